"""Run pytest with the harness, and end with the project's exit codes.

0: only expected failures; 1: an unexpected verdict; 2: wrong usage, also when nothing was selected;
3: the environment or the harness failed, or checks that were selected did not run.
"""

from __future__ import annotations

import os
import sys

import pytest

from harness import place

_EXIT = {int(pytest.ExitCode.USAGE_ERROR): 2, int(pytest.ExitCode.NO_TESTS_COLLECTED): 2}


def main() -> int:
    """Pytest's exit status, put into the project's words."""
    if place.of(os.environ) is not None and os.environ["LOCAL_RANK"] != "0":
        place.wait_for_the_first_worker()
        return 0
    status = int(pytest.main(sys.argv[1:]))
    return _EXIT.get(status, status)


if __name__ == "__main__":
    sys.exit(main())
