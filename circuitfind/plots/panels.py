"""Several plots beside and below each other in one figure, each under a title of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from circuitfind.plots.style import Caption, figure, safe

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

WIDEST = 1120  # pixels of a figure, beyond which panels go into the next row
EDGES = 100  # the figure's margins on the left and right
TITLE = 14  # pixels of a letter's height in a panel's title


class Panel(NamedTuple):
    """A plot: its title (lines separated by <br>, escaped), traces, and axes as plotly takes them."""

    title: str
    traces: Sequence[Any]
    xaxis: dict[str, Any]
    yaxis: dict[str, Any]


def panels(
    parts: Sequence[Panel],
    words: Caption,
    wide: float,
    high: float,
    gap: tuple[float, float],
    *,
    legend: float = 0,
    **layout: Any,
) -> Figure:
    """Lays plots out row by row.

    Args:
        wide, high: pixels of each plot.
        gap: pixels between them, across and down, for labels and titles.
        legend: pixels beside them, for a colour bar.
    """
    columns = max(1, min(len(parts), int((WIDEST - EDGES - legend + gap[0]) // (wide + gap[0]))))
    rows = -(-len(parts) // columns)
    across, down = columns * wide + (columns - 1) * gap[0], rows * high + (rows - 1) * gap[1]
    axes: dict[str, Any] = {}
    traces, titles = [], []
    for at, part in enumerate(parts):
        row, column = divmod(at, columns)
        number = "" if at == 0 else str(at + 1)
        left, top = column * (wide + gap[0]), row * (high + gap[1])
        axes[f"xaxis{number}"] = {
            **part.xaxis,
            "anchor": f"y{number}",
            "domain": [left / across, (left + wide) / across],
        }
        below = max(0.0, 1 - (top + high) / down)
        axes[f"yaxis{number}"] = {**part.yaxis, "anchor": f"x{number}", "domain": [below, 1 - top / down]}
        traces += [trace.update(xaxis=f"x{number}", yaxis=f"y{number}") for trace in part.traces]
        corner = {"x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom", "xref": f"x{number} domain"}
        font = {"size": TITLE - 1, "color": "#2a3f5f"}
        titles.append(
            {
                **corner,
                "yref": f"y{number} domain",
                "text": part.title,
                "showarrow": False,
                "align": "left",
                "font": font,
            }
        )
    lines = max(part.title.count("<br>") for part in parts) + 1
    made = figure(traces, words, EDGES + across + legend, down, annotations=titles, **axes, **layout)
    room = 1.5 * TITLE * lines  # the first row's titles stand below the caption
    return made.update_layout(height=made.layout.height + room, margin_t=made.layout.margin.t + room)


def heading(*lines: str) -> str:
    """A panel's title: the first line bold."""
    return "<br>".join([f"<b>{safe(lines[0])}</b>", *map(safe, lines[1:])])
