"""What `circuitfind show` prints of each kind of result: what it is, and its first rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from circuitfind.cli import shown
from circuitfind.cli.opened import SavedChecks, SavedCurve
from circuitfind.cli.output import Output
from circuitfind.cli.words import count, fixed, interval

if TYPE_CHECKING:
    from circuitfind.attribution.direct import DirectEffects
    from circuitfind.circuit import Circuit
    from circuitfind.comparison.result import Comparison
    from circuitfind.patching.path import PathEffects
    from circuitfind.patching.sweep import Sweep
    from circuitfind.scores import NodeScores, Scores

ROWS = 10


class Kind(NamedTuple):
    """A kind of result: its name, and its table."""

    name: str
    table: Callable[[Any, Output], None]


def kind(found: Any) -> Kind:
    """That of an opened file."""
    return KINDS[type(found).__name__]


def table(found: Any, out: Output) -> None:
    """What it is, and its first rows."""
    made, record = kind(found), found.record
    edges = f"{count(len(found), 'edge')} of {found.graph.n_edges:,}" if made.name == "circuit" else ""
    out.facts([("holds", made.name), ("model", record.model), ("behaviour", record.task), ("edges", edges)])
    out.say()
    made.table(found, out)


def _strongest(heading: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]], out: Output) -> None:
    """The first rows, a name and its numbers each."""
    best = rows[:ROWS]
    digits = shown.digits_for(value for _, values in best for value in values)
    sides = [(heading, "left"), *((name, "right") for name in columns)]
    out.table(
        f"The strongest {len(best)}", sides, [(name, *(shown.effect(v, digits) for v in vs)) for name, vs in best]
    )


def _sweep(found: Sweep, out: Output) -> None:
    rows = [(f"{row.name} {row.position}".strip(), [row.effect]) for row in found.top(ROWS)]
    _strongest("place", ["effect"], rows, out)
    if found.by_position:
        shown.positions(out)


def _scores(found: Scores, out: Output) -> None:
    names = [found.graph.edge_name(u, r) for u, r in found.ranked()[:ROWS].tolist()]
    _strongest("edge", [_heading(found)], [(name, [found[name]]) for name in names], out)


def _nodes(found: NodeScores, out: Output) -> None:
    rows = [(name, [float(np.sum(found[name]))]) for name in found.top(ROWS)]
    _strongest("node", [_heading(found)], rows, out)


def _heading(found: Scores | NodeScores) -> str:
    return "effect" if found.record.is_effect else "score"


def _direct(found: DirectEffects, out: Output) -> None:
    _nodes(found.scores, out)


def _paths(found: PathEffects, out: Output) -> None:
    shown.paths(found, ROWS, "absolute", out)


def _circuit(found: Circuit, out: Output) -> None:
    known = sorted((row for row in found.rows() if row.effect is not None), key=lambda row: -abs(row.effect or 0))
    rows = [
        (
            found.graph.edge_name(row.writer, row.reader),
            [math.nan if value is None else value for value in (row.estimate, row.exact)],
        )
        for row in known[:ROWS]
    ]
    if rows:
        _strongest("edge", ["estimate", "exact"], rows, out)


def _checks(found: SavedChecks, out: Output) -> None:
    rows = sorted(found.points, key=lambda row: -abs(row[2]))
    _strongest("edge", ["estimate", "exact"], [(row[0], row[1:3]) for row in rows], out)


def _curve(found: SavedCurve, out: Output) -> None:
    rows = [
        (f"{point.asked:,}", f"{point.n_edges:,}", fixed(point.faithfulness), interval(point.interval))
        for point in found.points
    ]
    columns = [(name, "right") for name in ("asked", "kept", "faithfulness", "95% interval")]
    out.table("Faithfulness by number of edges", columns, rows)


def _comparison(found: Comparison, out: Output) -> None:
    from circuitfind.comparison import result as tables

    summary = tables.summary(found, intervals=False)
    columns = [(heading, "right" if at else "left") for at, heading in enumerate(summary.headings)]
    out.table(summary.title, columns, summary.rows)


KINDS = {
    "Sweep": Kind("sweep", _sweep),
    "Scores": Kind("edge scores", _scores),
    "NodeScores": Kind("node scores", _nodes),
    "Circuit": Kind("circuit", _circuit),
    "PathEffects": Kind("effects of paths", _paths),
    "DirectEffects": Kind("direct effects", _direct),
    "Approximation": Kind("approximation", shown.approximation),
    "AttentionPattern": Kind("attention pattern", shown.attention),
    "SavedChecks": Kind("verification", _checks),
    "SavedCurve": Kind("curve", _curve),
    "Comparison": Kind("comparison", _comparison),
}
