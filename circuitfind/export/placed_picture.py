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

from circuitfind.export.arrows import READS, PlacedRow, Spot, attributes_of, signed
from circuitfind.export.graphs import served
from circuitfind.export.picture import FONT, NODES, look, quote
from circuitfind.graph import Graph

WIDTH, HEIGHT, GAP = 78, 52, 40  # of a box and a row, and between columns, in points
LEVELS = {"kv": 0, "mlp": 2}  # rows of a layer, all others between them


def source(graph: Graph, rows: Sequence[PlacedRow], places: Sequence[str], title: str | None = None) -> str:
    """Graphviz source; places without an edge are left out."""
    spots: dict[Spot, None] = {}  # an ordered set, as the next
    crossing: dict[tuple[Spot, str], None] = {}
    lines = []
    largest = max((abs(row.effect) for row in rows), default=1.0)
    for row in sorted(rows, key=lambda row: abs(row.effect)):
        start, end = row.ends(graph)
        crossing |= {(end, name): None for name in served(graph, row.reader)} if end.reads else {}
        spots |= {start: None, end: None}
        said = f"{graph.edge_name(row.writer, row.reader)}\n{places[row.place]}\nestimate {signed(row.effect)}"
        kind, share = graph.reader(row.reader).kind, math.sqrt(abs(row.effect) / largest)
        lines.append(f"{_id(start)} -> {_id(end)} [{look(kind, share, len(rows), said, row.effect < 0)}]")
    for shared, name in crossing:
        look_of = 'style=dotted arrowhead=vee color="#55606E" penwidth=1.3'
        lines += [f"{_id(shared)} -> {_id(spot)} [{look_of}]" for spot in spots if spot.name == name]
    return "\n".join(["digraph places {", *_settings(title), *_columns(graph, spots, places), *lines, "}", ""])


def _label(spot: Spot) -> str:
    return spot.name.removesuffix(READS) if ".kv" in spot.name else spot.name


def _id(spot: Spot) -> str:
    return quote(f"{_label(spot)} @ {spot.place}")


def _settings(title: str | None) -> Iterable[str]:
    font = f"fontname={quote(FONT)}"
    yield f'  layout=neato inputscale=72 splines=true bgcolor="#FFFFFF" pad=0.15 outputorder=edgesfirst {font}'
    yield f'  node [{font} fontsize=12 fontcolor="#1B2430" style=filled height=0.3 margin="0.07,0.03" penwidth=1.1]'
    yield "  edge [arrowsize=0.7]"
    if title:
        yield f"  label={quote(title)} labelloc=t fontsize=15"


def _columns(graph: Graph, spots: Iterable[Spot], places: Sequence[str]) -> Iterable[str]:
    """The boxes where they stand (dot would order the columns as it likes), with names of the columns and layers."""
    cells: dict[tuple[int, int, int], list[tuple[Spot, str]]] = {}  # by place, layer and row of the layer
    for spot in sorted(spots, key=_label):
        kind, layer = (attributes_of(graph, spot.name)[name] for name in ("kind", "layer"))
        cells.setdefault((spot.place, layer, LEVELS.get(kind, 1)), []).append((spot, kind))
    levels = sorted({cell[1:] for cell in cells})
    start = 0.0
    for place in sorted({cell[0] for cell in cells}):
        width = WIDTH * max(len(inside) for cell, inside in cells.items() if cell[0] == place)
        middle = start + width / 2
        yield _text(f"column {place}", places[place], middle, -HEIGHT, 13)
        for row, level in enumerate(levels):
            inside = cells.get((place, *level), [])
            for at, (spot, kind) in enumerate(inside):
                where = f'pos="{middle + WIDTH * (at - (len(inside) - 1) / 2):.0f},{HEIGHT * row}!"'
                told = f"label={quote(_label(spot))} tooltip={quote(f'{_label(spot)}, {places[place]}')}"
                yield f"  {_id(spot)} [{NODES.get(kind, NODES['end'])} {where} {told}]"
        start += width + GAP
    for row, (layer, _) in enumerate(levels):
        if 0 <= layer < graph.n_layers and (row == 0 or levels[row - 1][0] != layer):
            yield _text(f"row {row}", f"layer {layer}", -WIDTH, HEIGHT * row, 11)


def _text(name: str, text: str, x: float, y: float, size: int) -> str:
    plain = f'shape=plaintext style="" fontsize={size} fontcolor="#55606E"'
    return f'  {quote(name)} [{plain} label={quote(text)} pos="{x:.0f},{y:.0f}!"]'
