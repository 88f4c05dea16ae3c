"""How much memory a call may take: the size of a bucket, and what travels without one."""

from __future__ import annotations

import os

_SETTING = "SHARDPROOF_BUCKET_MIB"


def _bucket_bytes() -> int:
    text = os.environ.get(_SETTING, "32")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{_SETTING}={text!r}: expected a whole number of MiB, 1 or more")
    return int(text) * 1024 * 1024


BUCKET_BYTES = _bucket_bytes()
"""The most bytes that a call needs on a rank besides its result, all participants together and
what the backend copies included.

All ranks need the same value: set SHARDPROOF_BUCKET_MIB before the import, on every rank. More
saves collectives, less saves memory. 32 MiB: over 4 Gloo ranks a gather of 4 x 64 MiB took 0.80 of
torch's time with 16 MiB, 0.73 with 32 and 1.07 with 64, where glibc maps the memory of each
collective anew; a broadcast of the model-like shapes 136 ms with 16, 99 ms with 32.
"""

# A tensor of this share of a bucket fills collectives well enough to have its own.
_ALONE = 16


def alone_bytes() -> int:
    """From how many bytes on a tensor travels without a bucket, if it can."""
    return BUCKET_BYTES // _ALONE
