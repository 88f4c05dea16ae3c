"""Output into a pipe whose reader has gone, as with `| head`: the command ends in order."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

READER_GONE = 3
"""The exit code: what was asked for was not done."""


class ReaderGoneError(KeyboardInterrupt):
    """Nobody reads the output any more. An interrupt, so that whatever runs ends in order."""


class _Guarded:
    """A stream that raises once when its reader is gone, and is silent after that."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._gone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, unless nobody reads."""
        self._guard(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write all lines, unless nobody reads."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is held back, unless nobody reads."""
        self._guard(self._stream.flush)

    def _guard(self, action: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            action()
        except BrokenPipeError:
            self._gone = True
            # What the stream still holds is written when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise ReaderGoneError("nobody reads the output any more") from None


def run(main: Callable[[], int | None]) -> int:
    """A command's exit code, whoever reads its output."""
    sys.stdout = _Guarded(sys.stdout)
    try:
        status = main()
        sys.stdout.flush()
    except ReaderGoneError:
        return READER_GONE
    return status or 0
