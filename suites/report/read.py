"""Reading results.json: the schema is checked, so that every reader may rely on it.

A file may come from anybody: what a terminal would obey in its texts is shown, not sent.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import jsonschema
from packaging.version import InvalidVersion, Version

SCHEMA = Path(__file__).parent / "results.schema.json"
_FORMATS = jsonschema.FormatChecker(formats=())


@_FORMATS.checks("date-time", raises=ValueError)
def _is_time(value: object) -> bool:
    return not isinstance(value, str) or bool(datetime.datetime.fromisoformat(value))


@_FORMATS.checks("version", raises=InvalidVersion)
def _is_version(value: object) -> bool:
    return not isinstance(value, str) or bool(Version(value))


class BadResultsError(Exception):
    """A results.json that is missing, not JSON, or not of the schema; the text says which."""


def read(path: Path, *, validate: bool = True) -> dict[str, Any]:
    """The results of a run, from its folder or its results.json.

    Raises BadResultsError, naming the file and the first place that does not fit. Without
    `validate`, for what this process wrote itself, only a file that is no JSON is refused.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        return parse(file.read_bytes(), str(file), validate=validate)
    except FileNotFoundError:
        raise BadResultsError(f"{file}: there is no such file") from None


def parse(text: bytes, file: str, *, validate: bool = True) -> dict[str, Any]:
    """The results in a text; `file` names it in errors. See `read`."""
    try:
        data = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise BadResultsError(f"{file}: not JSON ({error})") from None
    if not validate:
        return dict(_shown(data))
    schema = json.loads(SCHEMA.read_text())
    validator = jsonschema.Draft202012Validator(schema, format_checker=_FORMATS)
    misfit = jsonschema.exceptions.best_match(validator.iter_errors(data))
    if misfit is not None:
        raise BadResultsError(f"{file}: at {misfit.json_path}: {misfit.message[:300]}")
    found = {v: sum(c["verdict"] == v for c in data["checks"]) for v in data["run"]["counts"]}
    if found != data["run"]["counts"]:
        raise BadResultsError(f"{file}: counts {data['run']['counts']} do not add up: {found}")
    return _shown(data)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a name that is there twice, readers take another one each."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is twice in an object")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_OBEYED = {c: f"\\x{c:02x}" for c in (*range(32), *range(0x7F, 0xA0)) if chr(c) not in "\t\n"}
_OBEYED |= {
    c: f"\\u{c:04x}" for c in range(0xD800, 0xE000)
}  # halves of a pair, which no file takes


def shown(text: str) -> str:
    """A text from anybody as a terminal may have it."""
    return text.translate(_OBEYED)


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, dict):
        return {_shown(key): _shown(one) for key, one in value.items()}
    return [_shown(one) for one in value] if isinstance(value, list) else value
