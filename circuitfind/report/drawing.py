"""The circuit as an SVG picture made in Python: no Graphviz needed, coloured by the page's style sheet.

The same boxes, arrows and pens as in Graphviz's drawing (`export.picture`), placed by `report.layout`. Colours, dark
mode and what happens on hover belong to the page: the SVG carries classes (`arrow q opposes`, `box head`) and names
(`data-edge`, `data-name`), strongest arrows last, and says every number in a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from circuitfind.export.graphs import EdgeRow, node_attributes
from circuitfind.export.picture import Arrow, Rank, arrows, describe, joints, pen, ranks
from circuitfind.graph import Graph
from circuitfind.report.layout import BOX_HEIGHT, XY, Placement, curve, layout

MARGIN, LABELS = 14.0, 54.0  # around the drawing; the layer labels' column at its left
KV_HEIGHT = 16.0


def draw(graph: Graph, rows: Sequence[EdgeRow], nodes: Sequence[str]) -> str:
    """SVG text of the circuit; of an empty one, `input` and `logits` with a line that says so."""
    drawn = arrows(graph, rows)
    levels = ranks(graph, nodes if drawn else ["input", "logits"], drawn)
    stubs = joints(graph, rows, nodes)
    widths = {name: _width(name) for rank in levels for name in rank.names}
    lane = 6 + 10 * max(0.0, 1 - len(drawn) / 60)  # a small circuit has room
    plan = layout([rank.names for rank in levels], widths, _links(drawn, stubs), lane)
    width = max(plan.width, 120.0) + LABELS + 2 * MARGIN
    height = plan.height + 2 * MARGIN
    zoom = 1 + 0.4 * max(0.0, 1 - len(drawn) / 60)
    kinds = {name: _kind(graph, name) for rank in levels for name in rank.names}
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width * zoom:.0f}" height="{height * zoom:.0f}"'
    parts = [
        f'<svg class="circuit" {size} role="group" aria-label="Circuit of {len(drawn)} edges">',
        *_bands(graph, levels, plan, width),
        f'<g transform="translate({MARGIN + LABELS:.0f} {MARGIN:.0f})">',
        *(_stub(plan, kinds, pair) for pair in stubs),
        *_arrows(drawn, plan, kinds, lane),
        *(_box(name, kinds[name], plan.boxes[name]) for rank in levels for name in rank.names),
        "</g>",
    ]
    if not drawn:
        parts.append(f'<text class="note" x="{width / 2:.0f}" y="{height / 2:.0f}">empty circuit: no edges</text>')
    return "\n".join([*parts, "</svg>"])


def _kind(graph: Graph, name: str) -> str:
    return "kv" if ".kv" in name else str(node_attributes(graph, name)["kind"])


def _width(name: str) -> float:
    return max(20 + 7.2 * len(name), 42.0)


def _links(drawn: Sequence[Arrow], stubs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], tuple[int, float]]:
    """How many arrows run between two boxes, and how hard they pull them together."""
    links: dict[tuple[str, str], tuple[int, float]] = {pair: (1, 6.0) for pair in stubs}
    for arrow in drawn:
        count, weight = links.get((arrow.source, arrow.target), (0, 0.0))
        links[arrow.source, arrow.target] = (count + 1, weight + 1 + 6 * (arrow.share or 0))
    return links


def _bands(graph: Graph, levels: Sequence[Rank], plan: Placement, width: float) -> list[str]:
    """A strip behind each layer with its label."""
    by_layer: dict[int, list[float]] = {}
    for rank, y in zip(levels, plan.heights, strict=True):
        if 0 <= rank.layer < graph.n_layers:
            by_layer.setdefault(rank.layer, []).append(y + MARGIN)
    parts = []
    for layer, heights in sorted(by_layer.items()):
        top, bottom = min(heights) - BOX_HEIGHT / 2 - 6, max(heights) + BOX_HEIGHT / 2 + 6
        parts.append(
            f'<rect class="band" x="0" y="{top:.1f}" width="{width:.0f}" height="{bottom - top:.1f}" rx="5"/>'
            f'<text class="layer" x="10" y="{(top + bottom) / 2:.1f}">layer {layer}</text>'
        )
    return parts


def _box(name: str, kind: str, at: XY) -> str:
    width, height = _width(name), _height(kind)
    radius = {"head": height / 2, "kv": 2.0}.get(kind, 6.0)
    return (
        f'<g class="box {kind}" data-name="{escape(name)}" tabindex="-1">'
        f'<rect x="{at.x - width / 2:.1f}" y="{at.y - height / 2:.1f}" width="{width:.1f}" height="{height:.0f}"'
        f' rx="{radius:.0f}"/><text x="{at.x:.1f}" y="{at.y:.1f}">{escape(name)}</text></g>'
    )


def _height(kind: str) -> float:
    return KV_HEIGHT if kind == "kv" else BOX_HEIGHT


def _stub(plan: Placement, kinds: Mapping[str, str], pair: tuple[str, str]) -> str:
    start, end = plan.boxes[pair[0]], plan.boxes[pair[1]]
    points = [XY(start.x, start.y - KV_HEIGHT / 2), XY(end.x, end.y + _height(kinds[pair[1]]) / 2)]
    return f'<path class="stub" data-from="{pair[0]}" data-to="{pair[1]}" d="{curve(points)[0]}"/>'


def _arrows(drawn: Sequence[Arrow], plan: Placement, kinds: Mapping[str, str], lane: float) -> list[str]:
    """Every arrow, weakest first."""
    paths = _lanes(drawn, plan, lane)
    leave = _ports(plan, kinds, {i: (arrow.source, paths[i][1].x) for i, arrow in enumerate(drawn)})
    enter = _ports(plan, kinds, {i: (arrow.target, paths[i][-2].x) for i, arrow in enumerate(drawn)})
    parts = []
    for i, arrow in enumerate(drawn):
        width, opacity = pen(arrow.share, len(drawn))
        long, half = 4.5 + 1.5 * width, 2.0 + 0.95 * width
        start, end = plan.boxes[arrow.source], plan.boxes[arrow.target]
        foot = XY(enter[i], end.y + _height(kinds[arrow.target]) / 2 + long)
        data, slope = curve([XY(leave[i], start.y - BOX_HEIGHT / 2), *paths[i][1:-1], foot])
        norm = math.hypot(slope, 1.0)
        dx, dy = -slope / norm, -1 / norm  # upwards: y falls
        corners = ((foot.x + dx * long, foot.y + dy * long), (foot.x - dy * half, foot.y + dx * half))
        last = (foot.x + dy * half, foot.y - dx * half)
        head = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (*corners, last)) + "Z"
        classes = f"arrow {arrow.kind}{' opposes' if arrow.opposes else ''}{' measured' if arrow.measured else ''}"
        parts.append(
            f'<g class="{classes}" data-edge="{escape(arrow.edge)}"'
            f' style="--w:{width:.2f};--o:{opacity:.2f}"><title>{escape(describe(arrow))}</title>'
            f'<path class="line" d="{data}"/><path class="tip" d="{head}"/></g>'
        )
    return parts


def _lanes(drawn: Sequence[Arrow], plan: Placement, lane: float) -> list[list[XY]]:
    """Each arrow's points; arrows between the same two boxes run side by side."""
    total: dict[tuple[str, str], int] = {}
    for arrow in drawn:
        total[arrow.source, arrow.target] = total.get((arrow.source, arrow.target), 0) + 1
    seen: dict[tuple[str, str], int] = {}
    paths = []
    for number in sorted(range(len(drawn)), key=lambda i: "qkv".find(drawn[i].kind)):
        pair = (drawn[number].source, drawn[number].target)
        shift = (seen.get(pair, 0) - (total[pair] - 1) / 2) * lane
        seen[pair] = seen.get(pair, 0) + 1
        paths.append((number, [XY(point.x + shift, point.y) for point in plan.paths[pair]]))
    return [path for _, path in sorted(paths, key=lambda item: item[0])]


def _ports(plan: Placement, kinds: Mapping[str, str], ends: Mapping[int, tuple[str, float]]) -> dict[int, float]:
    """x where each arrow touches its box: spread over the box in the order of where the arrows come from."""
    by_box: dict[str, list[tuple[float, int]]] = {}  # (x of the next point on its way, arrow)
    for arrow, (name, towards) in ends.items():
        by_box.setdefault(name, []).append((towards, arrow))
    result = {}
    for name, touching in by_box.items():
        room = _width(name) - (BOX_HEIGHT if kinds[name] == "head" else 14)
        step = min(7.0, room / max(len(touching) - 1, 1))
        for i, (_, arrow) in enumerate(sorted(touching)):
            result[arrow] = plan.boxes[name].x + (i - (len(touching) - 1) / 2) * step
    return result
