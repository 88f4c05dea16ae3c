"""Putting the subject into a running torch, and taking it out again."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing.spawn
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from harness.settings.subjects import Subject

UPSTREAM = (
    "torch.distributed._state_dict_utils",
    "torch.distributed.tensor.parallel._data_parallel_utils",
    "torch.distributed.tensor.parallel.ddp",
    "torch.distributed.tensor.parallel.fsdp",
)
BOUND_ELSEWHERE = (
    ("torch.distributed.checkpoint.state_dict", "_gather_state_dict"),
    ("torch.distributed.checkpoint.state_dict", "_broadcast_state_dict"),
    ("torch.distributed.checkpoint.staging", "_create_cpu_state_dict"),
    ("torch.distributed.fsdp._optim_utils", "_gather_state_dict"),
    ("torch.distributed.fsdp._init_utils", "DTensorExtensions"),
    ("torch.distributed.tensor.parallel.ddp", "_flatten_tensor"),
)


def names_of_torch() -> dict[tuple[str, str], int]:
    """(module, name) to the identity of what it stands for, over all of torch that is loaded."""
    return {
        (module.__name__, name): id(value)
        for module in list(sys.modules.values())
        if isinstance(module, types.ModuleType) and module.__name__.partition(".")[0] == "torch"
        for name, value in list(vars(module).items())
    }


def owner(module: str, name: str) -> str:
    """The package that the object behind a name comes from."""
    return str(getattr(sys.modules[module], name).__module__)


def tensor_parallel(grid: DeviceMesh) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model under tensor parallelism and DDP, always the same, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).to(grid.device_type)
    parallelize_module(model, grid["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    wrapped = DistributedDataParallel(model, device_mesh=grid["dp"])
    return wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1)


def losses(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """What three steps give."""
    found = []
    for _ in range(3):
        device = next(iter(optimizer.param_groups[0]["params"])).device
        loss = model(torch.ones(2, 4, device=device)).pow(2).sum()
        found.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.judges("install")
class TestInstall:
    @pytest.mark.law("values")
    @pytest.mark.world(1)
    def test_every_name_is_reached(self, judged: Any, subject: Subject) -> None:
        """Names that modules bound by `from ... import` are reached, those of callers too."""
        for module, _ in BOUND_ELSEWHERE:
            importlib.import_module(module)
        user = types.ModuleType("a_user_s_module")
        sys.modules[user.__name__] = user
        exec(
            "from torch.distributed._state_dict_utils import _gather_state_dict as mine\n"
            "also_mine = mine",
            vars(user),
        )
        judged()
        for module, name in BOUND_ELSEWHERE:
            assert owner(module, name).startswith(subject.root), f"{module}.{name}"
        for name in ("mine", "also_mine"):
            assert owner(user.__name__, name).startswith(subject.root), name
        for module in UPSTREAM:
            own = [
                name
                for name, value in vars(sys.modules[module]).items()
                if getattr(value, "__module__", "") == module
                and hasattr(subject.module(module.removeprefix("torch.distributed.")), name)
                and isinstance(value, (types.FunctionType, type))
            ]
            assert own == [], f"{module} keeps {own}"

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_a_second_install_is_harmless(self, judged: Any, subject: Subject) -> None:
        """Installed twice is installed once, and one uninstall takes it out."""
        subject.function("uninstall")()
        before = names_of_torch()
        judged()
        once = names_of_torch()
        judged()
        assert names_of_torch() == once
        subject.function("uninstall")()
        after = names_of_torch()
        assert {key: after[key] for key in before} == before

    @pytest.mark.law("compatibility")
    @pytest.mark.world(2)
    def test_a_model_that_was_wrapped_before(
        self, judged: Any, subject: Subject, device: torch.device
    ) -> None:
        """A model that DDP wrapped before the install must go on training as it did."""
        subject.function("uninstall")()
        grid = init_device_mesh(device.type, (1, 2), mesh_dim_names=("dp", "tp"))
        expected, wrapped = losses(*tensor_parallel(grid)), tensor_parallel(grid)
        judged()
        assert losses(*wrapped) == expected
        subject.function("uninstall")()
        left = [name for _, name in names_of_torch() if name.startswith("_shardproof")]
        assert not left, f"uninstall leaves {left}"

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_an_unsupported_torch_is_refused(
        self, judged: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A torch of another version is refused with the versions that work; nothing changes."""
        before = names_of_torch()
        running = r"\b" + r"\.".join(str(torch.__version__).split(".")[:2]) + r"\b"
        for version in ("1.99.1", "9.16.0", "3.0.0", "1.13.1+cu117", "unknown"):
            monkeypatch.setattr(torch, "__version__", version)
            with pytest.raises(RuntimeError, match=running) as told:
                judged()
            assert version in str(told.value)
            monkeypatch.undo()
        after = names_of_torch()
        assert {key: after[key] for key in before} == before

    @pytest.mark.law("isolation")
    @pytest.mark.world(1, limit=120)
    @pytest.mark.thorough
    def test_in_a_fresh_interpreter(self, judged: Any, subject: Subject) -> None:
        """Whatever part of upstream was imported first, or tried to, install works after it."""
        started = {first: fresh(first, subject.root) for first in UPSTREAM}
        for first, process in started.items():
            _, said = process.communicate(timeout=100)
            assert process.returncode == 0, f"{first} first: {said}"

    @pytest.mark.law("compatibility")
    @pytest.mark.world(1)
    def test_names_of_a_spawned_script(
        self, judged: Any, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a script bound before its spawned ranks install is replaced in them, and back."""
        script = tmp_path / "train.py"
        script.write_text(
            "from torch.distributed._state_dict_utils import _gather_state_dict\n\n"
            "def bound():\n    return _gather_state_dict.__module__\n"
        )
        for name in ("__main__", "__mp_main__"):
            monkeypatch.setitem(sys.modules, name, sys.modules["__main__"])
        # As a spawned process begins.
        multiprocessing.spawn._fixup_main_from_path(str(script))  # type: ignore[attr-defined]
        bound = sys.modules["__mp_main__"].bound
        judged()
        assert bound().startswith(subject.root), bound()
        subject.function("uninstall")()
        assert bound() == "torch.distributed._state_dict_utils", bound()


def fresh(first: str, root: str) -> subprocess.Popen[str]:
    """An interpreter that imports a module, then installs the subject and looks at its names."""
    script = (
        # The circular import of torch's own tensor.parallel.fsdp fails; it must not spoil more.
        f"try:\n    import {first}\nexcept ImportError as error: assert 'circular' in str(error)\n"
        f"import {root} as subject\nsubject.install()\n"
        "from torch.distributed.tensor.parallel.fsdp import DTensorExtensions\n"
        "from torch.distributed.tensor.parallel.ddp import _flatten_tensor\n"
        "from torch.distributed.checkpoint.state_dict import _gather_state_dict\n"
        "for found in DTensorExtensions, _flatten_tensor, _gather_state_dict:\n"
        "    assert found.__module__.startswith(subject.__name__), found.__module__\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.judges("uninstall")
class TestUninstall:
    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_torch_is_as_it_was(self, judged: Any, subject: Subject) -> None:
        """After uninstall every name of torch stands for what it stood for before."""
        subject.function("install")()
        judged()
        before = names_of_torch()
        subject.function("install")()
        assert names_of_torch() != before
        judged()
        assert names_of_torch() == before
        judged()
        assert names_of_torch() == before

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_a_module_imported_in_between(self, judged: Any, subject: Subject) -> None:
        """A module that bound a name while the subject was installed gets torch's back."""
        subject.function("install")()
        user = types.ModuleType("a_user_s_module")
        sys.modules[user.__name__] = user
        exec(
            "from torch.distributed._state_dict_utils import _gather_state_dict as mine\n"
            "also_mine = mine",
            vars(user),
        )
        for name in ("mine", "also_mine"):
            assert owner(user.__name__, name).startswith(subject.root), name
        judged()
        assert owner(user.__name__, "mine") == "torch.distributed._state_dict_utils"


CALLERS = (
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.fsdp._flat_param",
    "torch.distributed.fsdp._optim_utils",
)


def members_of_torch() -> dict[tuple[str, str], int]:
    """(module or class, name) to the identity, over what callers=True may replace."""
    found = names_of_torch()
    for module in CALLERS:
        for value in vars(importlib.import_module(module)).values():
            if isinstance(value, type):
                for name, member in vars(value).items():
                    found[f"{value.__module__}.{value.__qualname__}", name] = id(member)
    return found


@pytest.mark.judges("install")
class TestCallers:
    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    @pytest.mark.should("an option of the reference")
    def test_callers_come_and_go(self, judged: Any, subject: Subject) -> None:
        """callers=True replaces torch's callers, also after an install without; all comes back."""
        uninstall, installed = map(subject.function, ("uninstall", "installed"))
        uninstall()
        judged(callers=True)
        uninstall()
        before = members_of_torch()
        judged()
        set_alone = members_of_torch()
        judged(callers=True)
        judged(callers=True)
        both = members_of_torch()
        more = {key for key, value in both.items() if set_alone.get(key) != value}
        assert ("torch.distributed.checkpoint.state_dict", "_load_model_state_dict") in more
        judged()
        assert members_of_torch() == both, "a second install took the callers out"
        for callers in (False, True):
            with installed(callers=callers):
                pass
            assert members_of_torch() == both, f"a block, {callers=}, took the callers out"
        uninstall()
        assert members_of_torch() == before
        judged()
        with installed(callers=True):
            assert members_of_torch() == both
        assert members_of_torch() == set_alone, "a block left callers behind, or took the set out"
        uninstall()
        with installed(callers=True):
            assert members_of_torch() == both
        assert members_of_torch() == before


@pytest.mark.judges("installed")
class TestInstalled:
    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_for_the_time_of_a_block(self, judged: Any, subject: Subject) -> None:
        """Installed inside the block and not after it, also when it raises; nested blocks agree."""
        module, name = BOUND_ELSEWHERE[0]
        with judged(), judged():
            assert owner(module, name).startswith(subject.root)
        assert owner(module, name) == "torch.distributed._state_dict_utils"
        with pytest.raises(ZeroDivisionError), judged():
            raise ZeroDivisionError
        assert owner(module, name) == "torch.distributed._state_dict_utils"

    @pytest.mark.law("isolation")
    @pytest.mark.world(1)
    def test_what_was_installed_before_stays(self, judged: Any, subject: Subject) -> None:
        """A block does not take out what was installed before it."""
        module, name = BOUND_ELSEWHERE[0]
        subject.function("install")()
        with judged():
            pass
        assert owner(module, name).startswith(subject.root)


@pytest.mark.judges("install")
class TestWithoutDistributed:
    @pytest.mark.law("all-or-nothing")
    @pytest.mark.world(1)
    def test_a_torch_without_distributed_is_refused(
        self, judged: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A torch that was built without torch.distributed must be refused, and left as it is."""
        before = names_of_torch()
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "is_available", lambda: False)
            with pytest.raises(RuntimeError, match=r"torch\.distributed"):
                judged()
        assert names_of_torch() == before


class TestBucket:
    @pytest.mark.judges("install")
    @pytest.mark.law("symmetry")
    @pytest.mark.world(1)
    @pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "", "3", "٣"])
    def test_the_setting_is_read(
        self, judged: Any, monkeypatch: pytest.MonkeyPatch, text: str
    ) -> None:
        """SHARDPROOF_BUCKET_MIB must be a whole number of MiB, and is refused by name if not."""
        monkeypatch.setenv("SHARDPROOF_BUCKET_MIB", text)
        package = judged.__module__.partition(".")[0]
        spec = importlib.util.find_spec(f"{package}._core.limits")
        assert spec is not None
        assert spec.loader is not None
        again = importlib.util.module_from_spec(spec)
        if text in {"3", "٣"}:
            spec.loader.exec_module(again)
            assert again.BUCKET_BYTES == 3 << 20
        else:
            with pytest.raises(ValueError, match="SHARDPROOF_BUCKET_MIB"):
                spec.loader.exec_module(again)
