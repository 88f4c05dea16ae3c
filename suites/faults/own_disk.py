"""A small disk of a process's own, which is gone with the process, and how to fill one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
from pathlib import Path

_CLONE_NEWNS = 0x20000


def mount_small(folder: Path, size: str = "1m") -> None:
    """Mount a tmpfs that only this process and its children see."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    for words in (
        ["--make-rprivate", "/"],
        ["-t", "tmpfs", "-o", f"size={size}", "none", str(folder)],
    ):
        subprocess.run(["mount", *words], check=True)


def why_not() -> str:
    """What keeps this machine from it, in words."""
    words = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "no command unshare"
    return done.stderr.strip()


def fill(folder: Path) -> Path:
    """Write until there is no room; the file, to which several processes may add."""
    file = folder / "filler"
    with file.open("ab", buffering=0) as stream:
        for size in (1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    stream.write(bytes(size))
    assert os.statvfs(folder).f_bavail == 0, errno.ENOSPC
    return file
