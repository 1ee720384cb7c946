"""What a drawing of a circuit shows, without its layout: for Graphviz (`export.picture`) and the report's own drawing
(`report.drawing`).

1. `arrows`: one arrow per edge, weak ones first, so that strong ones are painted over them. An edge into a shared
   key/value head of a grouped-query model ends at a small box, such as `a1.kv0`.
2. `joints`: the lines from each small box to every query head of its group that is in the circuit.
3. `folded`: for a large circuit, one arrow for all edges from one layer's heads (`a3` for layer 3) or MLP to another's.
   Its width shows the sum of |effect|, its sign is that of the sum of effects.
4. `ranks`: the rows of the drawing from `input` at the bottom to `logits` at the top. A layer has one row for shared
   key/value heads, one for heads and one for its MLP; in parallel blocks heads and MLP share a row.
5. `PlacedRow`: an edge at a place, between two `Spot`s, which are nodes in the column of a place. An edge into a key or
   value ends at a spot of its own where it is read; from there lines lead to the heads that it serves.
6. `pen`: an arrow's width and opacity grow with the square root of |effect|. On a linear scale all but a handful of
   edges would be hairlines.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from circuitfind.errors import count
from circuitfind.export.graphs import EdgeRow, fed, node_attributes, served
from circuitfind.graph import Graph

MOST_FOLDED = 120  # arrows of a folded circuit
READS = " reads"  # ends the names of spots where keys, values or a mixer's input are read


class Arrow(NamedTuple):
    """One edge as drawn. `share` is sqrt(|effect| / largest |effect|), 0 to 1, or None if no effect is known."""

    edge: str
    source: str
    target: str
    kind: str
    estimate: float | None
    exact: float | None
    effect: float | None
    share: float | None
    said: str = ""  # the tooltip, in place of one that shows the edge's effects

    @property
    def opposes(self) -> bool:
        return self.effect is not None and self.effect < 0

    @property
    def measured(self) -> bool:
        return self.exact is not None


class Spot(NamedTuple):
    """A node at a place, or the reading of a key, a value or a mixer's input there, such as `a20.kv0 reads`."""

    place: int
    name: str

    @property
    def reads(self) -> bool:
        return self.name.endswith(READS)


class PlacedRow(NamedTuple):
    """One edge at one place: indices of the place, the writer and the reader, and the effect in units of the metric."""

    place: int
    writer: int
    reader: int
    effect: float

    def ends(self, graph: Graph) -> tuple[Spot, Spot]:
        """Return the spots where the edge starts and ends."""
        read = graph.reader_names[self.reader].partition("<")[0] + READS
        end = read if graph.reader(self.reader).kind in ("k", "v", "mixer") else served(graph, self.reader)[0]
        return Spot(self.place, graph.writer_names[self.writer]), Spot(self.place, end)


class Rank(NamedTuple):
    """A row of the drawing: its layer, whether it is the layer's lowest row, and its boxes in the graph's order."""

    layer: int
    first: bool
    names: tuple[str, ...]


class Pen(NamedTuple):
    """Width in points, and opacity from 0 to 1."""

    width: float
    opacity: float


def known(value: float | None) -> float | None:
    """Return the value, or None for NaN and infinity, which cannot be drawn."""
    return value if value is not None and math.isfinite(value) else None


def arrows(graph: Graph, rows: Iterable[EdgeRow]) -> list[Arrow]:
    """Return the circuit's edges as arrows, weakest first; ties keep the given order."""
    clean = [EdgeRow(row.writer, row.reader, known(row.estimate), known(row.exact)) for row in rows]
    largest = max((abs(row.effect) for row in clean if row.effect is not None), default=0.0)
    result = []
    for row in clean:
        edge, kind = graph.edge_name(row.writer, row.reader), graph.reader(row.reader).kind
        source, target = graph.writer_names[row.writer], graph.reader_names[row.reader].partition("<")[0]
        share = None if row.effect is None or not largest else math.sqrt(abs(row.effect) / largest)
        result.append(Arrow(edge, source, target, kind, row.estimate, row.exact, row.effect, share))
    return sorted(result, key=lambda arrow: arrow.share or 0.0)


def folded(drawn: Iterable[Arrow], most: int = MOST_FOLDED) -> tuple[list[Arrow], int]:
    """Return the strongest `most` arrows folded by layer, weakest first, and the number of all folded arrows."""
    bundles = defaultdict(list)
    for arrow in drawn:
        bundles[arrow.source.partition(".")[0], arrow.target.partition(".")[0]].append(arrow)
    sums = {ends: sum(abs(arrow.effect or 0.0) for arrow in inside) for ends, inside in bundles.items()}
    order = sorted(bundles, key=lambda ends: (-sums[ends], -len(bundles[ends])))
    largest, result = max(sums.values(), default=0.0), []
    for ends in reversed(order[:most]):
        inside, net = bundles[ends], sum(arrow.effect or 0.0 for arrow in bundles[ends])
        kinds, best = {arrow.kind for arrow in inside}, inside[-1]
        kind = best.kind if len(kinds) == 1 else "mlp"
        exact = net if all(arrow.measured for arrow in inside) else None
        share = math.sqrt(sums[ends] / largest) if largest else None
        name = " to ".join(ends)
        said = f"{name}\n{count(len(inside), 'edge')}, sum {signed(net)}, of magnitudes {sums[ends]:.3g}"
        said += f"\nstrongest {best.edge} {signed(best.effect)}"
        result.append(Arrow(name, *ends, kind, None, exact, net, share, said))
    return result, len(bundles)


def joints(graph: Graph, rows: Iterable[EdgeRow], nodes: Iterable[str]) -> list[tuple[str, str]]:
    """Return every pair (shared key/value head, query head of its group) in the circuit, in the graph's order."""
    inside = set(nodes)
    pairs: dict[tuple[str, str], None] = {}  # an ordered set
    for reader in sorted({row.reader for row in rows}):
        if graph.group > 1 and graph.reader(reader).kind in ("k", "v"):
            shared = graph.reader_names[reader].partition("<")[0]
            pairs |= {(shared, head): None for head in fed(graph, reader, inside)}
    return list(pairs)


def ranks(graph: Graph, nodes: Iterable[str], drawn: Iterable[Arrow]) -> list[Rank]:
    """Return the rows of boxes from `input` to `logits`, without empty rows."""
    rows: dict[tuple[int, int], list[str]] = {}
    for name in nodes:
        attributes = attributes_of(graph, name)
        level = 2 if attributes["kind"] == "mlp" and not graph.parallel else 1
        rows.setdefault((attributes["layer"], level), []).append(name)
    for name in sorted({arrow.target for arrow in drawn if ".kv" in arrow.target}, key=_number):
        rows.setdefault((_number(name)[0], 0), []).append(name)
    lowest = {layer: level for layer, level in sorted(rows, reverse=True)}
    return [Rank(layer, level == lowest[layer], tuple(names)) for (layer, level), names in sorted(rows.items())]


def attributes_of(graph: Graph, name: str) -> dict[str, Any]:
    """Return `kind`, `layer` and, for heads and spots that read, `head` of anything drawn as a box.

    name: of a node, a shared key/value head (`a3.kv0`), a spot that reads (`a3.kv0 reads`) or a layer's heads (`a3`).
    """
    if name.endswith(READS):
        layer, _, unit = name.removesuffix(READS)[1:].partition(".")
        return {"kind": "kv", "layer": int(layer), "head": int(unit.strip("hkv") or 0)}
    together = re.fullmatch(r"a(\d+)(\.kv\d+)?", name)
    if together is None:
        return node_attributes(graph, name)
    return {"kind": "kv" if together[2] else "head", "layer": int(together[1])}


def pen(share: float | None, n_edges: int) -> Pen:
    """Return an arrow's width and opacity; the more edges there are, the thinner and fainter are the weak ones."""
    crowd = min(max((n_edges - 30) / 270, 0.0), 1.0)  # 0 for a small circuit, 1 from 300 edges on
    share = 0.4 if share is None else share
    thin, wide, faint = 0.9 - 0.5 * crowd, 4.4 - 0.6 * crowd, 0.85 - 0.42 * crowd
    return Pen(thin + (wide - thin) * share, faint + (1 - faint) * share)


def signed(value: float | None) -> str:
    """Return `+0.123` or `-1.2e-05`, or a dash for None."""
    return "–" if value is None else f"{value:+.3g}"


def describe(arrow: Arrow) -> str:
    """Return an arrow's tooltip: its name, estimate and exact effect in three lines, or `said`."""
    if arrow.said:
        return arrow.said
    exact = signed(arrow.exact) if arrow.measured else "not measured"
    return f"{arrow.edge}\nestimate {signed(arrow.estimate)}\nexact {exact}"


def _number(shared: str) -> tuple[int, int]:
    """Return (layer, head) of the name `a{layer}.kv{head}`."""
    layer, _, head = shared[1:].partition(".kv")
    return int(layer), int(head)
