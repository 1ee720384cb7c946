"""Two circuits beside each other: how large they are, what their edges lead into and how deep; of one graph which edges
they share. Percentages are of the sum of |effects|, exact where measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import circuitfind as cf
from circuitfind.cli.cells import Cell, Right, count, fixed, percent
from circuitfind.cli.output import Output
from circuitfind.export.graphs import EdgeRow

KINDS = ("q", "k", "v", "mixer", "mlp", "logits")
THIRDS = 3


class Shared(NamedTuple):
    """An edge, and its effect in both circuits; NaN where it is not in one, or not known."""

    edge: str
    effect: float
    there: float


def show(names: Sequence[str], pair: tuple[cf.Circuit, cf.Circuit], n: int, out: Output) -> dict[str, Any]:
    """Prints the comparison, `n` edges of each kind, and returns it as JSON values."""
    profiles = [_profile(circuit) for circuit in pair]
    labels = list(dict.fromkeys(label for one in profiles for label in one))
    rows = ([label, *(one.get(label, Right("0")) for one in profiles)] for label in labels)
    out.table("Two circuits", ["", *names], rows)
    told: dict[str, Any] = {name: dict(one) for name, one in zip(names, profiles, strict=True)}
    a, b = pair
    if a.graph != b.graph:
        out.say(f"Of two graphs ({a.graph}; {b.graph}), whose edges are not each other's.", style="dim")
        return told
    effects = [{a.graph.edge_name(row.writer, row.reader): row.effect for row in one.rows()} for one in pair]
    known = [Shared(edge, *(_number(one.get(edge)) for one in effects)) for edge in (a | b).edges]
    known.sort(key=lambda row: -max(abs(value) if math.isfinite(value) else 0 for value in row[1:]))
    inside = {"In both": (a & b).edges, f"Only in {names[0]}": (a - b).edges, f"Only in {names[1]}": (b - a).edges}
    for title, edges in inside.items():
        chosen = [row for row in known if row.edge in set(edges)]
        if chosen:
            said = f"{title}: {count(len(edges), 'edge')}, the strongest first"
            out.rows(said, chosen, "edge effect there", n, effect=names[0], there=names[1])
    out.facts([("Jaccard", f"{fixed(a.jaccard(b))}, shared edges of all edges of the two")])
    return told | {"jaccard": a.jaccard(b), "edges": {title.lower(): edges for title, edges in inside.items()}}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


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
        share(f"into the {said} third of layers", [row for row in rows if _third(graph, row) == third])
    return found


def _third(graph: cf.Graph, row: EdgeRow) -> int:
    """Of the layers; the logits' is none of them."""
    return graph.reader(row.reader).layer * THIRDS // graph.n_layers
