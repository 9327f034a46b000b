"""A comparison as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html as html_lib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genret_jax.comparison.collections import Collections
    from genret_jax.comparison.report import Report

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #888; font-weight: 600; }
img { max-width: 100%; }
p, li { max-width: 50rem; }
.failed { color: #b00020; }
"""


def html(report: Report, pictures: Mapping[str, bytes]) -> str:
    """The page.

    Args:
      report: what it tells.
      pictures: name -> PNG; they go into the page as data URIs.
    """
    parts = [f"<h1>{_text(report.title())}</h1>"]
    for split in report.tables:
        parts += [
            f"<h2>{_text(report.heading(split))}</h2>",
            _table(report.head(split), report.lines(split)),
        ]
    parts += [f"<p>{_text(note)}</p>" for note in report.notes()]
    parts += [_picture(name, png) for name, png in pictures.items()]
    parts += [_list("", report.legend()), _failed(report.failures)]
    return _page(report.title(), parts)


def collections_html(found: Collections, png: bytes) -> str:
    """The page of several collections, with its picture and a link to each one's own page."""
    parts = [f"<h1>{_text(found.title())}</h1>"]
    for metric, lines in found.tables():
        parts += [f"<h2>{_text(metric)}</h2>", _table(found.head(), lines)]
    parts += [f"<p>{_text(note)}</p>" for note in found.notes()]
    links = [f'<a href="{_text(name)}/comparison.html">{_text(name)}</a>' for name in found.reports]
    parts += [f"<p>{', '.join(links)}</p>", _picture("every method on every collection", png)]
    parts += [_list("", found.legend()), _failed(found.failures)]
    return _page(found.title(), parts)


def _page(title: str, parts: Sequence[str]) -> str:
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _picture(name: str, png: bytes) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<p><img alt="{_text(name)}" src="data:image/png;base64,{data}"></p>'


def _failed(failures: Mapping[str, str]) -> str:
    return f"<h2>Failed</h2>\n{_list('failed', failures)}" if failures else ""


def _table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in heads)
    lines = ["<tr>" + "".join(f"<td>{_cell(c)}</td>" for c in line) + "</tr>" for line in cells]
    rows = "\n".join(lines)
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _list(kind: str, items: Mapping[str, str]) -> str:
    lines = [f"<li><b>{_text(name)}</b>: {_text(what)}</li>" for name, what in items.items()]
    return f'<ul class="{kind}">' + "\n".join(lines) + "</ul>"


def _cell(text: str) -> str:
    """A cell of the table; what Markdown has between ** is bold."""
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", _text(text))


def _text(text: str) -> str:
    return html_lib.escape(text, quote=True)
