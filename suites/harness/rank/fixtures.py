"""What a check is given on each rank: world, rank, device, mesh, subject, judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.rank import rank_process as rank_side
from harness.settings.options import SETTINGS
from harness.settings.subjects import Subject

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class World:
    """The world that the check runs in, as one of its ranks sees it."""

    size: int
    rank: int
    backend: str
    device: torch.device
    seed: int
    node: int
    """The machine that this rank runs on."""

    def post(self, name: str, text: str) -> None:
        """Put a text up for the other ranks; uses no collective, and waits for nobody."""
        _here().board.set(f"{name}/{self.rank}", text)

    def read(self, name: str, rank: int) -> str | None:
        """What a rank has put up under the name; None when there is nothing yet."""
        board, key = _here().board, f"{name}/{rank}"
        return board.get(key).decode() if board.check([key]) else None


def _here() -> rank_side.Rank:
    if rank_side.current is None:
        raise pytest.UsageError("this fixture exists on ranks only: mark the check with world()")
    return rank_side.current


@pytest.fixture
def world() -> World:
    """Size, backend and device of the world that the check runs in."""
    here = _here()
    return World(
        here.spec.size,
        here.rank,
        here.spec.backend,
        here.device,
        here.rank_spec.seed,
        here.rank_spec.node,
    )


@pytest.fixture
def shared() -> Path:
    """A folder that all ranks of this world share; it goes with the world.

    Over several machines it needs a folder that all of them see: --shared-dir.
    """
    here = _here().rank_spec
    folder = Path(here.shared or here.folder) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def rank() -> int:
    """This rank's number in the default group."""
    return _here().rank


@pytest.fixture
def device() -> torch.device:
    """The device for this rank's tensors."""
    return _here().device


@pytest.fixture
def mesh() -> Callable[..., DeviceMesh]:
    """Makes a device mesh: `mesh(2, 2)` over all ranks, `mesh(2, ranks=[1, 3])` over some.

    Every rank of the world must call it, with the same arguments; a rank outside gets the mesh,
    too, and no coordinate in it. Dimension names are `names`, or dp, tp for two dimensions, and
    rep, dp, tp for three.
    """
    here = _here()

    def make(
        *shape: int, ranks: Sequence[int] | None = None, names: Sequence[str] | None = None
    ) -> DeviceMesh:
        import torch
        from torch.distributed.device_mesh import DeviceMesh

        default = {1: ("x",), 2: ("dp", "tp"), 3: ("rep", "dp", "tp")}
        members = tuple(ranks) if ranks is not None else tuple(range(here.spec.size))
        called = tuple(names) if names is not None else default[len(shape)]
        key = (shape, members, called)
        if key not in here.meshes:
            table = torch.tensor(members, dtype=torch.int).reshape(shape)
            here.meshes[key] = DeviceMesh(here.spec.device, table, mesh_dim_names=called)
        return here.meshes[key]

    return make


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    """The implementation under test; see `harness.settings.subjects.Subject`."""
    settings = request.config.stash[SETTINGS]
    return Subject(settings.subject, settings.install_at, callers=settings.callers)


@pytest.fixture
def judged(request: pytest.FixtureRequest, subject: Subject) -> Any:
    """The function of the subject that the check's class judges."""
    mark = request.node.get_closest_marker("judges")
    if mark is None:
        raise pytest.UsageError(f"{request.node.nodeid}: needs the class mark judges(name)")
    return subject.function(mark.args[0])
