"""Run pytest with the harness, and end with the project's exit codes.

0: only expected failures; 1: an unexpected verdict; 2: wrong usage, also when nothing was selected;
3: the environment or the harness failed, or checks that were selected did not run.
"""

from __future__ import annotations

import sys

import pytest

_EXIT = {int(pytest.ExitCode.USAGE_ERROR): 2, int(pytest.ExitCode.NO_TESTS_COLLECTED): 2}


def main() -> int:
    """Pytest's exit status, put into the project's words."""
    status = int(pytest.main(sys.argv[1:]))
    return _EXIT.get(status, status)


if __name__ == "__main__":
    sys.exit(main())
