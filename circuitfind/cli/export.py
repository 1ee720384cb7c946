"""`circuitfind export`: a circuit or scores in other formats; needs no model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from circuitfind.cli import mib
from circuitfind.cli.options import By, OutOptions
from circuitfind.cli.output import Output
from circuitfind.cli.verbs import verb
from circuitfind.cli.words import count
from circuitfind.errors import FileError

if TYPE_CHECKING:
    from circuitfind.circuit import Circuit
    from circuitfind.scores import Scores


class Format(StrEnum):
    """What a circuit, or scores, can be written as."""

    dot = "dot"
    svg = "svg"
    png = "png"
    pdf = "pdf"
    graphml = "graphml"
    json = "json"
    safetensors = "safetensors"
    eap_ig = "eap-ig"
    mib = "mib"


class Sign(StrEnum):
    """What the scores of an EAP-IG file are."""

    effect = "effect"
    change = "change"


ENDINGS = {form: (f".{form.value}",) for form in Format} | {Format.eap_ig: (".json", ".pt")}
SignOption = Annotated[
    Sign,
    typer.Option(help='Of an EAP-IG file: "effect", positive = keep, or "change" of the metric when ablated.'),
]


@dataclass(frozen=True)
class ExportOptions:
    """What to write."""

    circuit: Annotated[
        Path, typer.Argument(metavar="FILE", help="A circuit.json, scores.safetensors, or EAP-IG's .json or .pt.")
    ]
    to: Annotated[Format | None, typer.Option(help="The format. Default: by the ending of --out, else svg.")] = None
    top: Annotated[int | None, typer.Option(min=1, help="Only so many of the strongest edges.")] = None
    title: Annotated[str | None, typer.Option(help="A line above the picture.")] = None
    sign: SignOption = Sign.effect
    entry: Annotated[str | None, typer.Option(metavar="TASK_MODEL", help="For mib: such as ioi_gpt2.")] = None
    by: Annotated[By, typer.Option(help="For mib: what circuits of grouped-query models rank by.")] = By.signed


def register(app: typer.Typer) -> None:
    """Adds the verb to the app."""
    verb(app, "circuitfind export circuitfind-out/circuit.json --to graphml")(export)


def export(what: ExportOptions, place: OutOptions, out: Output) -> int | None:
    """Write a circuit or scores as a picture or for another tool.

    Formats: dot, svg, png, pdf (with Graphviz's "dot" installed), graphml, json; eap-ig (.json or .pt); of scores
    also safetensors and mib, a folder of MIB's circuit track. --out is a file or a folder. With --to mib, FILE may be a
    folder, which is checked as a submission.
    """
    if what.to is Format.mib and what.circuit.is_dir():
        return mib.check(what.circuit, out)
    given = _open(what)
    if what.to is Format.mib:
        mib.write(_as_scores(what.circuit, given), place.out, what.entry, what.by.value, out)
        return None
    path, form = _target(what, place.out)
    if path.exists() and path.resolve() == what.circuit.resolve():
        raise FileError(f"{path}: this would overwrite {what.circuit} itself: give --out another name")
    with out.waiting("writing"):
        _write(given, path, form, what)
    out.say(f"Written: {path} ({count(len(given), 'edge')})")
    out.document(
        {"file": str(path), "format": form.value, "edges": len(given), "nodes": len(getattr(given, "nodes", []))}
    )
    return None


def _open(what: ExportOptions) -> Circuit | Scores:
    """Scores or a circuit, cut to --top edges."""
    from circuitfind.circuit import Circuit
    from circuitfind.scores import Scores

    if what.circuit.suffix.lower() == ".safetensors":
        scores = Scores.open(what.circuit, what.sign.value)
        return scores if what.top is None else scores.top(what.top)
    from circuitfind.report.sizes import strongest

    circuit = Circuit.open(what.circuit, what.sign.value)
    return circuit if what.top is None else strongest(circuit, what.top)


def _as_circuit(path: Path, given: Circuit | Scores) -> Circuit:
    from circuitfind.circuit import Circuit

    if not isinstance(given, Circuit):
        raise FileError(f"{path}: scores of all edges are no circuit: give --top, how many of the strongest to take")
    return given


def _as_scores(path: Path, given: Circuit | Scores) -> Scores:
    from circuitfind.scores import Scores

    if isinstance(given, Scores):
        return given
    if (scores := Scores.of(given)) is None:
        raise FileError(
            f"{path}: a circuit without a score for every edge: give the scores.safetensors that it is cut from"
        )
    return scores


def _target(what: ExportOptions, out: Path) -> tuple[Path, Format]:
    """The file and its format, from --to and --out."""
    ending = out.suffix.lower()
    if not ending or out.is_dir():
        form = what.to or Format.svg
        return out / f"{what.circuit.stem}{'.eap-ig.json' if form is Format.eap_ig else ENDINGS[form][0]}", form
    forms = [form for form in Format if ending in ENDINGS[form]]
    if what.to is not None and what.to not in forms:
        raise FileError(f"--out {out} does not end in {' or '.join(ENDINGS[what.to])}, as --to asks")
    if not forms:
        known = ", ".join(dict.fromkeys(e[1:] for form in Format if form is not Format.mib for e in ENDINGS[form]))
        raise FileError(f"--out {out}: unknown format '{ending[1:]}': use one of {known}")
    return out, what.to or forms[0]


def _write(given: Circuit | Scores, path: Path, form: Format, what: ExportOptions) -> None:
    from circuitfind.export.files import write_text

    if form is Format.eap_ig:
        given.save(path, format="eap-ig")
        return
    if form is Format.safetensors:
        _as_scores(what.circuit, given).save(path)
        return
    circuit = _as_circuit(what.circuit, given)
    if form is Format.json:
        circuit.save(path)
    elif form is Format.graphml:
        circuit.to_graphml(path)
    elif form is Format.dot:
        write_text(path, circuit.to_dot(title=what.title))
    else:
        circuit.render(path, title=what.title)
