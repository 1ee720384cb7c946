"""Figures of a sweep: every place, and the strongest ones with their intervals.

1. Places of one axis (layers) are bars; of two (layer and head, layer and position or span) a heat map.
2. Heads by position or span are a heat map of one row a head. Where there are too many rows, those with the largest
   effect at any of them are shown, in the model's order, and the caption says so.
3. Neurons are a histogram a layer, with counts on a log scale; the strongest neurons are marked, with their names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from circuitfind.errors import ScoreError
from circuitfind.plots.bars import bars
from circuitfind.plots.heat import heat
from circuitfind.plots.style import (
    NEUTRAL,
    PALETTE,
    Caption,
    Side,
    caption,
    colours,
    figure,
    graph_objects,
    made_by,
    safe,
    unit,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from circuitfind.patching.sweep import Sweep

ROWS, BARS, MARKED, BINS = 200, 30, 20, 80
WORDS = {
    "resid": "Residual stream",
    "resid-mid": "Residual stream between attention and MLPs",
    "attn": "Attention outputs",
    "mlp": "MLP outputs",
    "heads": "Heads",
    "q": "Queries",
    "k": "Keys",
    "v": "Values",
    "pattern": "Attention patterns",
    "neurons": "Neurons",
}


def effects(sweep: Sweep, *, normalised: bool = False, rows: int = ROWS) -> Figure:
    """Every place of a sweep.

    Args:
        normalised: divided by metric(full) - metric(empty).
        rows: how many heads are shown at most where each has a row.

    Raises:
        ScoreError: a normalised effect is undefined here.
    """
    values = sweep.normalised if normalised else sweep.effects
    counted = "effect / (full - ablated)" if normalised else unit(sweep.record)
    axes = [Side(*axis) for axis in sweep.axes]
    if "neuron" in (axis.name for axis in axes):
        return _histogram(sweep, values, counted)
    words, hover = _words(sweep), np.array(_hover(sweep), dtype=object).reshape(values.shape)
    if len(axes) == 1:
        scale = float(sweep.full.mean() - sweep.empty.mean()) if normalised else 1.0
        ends = np.sort(sweep.intervals() / scale, axis=-1)
        return bars([f"layer {label}" for label in axes[0].labels], values, words, counted, intervals=ends)
    if len(axes) == 2:
        return heat(values, axes[0], axes[1], hover, words, counted)
    names = sweep.names()[:: len(axes[-1].labels)]
    flat, texts = (part.reshape(len(names), -1) for part in (values, hover))
    kept = np.sort(np.argsort(-np.abs(flat).max(axis=1), kind="stable")[:rows])
    if len(kept) < len(names):
        words = words._replace(notes=(*words.notes, f"the strongest {len(kept)} of {len(names):,} rows"))
    side = Side(axes[1].name, [names[at] for at in kept])
    return heat(flat[kept], side, axes[-1], texts[kept], words, counted)


def strongest(sweep: Sweep, *, n: int = BARS, by: str = "absolute") -> Figure:
    """The n places of largest (or, by="signed", most positive) effect, with 95% intervals."""
    rows = sweep.top(n, by)
    names = [f"{row.name}, {row.position}" if row.position else row.name for row in rows]
    words = _words(sweep, f"the strongest {len(rows)} of {sweep.effects.size:,}")
    ends = [(row.low, row.high) for row in rows]
    return bars(names, [row.effect for row in rows], words, unit(sweep.record), intervals=ends)


def _words(sweep: Sweep, *more: str) -> Caption:
    by = f" by {sweep.axes[-1].name}" if any(sweep.positions) else ""
    what = f"{WORDS.get(sweep.what, sweep.what)}{by}, {made_by(sweep.record)}"
    ends = f"{sweep.full.mean():.3g} in full, {sweep.empty.mean():.3g} ablated"
    return caption(what, sweep.record, ends, *more, colours(sweep.record))


def _hover(sweep: Sweep) -> list[str]:
    """What each place says, in the order of `effects.ravel()`."""
    places = [f" at {safe(label)}" if label else "" for label in sweep.positions]
    try:
        parts = [f"<br>{part:.1%} of full - ablated" for part in sweep.normalised.ravel()]
    except ScoreError:
        parts = [""] * sweep.effects.size
    return [
        f"<b>{safe(name)}</b>{places[at % len(places)]}<br>{effect:+.4g}{part}"
        for at, (name, effect, part) in enumerate(zip(sweep.names(), sweep.effects.ravel(), parts, strict=True))
    ]


def _histogram(sweep: Sweep, values: np.ndarray, counted: str) -> Figure:
    go, hover = graph_objects(), _hover(sweep)
    low, high = float(values.min()), float(values.max())
    size = (high - low) / BINS or 1.0
    traces = [
        go.Histogram(
            x=layer.ravel(),
            name=f"layer {label}",
            xbins={"start": low - size / 2, "end": high + size, "size": size},
            marker={"color": PALETTE[at % len(PALETTE)]},
            opacity=0.6,
        )
        for at, (label, layer) in enumerate(zip(sweep.axes[0].labels, values, strict=True))
    ]
    flat = values.ravel()
    best = np.argsort(-np.abs(flat), kind="stable")[:MARKED]
    marks = go.Scatter(
        x=flat[best],
        y=np.full(len(best), 1.0),
        mode="markers",
        name=f"strongest {len(best)}",
        marker={"symbol": "diamond", "size": 8, "color": NEUTRAL, "line": {"color": "white", "width": 1}},
        hovertext=[hover[at] for at in best],
        hoverinfo="text",
    )
    return figure(
        [*traces, marks],
        _words(sweep, f"{flat.size:,} places"),
        800,
        380,
        barmode="overlay",
        showlegend=True,
        xaxis={"title": {"text": counted}},
        yaxis={"title": {"text": "neurons (log scale)"}, "type": "log", "dtick": 1},
    )
