"""A comparison as tables of text: for the terminal and for the Markdown report alike."""

from __future__ import annotations

import math
from typing import NamedTuple

from circuitfind.comparison.result import Comparison, Entry

Row = list[str]
SOME_EFFECT = 0.05  # of faithfulness
SHOWN_OVERLAP = 0.05  # of all edges: the overlap at the size nearest to this part is shown


class Text(NamedTuple):
    """A table: a title, headings, rows; the first column is text, the others are numbers."""

    title: str
    headings: Row
    rows: list[Row]

    @property
    def width(self) -> int:
        """Characters of a line, with two between columns and two before the first."""
        columns = zip(self.headings, *self.rows, strict=True)
        return sum(2 + max(map(len, column)) for column in columns)


def summary(found: Comparison, intervals: bool = True) -> Text:
    """One line a method: areas, agreement, costs; best CPR first, refused methods left out."""
    headings = ["method", "CPR", "95%", "CMD", "95%"] if intervals else ["method", "CPR", "CMD"]
    if found.reference:
        headings += ["AUROC edges", "AUROC heads"]
    with_exact = any(entry.rank_correlation is not None for entry in found.ranked)
    headings += ["rho"] * with_exact + ["fwd", "bwd", "CPU s", "MB"]
    rows = []
    for entry in sorted(found.ranked, key=lambda entry: -entry.cpr):
        row = [entry.method]
        for value, ends in ((entry.cpr, entry.cpr_interval), (entry.cmd, entry.cmd_interval)):
            row += [_number(value), _range(ends)] if intervals else [_number(value)]
        if found.reference:
            row += [_number(entry.auroc), _number(entry.auroc_heads)]
        row += [_number(entry.rank_correlation)] * with_exact
        rows.append([*row, *_costs(entry)])
    return Text("Methods", headings, rows)


def faithfulness(found: Comparison, by: str = "absolute") -> Text:
    """One line a method: exact faithfulness at each size."""
    sizes = [f"{point.asked:,}" for point in found.ranked[0].absolute] if found.ranked else []
    rows = [
        [entry.method, *(_number(point.faithfulness, 2) for point in getattr(entry, by))]
        for entry in sorted(found.ranked, key=lambda entry: entry.cmd)
    ]
    how = "highest magnitude" if by == "absolute" else "highest score"
    return Text(f"Faithfulness of the edges of {how}, by number of edges", ["method", *sizes], rows)


def closest(found: Comparison) -> Text:
    """One line a size: the method whose circuit is nearest to the whole model."""
    rows = []
    for point, method in found.closest():
        who = method if point.faithfulness >= SOME_EFFECT else "none does anything"
        rows.append([f"{point.asked:,}", f"{point.fraction:.1%}", who, _number(point.faithfulness, 2)])
    return Text("Nearest to faithfulness 1", ["edges", "of all", "method", "faithfulness"], rows)


def overlap(found: Comparison) -> Text:
    """Jaccard similarities of the methods' circuits at one size."""
    if not found.overlap:
        return Text("Overlap", [], [])
    size = min(found.overlap, key=lambda n: abs(math.log(max(n, 1) / (SHOWN_OVERLAP * found.n_edges))))
    names = [entry.method for entry in found.ranked]
    rows = [[name, *(_number(value, 2) for value in row)] for name, row in zip(names, found.overlap[size], strict=True)]
    return Text(f"Overlap (Jaccard) of the circuits of {size:,} edges", ["", *names], rows)


def _costs(entry: Entry) -> Row:
    costs = entry.costs
    memory = "" if costs.memory is None else f"{costs.memory / 2**20:.0f}"
    return [_passes(costs.forwards), _passes(costs.backwards), f"{costs.cpu_seconds:.1f}", memory]


def _passes(count: float) -> str:
    return f"{count:,.0f}" if count >= 10 or count == int(count) else f"{count:.1f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None or math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"  # no -0.00


def _range(ends: tuple[float, float]) -> str:
    return "" if math.isnan(ends[0]) else f"{ends[0]:.2f} to {ends[1]:.2f}"
