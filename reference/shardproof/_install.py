"""Put the reference into the running torch, and take it out again.

Torch's own code reaches the set by names that it bound at import time, and so may a user's. Each
name is therefore replaced by identity, in every module that holds it, and put back in the same
way: then also a module that was imported in between holds what torch holds. Methods of torch's
classes are replaced on the class.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import threading
from collections.abc import Iterator
from operator import is_
from types import CodeType, FunctionType, ModuleType

TORCH_FROM, TORCH_BELOW = (2, 11), (2, 16)

# FSDP first: torch's own import of tensor.parallel.fsdp before it is circular.
_BEFORE = ("torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict")
_TWINS = (
    "_state_dict_utils",
    "tensor.parallel._data_parallel_utils",
    "tensor.parallel.ddp",
    "tensor.parallel.fsdp",
)

_CALLERS = (
    "checkpoint.state_dict",
    "fsdp._flat_param",
    "fsdp._optim_utils",
    "fsdp._state_dict_utils",
    "fsdp.fully_sharded_data_parallel",
)

_lock = threading.RLock()
_replaced: list[tuple[object, object]] = []
"""(upstream's, ours), while installed. Holding both keeps their identities from being reused."""
_replaced_callers: list[tuple[object, object]] = []
"""The same of torch's callers of the set, while these are replaced, too."""
_kept: dict[FunctionType, CodeType] = {}
"""Upstream's functions that call upstream's still, and the code that they had."""
_THEIRS = "_shardproof_upstreams_"
"""What the names begin with under which they find these."""
_replaced_methods: list[tuple[type, str, object]] = []
"""(class, name, upstream's) of the methods that are replaced with them."""


def install(*, callers: bool = False) -> None:
    """Put the reference under torch's public API, in this process.

    From here on `DistributedDataParallel`, `replicate`, FSDP, `fully_shard` and
    `torch.distributed.checkpoint` work with the reference's functions, as does every module that
    has bound, or will bind, one of their names. What was made before keeps what it has: wrap
    models afterwards. A second call is harmless.

    A program that worked before works after: what a caller of torch's functions can do and gets a
    right answer for, the reference does as well. It refuses only where going on would corrupt,
    lose, hang or lie, with an error that names the input.

    Call it in every process of the job, before models are wrapped. No collective runs.

    Args:
        callers: replace some of torch's own code around the set, too, where it corrupts, loses,
            hangs or refuses, and no implementation of the set can help. ``shardproof.checkpoint``
            and ``shardproof.fsdp`` hold these functions, and say what they promise. After an
            install without it, a call with it adds them; a later call without it leaves them.

    Raises:
        RuntimeError: this torch is of a version that the reference was not made for, or was built
            without torch.distributed. Nothing is changed then.

    """
    with _lock:
        _check_torch()
        for name in _BEFORE:
            importlib.import_module(name)
        pairs = _replaced or [pair for name in _TWINS for pair in _pairs(name)]
        around = _replaced_callers
        if callers and not around:
            around = [pair for name in _CALLERS for pair in _pairs(name)]
            _replace_methods()
        _replaced[:], _replaced_callers[:] = pairs, around
        replacement = {id(theirs): ours for theirs, ours in (*pairs, *around)}
        for theirs, _ in pairs:
            _keep_as_it_is(theirs, replacement)
        _exchange(replacement)


def uninstall() -> None:
    """Leave torch, and every module that bound one of the names, as it was before `install()`.

    Harmless where nothing is installed. Models that were wrapped in between keep their hooks.
    """
    with _lock:
        _put_back(_replaced)
        _uninstall_callers()
        while _kept:
            function, code = _kept.popitem()
            function.__code__ = code
            for name in [name for name in function.__globals__ if name.startswith(_THEIRS)]:
                del function.__globals__[name]


@contextlib.contextmanager
def installed(*, callers: bool = False) -> Iterator[None]:
    """Install for the time of a `with` block; what was installed before it stays so after it."""
    before, callers_before = bool(_replaced), bool(_replaced_callers)
    install(callers=callers)
    try:
        yield
    finally:
        if not before:
            uninstall()
        elif not callers_before:
            _uninstall_callers()


def _uninstall_callers() -> None:
    with _lock:
        _put_back(_replaced_callers)
        while _replaced_methods:
            owner, name, theirs = _replaced_methods.pop()
            setattr(owner, name, theirs)


def _replace_methods() -> None:
    for name in _CALLERS:
        twin = importlib.import_module(f"shardproof.{name}")
        for owner, methods in getattr(twin, "METHODS", {}).items():
            for method, ours in methods.items():
                theirs = vars(owner)[method]
                # One that somebody else has replaced stays theirs, as a function does.
                if theirs.__module__ == owner.__module__:
                    _replaced_methods.append((owner, method, theirs))
                    setattr(owner, method, ours)


def is_installed() -> bool:
    """Whether the reference is in torch's place now, in this process."""
    return bool(_replaced)


def _check_torch() -> None:
    import torch

    version = str(torch.__version__)
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found or not TORCH_FROM <= tuple(map(int, found.groups())) < TORCH_BELOW:
        works = [f"{TORCH_FROM[0]}.{minor}" for minor in range(TORCH_FROM[1], TORCH_BELOW[1])]
        raise RuntimeError(
            f"shardproof cannot be installed into torch {version}: it replaces private functions, "
            f"and knows those of torch {', '.join(works)}. Use one of these, or a shardproof that "
            "was made for yours"
        )
    if not torch.distributed.is_available():
        raise RuntimeError(
            f"shardproof cannot be installed: this torch {version} was built without "
            "torch.distributed"
        )


def _pairs(name: str) -> list[tuple[object, object]]:
    """(upstream's, ours) for each function and class that the upstream module itself defines."""
    upstream = importlib.import_module(f"torch.distributed.{name}")
    twin = importlib.import_module(f"shardproof.{name}")
    return [
        (theirs, vars(twin)[key])
        for key, theirs in vars(upstream).items()
        if isinstance(theirs, (FunctionType, type))
        and theirs.__module__ == upstream.__name__
        and key in vars(twin)
    ]


def _keep_as_it_is(theirs: object, replacement: dict[int, object]) -> None:
    """Let a function of upstream's go on calling upstream's: a model may hold it as a hook.

    Models that were wrapped before keep what they have, whole: half of each does not train.
    """
    if isinstance(theirs, type):
        for member in vars(theirs).values():
            if isinstance(member, FunctionType):
                _keep_as_it_is(member, replacement)
        return
    if not isinstance(theirs, FunctionType) or theirs in _kept:
        return
    names = theirs.__globals__
    renamed = {n: _THEIRS + n for n, value in names.items() if id(value) in replacement}
    code = _with_names(theirs.__code__, renamed)
    if code is not theirs.__code__:
        names.update({alias: names[name] for name, alias in renamed.items()})
        _kept[theirs] = theirs.__code__
        theirs.__code__ = code


def _with_names(code: CodeType, renamed: dict[str, str]) -> CodeType:
    """The same code with other names for some globals, in the functions inside it as well."""
    names = tuple(renamed.get(name, name) for name in code.co_names)
    consts = tuple(
        _with_names(const, renamed) if isinstance(const, CodeType) else const
        for const in code.co_consts
    )
    same = names == code.co_names and all(map(is_, consts, code.co_consts))
    return code if same else code.replace(co_names=names, co_consts=consts)


def _put_back(replaced: list[tuple[object, object]]) -> None:
    _exchange({id(ours): theirs for theirs, ours in replaced})
    replaced.clear()


def _exchange(replacement: dict[int, object]) -> None:
    """Replace objects, by identity, wherever a module outside the reference has a name for them."""
    if not replacement:
        return
    for names in _namespaces():
        # A running torch has a hundred thousand names; all but a few modules have none of these.
        if replacement.keys().isdisjoint(map(id, list(names.values()))):
            continue
        for key, value in list(names.items()):
            if id(value) in replacement and not key.startswith(_THEIRS):
                names[key] = replacement[id(value)]


def _namespaces() -> Iterator[dict[str, object]]:
    for module in list(sys.modules.values()):
        # Only what is there: asking a lazy module for more would import it.
        if isinstance(module, ModuleType) and not _is_ours(module):
            yield vars(module)
    # A spawned process runs its script's functions in a namespace of their own, of which this
    # module is a copy: _fixup_main_from_path in multiprocessing/spawn.py.
    copied = vars(sys.modules.get("__mp_main__", object)).values()
    spaces = [thing.__globals__ for thing in list(copied) if isinstance(thing, FunctionType)]
    own = [names for names in spaces if names.get("__name__") == "__mp_main__"]
    yield from {id(names): names for names in own}.values()


def _is_ours(module: ModuleType) -> bool:
    name = getattr(module, "__name__", "")
    return name == "shardproof" or name.startswith("shardproof.")
