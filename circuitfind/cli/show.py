"""`circuitfind show`: what a file holds, as figures and rows."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import circuitfind as cf
from circuitfind.cli import tables
from circuitfind.cli.cells import count
from circuitfind.cli.options import option
from circuitfind.cli.output import Output
from circuitfind.errors import FileError

READS = (
    "A circuit.json, a .safetensors of scores or a sweep, or the .json of any result: verify.json, compare.json,"
    " paths.json, a curve, ..."
)


@dataclass(frozen=True)
class ShowOptions:
    file: Path = option(READS, MISSING, argument=True, metavar="FILE")
    what: str | None = option("Only this figure, such as effects, strongest, layers or scatter.", metavar="FIGURE")
    out: Path | None = option("Default: the file's name with .html, beside it.", metavar="PAGE.html")


def show(given: ShowOptions, out: Output) -> None:
    """Show a file: a page of figures that opens without a network, and the strongest rows.

    Blue supports the task, red opposes it, white is 0. Needs plotly, which the extra "plots" brings.

    Example: circuitfind show circuitfind-out/circuit.json
    """
    found = cf.open(given.file)
    path = given.out or given.file.with_suffix(".html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise FileError(f"--out {path}: a page's name ends in .html")
    with out.waiting("drawing"):
        names = _draw(found, given, path)
    kind = tables.of(found, out)
    if names:
        out.say(f"Written: {path} ({count(len(names), 'figure')}: {', '.join(names)})")
    page = str(path) if names else None
    out.document({"file": str(given.file), "holds": kind, "page": page, "figures": names})


def _draw(found: Any, given: ShowOptions, path: Path) -> list[str]:
    """Writes the page, and returns the names of its figures; none of results that have no figures."""
    from circuitfind.plots.page import save_page
    from circuitfind.plots.plot import FIGURES, drawings

    kind = type(found).__name__
    if kind == "Comparison" and given.what is None:
        found.save(path)
        return ["comparison"]
    known = drawings(found) if kind in FIGURES else {}
    if given.what is not None and given.what not in known:
        whole = ", which is one page" if kind == "Comparison" else ""
        raise FileError(f"--what {given.what}: {given.file} has the figures {', '.join(known) or '(none)'}{whole}")
    names = [given.what] if given.what else list(known)
    if names:
        save_page([known[name]() for name in names], path, given.file.name)
    return names
