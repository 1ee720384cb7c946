"""The circuit as an SVG picture, made in Python without Graphviz, that fits a window however deep the model is.

1. Each layer is a row of its heads and its MLP, in several rows if it is wider than the window. A dashed line replaces
   layers without a node.
2. In a grouped-query model, a shared key/value head and the heads that it serves form one *block*, with the key/value
   head at the left. `report.layout` places blocks.
3. An arrow from a head to the MLP of its own layer is an arc above the row; all others run upwards.
4. Where head names do not fit, they are shortened to `h3`: the layer is named at the side.

Arrows and line widths are those of the Graphviz drawing (`export.arrows`). The page sets colours, dark mode and
hovering: the SVG has only classes (`arrow q opposes`, `box head`), names (`data-edge`, `data-name`) and numbers in
tooltips. The strongest arrows are drawn last, on top.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

from circuitfind.export.arrows import Arrow, arrows, attributes_of, describe, joints, pen, ranks
from circuitfind.export.graphs import EdgeRow
from circuitfind.graph import Graph
from circuitfind.report.layout import BOX_HEIGHT, GAP, WIDE, XY, Placement, curve, layout

MARGIN, LABELS = 12.0, 54.0  # around the drawing; the layer labels' column at its left
BESIDE = 3.0  # between the boxes of a block


class Box(NamedTuple):
    """A node, or the inputs of a shared key/value head. `aside`: pixels from its block's centre to its own."""

    name: str
    kind: str
    label: str
    width: float
    aside: float = 0.0


class Block(NamedTuple):
    """Boxes side by side: a key/value head and the heads that it serves, or a single node."""

    boxes: tuple[Box, ...]
    width: float

    @property
    def name(self) -> str:
        return self.boxes[0].name

    @classmethod
    def of(cls, boxes: Sequence[Box]) -> Block:
        whole = sum(box.width + BESIDE for box in boxes) - BESIDE
        ends = [sum(box.width + BESIDE for box in boxes[: i + 1]) - BESIDE for i in range(len(boxes))]
        placed = (box._replace(aside=end - (box.width + whole) / 2) for box, end in zip(boxes, ends, strict=True))
        return cls(tuple(placed), whole)


class Row(NamedTuple):
    """A row of the drawing. `layer` is -1 for `input` and the number of layers for `logits`."""

    layer: int
    blocks: tuple[Block, ...]


def draw(graph: Graph, rows: Sequence[EdgeRow], nodes: Sequence[str], marks: Mapping[str, str] | None = None) -> str:
    """Return the circuit as SVG text; an empty circuit is `input` and `logits` with a note. `marks`: by edge name,
    a further class for its arrow."""
    drawn = arrows(graph, rows)
    levels = _rows(graph, nodes if drawn else ["input", "logits"], drawn, joints(graph, rows, nodes))
    blocks = [block for level in levels for block in level.blocks]
    home = {box.name: (block, box) for block in blocks for box in block.boxes}
    level = {block.name: i for i, row in enumerate(levels) for block in row.blocks}
    lane = min(16.0, max(1.5, 360 / max(len(drawn), 1)))  # a small circuit has room
    links: dict[tuple[str, str], tuple[int, float]] = {}
    for arrow in drawn:
        pair = home[arrow.source][0].name, home[arrow.target][0].name
        if level[pair[0]] < level[pair[1]]:
            count, weight = links.get(pair, (0, 0.0))
            links[pair] = count + 1, weight + 1 + 6 * (arrow.share or 0)
    widths = {block.name: block.width for block in blocks}
    plan = layout([[block.name for block in row.blocks] for row in levels], widths, links, lane)
    at = plan.boxes
    centres = {box.name: XY(at[block.name].x + box.aside, at[block.name].y) for block, box in home.values()}
    width, height = max(plan.width, 120.0) + LABELS + 2 * MARGIN, plan.height + 2 * MARGIN
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    parts = [
        f'<svg class="circuit" {size} role="group" aria-label="Circuit of {len(drawn)} edges">',
        *_bands(graph, levels, plan, width),
        f'<g transform="translate({MARGIN + LABELS:.0f} {MARGIN:.0f})">',
        *(_hull(block, plan.boxes[block.name]) for block in blocks if len(block.boxes) > 1),
        *_arrows(drawn, plan, home, centres, lane, marks or {}),
        *(_box(box, centres[box.name]) for _, box in home.values()),
        "</g>",
    ]
    if not drawn:
        parts.append(f'<text class="note" x="{width / 2:.0f}" y="{height / 2:.0f}">empty circuit: no edges</text>')
    return "\n".join([*parts, "</svg>"])


# -------------------------------------------------------------------- what stands where
def _rows(graph: Graph, nodes: Sequence[str], drawn: Sequence[Arrow], stubs: Iterable[tuple[str, str]]) -> list[Row]:
    """Rows from `input` to `logits`, without layers that have no node; wide layers take several rows."""
    shared = {head: key_value for key_value, head in stubs}
    layers = groupby(ranks(graph, nodes, drawn), key=lambda rank: rank.layer)
    names = [(layer, [name for rank in group for name in rank.names]) for layer, group in layers]
    whole = max(sum(_box_of(graph, name, True).width + GAP for name in row) for _, row in names) <= 1.4 * WIDE
    result = []
    for layer, row in names:
        members: dict[str, list[Box]] = {}
        for name in row:
            members.setdefault(shared.get(name, name), []).append(_box_of(graph, name, whole))
        line: list[Block] = []
        for block in map(Block.of, members.values()):
            if line and sum(other.width + GAP for other in line) + block.width > 1.4 * WIDE:
                result.append(Row(layer, tuple(line)))
                line = []
            line.append(block)
        result.append(Row(layer, tuple(line)))
    return result


def _box_of(graph: Graph, name: str, whole: bool) -> Box:
    kind = str(attributes_of(graph, name)["kind"])
    label = name if kind != "kv" and whole else name.rpartition(".")[2]
    return Box(name, kind, label, max(14 + 6.4 * len(label), 26.0))


def _bands(graph: Graph, levels: Sequence[Row], plan: Placement, width: float) -> list[str]:
    """A strip with a label behind each layer, and a line wherever layers are left out."""
    heights = defaultdict(list)
    for row, y in zip(levels, plan.heights, strict=True):
        heights[row.layer].append(y + MARGIN)
    parts, below = [], -1
    for layer, at in sorted(heights.items()):
        top, bottom = min(at) - BOX_HEIGHT / 2 - 3, max(at) + BOX_HEIGHT / 2 + 3
        if layer > below + 1:  # just below the strip
            which = f"layer {below + 1}" if layer == below + 2 else f"layers {below + 1} to {layer - 1}"
            line = f'x1="0" x2="{width:.0f}" y1="{bottom + 1:.1f}" y2="{bottom + 1:.1f}"'
            parts.append(f'<line class="fold" {line}><title>no node of {which}</title></line>')
        if 0 <= layer < graph.n_layers:
            parts.append(
                f'<rect class="band" x="0" y="{top:.1f}" width="{width:.0f}" height="{bottom - top:.1f}" rx="4"/>'
                f'<text class="layer" x="10" y="{(top + bottom) / 2:.1f}">layer {layer}</text>'
            )
        below = layer
    return parts


def _hull(block: Block, at: XY) -> str:
    left, top = at.x - block.width / 2 - 2, at.y - BOX_HEIGHT / 2 - 2
    size = f'width="{block.width + 4:.1f}" height="{BOX_HEIGHT + 4:.0f}"'
    return f'<rect class="block" x="{left:.1f}" y="{top:.1f}" {size} rx="7"/>'


def _box(box: Box, at: XY) -> str:
    radius = {"head": BOX_HEIGHT / 2, "kv": 2.0}.get(box.kind, 5.0)
    corner = f'x="{at.x - box.width / 2:.1f}" y="{at.y - BOX_HEIGHT / 2:.1f}"'
    return (
        f'<g class="box {box.kind}" data-name="{escape(box.name)}" tabindex="-1">'
        f'<rect {corner} width="{box.width:.1f}" height="{BOX_HEIGHT:.0f}" rx="{radius:.0f}"/>'
        f'<text x="{at.x:.1f}" y="{at.y:.1f}">{escape(box.label)}</text></g>'
    )


# -------------------------------------------------------------------- arrows
Homes = Mapping[str, tuple[Block, Box]]


def _arrows(
    drawn: Sequence[Arrow],
    plan: Placement,
    home: Homes,
    centres: Mapping[str, XY],
    lane: float,
    marks: Mapping[str, str],
) -> list[str]:
    paths = [_path(arrow, plan, home, centres, shift) for arrow, shift in zip(drawn, _shifts(drawn, lane), strict=True)]
    leave = _ports(home, centres, {i: (arrow.source, paths[i][1].x) for i, arrow in enumerate(drawn)})
    enter = _ports(home, centres, {i: (arrow.target, paths[i][-2].x) for i, arrow in enumerate(drawn)})
    gap = min((a - b for a, b in zip(plan.heights, plan.heights[1:], strict=False)), default=BOX_HEIGHT) - BOX_HEIGHT
    parts = []
    for i, arrow in enumerate(drawn):
        width, opacity = pen(arrow.share, len(drawn))
        long = min(4.5 + 1.5 * width, 0.7 * gap)
        half = min(2.0 + 0.95 * width, 0.6 * long)
        start, end = centres[arrow.source], centres[arrow.target]
        if start.y == end.y:  # an arc above the row
            top = start.y - BOX_HEIGHT / 2
            foot, rise = XY(enter[i], top - long), top - 1.6 * max(gap, long)
            sides = f"{leave[i]:.1f} {rise:.1f} {foot.x:.1f} {rise:.1f} {foot.x:.1f} {foot.y:.1f}"
            data = f"M{leave[i]:.1f} {top:.1f}C{sides}"
            slope, up = 0.0, -1
        else:
            foot, up = XY(enter[i], end.y + BOX_HEIGHT / 2 + long), 1
            data, slope = curve([XY(leave[i], start.y - BOX_HEIGHT / 2), *paths[i][1:-1], foot])
        norm = math.hypot(slope, 1.0)
        dx, dy = -slope / norm, -up / norm  # y falls upwards
        steps = ((dx * long, dy * long), (-dy * half, dx * half), (dy * half, -dx * half))
        tip = "M" + "L".join(f"{foot.x + x:.1f} {foot.y + y:.1f}" for x, y in steps) + "Z"
        said = {"opposes": arrow.opposes, "measured": arrow.measured, marks.get(arrow.edge, ""): True}
        classes = " ".join(["arrow", arrow.kind, *(name for name, holds in said.items() if name and holds)])
        parts.append(
            f'<g class="{classes}" data-edge="{escape(arrow.edge)}"'
            f' style="--w:{width:.2f};--o:{opacity:.2f}"><title>{escape(describe(arrow))}</title>'
            f'<path class="line" d="{data}"/><path class="tip" d="{tip}"/></g>'
        )
    return parts


def _path(arrow: Arrow, plan: Placement, home: Homes, centres: Mapping[str, XY], shift: float) -> list[XY]:
    """The points that an arrow passes through; within a row, only the centres of its two boxes."""
    pair = home[arrow.source][0].name, home[arrow.target][0].name
    between = [XY(point.x + shift, point.y) for point in plan.paths[pair][1:-1]] if pair in plan.paths else []
    return [centres[arrow.source], *between, centres[arrow.target]]


def _shifts(drawn: Sequence[Arrow], lane: float) -> list[float]:
    """The sideways shift of each arrow, in pixels, so that arrows between the same two boxes run side by side."""
    pairs = [(arrow.source, arrow.target) for arrow in drawn]
    total, seen, shifts = Counter(pairs), Counter[tuple[str, str]](), [0.0] * len(drawn)
    for number in sorted(range(len(drawn)), key=lambda i: "qkv".find(drawn[i].kind)):
        pair = pairs[number]
        shifts[number] = (seen[pair] - (total[pair] - 1) / 2) * lane
        seen[pair] += 1
    return shifts


def _ports(home: Homes, centres: Mapping[str, XY], ends: Mapping[int, tuple[str, float]]) -> dict[int, float]:
    """The x at which each arrow touches its box: arrows are spread over it, sorted by where their other ends lie."""
    by_box, result = defaultdict(list), {}
    for arrow, (name, towards) in ends.items():
        by_box[name].append((towards, arrow))
    for name, touching in by_box.items():
        box = home[name][1]
        room = box.width - (BOX_HEIGHT if box.kind == "head" else 10)
        step = min(7.0, room / max(len(touching) - 1, 1))
        for i, (_, arrow) in enumerate(sorted(touching)):
            result[arrow] = centres[name].x + (i - (len(touching) - 1) / 2) * step
    return result
