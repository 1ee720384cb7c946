"""Layered layout of a circuit: positions of its boxes and paths of its arrows.

Order within each rank (Sugiyama et al. 1981, as in Graphviz's dot, Gansner et al. 1993):

1. A *slot* is a place in a rank: a box, or a point that a long arrow passes through. Arrows between the same two boxes
   share their slots.
2. Sweeps up and down sort each rank by the mean position of each slot's neighbours in the rank just sorted
   (barycentres). The order with the fewest crossings is kept.

Coordinates:

3. Every slot is pulled towards the weighted mean of its neighbours. Passing points have the largest weights for each
   other, so that long arrows run straight. Each rank keeps its order and minimum distances: least squares under these
   constraints is an isotonic regression (pool adjacent violators), repeated in sweeps. A drawing narrower than a window
   is stretched, and in one that is too high the ranks move closer together (`WIDE`, `TALL`).
4. Between ranks an arrow is a monotone cubic (Fritsch and Carlson 1980) with x as a function of y.

Coordinates are in pixels, y grows downwards as in SVG; `input` is at the bottom.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

BOX_HEIGHT = 18.0
WIDE, TALL = 1180.0, 640.0  # room in a window
GAP, LEAST_GAP = 12.0, 8.0  # between boxes of a rank; between ranks
MOST_STRETCH = 2.2
SWEEPS, PULLS = 24, 40  # for the order, and for the coordinates
PINCH = 0.6  # of a lane: distance of arrows squeezed past a box
STIFFNESS = 0.4  # pull of a long arrow's lane, against 1 for the straight line


class XY(NamedTuple):
    x: float
    y: float


class Placement(NamedTuple):
    """Centres of the boxes, the points of every link from source to target, and the height of each rank's centre."""

    boxes: dict[str, XY]
    paths: dict[tuple[str, str], list[XY]]
    heights: list[float]
    width: float
    height: float


def layout(
    levels: Sequence[Sequence[str]],
    widths: Mapping[str, float],
    links: Mapping[tuple[str, str], tuple[int, float]],
    lane: float,
) -> Placement:
    """Place boxes and links; widths and distances are in pixels.

    Args:
        levels: names of the boxes, rank by rank from the bottom.
        links: `{(source, target): (arrows side by side, weight)}`, source in a lower rank than target.
        lane: distance of arrows that run side by side.
    """
    lanes = {pair: (lane * count, weight) for pair, (count, weight) in links.items()}
    layers = slots(levels, widths, lanes)
    x = _stretched(_columns(layers, lane))
    low = min((here - width / 2 for here, width in zip(x, layers.widths, strict=True)), default=0.0)
    high = max((here + width / 2 for here, width in zip(x, layers.widths, strict=True)), default=0.0)
    y = _heights(layers, x)
    level = {slot: rank for rank, row in enumerate(layers.rows) for slot in row}
    _relax(layers, x, [y[level[slot]] for slot in range(len(x))], PINCH * lane)
    points = [XY(here - low, y[level[slot]]) for slot, here in enumerate(x)]
    boxes = {name: points[slot] for name, slot in layers.boxes.items()}
    paths = {pair: [points[slot] for slot in chain] for pair, chain in layers.chains.items()}
    return Placement(boxes, paths, y, high - low, y[0] + BOX_HEIGHT / 2 if y else 0.0)


def _columns(layers: Slots, lane: float) -> list[float]:
    """The x of every slot, pulled by its neighbours within each rank's order and minimum distances."""
    x = [0.0] * len(layers.widths)
    for row in layers.rows:
        _place(layers, row, [0.0] * len(row), x, lane)
    force = (1, 2, 6)  # between boxes, between a passing point and a box, between points
    pull = [
        [(other, weight * force[(not box) + (not layers.is_box[other])]) for other, weight in (*below, *above)]
        for box, below, above in zip(layers.is_box, layers.below, layers.above, strict=True)
    ]
    for sweep in range(PULLS):
        for row in layers.rows if sweep % 2 else reversed(layers.rows):
            _place(layers, row, [_mean(pull[slot], x, x[slot]) for slot in row], x, lane)
    return x


def _stretched(x: list[float]) -> list[float]:
    """Stretch a narrow drawing to the window's width, by at most `MOST_STRETCH`."""
    span = max(x, default=0.0) - min(x, default=0.0)
    factor = min(max(WIDE / span, 1.0), MOST_STRETCH) if span else 1.0
    return [factor * here for here in x]


def _place(layers: Slots, row: Sequence[int], wishes: Sequence[float], x: list[float], lane: float) -> None:
    """Set x of a rank nearest to the wishes, in least squares, at the minimum distances: isotonic regression of
    wish - offset."""
    offset, offsets = 0.0, []
    for i, slot in enumerate(row):
        if i:
            gap = GAP if layers.is_box[slot] and layers.is_box[row[i - 1]] else min(0.8 * lane, 5.0)
            offset += (layers.widths[slot] + layers.widths[row[i - 1]]) / 2 + gap
        offsets.append(offset)
    if not any(wishes):  # the first placing: the row around 0
        wishes = [here - offset / 2 for here in offsets]
    pools: list[list[float]] = []  # mean, weight, members
    for slot, wish, here in zip(row, wishes, offsets, strict=True):
        weight = 3.0 if layers.is_box[slot] else 1.0
        pools.append([wish - here, weight, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, heavy, count = pools.pop()
            before, light, others = pools.pop()
            pools.append([(before * light + mean * heavy) / (light + heavy), light + heavy, others + count])
    means = [pool[0] for pool in pools for _ in range(int(pool[2]))]
    for slot, mean, here in zip(row, means, offsets, strict=True):
        x[slot] = mean + here


def _relax(layers: Slots, x: list[float], y: Sequence[float], pinch: float) -> None:
    """Straighten long arrows between the boxes that they pass, most of the way from their lanes (x and y by slot)."""
    lanes, room = list(x), _rooms(layers, x, pinch)
    for _ in range(PULLS):
        for chain in layers.chains.values():
            for before, slot, after in zip(chain, chain[1:], chain[2:], strict=False):
                rise = (y[slot] - y[before]) / (y[after] - y[before])
                straight = x[before] + (x[after] - x[before]) * rise
                low, high = room[slot]
                x[slot] = min(max((straight + STIFFNESS * lanes[slot]) / (1 + STIFFNESS), low), high)


def _rooms(layers: Slots, x: Sequence[float], pinch: float) -> dict[int, tuple[float, float]]:
    """The range of x for each passing point between the boxes beside it, `pinch` further off for each point between."""
    rooms = {}
    for row in layers.rows:
        lows, highs = _bounds(layers, row, x, pinch), _bounds(layers, row[::-1], x, -pinch)
        for slot, low, high in zip(row, lows, reversed(highs), strict=True):
            rooms[slot] = (min(low, x[slot]), max(high, x[slot]))
    return rooms


def _bounds(layers: Slots, row: Sequence[int], x: Sequence[float], pinch: float) -> list[float]:
    """How near each point may come to the last box before it in `row`; `pinch` is negative if `row` runs from right to
    left."""
    sign = 1 if pinch > 0 else -1
    edge, bounds = -sign * 1e9, []
    for slot in row:
        edge = x[slot] + sign * (layers.widths[slot] / 2 + 3) if layers.is_box[slot] else edge + pinch
        bounds.append(edge)
    return bounds


def _heights(layers: Slots, x: Sequence[float]) -> list[float]:
    """The y of every rank. Ranks are further apart where the arrows between them run further sideways; all gaps shrink
    if the drawing would not fit a window."""
    gaps = []
    for row in reversed(layers.rows[:-1]):
        moves = sorted(abs(x[slot] - x[upper]) for slot in row for upper, _ in layers.above[slot])
        sideways = moves[int(0.8 * len(moves))] if moves else 0.0
        gaps.append(min(34 + 0.14 * sideways + 0.05 * len(moves), 84))
    fitting = min(1.0, (TALL - BOX_HEIGHT * len(layers.rows)) / max(sum(gaps), 1.0))
    heights = [BOX_HEIGHT / 2]
    for gap in gaps:
        heights.append(heights[-1] + BOX_HEIGHT + max(gap * fitting, LEAST_GAP))
    return heights[::-1] if layers.rows else []


def curve(points: Sequence[XY]) -> tuple[str, float]:
    """Return SVG path data through points of decreasing y, and the slope dx/dy at its end."""
    slopes = [(b.x - a.x) / (b.y - a.y) for a, b in pairwise(points)]
    inner = [2 * (a * b) / (a + b) if a * b > 0 else 0.0 for a, b in pairwise(slopes)]
    tangents = [_tilt(slopes[0]), *inner, _tilt(slopes[-1])]
    text = [f"M{points[0].x:.1f} {points[0].y:.1f}"]
    for (a, b), (leave, arrive) in zip(pairwise(points), pairwise(tangents), strict=True):
        third = (b.y - a.y) / 3
        controls = ((a.x + leave * third, a.y + third), (b.x - arrive * third, b.y - third), b)
        text.append("C" + " ".join(f"{cx:.1f} {cy:.1f}" for cx, cy in controls))
    return "".join(text), tangents[-1]


def _tilt(slope: float) -> float:
    """Limit a slope dx/dy, so that arrows leave and arrive nearly vertically."""
    return min(max(slope * 0.3, -0.9), 0.9)


@dataclass
class Slots:
    """Ranks of slots. `rows[rank]`: slot numbers from left to right; `chains[(source, target)]`: those of a link."""

    rows: list[list[int]] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)
    is_box: list[bool] = field(default_factory=list)
    boxes: dict[str, int] = field(default_factory=dict)
    chains: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    below: list[list[tuple[int, float]]] = field(default_factory=list)  # (neighbour, weight) one rank down
    above: list[list[tuple[int, float]]] = field(default_factory=list)

    def add(self, rank: int, width: float, is_box: bool) -> int:
        number = len(self.widths)
        self.widths.append(width)
        self.is_box.append(is_box)
        self.below.append([])
        self.above.append([])
        self.rows[rank].append(number)
        return number


def slots(
    levels: Sequence[Sequence[str]], widths: Mapping[str, float], links: Mapping[tuple[str, str], tuple[float, float]]
) -> Slots:
    """Boxes and passing points of every rank, ordered. Arguments as for `layout`, but `links` has (width, weight)."""
    result = Slots(rows=[[] for _ in levels])
    level = {name: rank for rank, names in enumerate(levels) for name in names}
    for name, rank in level.items():
        result.boxes[name] = result.add(rank, widths[name], True)
    for (source, target), (width, weight) in links.items():
        passing = [result.add(rank, width, False) for rank in range(level[source] + 1, level[target])]
        chain = [result.boxes[source], *passing, result.boxes[target]]
        result.chains[source, target] = chain
        for lower, upper in pairwise(chain):
            result.above[lower].append((upper, weight))
            result.below[upper].append((lower, weight))
    _order(result)
    return result


def _order(layers: Slots) -> None:
    """Sort the ranks until the crossings stop decreasing; leave the best order in `layers.rows`."""
    place = [0.0] * len(layers.widths)
    for row in layers.rows:
        _number(row, place)
    best, best_rows, since = _crossings(layers, place), [list(row) for row in layers.rows], 0
    for sweep in range(SWEEPS):
        upwards = sweep % 2 == 0
        neighbours = layers.below if upwards else layers.above
        for row in layers.rows if upwards else reversed(layers.rows):
            wish = {slot: _mean(neighbours[slot], place, place[slot]) for slot in row}
            row.sort(key=wish.__getitem__)
            _number(row, place)
        since += 1
        if (crossings := _crossings(layers, place)) < best:
            best, best_rows, since = crossings, [list(row) for row in layers.rows], 0
        if since == 6:
            break
    layers.rows = best_rows


def _number(row: Sequence[int], place: list[float]) -> None:
    """Set the place of each slot in its rank, from 0 to 1, so that ranks of different sizes are comparable."""
    for i, slot in enumerate(row):
        place[slot] = (i + 0.5) / len(row)


def _mean(neighbours: Sequence[tuple[int, float]], place: Sequence[float], default: float) -> float:
    """The weighted mean place of the neighbours, or the default if there are none."""
    total = sum(weight for _, weight in neighbours)
    return sum(weight * place[slot] for slot, weight in neighbours) / total if total else default


def _crossings(layers: Slots, place: Sequence[float]) -> int:
    """Pairs of segments between neighbouring ranks that cross."""
    total = 0
    for row in layers.rows:
        seen: list[float] = []
        for slot in row:
            ends = sorted(place[upper] for upper, _ in layers.above[slot])
            total += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return total
