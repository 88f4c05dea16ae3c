"""Render a template as one HTML file that asks no network: style and scripts stand in it."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

FOLDER = Path(__file__).parent
SUITES = FOLDER.parents[1]


def render(
    template: str, *, scripts: tuple[str, ...] = (), styles: tuple[str, ...] = (), **values: Any
) -> str:
    """The page of a template, which extends base.html.

    Args:
        template: a file of this folder, or of suites/, as "website/index.html".
        scripts: files, named alike, that run in this order after page.js.
        styles: files, named alike, that come after style.css.
        values: what the template shows. Scripts read `data` as JSON from the element of that id.

    """
    code = [_file(name) for name in ("page.js", *scripts)]
    page = _ENVIRONMENT.get_template(template)
    return page.render(
        values,
        scripts=code,
        style=Markup("\n").join(_file(name) for name in ("style.css", *styles)),
        allowed=" ".join(f"'sha256-{_digest(one)}'" for one in code),
        data=_as_json(values["data"]) if "data" in values else None,
    )


def _as_json(value: Any) -> Markup:
    """JSON that no HTML parser takes for anything else."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _file(name: str) -> Markup:
    assert _ENVIRONMENT.loader is not None
    return Markup(_ENVIRONMENT.loader.get_source(_ENVIRONMENT, name)[0])


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader([FOLDER, SUITES], encoding="utf-8"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
