"""Ranks that are threads of one process, as torch's own tests have them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest

_THREADS = textwrap.dedent(
    """
    import unittest
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.testing._internal.common_distributed import MultiThreadedTestCase
    from {root}._state_dict_utils import {name} as judged

    def place(full, mesh, *placements):
        same = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return same.redistribute(mesh, placements)

    class Threads(MultiThreadedTestCase):
        world_size = 4

        def setUp(self):
            super().setUp()
            self._spawn_threads()

        def test(self):
            line = init_device_mesh("cpu", (4,))
            grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
            even, odd = torch.arange(24.0).reshape(8, 3), torch.arange(21.0).reshape(7, 3)
            whole = {{"even": even, "odd": odd, "same": even, "grid": even, "plain": even[:1]}}

            def spread(scale):
                return {{
                    "even": place(even * scale, line, Shard(0)),
                    "odd": place(odd * scale, line, Shard(0)),
                    "same": place(even * scale, line, Replicate()),
                    "grid": place(even * scale, grid, Shard(0), Shard(1)),
                    "plain": even[:1] * scale,
                }}

            def check(got):
                assert list(got) == list(whole), list(got)
                for name, value in got.items():
                    value = value.full_tensor() if isinstance(value, DTensor) else value
                    assert torch.equal(value, whole[name]), (name, value)

            {call}

    unittest.main()
    """
)


def in_threads(root: str, name: str, call: str) -> None:
    """Call a function of a subject on four threads that are ranks, in a process of their own."""
    program = _THREADS.format(root=root, name=name, call=call)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, f"{name} on threads: {done.stderr[-3000:]}"


@pytest.mark.judges("_state_dict_utils._gather_state_dict")
class TestGatherThreads:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1, limit=120)
    @pytest.mark.thorough
    def test_ranks_as_threads(self, subject: Any) -> None:
        """Ranks that are threads of one process must get the whole tensors."""
        in_threads(subject.root, "_gather_state_dict", "check(judged(spread(1)))")


@pytest.mark.judges("_state_dict_utils._distribute_state_dict")
class TestDistributeThreads:
    @pytest.mark.law("compatibility")
    @pytest.mark.world(1, limit=120)
    @pytest.mark.thorough
    def test_ranks_as_threads(self, subject: Any) -> None:
        """Ranks that are threads of one process must get their parts."""
        call = "into = spread(0); judged(dict(whole), into, torch.device('cpu')); check(into)"
        in_threads(subject.root, "_distribute_state_dict", call)


@pytest.mark.judges("_state_dict_utils._broadcast_state_dict")
class TestBroadcastThreads:
    @pytest.mark.law("values")
    @pytest.mark.world(1, limit=120)
    @pytest.mark.thorough
    def test_ranks_as_threads(self, subject: Any) -> None:
        """Ranks that are threads of one process must get what the first of them has."""
        call = (
            "into = spread(0); "
            "judged(whole if self.rank == 0 else {}, into, torch.device('cpu')); check(into)"
        )
        in_threads(subject.root, "_broadcast_state_dict", call)
