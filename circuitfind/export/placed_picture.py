"""Edges at places as a drawing: a column for each position or span, rows for each layer.

1. A node is drawn in every column where it writes, or where it reads a query or (an MLP or `logits`) its input.
2. An edge is an arrow within a column. An edge into a key or value ends at a small box, such as `a20.kv0`, in the
   column where it is read.
3. Dotted lines lead from this box to the head in every column where the head is drawn: attention moves information
   between tokens along them.

Colours, widths and dashes of arrows are those of `picture.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from circuitfind.export.arrows import READS, PlacedRow, Spot, attributes_of, signed
from circuitfind.export.graphs import served
from circuitfind.export.picture import FONT, NODES, look, quote
from circuitfind.graph import Graph

WIDTH, HEIGHT, GAP = 78, 52, 40  # in points: a box's width, a row's height, the gap between columns
LEVELS = {"kv": 0, "mlp": 2}  # a layer's rows from the bottom; all other kinds are in row 1


def source(graph: Graph, rows: Sequence[PlacedRow], places: Sequence[str], title: str | None = None) -> str:
    """Return Graphviz source of the edges; places without an edge are left out."""
    spots: dict[Spot, None] = {}  # an ordered set, like `crossing`
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
    """Yield lines for the boxes and the names of columns and layers, at fixed positions (dot would reorder columns)."""
    cells: dict[tuple[int, int, int], list[tuple[Spot, str]]] = {}  # (place, layer, the layer's row) -> boxes
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
