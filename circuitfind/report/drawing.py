"""The circuit as an SVG picture made in Python, without Graphviz.

The same boxes, arrows and pens as in Graphviz's drawing (`export.picture`), placed by `report.layout`. Colours, dark
mode and hovering belong to the page: the SVG carries classes (`arrow q opposes`, `box head`), names (`data-edge`,
`data-name`) and every number in a tooltip; the strongest arrows come last.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
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
    levels, stubs = ranks(graph, nodes if drawn else ["input", "logits"], drawn), joints(graph, rows, nodes)
    kinds = {name: _kind(graph, name) for rank in levels for name in rank.names}
    small = max(0.0, 1 - len(drawn) / 60)  # a small circuit has room
    lane, zoom = 6 + 10 * small, 1 + 0.4 * small
    plan = layout([rank.names for rank in levels], {name: _width(name) for name in kinds}, _links(drawn, stubs), lane)
    width, height = max(plan.width, 120.0) + LABELS + 2 * MARGIN, plan.height + 2 * MARGIN
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width * zoom:.0f}" height="{height * zoom:.0f}"'
    parts = [
        f'<svg class="circuit" {size} role="group" aria-label="Circuit of {len(drawn)} edges">',
        *_bands(graph, levels, plan, width),
        f'<g transform="translate({MARGIN + LABELS:.0f} {MARGIN:.0f})">',
        *(_stub(plan, kinds, pair) for pair in stubs),
        *_arrows(drawn, plan, kinds, lane),
        *(_box(name, kind, plan.boxes[name]) for name, kind in kinds.items()),
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
    by_layer, parts = defaultdict(list), []
    for rank, y in zip(levels, plan.heights, strict=True):
        if 0 <= rank.layer < graph.n_layers:
            by_layer[rank.layer].append(y + MARGIN)
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
        steps = ((dx * long, dy * long), (-dy * half, dx * half), (dy * half, -dx * half))
        head = "M" + "L".join(f"{foot.x + x:.1f} {foot.y + y:.1f}" for x, y in steps) + "Z"
        classes = f"arrow {arrow.kind}{' opposes' if arrow.opposes else ''}{' measured' if arrow.measured else ''}"
        parts.append(
            f'<g class="{classes}" data-edge="{escape(arrow.edge)}"'
            f' style="--w:{width:.2f};--o:{opacity:.2f}"><title>{escape(describe(arrow))}</title>'
            f'<path class="line" d="{data}"/><path class="tip" d="{head}"/></g>'
        )
    return parts


def _lanes(drawn: Sequence[Arrow], plan: Placement, lane: float) -> list[list[XY]]:
    """Each arrow's points; arrows between the same two boxes run side by side."""
    pairs = [(arrow.source, arrow.target) for arrow in drawn]
    total, seen, paths = Counter(pairs), Counter[tuple[str, str]](), {}
    for number in sorted(range(len(drawn)), key=lambda i: "qkv".find(drawn[i].kind)):
        pair = pairs[number]
        shift = (seen[pair] - (total[pair] - 1) / 2) * lane
        seen[pair] += 1
        paths[number] = [XY(point.x + shift, point.y) for point in plan.paths[pair]]
    return [paths[number] for number in range(len(drawn))]


def _ports(plan: Placement, kinds: Mapping[str, str], ends: Mapping[int, tuple[str, float]]) -> dict[int, float]:
    """x where each arrow touches its box: spread over the box in the order of where the arrows come from."""
    by_box, result = defaultdict(list), {}
    for arrow, (name, towards) in ends.items():
        by_box[name].append((towards, arrow))
    for name, touching in by_box.items():
        room = _width(name) - (BOX_HEIGHT if kinds[name] == "head" else 14)
        step = min(7.0, room / max(len(touching) - 1, 1))
        for i, (_, arrow) in enumerate(sorted(touching)):
            result[arrow] = plan.boxes[name].x + (i - (len(touching) - 1) / 2) * step
    return result
