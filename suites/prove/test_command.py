"""The command line, and what it leaves: exit codes, JSON, the page."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from shardproof._prove import command

MINE = """
import os
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    if "RANK" in os.environ:
        model = DistributedDataParallel(model)  # there is no process group yet: prove makes one
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = torch.ones(2, 4)
    def step():
        model(rows).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, step

def drifted():
    model, optimizer, step = build()
    with torch.no_grad():
        if os.environ["RANK"] == "1":
            model.module[0].bias[3] += 1
    return model, optimizer, step

def dying():
    model, optimizer, step = build()
    if os.environ["RANK"] == "1":
        model.register_state_dict_post_hook(lambda *_: os._exit(9))
    return model, optimizer, step

def fails():
    raise RuntimeError("the data is not there")

def wants(batch):
    return None

number = 3

def hostile():
    model = nn.Module()
    setattr(model, "_parameters", {"<script>alert(1)</script>": nn.Parameter(torch.ones(2))})
    return model
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_train.py").write_text(MINE)
    return tmp_path


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For commands in this process: they begin where the user's script is, without ranks."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_train", raising=False)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return folder


def main(arguments: Sequence[str]) -> int:
    """The command in this process; its exit code."""
    return command.main(["prove", *arguments])


def _command(folder: Path, arguments: Sequence[str], **variables: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-m", "shardproof", "prove", *arguments],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *arguments: str, ranks: int = 1) -> tuple[list[int], list[str], str]:
    """Exit codes, what each rank printed, and what all of them said on stderr."""
    if ranks == 1:
        started = [_command(folder, arguments)]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        started = [_command(folder, arguments, RANK=str(r), **where) for r in range(ranks)]
    answers = [process.communicate(timeout=200) for process in started]
    codes = [process.returncode for process in started]
    return codes, [out for out, _ in answers], "".join(err for _, err in answers)


def test_whole(folder: Path) -> None:
    """Two ranks that are right end with 0; rank 0 prints the table, and writes what was asked."""
    codes, printed, said = run(
        folder, "my_train:build", "--steps", "2", "--save", "p.json", "--save", "p.html", ranks=2
    )
    assert codes == [0, 0], said
    assert "whole: DistributedDataParallel with AdamW on 2 ranks" in printed[0]
    assert not printed[1]
    assert "prove: snapshot of" in said
    told = json.loads((folder / "p.json").read_text())
    assert told["whole"]
    assert {road["verdict"] for road in told["roads"]} == {"whole"}
    assert [one["key"] for one in told["inventory"]][:1] == ["0.weight"]
    page = (folder / "p.html").read_text()
    assert '<h1 class="whole">Whole</h1>' in page
    assert "<script" not in page


@pytest.mark.thorough
def test_not_whole(folder: Path) -> None:
    """A drifted replica ends with 1, and is named with rank and element."""
    codes, printed, said = run(folder, "my_train:drifted", "--roads", "dcp", "--quiet", ranks=2)
    assert codes == [1, 1], said
    assert "0.bias" in printed[0]
    assert "on rank 1, first at element [3]" in printed[0]


@pytest.mark.thorough
def test_a_rank_that_dies(folder: Path) -> None:
    """A process that is gone is named by the others, which end with 3, and not at the limit."""
    codes, _, said = run(
        folder, "my_train:dying", "--roads", "sharded", "--limit", "100", "--quiet", ranks=2
    )
    assert codes == [3, 9], said
    assert "rank 1 died: the process is gone" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["my_train"], "expected MODULE:FUNCTION"),
        (["nothing_here:build"], "there is no module 'nothing_here' here"),
        (["my_train:nothing"], "'my_train' has no 'nothing'"),
        (["my_train:number"], "my_train:number is no function"),
        (["my_train:wants"], "takes batch: expected a function without arguments"),
        (["my_train:build", "--steps", "-1"], "expected 0 or more"),
        (["my_train:build", "--roads", "dpc"], "'dpc': prove knows the roads"),
        (["my_train:build", "--save", "p.txt"], "expected a name that ends in .json or .html"),
        (["my_train:build", "--save", "none/p.json"], "there is no folder"),
    ],
)
def test_wrong_usage(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    """Wrong usage ends with 2, and says what was expected."""
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


def test_the_environment_fails(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A job that cannot be built ends with 3, with its error."""
    assert main(["my_train:fails"]) == 3
    assert "the data is not there" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """--help tells roads and exit codes."""
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert "broadcast" in printed
    assert "Ends with 0: whole" in printed


def test_names_are_escaped(here: Path) -> None:
    """A name in the model cannot put code into the page."""
    main(["my_train:hostile", "--roads", "sharded", "--save", "p.html", "--quiet"])
    page = (here / "p.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
