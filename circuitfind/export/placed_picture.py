"""Edges at their places as a drawing: a column for each position or span, a row for each layer.

1. A node stands in every column where it writes, or reads its query or (an MLP) its input: `a20.h0` under "end".
2. An edge is an arrow within a column. One into a key or value ends at a small box of its own, `a20.kv0`, in the column
   where it is read.
3. From there a dotted line leads to the head in each column where it stands: there attention carries something from
   token to token.

Colours, widths and dashes of arrows are those of `picture.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from circuitfind.export.arrows import pen, signed
from circuitfind.export.graphs import node_attributes
from circuitfind.export.picture import COLORS, FONT, NODES, hollow, quote
from circuitfind.graph import Graph

WIDTH, HEIGHT, GAP = 78, 52, 40  # of a box and a row, and between columns, in points


class PlacedRow(NamedTuple):
    """One edge at one place: indices, and its effect in units of the metric."""

    place: int
    writer: int
    reader: int
    effect: float


class _Box(NamedTuple):
    """One box; `level` orders a layer's rows: 0 for keys and values, 1 for heads, 2 for MLPs."""

    place: int
    layer: int
    level: int
    name: str
    kind: str

    @property
    def id(self) -> str:
        return quote(f"{self.name} @ {self.place}")


def source(graph: Graph, rows: Sequence[PlacedRow], places: Sequence[str], title: str | None = None) -> str:
    """Graphviz source; places without an edge are left out."""
    boxes: dict[_Box, None] = {}  # an ordered set, as the next
    crossing: dict[tuple[_Box, str], None] = {}
    lines = []
    largest = max((abs(row.effect) for row in rows), default=1.0)
    for place, writer, reader, effect in sorted(rows, key=lambda row: abs(row.effect)):
        kind, served = graph.reader(reader).kind, [graph.node_names[node] for node in graph.serves[reader].nonzero()[0]]
        start = _node(graph, place, graph.writer_names[writer])
        end = _node(graph, place, served[0]) if kind in ("q", "mlp", "logits") else _read(graph, place, reader)
        if end.kind == "kv":
            crossing |= {(end, name): None for name in served}
        boxes |= {start: None, end: None}
        width, opacity = pen(math.sqrt(abs(effect) / largest), len(rows))
        told = quote(f"{graph.edge_name(writer, reader)}\n{places[place]}\nestimate {signed(effect)}")
        look = f'color="{COLORS[kind]}{round(opacity * 255):02X}" penwidth={width:.2f} {hollow(width)} tooltip={told}'
        lines.append(f"{start.id} -> {end.id} [{look}{' style=dashed' if effect < 0 else ''}]")
    for shared, name in crossing:
        ends = (box for box in boxes if box.name == name)
        lines += [f'{shared.id} -> {box.id} [style=dotted arrowhead=vee color="#55606E" penwidth=1.3]' for box in ends]
    return "\n".join(["digraph places {", *_settings(title), *_columns(graph, boxes, places), *lines, "}", ""])


def _node(graph: Graph, place: int, name: str) -> _Box:
    attributes = node_attributes(graph, name)
    return _Box(place, attributes["layer"], 2 if attributes["kind"] == "mlp" else 1, name, attributes["kind"])


def _read(graph: Graph, place: int, reader: int) -> _Box:
    """The box of a key or value (or of what a mixer reads)."""
    name = graph.reader_names[reader].partition("<")[0]
    return _Box(place, graph.reader(reader).layer, 0, name if ".kv" in name else f"{name} reads", "kv")


def _settings(title: str | None) -> Iterable[str]:
    font = f"fontname={quote(FONT)}"
    yield f'  layout=neato inputscale=72 splines=true bgcolor="#FFFFFF" pad=0.15 outputorder=edgesfirst {font}'
    yield f'  node [{font} fontsize=12 fontcolor="#1B2430" style=filled height=0.3 margin="0.07,0.03" penwidth=1.1]'
    yield "  edge [arrowsize=0.7]"
    if title:
        yield f"  label={quote(title)} labelloc=t fontsize=15"


def _columns(graph: Graph, boxes: Iterable[_Box], places: Sequence[str]) -> Iterable[str]:
    """The boxes where they stand (dot would order the columns as it likes), with names of the columns and layers."""
    cells: dict[tuple[int, int, int], list[_Box]] = {}
    for box in sorted(boxes):
        cells.setdefault(box[:3], []).append(box)
    levels = sorted({cell[1:] for cell in cells})
    start = 0.0
    for place in sorted({cell[0] for cell in cells}):
        width = WIDTH * max(len(inside) for cell, inside in cells.items() if cell[0] == place)
        middle = start + width / 2
        yield _text(f"column {place}", places[place], middle, -HEIGHT, 13)
        for row, level in enumerate(levels):
            inside = cells.get((place, *level), [])
            for at, box in enumerate(inside):
                where = f'pos="{middle + WIDTH * (at - (len(inside) - 1) / 2):.0f},{HEIGHT * row}!"'
                told = quote(f"{box.name}, {places[place]}")
                yield f"  {box.id} [{NODES.get(box.kind, NODES['end'])} {where} label={quote(box.name)} tooltip={told}]"
        start += width + GAP
    for row, (layer, _) in enumerate(levels):
        if 0 <= layer < graph.n_layers and (row == 0 or levels[row - 1][0] != layer):
            yield _text(f"row {row}", f"layer {layer}", -WIDTH, HEIGHT * row, 11)


def _text(name: str, text: str, x: float, y: float, size: int) -> str:
    look = f'shape=plaintext style="" fontsize={size} fontcolor="#55606E"'
    return f'  {quote(name)} [{look} label={quote(text)} pos="{x:.0f},{y:.0f}!"]'
