"""A comparison as one HTML page that opens offline: the summary, then a figure for each question.

1. How faithful are the circuits of each size? Curves of both selections.
2. Which ranking is best over all sizes? CPR and CMD with their intervals.
3. Do the methods find the same circuits? Overlap of each two, with a slider for the size.
4. What does it cost? CPR against CPU seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from circuitfind.comparison.result import Comparison, Entry, TextTable, remarks, said_of, shown_overlap, summary
from circuitfind.export.files import write_text
from circuitfind.plots import faithfulness
from circuitfind.plots.charts import bars, heat
from circuitfind.plots.page import page
from circuitfind.plots.style import PALETTE, Caption, Side, error_bars, figure, marks, safe

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from circuitfind.statistics import Interval

LEAST_SECONDS = 1e-3  # smallest value on the log scale
AREAS = {
    "cpr": "area under the faithfulness of the edges of highest score",
    "cmd": "area between the faithfulness of the edges of highest magnitude and 1; lower is better",
}


def write_page(found: Comparison, path: str | PathLike[str]) -> Path:
    """Write the page; a FileError if the file cannot be written or plotly is not installed."""
    title = f"{len(found.ranked)} methods on {found.record.task} in {found.record.model}"
    return write_text(path, page([*_parts(found)], title))


def _parts(found: Comparison) -> Iterator[Figure | str]:
    yield f"<p>{escape(said_of(found))}</p>"
    yield _table(summary(found))
    if found.ranked:
        yield from ("<h2>Faithfulness</h2>", *(faithfulness_by_size(found, by) for by in ("absolute", "signed")))
        yield from ("<h2>Over all sizes</h2>", area(found, "cpr"), area(found, "cmd"))
        yield from ("<h2>Overlap</h2>", overlap(found), "<h2>Cost</h2>", cost(found))
    for title, methods in remarks(found).items():
        rows = "".join(f"<li>{escape(method)}: {escape(said)}</li>" for method, said in methods)
        yield f"<h2>{title}</h2><ul>{rows}</ul>"


# -------------------------------------------------------------------- figures
def faithfulness_by_size(found: Comparison, by: str) -> Figure:
    """A line for each method. `by`: selection of edges, "signed" or "absolute"."""
    how = "highest magnitude" if by == "absolute" else "highest score"
    points = {entry.method: getattr(entry, by) for entry in found.ranked}
    return faithfulness.curves(points, faithfulness.measured(f"The edges of {how}", found.record))


def area(found: Comparison, name: str) -> Figure:
    """Bars of CPR, largest on top, or of CMD, smallest on top."""
    best = 1 if name == "cmd" else -1
    entries = sorted(found.ranked, key=lambda entry: best * getattr(entry, name))
    names, values = [entry.method for entry in entries], [getattr(entry, name) for entry in entries]
    intervals = [getattr(entry, f"{name}_interval") for entry in entries]
    return bars(names, values, Caption(name.upper(), (AREAS[name],)), name.upper(), intervals=intervals, signed=False)


def overlap(found: Comparison) -> Figure:
    """Jaccard similarity of the circuits of each two methods, with a slider for the number of edges."""
    names, sizes, shown = [entry.method for entry in found.ranked], sorted(found.overlap), shown_overlap(found)
    words = Caption("Overlap of the circuits (Jaccard)", ("edges of highest magnitude; 1 = the same edges",))
    sides = Side("", names), Side("", names)
    hovers = {size: _shared(names, found.overlap[size]) for size in sizes}
    made = heat(np.array(found.overlap[shown]), *sides, hovers[shown], words, "Jaccard", signed=False, most=1.0)
    steps = [
        {"label": f"{size:,}", "method": "restyle", "args": [{"z": [found.overlap[size]], "hovertext": [hovers[size]]}]}
        for size in sizes
    ]
    slider = {"active": sizes.index(shown), "currentvalue": {"prefix": "number of edges: "}, "pad": {"t": 110}}
    return made.update_layout(sliders=[{**slider, "steps": steps}], height=made.layout.height + 120)


def cost(found: Comparison) -> Figure:
    """CPR against CPU seconds, a point for each method."""
    entries = sorted(found.ranked, key=lambda entry: entry.costs.cpu_seconds)
    y = np.array([entry.cpr for entry in entries])
    ends = np.array([entry.cpr_interval for entry in entries]).reshape(-1, 2)
    names, said = [safe(entry.method) for entry in entries], [_spent(entry) for entry in entries]
    sides = [
        ("top center", "bottom center")[at % 2] for at in range(len(entries))
    ]  # so that names of neighbours do not overlap
    look = {"text": names, "textposition": sides, "marker": {"size": 9, "color": PALETTE[0]}}
    seconds = [max(entry.costs.cpu_seconds, LEAST_SECONDS) for entry in entries]
    look["error_y"] = error_bars(y, ends, thickness=0.7, width=3, color="#999")
    trace = marks(seconds, y, said, "", "markers+text", **look)
    words = Caption("CPR against cost", ("CPU seconds for making the ranking, without its evaluation",))
    across = {"title": {"text": "CPU seconds (log scale)"}, "type": "log", "dtick": 1}
    return figure(trace, words, 860, 430, xaxis=across, yaxis={"title": {"text": "CPR"}})


# -------------------------------------------------------------------- texts
def _shared(names: list[str], matrix: list[list[float]]) -> list[list[str]]:
    return [
        [f"<b>{safe(a)}</b> and <b>{safe(b)}</b><br>{value:.3f}" for b, value in zip(names, row, strict=True)]
        for a, row in zip(names, matrix, strict=True)
    ]


def _spent(entry: Entry) -> str:
    costs = entry.costs
    return (
        f"<b>{safe(entry.method)}</b><br>CPR {entry.cpr:.3f}{_range(entry.cpr_interval)}"
        f"<br>{costs.cpu_seconds:.3g} s, {costs.forwards:,.1f} forward, {costs.backwards:,.1f} backward passes per pair"
    )


def _range(ends: Interval) -> str:
    return f" (95% {ends.low:.3f} to {ends.high:.3f})" if math.isfinite(ends.low) else ""


def _table(table: TextTable) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in table.headings)
    rows = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'
