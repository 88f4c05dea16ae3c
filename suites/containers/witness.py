"""As whom the processes of a project's containers run: seen from inside, whenever Python starts."""

from __future__ import annotations

import json

from containers.engine import Project

# Python imports it wherever it starts, from /subject: all processes that are there at that moment.
SEEN = """
import json, os
seen = {}
for number in filter(str.isdecimal, os.listdir("/proc")):
    try:
        with open(f"/proc/{number}/status") as status:
            seen[number] = dict(line.rstrip().split(":\\t", 1) for line in status if ":\\t" in line)
    except OSError:
        pass  # it has ended
with open(f"/app/out/witness-{os.uname().nodename}-{os.getpid()}", "w") as out:
    json.dump(seen, out)
"""

# compose takes it beside compose.yaml. 44 is a group as a device may need it; no engine here is
# asked for GPUs.
OVERRIDE = """
services:
  tests-cpu: &witnessed
    group_add: ["44"]
    volumes: ["./witness:/subject:ro"]
  tests:
    <<: *witnessed
    deploy: !reset {}
  node0: *witnessed
  node1: *witnessed
"""


def place(project: Project) -> None:
    """Let the project's containers leave what `assert_owner` reads."""
    (project.folder / "compose.override.yaml").write_text(OVERRIDE)
    folder = project.folder / "witness"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SEEN)


def assert_owner(project: Project) -> None:
    """Every process but the engine's init was the owner's, in his group, without capabilities."""
    wanted = {
        "Uid": "\t".join([str(project.owner)] * 4),
        "Gid": "\t".join([str(project.group)] * 4),
        **dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0" * 16),
        "NoNewPrivs": "1",
    }
    names = set()
    for path in project.out.glob("witness-*"):
        processes: dict[str, dict[str, str]] = json.loads(path.read_text())
        assert processes.pop("1")["Name"] == "docker-init"
        for process in processes.values():
            name = process["Name"]
            names.add(name)
            assert {key: process[key] for key in wanted} == wanted, name
            assert set(process["Groups"].split()) - {str(project.group)} == {"44"}, name
    assert {"bash", "python"} <= names, "the entrypoint and the preflight at least"
