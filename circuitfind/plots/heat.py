"""Heat maps: layers by heads, layers by positions, tokens by tokens. Each cell is a place, named when hovered.

Rows run downwards as in a table (layer 0 on top). Both sides are numbered axes under labels, so that a token may stand
at several positions. Cells keep a readable size: a long prompt makes a wide figure, many rows make a high one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitfind.plots.style import GAP, SHARES, SIGNED, Caption, Side, figure, graph_objects, limit, ticks

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

WIDE, HIGH, LEAST = 720, 460, 640  # pixels: of a plot of cells in comfortable size, and of the narrowest figure
LETTER = 7.0


def heat(
    values: np.ndarray,
    rows: Side,
    columns: Side,
    hover: np.ndarray | Sequence[Sequence[str]],
    words: Caption,
    unit: str,
    *,
    signed: bool = True,
    most: float | None = None,
) -> Figure:
    """A heat map.

    Args:
        values: `[rows, columns]`; NaN leaves a grey gap.
        hover: `[rows, columns]` what each cell says, already escaped.
        unit: of the values, beside the colour bar.
        signed: the diverging scale, symmetric about 0; else from 0 upwards.
        most: the scale's end; by default the largest magnitude shown.
    """
    end = limit(values) if most is None else most
    wide, high = _cell(len(columns.labels), WIDE, 14, 46), _cell(len(rows.labels), HIGH, 13, 40)
    tall = max(high * len(rows.labels), 180)
    trace = cells(values, hover, end, signed, colorbar=colour_bar(unit, min(tall, HIGH)))
    left = 40 + LETTER * max(map(len, rows.labels), default=0)
    width = max(LEAST, left + 130 + wide * len(columns.labels))
    return figure(
        trace,
        words,
        width,
        tall,
        plot_bgcolor=GAP,
        xaxis=axis(columns, (width - left - 130) / max(len(columns.labels), 1), across=True),
        yaxis=axis(rows, high, across=False),
    )


def cells(
    values: np.ndarray, hover: np.ndarray | Sequence[Sequence[str]], end: float, signed: bool, **more: Any
) -> Any:
    """The coloured cells alone, from -end (or, unsigned, from 0) to end."""
    return graph_objects().Heatmap(
        z=np.asarray(values, dtype=np.float64),
        hovertext=[list(row) for row in hover],
        hoverinfo="text",
        colorscale=SIGNED if signed else SHARES,
        zmin=-end if signed else 0,
        zmax=end,
        xgap=1,
        ygap=1,
        **more,
    )


def colour_bar(counted: str, high: float) -> dict[str, Any]:
    """The scale beside the plot, from its top downwards; `high` in pixels."""
    look = {"thickness": 14, "lenmode": "pixels", "len": high, "y": 1, "yanchor": "top"}
    return {"title": {"text": counted, "side": "right"}, **look}


def _cell(count: int, room: float, least: float, most: float) -> float:
    """Pixels of a cell when so many share the room."""
    return float(np.clip(room / max(count, 1), least, most))


def axis(side: Side, cell: float, across: bool) -> dict[str, Any]:
    """A side of the cells as plotly's axis, from left to right or from top to bottom, `cell` pixels each."""
    made = {
        "title": {"text": side.name},
        **ticks(side.labels),
        "tickfont": {"size": 11 if cell >= 15 else 9},
        "showgrid": False,
        "zeroline": False,
        "automargin": True,
    }
    ends = [-0.5, len(side.labels) - 0.5]
    if across:
        fits = LETTER * max(map(len, side.labels), default=0) < cell
        return {**made, "range": ends, "tickangle": 0 if fits else -60}
    return {**made, "range": ends[::-1]}
