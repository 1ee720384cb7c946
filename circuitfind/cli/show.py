"""`circuitfind show`: any file that circuitfind wrote, as a page of figures and a short table; needs no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuitfind.cli import show_tables
from circuitfind.cli.opened import READS, SavedChecks, SavedCurve, opened
from circuitfind.cli.output import Output
from circuitfind.cli.verbs import verb
from circuitfind.cli.words import count
from circuitfind.errors import FileError
from circuitfind.export.files import check_file

if TYPE_CHECKING:
    from circuitfind.plots.plot import Drawing


@dataclass(frozen=True)
class ShowOptions:
    """What is shown."""

    file: Annotated[Path, typer.Argument(metavar="FILE", help=f"{READS[0].upper()}{READS[1:]}.")]
    what: Annotated[
        str | None,
        typer.Option(metavar="FIGURE", help="Only this figure, such as effects, strongest, layers or scatter."),
    ] = None
    out: Annotated[
        Path | None, typer.Option(metavar="PAGE.html", help="Default: the file's name with .html, beside it.")
    ] = None


def register(app: typer.Typer) -> None:
    """Adds the verb to the app."""
    verb(app, "circuitfind show circuitfind-out/circuit.json")(show)


def show(given: ShowOptions, out: Output) -> None:
    """Show a file: a page of figures that opens without a network, and the strongest rows.

    Blue supports the behaviour, red opposes it, white is 0. Needs plotly, which the extra "plots" brings.
    """
    check_file(given.file)
    path = given.out or given.file.with_suffix(".html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise FileError(f"--out {path}: a page's name ends in .html")
    with out.waiting("drawing"):
        found = opened(given.file)
        names = _write(found, given, path)
    show_tables.table(found, out)
    out.say(f"Written: {path} ({count(len(names), 'figure')}: {', '.join(names)})")
    out.document({"file": str(given.file), "holds": show_tables.kind(found).name, "page": str(path), "figures": names})


def _write(found: Any, given: ShowOptions, path: Path) -> list[str]:
    """Writes the page, and returns the names of its figures."""
    from circuitfind.plots.page import save_page

    if show_tables.kind(found).name == "comparison":
        from circuitfind.comparison.page import write_page

        if given.what is not None:
            raise FileError(f"--what {given.what}: a comparison is one page, leave it out")
        write_page(found, path)
        return ["comparison"]
    known = _drawings(found)
    if given.what is not None and given.what not in known:
        raise FileError(f"--what {given.what}: {given.file} has the figures {', '.join(known)}")
    names = [given.what] if given.what else list(known)
    save_page([known[name]() for name in names], path, given.file.name)
    return names


def _drawings(found: Any) -> dict[str, Drawing]:
    from circuitfind.plots import faithfulness, scatter
    from circuitfind.plots.plot import drawings

    if isinstance(found, SavedCurve):
        words = faithfulness.measured("Faithfulness by size", found.record)
        return {"faithfulness": lambda: faithfulness.curves({"faithfulness": found.points}, words)}
    if isinstance(found, SavedChecks):
        points = [scatter.EffectPair(*row) for row in found.points]
        return {"scatter": lambda: scatter.checked(points, found.record)}
    return drawings(found)
