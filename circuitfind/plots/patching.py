"""Figures of sweeps over places, of path patching and of attention patterns.

Sweeps:

1. A sweep with one axis (layers) is bars; with two (layer and head, layer and position or span) a heat map.
2. Heads by position or span are a heat map with a row for each head. If there are too many heads, those with the
   largest effect at any position are shown, in the model's order, and the caption says so.
3. Neurons are a histogram for each layer, with counts on a log scale; the strongest neurons are marked and named.

Paths:

4. A few paths are bars. More paths into one receiver (or several patched together) are a heat map of the senders,
   layers by heads and MLP. More paths from one sender into separate receivers are a heat map of the receivers, layers
   by q, k, v and MLP.
5. Paths from several senders into separate receivers are a heat map of senders by receivers, cut as in 2. Cells without
   a path are grey.

Attention patterns:

6. Queries down, keys across, from 0 (white) to 1 (blue); each row sums to at most 1. Several heads are side by side, in
   the order given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitfind.errors import ScoreError
from circuitfind.plots import style
from circuitfind.plots.charts import LETTER, axis, bars, by_layer, cells, colour_bar, heat
from circuitfind.plots.style import Caption, Side, Subplot, caption, figure, graph_objects, hover, safe, unit
from circuitfind.result import strongest

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from circuitfind.patching.attention import AttentionPattern
    from circuitfind.patching.path import PathEffects
    from circuitfind.patching.sweep import Sweep
    from circuitfind.record import Record

ROWS, BARS, MARKED, BINS = 200, 30, 20, 80
FEW = 12  # most paths that are shown as bars
CELL, SMALLEST, LARGEST = 20, 200, 520  # pixels: a token in one of several patterns; smallest and largest such pattern
WORDS = {
    "resid": "Residual stream",
    "resid-mid": "Residual stream between attention and MLPs",
    "attn": "Attention outputs",
    "mlp": "MLP outputs",
    "attn-out": "Outputs of attention modules",
    "mlp-out": "Outputs of MLP modules",
    "heads": "Heads",
    "q": "Queries",
    "k": "Keys",
    "v": "Values",
    "pattern": "Attention patterns",
    "neurons": "Neurons",
}


# -------------------------------------------------------------------- sweeps
def sweep_effects(sweep: Sweep, *, normalised: bool = False, rows: int = ROWS) -> Figure:
    """Return a figure of all effects of a sweep; `normalised`: divided by metric(full) - metric(empty); `rows`: the
    most heads with a row."""
    values = sweep.normalised if normalised else sweep.effects
    counted = "effect / (clean - ablated)" if normalised else unit(sweep.record)
    axes = [Side(*axis) for axis in sweep.axes]
    if "neuron" in (axis.name for axis in axes):
        return _histogram(sweep, values, counted)
    words = _sweep_words(sweep)
    texts: np.ndarray = np.array(_hovers(sweep), dtype=object).reshape(values.shape)
    if len(axes) == 1:
        ends = np.sort(sweep.intervals() / (sweep.full.mean() - sweep.empty.mean() if normalised else 1.0), axis=-1)
        return bars([f"layer {label}" for label in axes[0].labels], values, words, counted, intervals=ends)
    if len(axes) == 2:
        return heat(values, axes[0], axes[1], texts, words, counted)
    names = sweep.names()[:: len(axes[-1].labels)]
    flat, texts = values.reshape(len(names), -1), texts.reshape(len(names), -1)
    kept = style.largest(np.abs(flat).max(axis=1), rows)
    words = words._replace(notes=(*words.notes, *style.left_out(len(kept), len(names), "rows")))
    side = Side(axes[1].name, [names[at] for at in kept])
    return heat(flat[kept], side, axes[-1], texts[kept], words, counted)


def strongest_places(sweep: Sweep, *, n: int = BARS, by: str = "absolute") -> Figure:
    """The n places of largest (or, by="signed", most positive) effect, with 95% intervals."""
    rows = sweep.top(n, by)
    names = [f"{row.name}, {row.position}" if row.position else row.name for row in rows]
    words = _sweep_words(sweep, f"the strongest {len(rows)} of {sweep.effects.size:,}")
    return _strongest(rows, names, words, sweep.record)


def _strongest(rows: Sequence[Any], names: Sequence[str], words: Caption, record: Record) -> Figure:
    ends = [(row.low, row.high) for row in rows]
    return bars(names, [row.effect for row in rows], words, unit(record), intervals=ends)


def _sweep_words(sweep: Sweep, *more: str) -> Caption:
    by = f" by {sweep.axes[-1].name}" if any(sweep.positions) else ""
    what = f"{WORDS.get(sweep.what, sweep.what)}{by}, {style.made_by(sweep.record)}"
    return caption(what, sweep.record, _ends(sweep), *more, style.colours(sweep.record))


def _ends(found: Sweep | PathEffects) -> str:
    return f"clean run {found.full.mean():.3g}, ablated run {found.empty.mean():.3g}"


def _hovers(sweep: Sweep) -> list[str]:
    """The hover text of each place, in the order of `effects.ravel()`."""
    places = [f" at {safe(label)}" if label else "" for label in sweep.positions]
    try:
        parts = [f"<br>{part:.1%} of clean - ablated" for part in sweep.normalised.ravel()]
    except ScoreError:
        parts = [""] * sweep.effects.size
    return [
        f"<b>{safe(name)}</b>{places[at % len(places)]}<br>{effect:+.4g}{part}"
        for at, (name, effect, part) in enumerate(zip(sweep.names(), sweep.effects.ravel(), parts, strict=True))
    ]


def _histogram(sweep: Sweep, values: np.ndarray, counted: str) -> Figure:
    texts, flat = _hovers(sweep), values.ravel()
    low, high = float(values.min()), float(values.max())
    size = (high - low) / BINS or 1.0
    bins = {"start": low - size / 2, "end": high + size, "size": size}
    shown = []
    for label, layer, colour in zip(sweep.axes[0].labels, values, cycle(style.PALETTE), strict=False):
        look: dict[str, Any] = {"xbins": bins, "marker": {"color": colour}, "opacity": 0.6}
        shown.append(graph_objects().Histogram(x=layer.ravel(), name=f"layer {label}", **look))
    best = strongest(flat, MARKED)
    mark = {"symbol": "diamond", "size": 8, "color": style.NEUTRAL, "line": {"color": "white", "width": 1}}
    said, ones = [texts[at] for at in best], np.ones(len(best))
    shown.append(style.marks(flat[best], ones, said, f"strongest {len(best)}", marker=mark))
    words, across = _sweep_words(sweep, f"{flat.size:,} places"), {"title": {"text": counted}}
    down = {"title": {"text": "neurons (log scale)"}, "type": "log", "dtick": 1}
    return figure(shown, words, 800, 380, barmode="overlay", showlegend=True, xaxis=across, yaxis=down)


# -------------------------------------------------------------------- paths
def path_effects(found: PathEffects, *, rows: int = ROWS) -> Figure:
    """Return a figure of all paths; `rows`: the most senders, and the most receivers, that a heat map shows."""
    values = found.effects
    if not many_paths(found):
        return strongest_paths(found, n=FEW)
    if len(found.receivers) == 1:
        return _table(found, found.senders, found.per_example[:, 0])
    if len(found.senders) == 1:
        return _table(found, found.receivers, found.per_example[0])
    sizes = np.nan_to_num(np.abs(values))
    down, across = (style.largest(sizes.max(axis=side), rows) for side in (1, 0))
    few = style.left_out(len(down), len(found.senders), "senders")
    few += style.left_out(len(across), len(found.receivers), "receivers")
    texts = [[hover(f"{found.senders[u]} -> {found.receivers[r]}", values[u, r]) for r in across] for u in down]
    sides = Side("sender", [found.senders[u] for u in down]), Side("receiver", [found.receivers[r] for r in across])
    return heat(values[np.ix_(down, across)], *sides, texts, _path_words(found, *few), unit(found.record))


def many_paths(found: PathEffects) -> bool:
    """Whether there are too many paths for bars."""
    return bool(np.isfinite(found.effects).sum() > FEW)


def strongest_paths(found: PathEffects, *, n: int = BARS, by: str = "absolute") -> Figure:
    """The n paths of largest (or, by="signed", most positive) effect, with 95% intervals."""
    rows, total = found.top(n, by), int(np.isfinite(found.effects).sum())
    names = [f"{row.sender} -> {_short(row.receiver)}" for row in rows]
    return _strongest(rows, names, _path_words(found, *style.left_out(len(rows), total)), found.record)


def _table(found: PathEffects, names: tuple[str, ...], per_example: np.ndarray) -> Figure:
    means, ends = per_example.mean(axis=-1), found.intervals_of(per_example)
    return by_layer(names, means, _path_words(found), unit(found.record), ends)


def _short(receivers: str) -> str:
    """Shorten the names of receivers that were patched together, if they are more than three."""
    names = receivers.split(" + ")
    return receivers if len(names) <= 3 else f"{names[0]} and {len(names) - 1} others"


def _path_words(found: PathEffects, *more: str) -> Caption:
    what = f" from {found.senders[0]}" if len(found.senders) == 1 else ""
    what += f" into {_short(found.receivers[0])}" if len(found.receivers) == 1 else ""
    return caption(f"Path patching{what}", found.record, _ends(found), *more, style.colours(found.record))


# -------------------------------------------------------------------- attention patterns
UNIT = "attention"


def attention(found: AttentionPattern | Sequence[AttentionPattern]) -> Figure:
    """Return a figure of one attention pattern or several, token by token."""
    several = list(found) if isinstance(found, Sequence) else [found]
    sides = [style.tokens_at(one.tokens) for one in several]
    texts = [_pattern_hovers(one, labels) for one, labels in zip(several, sides, strict=True)]
    words = _pattern_words(several)
    if len(several) == 1:
        (one,), (labels,), (text,) = several, sides, texts
        return heat(one.pattern, Side("query", labels), Side("key", labels), text, words, UNIT, signed=False, most=1.0)
    size = float(np.clip(CELL * max(map(len, sides)), SMALLEST, LARGEST))
    parts: list[Subplot] = []
    for one, labels, text in zip(several, sides, texts, strict=True):
        bar = {"showscale": not parts, "colorbar": colour_bar(UNIT, size)}
        axes = (axis(Side(name, labels), size / max(len(labels), 1), name == "key") for name in ("key", "query"))
        parts.append(Subplot(style.heading(one.head), [cells(one.pattern, text, 1.0, signed=False, **bar)], *axes))
    longest = LETTER * min(style.LONGEST, max((len(label) for labels in sides for label in labels), default=0))
    return style.subplots(parts, words, size, size, (longest + 60, longest + 90), legend=90)


def _pattern_hovers(one: AttentionPattern, labels: Sequence[str]) -> list[list[str]]:
    values = np.asarray(one.pattern, dtype=np.float64)
    if values.shape != (len(labels), len(labels)):
        raise ScoreError(
            f"an attention pattern of {len(labels)} tokens is [{len(labels)}, {len(labels)}], this one is"
            f" {list(values.shape)}: give one head's pattern on one prompt, without padding"
        )
    names = [f"<b>{safe(label)}</b>" for label in labels]
    return [
        [f"{query} attends to {key}<br>{value:.4f}" for key, value in zip(names, row, strict=True)]
        for query, row in zip(names, values, strict=True)
    ]


def _pattern_words(found: Sequence[AttentionPattern]) -> Caption:
    heads = [one.head for one in found]
    names = ", ".join(heads) if len(heads) <= 4 else f"{len(heads)} heads"
    settings = found[0].record.settings
    side = f"{settings['side']} prompt" if "side" in settings else "prompt"
    prompts = {(one.tokens, one.record.settings.get("example")) for one in found}
    which = [f"{side} {settings['example']}"] if "example" in settings and len(prompts) == 1 else []
    return caption(f"Attention of {names}", replace(found[0].record, n_examples=0, metric=""), *which)
