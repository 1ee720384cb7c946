"""report.html: one self-contained page about a search and its circuit.

1. The sections come from `report.sections`, the drawing from `report.drawing`, the plots from `report.plots`.
2. Style and script stand in the page itself; nothing is loaded from anywhere, which a content security policy in the
   page's head enforces. It reads on paper, on a phone, in the dark, and without the script.
"""

from __future__ import annotations

from html import escape
from importlib.resources import files
from os import PathLike
from pathlib import Path
from string import Template

from circuitfind.export.files import write_text
from circuitfind.report import sections
from circuitfind.report.data import ExampleRow, ReportData

__all__ = ["ExampleRow", "ReportData", "html", "write"]

SECTIONS = (
    sections.head,
    sections.picture,
    sections.whole,
    sections.curve,
    sections.checks,
    sections.examples,
    sections.steps,
    sections.record,
)


def html(data: ReportData) -> str:
    """The page as text."""
    body = "\n".join(text for text in (section(data) for section in SECTIONS) if text)
    page = Template(_piece("page.html"))
    return page.substitute(title=escape(data.title), style=_piece("style.css"), script=_piece("script.js"), body=body)


def write(path: str | PathLike[str], data: ReportData) -> Path:
    """Writes the page, whole or not at all.

    Raises:
        FileError: the place cannot be written to.
    """
    return write_text(path, html(data))


def _piece(name: str) -> str:
    """A file of this package."""
    return files("circuitfind.report").joinpath(name).read_text(encoding="utf-8").strip()
