"""Run pytest with the harness, and end with the project's exit codes.

0: only expected failures; 1: an unexpected verdict; 2: wrong usage, also when nothing was selected;
3: the environment or the harness failed, or checks that were selected did not run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import pytest

from harness.system import pipes, torchrun_env

# pytest looks for its configuration above whatever argument is a path that exists, before it knows
# these options: their values must not stand alone.
_WITH_PATHS = ("--subject", "--expectations", "--run-dir", "--shared-dir")
_EXIT = {
    int(pytest.ExitCode.USAGE_ERROR): 2,
    int(pytest.ExitCode.NO_TESTS_COLLECTED): 2,
    int(pytest.ExitCode.INTERRUPTED): 3,
}


def main() -> int:
    """Pytest's exit status, put into the project's words."""
    if torchrun_env.of(os.environ) is not None and os.environ["LOCAL_RANK"] != "0":
        torchrun_env.wait_for_the_first_worker()
        return 0
    status = int(pytest.main(joined(sys.argv[1:])))
    if status == pytest.ExitCode.USAGE_ERROR:
        command = os.environ.get("SHARDPROOF_COMMAND", "ci/conformance")
        print(f"{command} --help lists the options", file=sys.stderr)
    return _EXIT.get(status, status)


def joined(arguments: Sequence[str]) -> list[str]:
    """The arguments with each of the options whose values may be paths in one with its value."""
    found: list[str] = []
    for argument in arguments:
        if found and found[-1] in _WITH_PATHS:
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found


if __name__ == "__main__":
    sys.exit(pipes.run(main))
