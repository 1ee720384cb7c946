"""`circuitfind export`: a circuit in other formats; needs no model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from circuitfind.cli.options import OutOptions
from circuitfind.cli.output import Output
from circuitfind.cli.pages import strongest
from circuitfind.cli.verbs import verb
from circuitfind.cli.words import count
from circuitfind.errors import FileError

if TYPE_CHECKING:
    from circuitfind.circuit import Circuit


class Format(StrEnum):
    """What a circuit can be written as."""

    dot = "dot"
    svg = "svg"
    png = "png"
    pdf = "pdf"
    graphml = "graphml"
    json = "json"


@dataclass(frozen=True)
class ExportOptions:
    """What to write."""

    circuit: Annotated[Path, typer.Argument(metavar="CIRCUIT", help="A circuit.json.")]
    to: Annotated[Format | None, typer.Option(help="The format. Default: by the ending of --out, else svg.")] = None
    top: Annotated[int | None, typer.Option(min=1, help="Only so many of the strongest edges.")] = None
    title: Annotated[str | None, typer.Option(help="A line above the picture.")] = None


def register(app: typer.Typer) -> None:
    """Adds the verb to the app."""
    verb(app, "circuitfind export circuitfind-out/circuit.json --to graphml")(export)


def export(what: ExportOptions, place: OutOptions, out: Output) -> None:
    """Write a circuit as a picture or for another tool.

    Formats: dot, svg, png, pdf (with Graphviz's "dot" installed), graphml, json. --out is a file or a folder.
    """
    from circuitfind.circuit import Circuit

    circuit = Circuit.open(what.circuit)
    if what.top is not None:
        circuit = strongest(circuit, what.top)
    path, form = _target(what, place.out)
    if path.exists() and path.resolve() == what.circuit.resolve():
        raise FileError(f"{path}: this would overwrite the circuit itself: give --out another name")
    with out.waiting("drawing"):
        _write(circuit, path, form, what.title)
    out.say(f"Written: {path} ({count(len(circuit), 'edge')})")
    out.document({"file": str(path), "format": form.value, "edges": len(circuit), "nodes": len(circuit.nodes)})


def _target(what: ExportOptions, out: Path) -> tuple[Path, Format]:
    """The file and its format, from --to and --out."""
    ending = out.suffix.lower().lstrip(".")
    if not ending or out.is_dir():
        form = what.to or Format.svg
        return out / f"{what.circuit.stem}.{form.value}", form
    if what.to is not None and ending != what.to.value:
        raise FileError(f"--out {out} does not end in .{what.to.value}, as --to asks")
    if ending not in list(Format):
        raise FileError(f"--out {out}: unknown format '{ending}': use one of {', '.join(Format)}")
    return out, Format(ending)


def _write(circuit: Circuit, path: Path, form: Format, title: str | None) -> None:
    from circuitfind.export.files import write_text

    if form is Format.json:
        circuit.save(path)
    elif form is Format.graphml:
        circuit.to_graphml(path)
    elif form is Format.dot:
        write_text(path, circuit.to_dot(title=title))
    else:
        circuit.render(path, title=title)
