"""Pages of figures that open from disk without a network: each page includes plotly.js once.

A content security policy in the page's head forbids all requests. The same figures give the same page, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from os import PathLike
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from circuitfind.errors import FileError
from circuitfind.export.files import write_text
from circuitfind.plots.style import graph_objects

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def save_page(figures: Figure | Sequence[Figure], path: str | PathLike[str], title: str = "circuitfind") -> Path:
    """Write figures to one HTML page that needs no network, and return its path.

    Raises:
        FileError: no figure is given, or something else than figures; the path cannot be written; or plotly is not
            installed.
    """
    several = list(figures) if isinstance(figures, Sequence) else [figures]
    if not several:
        raise FileError(f"{path}: no figures are given: a page is made of at least one, which circuitfind.plot makes")
    if strange := [type(one).__name__ for one in several if not isinstance(one, graph_objects().Figure)]:
        raise FileError(f"a page is made of figures, not of type {strange[0]}: circuitfind.plot makes them")
    return write_text(path, page(several, title))


def page(parts: Sequence[Figure | str], title: str) -> str:
    """Return a page of figures and pieces of HTML, whose text from outside is already escaped."""
    graph_objects()
    from plotly.offline import get_plotlyjs

    template = Template(files("circuitfind.plots").joinpath("page.html").read_text(encoding="utf-8"))
    body = "\n".join(part if isinstance(part, str) else _figure(part, at) for at, part in enumerate(parts))
    return template.substitute(title=escape(title), library=get_plotlyjs(), body=body)


def _figure(figure: Figure, at: int) -> str:
    """Return an element for a figure with its data, in which no text can close the script element."""
    data = figure.to_json().replace("<", "\\u003c")
    return (
        f'<div class="scroll"><div data-figure="figure-{at}"></div></div>\n'
        f'<script type="application/json" id="figure-{at}">{data}</script>'
    )
