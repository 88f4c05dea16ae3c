"""The command `ci/bundle`: pack a run into one file, or verify such a file."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from bundle import archive, contents
from bundle.archive import MOST_BYTES, BadBundleError
from bundle.verify import Findings, verify
from harness.system import pipes
from report.read import BadResultsError, read, shown

ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> int:
    """0 packed, or nothing found; 1 refused; 2 wrong usage; 3 it cannot be told."""
    parser = argparse.ArgumentParser(
        prog="ci/bundle",
        description="Pack a run into one file to hand over: results, JUnit, reports, environment, "
        "logs, checksums. Or say whether such a file is whole, unaltered, and complete for the "
        "commit of its suites.",
        epilog="Ends with 0: packed, or believed; 1: refused; 2: wrong usage; 3: the run cannot be "
        "read, or the commit of the bundle is not in this checkout.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "run", nargs="?", type=Path, metavar="RUN", help="the folder of a run (default: out/latest)"
    )
    add("--out", type=Path, metavar="FILE", help="default: RUN.bundle.zip beside the folder")
    add("--verify", type=Path, metavar="FILE", help="verify this file, and pack nothing")
    add(
        "--expect-digest",
        metavar="SHA256",
        help="of the file, as whoever made it has published it",
    )
    add(
        "--own-inventory",
        action="store_true",
        help="where the commit is not in this checkout, take the bundle's own list of checks",
    )
    options = parser.parse_args(arguments)
    if options.verify is None:
        if options.expect_digest or options.own_inventory:
            parser.error("--expect-digest and --own-inventory go with --verify FILE")
        return _pack(options.run or ROOT / "out" / "latest", options.out)
    if options.run or options.out:
        parser.error("--verify takes one file, and goes with neither RUN nor --out")
    expected = options.expect_digest and options.expect_digest.lower().removeprefix("sha256:")
    if expected and not re.fullmatch(r"[0-9a-f]{64}", expected):
        parser.error(f"--expect-digest {options.expect_digest}: expected 64 hexadecimal digits")
    try:
        if options.verify.stat().st_size > MOST_BYTES:
            print(f"ci/bundle: {options.verify}: more than {MOST_BYTES} bytes", file=sys.stderr)
            return 1
        content = options.verify.read_bytes()
    except OSError as error:
        parser.error(f"--verify {options.verify}: {error.strerror}")
    return _tell(verify(content, ROOT, expected, own_inventory=options.own_inventory))


def _pack(folder: Path, out: Path | None) -> int:
    folder = folder.resolve()
    try:
        data = read(folder)
        bundle = archive.pack(contents.of_run(folder, data))
        print("packed; verifying, as --verify will", file=sys.stderr)
        found = verify(bundle, ROOT, own_inventory=True)
    except (BadResultsError, BadBundleError) as error:
        print(f"ci/bundle: {error}", file=sys.stderr)
        return 3
    file = out or folder.with_name(f"{folder.name}.bundle.zip")
    file.write_bytes(bundle)
    print(f"{file}: {len(bundle)} bytes")
    print(f"sha256 {found.digest}")
    if found.bad:
        print("--verify will refuse it:")
        for line in found.bad:
            print(f"  {shown(line)}")
    else:
        print("publish the digest beside it: ci/bundle --verify FILE --expect-digest SHA256")
    return 0


def _tell(found: Findings) -> int:
    for word, lines in (("", found.good), ("OPEN     ", found.open), ("REFUSED  ", found.bad)):
        for line in lines:
            print(word + shown(line))
    print(f"sha256 {found.digest}")
    if not found.bad:
        print(
            "A bundle has no signature: whoever made it can have made all of its parts. A digest "
            "that they published (--expect-digest) ties it to them."
        )
    return found.code


if __name__ == "__main__":
    sys.exit(pipes.run(main))
