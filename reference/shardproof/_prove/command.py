"""`python -m shardproof prove my_train:build`: prove a job that a function of the user builds."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardproof._install import install
from shardproof._prove.exchange import Exchange, RankLostError
from shardproof._prove.models import models_in
from shardproof._prove.optimizers import Optimizers
from shardproof._prove.proof import Proof
from shardproof._prove.roads import ROADS
from shardproof._prove.room import NoRoomError
from shardproof._prove.run import WrongUseError, prove
from shardproof._prove.step import synthetic_step

WHOLE, NOT_WHOLE, USAGE, ENVIRONMENT = range(4)

_EPILOG = """\
my_train:build is a function without arguments. It returns the model as it trains, or a tuple:
(model, optimizer) or (model, optimizer, step), where step() trains on a batch, the same each time.
Model and optimizer may be lists: the stages of a pipeline that this rank has.
It may call init_process_group(); where it does not and needs one, it is made for it.

roads:
{roads}

Ends with 0: whole; 1: something is lost or unsafe; 2: wrong usage; 3: the environment failed, or a
rank died or hangs.
"""


class _UsageError(Exception):
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        proof = _prove(options)
        if _rank() == 0:
            print(proof)
            for path in options.save:
                proof.save(path)
                print(f"written: {path}", file=sys.stderr)
        # A launcher ends all ranks when the first one ends with an error.
        Exchange(options.limit).all("the end", None)
        return WHOLE if proof.whole else NOT_WHOLE
    except (_UsageError, WrongUseError) as error:
        print(f"shardproof prove: {error}", file=sys.stderr)
        return USAGE
    except (NoRoomError, RankLostError, OSError, RuntimeError) as error:
        print(f"shardproof prove: rank {_rank()}: {error}", file=sys.stderr)
        return ENVIRONMENT
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m shardproof", description="Proofs about a job's checkpoints."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    width = max(map(len, ROADS))
    roads = "\n".join(
        f"  {road.name:{width}}  {road.what}{' (only if named)' if road.asked_only else ''}"
        for road in ROADS.values()
    )
    one = commands.add_parser(
        "prove",
        help="say whether the checkpoints of a job are whole",
        description="Save, spoil, load and compare, over every road of torch's public API.",
        epilog=_EPILOG.format(roads=roads),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("build", metavar="MODULE:FUNCTION", help="what builds the job on each rank")
    one.add_argument("--steps", type=int, default=0, metavar="N", help="train so many steps first")
    one.add_argument(
        "--roads", metavar="A,B", help="only these (default: all that the job can use)"
    )
    one.add_argument(
        "--save", action="append", default=[], metavar="PATH", help="proof.json or proof.html"
    )
    one.add_argument("--folder", metavar="DIR", help="for checkpoints; all ranks must see it")
    one.add_argument(
        "--snapshot", default="auto", metavar="WHERE", help="cpu, disk, a folder, or auto (default)"
    )
    one.add_argument(
        "--limit",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="within which a rank that dies or hangs is named (default: %(default)g)",
    )
    one.add_argument("--install", action="store_true", help="with shardproof.install() before")
    one.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser


def _prove(options: argparse.Namespace) -> Proof:
    if options.steps < 0:
        raise _UsageError(f"--steps {options.steps}: expected 0 or more")
    for path in options.save:
        if Path(path).suffix not in (".json", ".html", ".htm"):
            raise _UsageError(f"--save {path}: expected a name that ends in .json or .html")
        if not Path(path).absolute().parent.is_dir():
            raise _UsageError(f"--save {path}: there is no folder {Path(path).absolute().parent}")
    if options.install:
        install()
    model, optimizer, step = _built(_function(options.build))
    for _ in range(options.steps):
        if step is not None:
            step()
        else:
            synthetic_step(Optimizers(optimizer))
    return prove(
        model,
        optimizer,
        step=step,
        roads=options.roads.split(",") if options.roads else None,
        folder=options.folder,
        snapshot=options.snapshot,
        limit=options.limit,
        progress=not options.quiet,
    )


def _function(name: str) -> Callable[[], Any]:
    module, _, function = name.partition(":")
    if not module or not function:
        raise _UsageError(f"{name!r}: expected MODULE:FUNCTION, such as my_train:build")
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0] and error.name != module:
            raise _UsageError(f"{module} cannot be imported: {error}") from error
        raise _UsageError(f"there is no module {module!r} here ({os.getcwd()})") from error
    for part in function.split("."):
        if not hasattr(found, part):
            raise _UsageError(f"{module!r} has no {function!r}")
        found = getattr(found, part)
    if not callable(found):
        raise _UsageError(f"{name} is no function: got {type(found).__name__}")
    needed = [
        parameter.name
        for parameter in inspect.signature(found).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise _UsageError(
            f"{name} takes {', '.join(needed)}: expected a function without arguments"
        )
    build: Callable[[], Any] = found
    return build


def _built(build: Callable[[], Any]) -> tuple[Any, Any, Callable[[], Any] | None]:
    random = torch.get_rng_state()
    try:
        made = build()
    except (ValueError, RuntimeError) as error:
        several = "RANK" in os.environ and not dist.is_initialized()
        if not several or "process group" not in str(error):
            traceback.print_exc()
            raise RuntimeError(f"the function that builds the job failed: {error}") from error
        torch.set_rng_state(random)
        dist.init_process_group()
        made = build()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group()
    parts = made if isinstance(made, tuple) else (made,)
    try:
        models_in(parts[0] if 1 <= len(parts) <= 3 else None)
    except TypeError as error:
        raise _UsageError(
            "the function that builds the job returned "
            f"{[type(part).__name__ for part in parts]}: expected a model, (model, optimizer) or "
            "(model, optimizer, step), where the model is a module or a list of them"
        ) from error
    model, optimizer, step = (*parts, None, None)[:3]
    if step is not None and not callable(step):
        raise _UsageError(f"step is a {type(step).__name__}: expected a function")
    return model, optimizer, step


def _rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))
