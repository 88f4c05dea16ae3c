"""A run in one line, as an SVG that asks for nothing."""

from __future__ import annotations

from html import escape

from website.history import Run

_COLOURS = {"holds": "#1a6e3c", "known": "#855300", "unexpected": "#b3201f", "not run": "#59626d"}
_LETTER = 6.1
"""Pixels, about, of a letter of 11 pixels."""


def badge(run: Run) -> str:
    """Which torch, and how many defects it has; or what else there is to say."""
    who = str(run.column).rpartition(" on ")[0]
    return _svg("shardproof", f"{who}: {_said(run)}", _COLOURS[run.state])


def _said(run: Run) -> str:
    if run.missing:
        return f"{run.missing} checks did not run"
    if run.counts["unexpected"]:
        return _several(run.counts["unexpected"], "unexpected failure")
    if run.defects:
        return _several(len(run.defects), "defect")
    if run.counts["known"]:
        return _several(run.counts["known"], "known failure")
    return f"{run.counts['holds']} checks hold" if run.counts["holds"] else "nothing was judged"


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def _svg(left: str, right: str, colour: str) -> str:
    one, other = (round(len(text) * _LETTER) + 12 for text in (left, right))
    title = escape(f"{left}: {right}")
    texts = "".join(
        f'<text x="{x + 6}" y="14" textLength="{width - 12}">{escape(text)}</text>'
        for x, width, text in ((0, one, left), (one, other, right))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{one + other}" height="20" '
        f'viewBox="0 0 {one + other} 20" role="img" '
        f'aria-label="{title}"><title>{title}</title>'
        # No clip path, which would need an id: several badges stand in one page.
        f'<rect width="{one + other}" height="20" rx="3" fill="{colour}"/>'
        f'<path d="M3 0h{one - 3}v20H3a3 3 0 0 1-3-3V3a3 3 0 0 1 3-3z" fill="#30363d"/>'
        f'<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">{texts}</g>'
        "</svg>\n"
    )
