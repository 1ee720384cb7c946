"""Bars of named values with their intervals, the first on top: the strongest places, edges or nodes, or methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from circuitfind.plots.style import (
    NEUTRAL,
    OPPOSES,
    SUPPORTS,
    Caption,
    figure,
    graph_objects,
    safe,
    ticks,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BAR, WIDTH, LONGEST = 20, 760, 32


def bars(
    names: Sequence[str],
    values: Sequence[float] | np.ndarray,
    words: Caption,
    unit: str,
    *,
    intervals: Sequence[tuple[float, float]] | np.ndarray | None = None,
    signed: bool = True,
    more: Sequence[str] | None = None,
) -> Figure:
    """Horizontal bars, one a name; names may repeat.

    Args:
        intervals: (low, high) of each value; NaN where there is none.
        signed: blue for positive values, red for negative; else all grey.
        more: what else each says on hovering.
    """
    length = np.asarray(values, dtype=np.float64)
    ends = np.full((len(length), 2), np.nan) if intervals is None else np.asarray(intervals, dtype=np.float64)
    further = ["" for _ in names] if more is None else [f"<br>{safe(text)}" for text in more]
    hover = [
        f"<b>{safe(name)}</b><br>{value:+.4g}" + (f"<br>95% {low:.4g} to {high:.4g}" if np.isfinite(low) else "") + text
        for name, value, (low, high), text in zip(names, length, ends, further, strict=True)
    ]
    trace = graph_objects().Bar(
        x=length,
        y=np.arange(len(length)),
        orientation="h",
        hovertext=hover,
        hoverinfo="text",
        marker={"color": [SUPPORTS if v >= 0 else OPPOSES for v in length] if signed else NEUTRAL},
        error_x={
            "type": "data",
            "array": ends[:, 1] - length,
            "arrayminus": length - ends[:, 0],
            "visible": bool(np.isfinite(ends).any()),
            "color": "#222",
            "thickness": 1,
            "width": 3,
        },
    )
    return figure(
        trace,
        words,
        WIDTH,
        BAR * len(length) + 20,
        bargap=0.25,
        xaxis={"title": {"text": unit}, "zerolinecolor": "#999"},
        yaxis={**ticks(names, LONGEST), "range": [len(length) - 0.5, -0.5], "automargin": True, "showgrid": False},
    )
