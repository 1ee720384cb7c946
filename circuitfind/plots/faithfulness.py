"""Faithfulness against the number of edges, which has a log scale; the line at 1 is the whole model.

1. A curve's points are at the number of edges asked for, with 95% intervals. The hover text gives the number left after
   pruning. Several methods are lines of one figure.
2. A search's circuits are at their number of edges, with a symbol for each stage. A star marks the chosen circuit.

A log scale has no 0: circuits without edges are shown at 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitfind.plots.style import NEUTRAL, OPPOSES, PALETTE, Caption, caption, error_bars, figure, marks, safe

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from circuitfind.circuit import Circuit
    from circuitfind.evaluation.curve import CurvePoint
    from circuitfind.record import Record

WIDTH, HEIGHT = 860, 430
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross")
STAGES = {"start": "circle", "re-scored": "square", "grid": "circle", "bisection": "square", "pruning": "triangle-up"}


def measured(what: str, record: Record, *more: str) -> Caption:
    """Return the caption of exact runs of circuits, which have an ablation but no direction."""
    return caption(what, replace(record, direction=""), *more)


def curves(points: Mapping[str, Sequence[CurvePoint]], words: Caption) -> Figure:
    """Return a figure with a line for each method; `points`: by method name, smallest size first."""
    slowly = cycle(symbol for symbol in SYMBOLS for _ in PALETTE)  # the next symbol once all colours are used
    looks = zip(cycle(PALETTE), slowly, strict=False)
    lines = [_line(*curve, *look) for curve, look in zip(points.items(), looks, strict=False)]
    return _framed(lines, words, "edges asked for (log scale)")


def search(tried: Sequence[Any], circuit: Circuit) -> Figure:
    """Return a figure of every circuit that a search ran (`n_edges`, `faithfulness`, `stage`) and the one it chose."""
    known = sorted((point for point in tried if np.isfinite(point.faithfulness)), key=lambda point: point.n_edges)
    x, y = _sizes(point.n_edges for point in known), [point.faithfulness for point in known]
    look = {"symbol": [STAGES.get(point.stage, "circle") for point in known], "size": 9, "color": PALETTE[0]}
    texts = [f"{p.n_edges:,} edges: {p.faithfulness:.3f} ({safe(p.stage)})" for p in known]
    trail = {"color": "#bbb", "width": 1}
    run = marks(x, y, texts, "circuits run", "lines+markers", line=trail, marker=look)
    found = circuit.facts.get("faithfulness_on_search_pairs")
    star = {"symbol": "star", "size": 16, "color": OPPOSES}
    said = [f"<b>the circuit</b>: {len(circuit):,} edges"]
    chosen = marks(_sizes([len(circuit)]), [found], said, "the circuit", marker=star)
    words = measured("The search's circuits", circuit.record, "squares: re-scored, or bisection; triangles: pruning")
    return _framed([run] if found is None else [run, chosen], words, "edges in the circuit (log scale)")


def _line(name: str, points: Sequence[CurvePoint], colour: str, symbol: str) -> Any:
    y = np.array([point.faithfulness for point in points])
    ends = np.array([point.interval for point in points], dtype=np.float64).reshape(-1, 2)
    x, texts = _sizes(point.asked for point in points), [_said(name, point) for point in points]
    look: dict[str, Any] = {"line": {"color": colour, "width": 1.6}, "marker": {"symbol": symbol, "size": 7}}
    return marks(x, y, texts, safe(name), "lines+markers", error_y=error_bars(y, ends, thickness=0.8, width=3), **look)


def _said(name: str, point: CurvePoint) -> str:
    ends = f" (95% {point.interval[0]:.3f} to {point.interval[1]:.3f})" if np.isfinite(point.interval).all() else ""
    size = f"{point.asked:,} edges asked for, {point.fraction:.2%}; {point.n_edges:,} left"
    return f"<b>{safe(name)}</b><br>{size}<br>faithfulness {point.faithfulness:.3f}{ends}"


def _framed(traces: Sequence[Any], words: Caption, across: str) -> Figure:
    x = {"title": {"text": across}, "type": "log", "dtick": 1, "minor": {"dtick": "D1", "ticks": "outside"}}
    y = {"title": {"text": "faithfulness"}, "zerolinecolor": "#bbb"}
    made = figure(traces, words, WIDTH, HEIGHT, showlegend=True, xaxis=x, yaxis=y)
    made.add_hline(y=1, line={"color": NEUTRAL, "dash": "dash", "width": 1.2})
    return made


def _sizes(counts: Iterable[int]) -> list[int]:
    return [max(count, 1) for count in counts]
