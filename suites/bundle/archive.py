"""The file of a bundle: a zip with SHA256SUMS, and a digest of all its bytes as its comment.

A reader takes nothing on trust: names are of a fixed form, sizes have bounds, no file is written
and nothing is executed. The same content makes the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Mapping

SUMS = "SHA256SUMS"
NAMES = re.compile(
    r"(results|summary)\.json|junit\.xml|inventory\.txt|report\.(html|txt)|SHA256SUMS"
    r"|logs/(?!\.+/)[\w.-]{1,200}/rank-\d{1,6}\.log",
    re.ASCII,
)
MOST_BYTES = 1 << 28
MOST_FILES = 100_000
_MARK = b"sha256:"
_LONG = len(_MARK) + 64
_DATE = (1980, 1, 1, 0, 0, 0)


class BadBundleError(Exception):
    """The file is no bundle, or was changed; the text says where."""


def pack(files: Mapping[str, bytes]) -> bytes:
    """The bytes of a bundle of these files, which must have no SHA256SUMS of their own."""
    sums = "".join(f"{_sha256(files[n])}  {n}\n" for n in sorted(files)).encode()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted({**files, SUMS: sums}.items()):
            if not NAMES.fullmatch(name):
                raise BadBundleError(f"{name!r}: a bundle holds no such file")
            entry = zipfile.ZipInfo(name, _DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
        archive.comment = b"-" * _LONG
    body = stream.getvalue()[:-_LONG]
    return body + _MARK + _sha256(body).encode()


def unpack(bundle: bytes) -> dict[str, bytes]:
    """The files of a bundle, without SHA256SUMS.

    Raises BadBundleError, naming the first part that is not as it was packed.
    """
    body, comment = bundle[:-_LONG], bundle[-_LONG:]
    if not comment.startswith(_MARK):
        raise BadBundleError("not a bundle, or cut off: it does not end with its digest")
    if comment.removeprefix(_MARK).decode("ascii", "replace") != _sha256(body):
        raise BadBundleError(_where(bundle) + "its bytes are not those that its digest is of")
    files = _files(bundle)
    stated = _stated(files.pop(SUMS, None))
    for name in sorted(stated.keys() | files.keys()):
        if name not in files:
            raise BadBundleError(f"{name}: {SUMS} names it, and the bundle has no such file")
        if name not in stated:
            raise BadBundleError(f"{name}: {SUMS} does not name it")
        if stated[name] != _sha256(files[name]):
            raise BadBundleError(f"{name}: its bytes are not those that {SUMS} states")
    return files


def _where(bundle: bytes) -> str:
    """The first file that is not as it was packed, where that can be told."""
    try:
        files = _files(bundle)
        stated = _stated(files.pop(SUMS, None))
    except BadBundleError as error:
        return f"{error}; "
    changed = [name for name, content in files.items() if stated.get(name) != _sha256(content)]
    return f"{changed[0]} was changed; " if changed else ""


def _files(bundle: bytes) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            entries = archive.infolist()
            if len(entries) > MOST_FILES:
                raise BadBundleError(f"{len(entries)} files, expected at most {MOST_FILES}")
            found: dict[str, bytes] = {}
            left = MOST_BYTES
            for entry in entries:
                if not NAMES.fullmatch(entry.filename):
                    raise BadBundleError(f"{entry.filename!r}: a bundle holds no such file")
                if entry.filename in found:
                    raise BadBundleError(f"{entry.filename}: it is there twice")
                with archive.open(entry) as stream:
                    content = stream.read(left + 1)
                left -= len(content)
                if left < 0:
                    raise BadBundleError(f"its files have more than {MOST_BYTES} bytes")
                found[entry.filename] = content
            return found
    except BadBundleError:
        raise
    except Exception as error:
        # zipfile raises a dozen kinds: of zlib, struct, its own, for lengths and for passwords.
        raise BadBundleError(f"not a zip that can be read ({error})") from error


def _stated(sums: bytes | None) -> dict[str, str]:
    if sums is None:
        raise BadBundleError(f"it has no {SUMS}")
    lines = sums.decode("ascii", "replace").splitlines()
    found = [re.fullmatch(r"([0-9a-f]{64})  (\S+)", line) for line in lines]
    for line, match in zip(lines, found, strict=True):
        if match is None:
            raise BadBundleError(f"{SUMS}: {line[:80]!r}: expected a digest and a name")
    return {match[2]: match[1] for match in found if match}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
