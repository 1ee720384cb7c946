"""`circuitfind export`: write circuits and scores as pictures or for other tools."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any

from rich.text import Text

import circuitfind as cf
from circuitfind.cli import options
from circuitfind.cli.cells import count
from circuitfind.cli.options import option
from circuitfind.cli.output import Output, linked
from circuitfind.errors import FileError
from circuitfind.export.files import write_text

MIB, EAP_IG, NEURONPEDIA = "mib", "eap-ig", "neuronpedia"
PICTURES, TABLES = ("dot", "svg", "png", "pdf"), ("csv", "parquet")
FORMATS = (*PICTURES, "html", "graphml", "json", "safetensors", *TABLES, NEURONPEDIA, EAP_IG, MIB)
ENDINGS: dict[str, tuple[str, ...]] = {form: (f".{form}",) for form in FORMATS if form != MIB}
ENDINGS |= {EAP_IG: (".json", ".pt"), NEURONPEDIA: (".neuronpedia.json",)}


@dataclass(frozen=True)
class ExportOptions:
    circuit: Path = option(options.SCORES_OR_CIRCUIT, MISSING, argument=True, metavar="FILE")
    to: str | None = option("Format. Default: from the extension of --out, else svg.", words=FORMATS)
    top: int | None = option("Export only this many of the strongest edges.", least=1)
    title: str | None = option("Title above the picture.")
    beside: Path | None = option(
        "For html: a second circuit; the page marks which edges belong to which.", metavar="FILE"
    )
    entry: str | None = option(
        "For mib: task and model, such as ioi_gpt2. For neuronpedia: the model's id there, such as gpt2-small.",
        metavar="NAME",
    )
    by: str = option("For mib: how edges of grouped-query models are ranked.", options.BY[1], words=options.BY)


def export(what: ExportOptions, sign: options.Sign, place: options.Out, out: Output) -> None:
    """Write a circuit or scores as a picture or for another tool.

    Formats: dot, svg, png, pdf (with Graphviz's "dot" installed), html (the page), graphml, json, neuronpedia (for its
    page and circuit-tracer's), csv, parquet; eap-ig (.json or .pt); of scores also safetensors and mib, a folder of
    MIB's circuit track, which "circuitfind mib" checks. --out is a file or a folder.

    Example: circuitfind export circuitfind-out/circuit.json --to graphml
    """
    from circuitfind.placed_scores import DRAWN

    given = _open(what, sign.sign)
    placed = isinstance(given, cf.PlacedScores)
    if what.to == MIB and not placed:
        _write_mib(_as_scores(what.circuit, given), place.out, what, out)
        return
    path, form = _target(what, place.out)
    if placed and form not in (*PICTURES, NEURONPEDIA):
        drawn = ", ".join((*PICTURES, NEURONPEDIA))
        raise FileError(f"{what.circuit}: scores of edges by position or span can only be drawn: use --to {drawn}")
    if what.beside is not None and form != "html":
        raise FileError("--beside only applies to the page: give --to html")
    if path.exists() and path.resolve() == what.circuit.resolve():
        raise FileError(f"{path}: this would overwrite {what.circuit} itself: give --out another name")
    n = what.top or DRAWN
    with out.waiting("writing"):
        _write(given, path, form, what, *([n] if placed else []))
    edges = int(given.cut(n).sum()) if isinstance(given, cf.PlacedScores) else len(given)
    which = f" of the {n} strongest, those that lead to the logits" if placed else ""
    out.text.print(Text("Written: ") + linked(path, str(path)) + f" ({count(edges, 'edge')}{which})")
    nodes = {} if placed else {"nodes": len(getattr(given, "nodes", []))}
    out.document({"file": str(path), "format": form, "edges": edges, **nodes})


def _open(what: ExportOptions, sign: Any) -> cf.Circuit | cf.Scores | cf.PlacedScores:
    """Read scores or a circuit and keep the --top strongest edges; placed scores are kept whole."""
    if what.circuit.suffix.lower() == ".safetensors":
        try:
            return cf.PlacedScores.open(what.circuit)
        except FileError:
            scores = cf.Scores.open(what.circuit, sign)
        return scores if what.top is None else scores.top(what.top)
    from circuitfind.report.sizes import strongest

    circuit = cf.Circuit.open(what.circuit, sign)
    if not len(circuit) and (found := cf.Scores.of(circuit)) is not None:  # another tool's file may hold only scores
        return found if what.top is None else found.top(what.top)
    return circuit if what.top is None else strongest(circuit, what.top)


def _as_scores(path: Path, given: Any) -> cf.Scores:
    scores = given if isinstance(given, cf.Scores) else cf.Scores.of(given)
    if scores is None:
        remedy = "give the scores.safetensors that it was cut from"
        raise FileError(f"{path}: a circuit without a score for every edge: {remedy}")
    return scores


def _target(what: ExportOptions, out: Path) -> tuple[Path, str]:
    """The output file and its format, from --to and --out."""
    ending = ENDINGS[NEURONPEDIA][0] if out.name.lower().endswith(ENDINGS[NEURONPEDIA]) else out.suffix.lower()
    if not ending or out.is_dir():
        form = what.to or "svg"
        return out / f"{what.circuit.stem}{'.eap-ig.json' if form == EAP_IG else ENDINGS.get(form, ('',))[0]}", form
    forms = [form for form, endings in ENDINGS.items() if ending in endings]
    if what.to is not None and what.to not in forms:
        raise FileError(f"--out {out} does not end in {' or '.join(ENDINGS[what.to])}, as --to requires")
    if not forms:
        known = ", ".join(dict.fromkeys(one[1:] for endings in ENDINGS.values() for one in endings))
        raise FileError(f"--out {out}: unknown format '{ending[1:]}': use one of {known}")
    return out, what.to or forms[0]


def _write(given: Any, path: Path, form: str, what: ExportOptions, *n: int) -> None:
    """Write the file. `n`: number of edges to draw of placed scores."""
    if form == EAP_IG:
        given.save(path, format="eap-ig")
    elif form == "safetensors":
        _as_scores(what.circuit, given).save(path)
    elif form in TABLES:
        given.save(path)
    elif isinstance(given, cf.Scores):
        raise FileError(f"{what.circuit}: these are scores, not a circuit: give --top, the number of edges to take")
    elif form in ("json", "graphml", NEURONPEDIA):  # --entry is the model's name there
        made = given.record if what.entry is None else replace(given.record, model=what.entry)
        replace(given, record=made).save(path, *n)
    elif form == "html":
        given.report(None, None, path, beside=None if what.beside is None else cf.Circuit.open(what.beside))
    elif form == "dot":
        write_text(path, given.to_dot(*n, title=what.title))
    else:
        given.render(path, *n, title=what.title)


# -------------------------------------------------------------------- MIB
def _write_mib(scores: cf.Scores, root: Path, what: ExportOptions, out: Output) -> None:
    """Write an entry of the circuit track: scores, or nine circuits if scores are of shared keys and values."""
    from circuitfind.export import mib
    from circuitfind.export.eap_ig import Foreign

    name, graph = what.entry, scores.graph
    by: Any = what.by
    if name is None:
        raise FileError("--to mib: give --entry TASK_MODEL, such as --entry ioi_gpt2")
    if graph.group > 1:
        files = mib.write_circuits(root, name, graph, scores.ranked(by))
        why = f"{graph.group} query heads share each key and value, and MIB's scores are by query head"
        out.say(f"Wrote nine circuits instead of scores: {why} (score with circuitfind attribute --ungrouped).")
    else:
        files = mib.write_importances(root, name, Foreign(graph, graph.real & False, scores.values))
    out.say(f"Written: {root / name} ({count(len(files), 'file')})")
    out.document({"folder": str(root / name), "files": [str(path) for path in files]})
