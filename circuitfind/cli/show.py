"""`circuitfind show`: what a file holds, as figures and rows.

Of two circuits: how large they are, what their edges lead into and how deep, and, of one graph, which edges they share.
Percentages are of the sum of |effects|, exact where measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from rich.text import Text

import circuitfind as cf
from circuitfind.cli import tables, verdicts
from circuitfind.cli.cells import Cell, Right, count, fixed, percent
from circuitfind.cli.options import option
from circuitfind.cli.output import Output, linked
from circuitfind.errors import FileError, installing
from circuitfind.export.graphs import EdgeRow

READS = (
    "A circuit.json, a .safetensors of scores or a sweep, or the .json of any result: verify.json, compare.json,"
    " paths.json, a curve, ..."
)
KINDS = ("q", "k", "v", "mixer", "mlp", "logits")


@dataclass(frozen=True)
class ShowOptions:
    file: Path = option(READS, MISSING, argument=True, metavar="FILE")
    other: Path | None = option("Second circuit to compare with the first.", argument=True, metavar="[FILE]")
    what: str | None = option("Make only this figure, such as effects, strongest, layers or scatter.", metavar="FIGURE")
    out: Path | None = option("Page to write. Default: FILE with .html as its extension.", metavar="PAGE.html")
    top: int | None = option("Number of rows to print. Default: 15.", least=0)
    sort: str | None = option("Column to sort rows by; numbers by magnitude.", metavar="COLUMN")
    edges: bool = option("Print only edge names, one per line (with --top: the strongest).", False)


def show(given: ShowOptions, out: Output) -> None:
    """Show a file: print its strongest rows and write a page of figures that opens offline.

    Two circuits, also of different models, are compared by size, kinds of edges and shared edges.

    Blue supports the task, red opposes it, white is 0. The page needs plotly, which the extra "plots" brings; rows are
    printed without it.

    Example: circuitfind show circuitfind-out/circuit.json --top 30 --sort exact
    """
    found = _one(given.file)
    if given.other is not None:
        _compare(found, given, given.other, out)
        return
    if given.edges:
        _names(found, given, out)
        return
    if given.sort is not None and given.sort not in (columns := found.columns()):
        raise FileError(f"--sort {given.sort}: {given.file} has the columns {', '.join(columns) or '(none)'}")
    path = given.out or given.file.with_suffix(".html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise FileError(f"--out {path}: the page must end in .html")
    with out.waiting("drawing"):
        names = _draw(found, given, path, out)
    kind = tables.of(found, out, given.top, given.sort)
    if names:
        drawn = f" ({count(len(names), 'figure')}: {', '.join(names)})"
        out.text.print(Text("Written: ") + linked(path, str(path)) + drawn)
    page = str(path) if names else None
    out.document({"file": str(given.file), "holds": kind, "page": page, "figures": names})


def _one(path: Path) -> Any:
    """The result in a file; FileError if the file holds several."""
    found = cf.open(path)
    if isinstance(found, dict):
        keep = f"cf.open('{path}')[NAME].save('scores.safetensors')"
        raise FileError(f"{path}: holds {len(found)} sets of scores ({'; '.join(found)}): save one in Python, {keep}")
    if isinstance(found, list):
        raise FileError(f"{path}: a folder of {len(found)} circuits: give one of its files")
    return found


def _compare(found: Any, given: ShowOptions, other: Path, out: Output) -> None:
    second = _one(other)
    for path, one in ((given.file, found), (other, second)):
        if not isinstance(one, cf.Circuit):
            raise FileError(f"{path}: holds no circuit; only circuits can be compared")
    names = [path.stem for path in (given.file, other)]
    if names[0] == names[1]:
        names = [str(path.parent) for path in (given.file, other)]
    told = _beside(names, (found, second), verdicts.ROWS if given.top is None else given.top, out)
    out.document({"files": [str(given.file), str(other)], **told})


def _names(found: Any, given: ShowOptions, out: Output) -> None:
    if not isinstance(found, cf.Circuit):
        raise FileError(f"--edges: {given.file} holds no circuit: make one with 'circuitfind export --top N --to json'")
    edges = found.edges
    if given.top is not None:
        ranked = sorted(zip(found.rows(), edges, strict=True), key=lambda one: -abs(one[0].effect or 0))
        edges = [name for _, name in ranked[: given.top]]
    if not out.as_json:
        print("\n".join(edges))
    out.document({"file": str(given.file), "holds": "circuit", "edges": edges})


def _draw(found: Any, given: ShowOptions, path: Path, out: Output) -> list[str]:
    """Write the page and return the names of its figures. No page if the result has no figures, or if plotly is not
    installed and no page was asked for."""
    from circuitfind.plots.page import save_page
    from circuitfind.plots.plot import FIGURES, drawings

    kind = type(found).__name__
    if find_spec("plotly") is None and given.what is None and given.out is None:
        if kind in (*FIGURES, "Comparison"):
            out.warn(f"no page of figures, plotly is not installed: {installing('plotly')}")
        return []
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


# -------------------------------------------------------------------- two circuits
class _Shared(NamedTuple):
    """An edge and its effect in both circuits; NaN if it is not in a circuit or not known."""

    edge: str
    effect: float
    there: float


def _beside(names: Sequence[str], pair: tuple[cf.Circuit, cf.Circuit], n: int, out: Output) -> dict[str, Any]:
    """Print the comparison, with `n` edges of each kind, and return it as JSON values."""
    profiles = [_profile(circuit) for circuit in pair]
    labels = list(dict.fromkeys(label for one in profiles for label in one))
    rows = ([label, *(one.get(label, Right("0")) for one in profiles)] for label in labels)
    out.table("Two circuits", ["", *names], rows)
    told: dict[str, Any] = {name: dict(one) for name, one in zip(names, profiles, strict=True)}
    a, b = pair
    if a.graph != b.graph:
        out.say(
            f"The two circuits belong to different graphs ({a.graph}; {b.graph}), so edges cannot be matched.",
            style="dim",
        )
        return told
    effects = [{name: row.effect for name, row in zip(one.edges, one.rows(), strict=True)} for one in pair]
    both = {edge: [one.get(edge) for one in effects] for edge in (a | b).edges}
    known = [_Shared(edge, *(math.nan if one is None else one for one in values)) for edge, values in both.items()]
    known.sort(key=lambda row: -max(abs(value) if math.isfinite(value) else 0 for value in row[1:]))
    inside = {"In both": (a & b).edges, f"Only in {names[0]}": (a - b).edges, f"Only in {names[1]}": (b - a).edges}
    for title, edges in inside.items():
        chosen = [row for row in known if row.edge in set(edges)]
        if chosen:
            said = f"{title}: {count(len(edges), 'edge')}, the strongest first"
            out.rows(said, chosen, "edge effect there", n, effect=names[0], there=names[1])
    out.facts([("Jaccard", f"{fixed(a.jaccard(b))}, fraction of shared edges among all edges of the two")])
    return told | {"jaccard": a.jaccard(b), "edges": {title.lower(): edges for title, edges in inside.items()}}


def _profile(circuit: cf.Circuit) -> dict[str, Cell]:
    graph, rows = circuit.graph, circuit.rows()
    made = circuit.record
    found: dict[str, Cell] = {"model": Right(made.model), "task": Right(made.task), "metric": Right(made.metric)}
    found["edges"] = Right(f"{len(circuit):,} of {graph.n_edges:,}")
    for kind, letter in (("heads", "a"), ("MLPs", "m")):
        inside, whole = (sum(name.startswith(letter) for name in names) for names in (circuit.nodes, graph.node_names))
        found[kind] = Right(f"{inside} of {whole}")
    found["faithfulness"] = fixed(circuit.facts.get("faithfulness"))

    def size(part: list[EdgeRow]) -> float:
        return sum(abs(row.effect or 0) for row in part)

    def share(label: str, part: list[EdgeRow]) -> None:
        found[label] = Right(f"{len(part)} ({percent(size(part) / (size(rows) or math.nan))})")

    for kind in KINDS:
        if kind != "mixer" or graph.mixers:
            share(f"into {kind}", [row for row in rows if graph.reader(row.reader).kind == kind])
    for third, said in enumerate(("first", "middle", "last")):
        there = [row for row in rows if 3 * graph.reader(row.reader).layer // graph.n_layers == third]  # not the logits
        share(f"into the {said} third of layers", there)
    return found
