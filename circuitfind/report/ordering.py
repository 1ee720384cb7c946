"""Layered drawing, first half: which box and which passing arrow stands where in its rank, from left to right.

The method of Sugiyama et al. (1981), as in Graphviz's dot (Gansner et al. 1993):

1. A *slot* is a place in a rank: a box, or a point where a long arrow passes through. Arrows between the same two boxes
   share their slots.
2. Sweeps up and down sort each rank by the mean position of its neighbours in the rank just sorted (barycentres).
3. Of all orders met, the one with the fewest crossings is kept.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

SWEEPS = 24


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
        """A new slot at the right end of a rank."""
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
    """Boxes and passing points of every rank, ordered.

    Args:
        levels: names of the boxes, rank by rank from the bottom.
        widths: width of each box.
        links: `{(source, target): (width it needs where it passes, weight)}`, source below target.
    """
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
    """Sweeps until the crossings stop falling; leaves the best order in `layers.rows`."""
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
        crossings = _crossings(layers, place)
        since += 1
        if crossings < best:
            best, best_rows, since = crossings, [list(row) for row in layers.rows], 0
        if since == 6:
            break
    layers.rows = best_rows


def _number(row: Sequence[int], place: list[float]) -> None:
    """Places in 0..1, so that ranks of different sizes compare."""
    for i, slot in enumerate(row):
        place[slot] = (i + 0.5) / len(row)


def _mean(neighbours: Sequence[tuple[int, float]], place: Sequence[float], default: float) -> float:
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
