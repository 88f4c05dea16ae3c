"""Libraries that people put on top of torch, with the subject under them.

A check is one scenario of one library: `exercises("torchao", suite="ecosystem")` names the
library, `needs("package torchao")` what must be installed, the docstring what must hold. Besides
asserting it, a check notes digests of what it got; `ecosystem.table` compares them with those of
the same check under another subject.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from harness.settings.options import SETTINGS
from harness.settings.subjects import Subject

if TYPE_CHECKING:
    from ecosystem.digests import Digests

pytest.register_assert_rewrite("ecosystem.kit", "conformance.kit", "integration.kit")

# Imported once, in the parent of all ranks: each takes seconds.
WARM = {
    "torchtitan": ("torchtitan.models.llama3", "torchtitan.components.checkpoint"),
    "accelerate": ("accelerate",),
    "transformers": ("transformers.models.llama.modeling_llama",),
    "peft": ("peft.tuners.lora",),
    "torchao": ("torchao.quantization", "torchao.optim", "torchao.float8"),
    "torchrec": ("torchrec.distributed.model_parallel",),
    "lightning-fabric": ("lightning_fabric",),
    "nemo-automodel": ("nemo_automodel.components.checkpoint.checkpointing",),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Import the libraries that selected checks need, where they are installed."""
    needed = {
        str(name).removeprefix("package ")
        for item in session.items
        for mark in item.iter_markers("needs")
        for name in mark.args
    }
    for library in WARM.keys() & needed:
        try:
            importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue  # its checks are reported as preconditions
        # A fork copies one thread: Arrow's allocator, which torchtitan imports, starts another.
        os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in WARM[library]:
                importlib.import_module(module)
        if (bars := sys.modules.get("tqdm")) is not None:
            bars.tqdm.monitor_interval = 0  # else the first progress bar leaves a thread behind


def pytest_itemcollected(item: pytest.Item) -> None:
    """What libraries warn of is not the subject's."""
    item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(autouse=True)
def in_place(request: pytest.FixtureRequest, subject: Subject) -> Iterator[None]:
    """Put the subject in place for the check, and take it out again."""
    if request.node.get_closest_marker("exercises") is None:
        yield
        return
    with subject.in_place():
        yield


@pytest.fixture
def note(request: pytest.FixtureRequest, rank: int) -> Iterator[Digests]:
    """Takes what a check got; it is compared with what it gets under another subject."""
    from ecosystem.digests import Digests, folder_of  # not before a subject that installs first

    settings = request.config.stash[SETTINGS]
    digests = Digests()
    yield digests
    digests.write(folder_of(settings.run_dir, request.node.nodeid), rank)
