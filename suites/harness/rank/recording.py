"""Records every collective that a rank issues, whatever issues it.

torch.distributed's functions, functional collectives and DTensors, C++ such as DDP's reducer, and
methods of a ProcessGroup all end in an operator of the namespace c10d, which the ProcessGroup calls
through torch's dispatcher (torch/csrc/distributed/c10d/ProcessGroup.hpp). A kernel under
BackendSelect, the last key before the device's own kernel, sees each once: below autograd and
TorchDispatchModes, so that what counts collectives counts the same. It hands the same arguments on.
Only methods of a backend itself go past it; a rank that calls one says so in its record. new_group
is recorded as well: ranks that make groups in another order get other groups.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

from harness.rank.reporter import kind_of_error
from harness.records.call_ring import ANY_SOURCE, FAILED, ISSUED, NEW_GROUPS, REFUSED, Ring

_SHOWN = 4


@dataclass(frozen=True)
class _Operator:
    """How one operator's arguments are read: positions of the process group and what else."""

    name: str
    """What people call it."""
    kind: str
    """Operators of one kind can be mixed: they send the same."""
    group: int
    shown: int | None = 0
    """The argument whose tensors are told."""
    alike: int | None = None
    """The argument whose tensors must have the same number of elements on all ranks."""
    root: int | None = None
    peer: int | None = None
    to_peer: bool = False


_OPERATORS = {
    "allreduce_": _Operator("all_reduce", "all_reduce", 1, alike=0),
    "allreduce_coalesced_": _Operator("all_reduce_coalesced", "all_reduce", 1, alike=0),
    "broadcast_": _Operator("broadcast", "broadcast", 1, alike=0, root=2),
    "reduce_": _Operator("reduce", "reduce", 1, alike=0, root=3),
    "allgather_": _Operator("all_gather", "all_gather", 2, 1, 0),
    "_allgather_base_": _Operator("all_gather_into_tensor", "all_gather", 2, 1, 0),
    "allgather_coalesced_": _Operator("all_gather_coalesced", "all_gather", 2, 1, 0),
    "allgather_into_tensor_coalesced_": _Operator(
        "all_gather_into_tensor_coalesced", "all_gather", 2, 1, 0
    ),
    "reduce_scatter_": _Operator("reduce_scatter", "reduce_scatter", 2, 1, 1),
    "_reduce_scatter_base_": _Operator("reduce_scatter_tensor", "reduce_scatter", 2, 1, 1),
    "reduce_scatter_tensor_coalesced_": _Operator(
        "reduce_scatter_tensor_coalesced", "reduce_scatter", 2, 1, 1
    ),
    "gather_": _Operator("gather", "gather", 2, 1, 1, root=3),
    "scatter_": _Operator("scatter", "scatter", 2, 0, 0, root=3),
    "alltoall_": _Operator("all_to_all", "all_to_all", 2, 1),
    "alltoall_base_": _Operator("all_to_all_single", "all_to_all", 2, 1),
    "barrier": _Operator("barrier", "barrier", 1, None),
    "monitored_barrier_": _Operator("monitored_barrier", "monitored_barrier", 1, None),
    "send": _Operator("send", "", 1, alike=0, peer=2, to_peer=True),
    "recv_": _Operator("recv", "", 1, alike=0, peer=2),
    "recv_any_source_": _Operator("recv from any rank", "", 1),
}
_BACKEND_METHODS = (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "allgather", "_allgather_base"),
    *("allgather_coalesced", "reduce_scatter", "_reduce_scatter_base", "gather", "scatter"),
    *("alltoall", "alltoall_base", "barrier", "monitored_barrier", "send", "recv"),
    "recv_anysource",
)

_ring: Ring | None = None
_library: Any = None
_c10d: Any = None


def watch() -> None:
    """See all collectives of this process and its forks; cheap where no record is kept."""
    global _library, _c10d
    if _library is not None:
        return
    import torch
    from torch.distributed import distributed_c10d

    _c10d = distributed_c10d
    for function in (_note, _end):
        _hide_from_dynamo(function, with_calls=True)
    _library = torch.library.Library("c10d", "IMPL")
    key: Any = torch._C.DispatchKey.BackendSelect
    below = torch._C._dispatch_keyset_full_after(key)
    for name, operator in _OPERATORS.items():
        if not hasattr(torch.ops.c10d, name):  # versions of torch differ in them
            continue
        # What OpOverload.redispatch calls, without its frame, which torch.compile would look at.
        redispatch = getattr(torch.ops.c10d, name).default._handle.redispatch_boxed
        kernel = _kernel(operator, redispatch, below)
        _library.impl(name, kernel, "BackendSelect", with_keyset=True)
    backend: Any = torch._C._distributed_c10d.Backend
    for name in filter(partial(hasattr, backend), _BACKEND_METHODS):
        setattr(backend, name, _report_backend_call(name, getattr(backend, name)))
    distributed_c10d._new_group_with_tag = _record_new_groups(distributed_c10d._new_group_with_tag)


def start(path: Path) -> None:
    """Note the calls of this process there from now on."""
    global _ring
    watch()
    with contextlib.suppress(OSError):  # then the parent knows of none, and says so
        _ring = Ring(path)
    os.register_at_fork(after_in_child=_stop)


def restart() -> None:
    """Forget what was noted: another check begins."""
    if _ring is not None:
        _ring.restart()


def _stop() -> None:
    """In a process that the rank forks, whose calls are not the rank's."""
    global _ring
    _ring = None


def _hide_from_dynamo(function: Callable[..., Any], *, with_calls: bool = False) -> Any:
    """Keep torch.compile out of the frames of `function`; it enters all below a compiled frame.

    As torch._dynamo.eval_frame.skip_code does, which takes seconds to import.
    """
    from torch._C._dynamo import eval_frame

    action: Any = eval_frame._FrameAction
    within = action.SKIP if with_calls else action.DEFAULT
    strategy = eval_frame._FrameExecStrategy(action.SKIP, within)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)
    return function


def _kernel(operator: _Operator, redispatch: Callable[..., Any], below: Any) -> Any:
    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        ring = _ring
        token = ring and _note(ring, operator.name, _begin, operator, args)
        try:
            result = redispatch(keyset & below, *args, **kwargs)
        except BaseException as error:
            _end(ring, token, error)
            raise
        _end(ring, token, None)
        return result

    return _hide_from_dynamo(kernel)


def _record_new_groups(make: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(make)
    def new_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        ring = _ring
        # With this option its members alone make the group.
        if kwargs.get("use_local_synchronization", args[4:5] == (True,)):
            ring = None
        token = ring and _note(ring, "new_group", _begin_group, ranks)
        try:
            group = make(ranks, *args, **kwargs)
        except BaseException as error:
            _end(ring, token, error)
            raise
        _end(ring, token, None)
        return group

    return _hide_from_dynamo(new_group)


def _report_backend_call(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _ring is not None:
            _ring.miss(f"it called {name} of a backend itself, which no record sees")
        return method(self, *args, **kwargs)

    return _hide_from_dynamo(call)


def _note(ring: Ring, name: str, begin: Callable[..., Any], *args: Any) -> Any:
    """Write a call down; whatever goes wrong with that is told in the record, not to the rank."""
    try:
        return begin(ring, *args)
    except Exception as error:
        ring.miss(f"{name} could not be noted ({type(error).__name__}: {error})")
        return None


def _end(ring: Ring | None, token: Any, error: BaseException | None) -> None:
    """Note how a call came back."""
    if ring is None or token is None:
        return
    outcome = ISSUED
    if error is not None:
        # A collective that failed because of another rank was issued on this one.
        outcome = REFUSED if kind_of_error(error) == "error" else FAILED
    ring.end(token, outcome)


def _begin_group(ring: Ring, ranks: Any) -> Any:
    everyone = tuple(_c10d._world.pg_group_ranks.get(_c10d.GroupMember.WORLD, ()))
    members = everyone if ranks is None else ranks
    # What else may be given could be read only once, and is torch's to refuse or to read.
    said = f"ranks ({', '.join(map(str, members))})" if isinstance(members, (list, tuple)) else ""
    return ring.begin((NEW_GROUPS, everyone, None), "new_group", f"new_group {said}", "", said)


def _begin(ring: Ring, operator: _Operator, args: tuple[Any, ...]) -> Any:
    first: Any = args
    while isinstance(first, (list, tuple)):
        first = first[0] if first else None
    if first is not None and first.is_meta:  # under FakeTensorMode nothing is sent
        return None
    group = _c10d.ProcessGroup.unbox(args[operator.group])
    members = tuple(_c10d._world.pg_group_ranks.get(group, ()))
    op, kind, way, said = operator.name, operator.kind, None, []
    if not kind:
        backend, _ = _c10d._world.pg_map.get(group, ("", None))
        me = _global(members, group.rank())
        peer = _global(members, args[operator.peer]) if operator.peer else ANY_SOURCE
        tag = args[-1] if backend == "gloo" else 0  # NCCL has no tags
        way = (me, peer, tag) if operator.to_peer else (peer, me, tag)
        if peer != ANY_SOURCE:
            op += f" {'to' if operator.to_peer else 'from'} rank {peer}"
        if tag:
            said.append(f"tag {tag}")
    elif operator.root is not None:
        said.append(f"root {_global(members, args[operator.root])}")
        kind += said[0]
    shown = [] if operator.shown is None else _flat(args[operator.shown])
    data = ""
    if operator.alike is not None:
        alike = shown if operator.alike == operator.shown else _flat(args[operator.alike])
        data = f"{_dtypes(alike)} {sum(t.numel() for t in alike)}"
    if shown:
        said.append(_tensors(shown))
    return ring.begin((group.group_name, members, way), op, kind, data, ", ".join(said))


def _global(members: tuple[int, ...], rank: int) -> int:
    return members[rank] if 0 <= rank < len(members) else rank


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _flat(part)]
    return [value]


def _dtypes(tensors: list[Any]) -> str:
    return ", ".join(sorted({str(dtype)[6:] for dtype in {t.dtype for t in tensors}}))


def _tensors(tensors: list[Any]) -> str:
    text = f"{_dtypes(tensors)} " + ", ".join(str(tuple(t.shape)) for t in tensors[:_SHOWN])
    if len(tensors) > _SHOWN:
        elements = sum(t.numel() for t in tensors)
        text += f" and {len(tensors) - _SHOWN} more, {elements} elements in all"
    return text
