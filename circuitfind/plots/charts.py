"""Charts for figures: heat maps, heat maps of named places by layer, and bars with intervals.

1. Heat maps: rows run downwards as in a table (layer 0 on top). Both axes are numbered and labelled, because a token
   may be at several positions. Cells stay readable: long prompts make wide figures, many rows high ones. A cell's hover
   text gives its place and value.
2. Places by layer: layers down; heads and the MLP across, or the readers of each layer (q, k, v, MLP). Values that
   belong to no layer (`input`, `logits`) are given below the title. Cells without a place are grey.
3. Bars: one for each name, the first on top.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from circuitfind.errors import count
from circuitfind.export import html
from circuitfind.plots import style
from circuitfind.plots.style import Caption, Side, figure, graph_objects, hover, safe

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

WIDE, HIGH, LEAST = 720, 460, 640  # pixels: preferred size of a plot of cells; width of the narrowest figure
Texts = np.ndarray | Sequence[Sequence[str]]  # hover texts of cells, already escaped
LETTER = 7.0
BAR, BARS_WIDE, LONGEST_NAME = 20, 760, 32
PLACE = re.compile(r"m(?P<mlp>\d+)|s(?P<mixer>\d+)|a(?P<layer>\d+)\.(?P<kind>h|kv)(?P<unit>\d+)(<(?P<slot>[qkv])>)?")
SLOTS = ("", "q", "k", "v", "mixer", "MLP")  # in the order of their columns


# -------------------------------------------------------------------- heat maps
def heat(
    values: np.ndarray,
    rows: Side,
    columns: Side,
    texts: Texts,
    words: Caption,
    unit: str,
    *,
    signed: bool = True,
    most: float | None = None,
) -> Figure:
    """Return a heat map.

    Args:
        values: `[rows, columns]`; NaN leaves a grey gap.
        texts: `[rows, columns]` hover texts, already escaped.
        unit: the unit of the values, shown beside the colour bar.
        signed: whether the scale is diverging and symmetric about 0; else it starts at 0.
        most: the end of the scale. By default the largest magnitude shown, or the 99th percentile if the largest would
            make all others invisible; cells beyond it are marked, and counted below the title.
    """
    n_rows, n_columns = len(rows.labels), len(columns.labels)
    wide = float(np.clip(WIDE / max(n_columns, 1), 9, 46))
    high = float(np.clip(HIGH / max(n_rows, 1), 9, 40))
    tall = max(high * n_rows, 180)
    bar = colour_bar(unit, min(tall, HIGH))
    end, marked = html.scale_end(values) if most is None else most, {}
    if beyond := most is None and html.count_beyond(values, end):
        words = words._replace(notes=(*words.notes, f"{count(beyond, 'cell')} beyond the colour scale, marked ×"))
        marked = {"text": np.where(np.abs(np.nan_to_num(values)) > end, "×", ""), "texttemplate": "%{text}"}
    trace = cells(values, texts, end, signed, colorbar=bar, **marked)
    labels = 40 + LETTER * max(map(len, rows.labels), default=0) + 130
    width = max(LEAST, labels + wide * n_columns)
    x, y = axis(columns, (width - labels) / max(n_columns, 1), across=True), axis(rows, high, across=False)
    return figure(trace, words, width, tall, plot_bgcolor=style.GAP, xaxis=x, yaxis=y)


def cells(values: np.ndarray, texts: Texts, end: float, signed: bool, **more: Any) -> Any:
    """Return the trace of coloured cells, on a scale from -end (if not signed, from 0) to end."""
    scale = {"colorscale": style.SIGNED if signed else style.SHARES, "zmin": -end if signed else 0, "zmax": end}
    said = {"hovertext": [list(row) for row in texts], "hoverinfo": "text"}
    return graph_objects().Heatmap(z=np.asarray(values, dtype=np.float64), xgap=1, ygap=1, **said, **scale, **more)


def colour_bar(counted: str, high: float) -> dict[str, Any]:
    """Return a colour bar beside the plot, aligned with its top; `high`: its height in pixels."""
    title = {"text": counted, "side": "right"}
    return {"title": title, "thickness": 14, "lenmode": "pixels", "len": high, "y": 1, "yanchor": "top"}


def axis(side: Side, cell: float, across: bool) -> dict[str, Any]:
    """Return plotly's axis for one side of the cells, from left to right or top to bottom; `cell`: pixels of each."""
    look = {"tickfont": {"size": 11 if cell >= 15 else 9}, "showgrid": False, "zeroline": False, "automargin": True}
    made = {"title": {"text": side.name}, **style.ticks(side.labels), **look}
    every = -(-11 // max(int(cell), 1))  # label only some cells if there is no room for all labels
    made |= {name: made[name][::every] for name in ("tickvals", "ticktext")}
    ends = [-0.5, len(side.labels) - 0.5]
    fits = LETTER * max(map(len, side.labels), default=0) < cell
    return {**made, "range": ends, "tickangle": 0 if fits else -60} if across else {**made, "range": ends[::-1]}


# -------------------------------------------------------------------- places by layer
class _Column(NamedTuple):
    slot: int
    unit: int
    label: str


def by_layer(
    names: Sequence[str], values: np.ndarray, words: Caption, unit: str, ends: np.ndarray | None = None
) -> Figure:
    """Return a heat map by layer of named values `[names]`, NaN if unknown; `ends` `[names, 2]`: 95% intervals."""
    between = np.full((len(names), 2), np.nan) if ends is None else ends
    known = {name: (float(value), *pair) for name, value, pair in zip(names, values, between.tolist(), strict=True)}
    placed = {name: at for name in names if (at := _place(name)) is not None}
    layers = sorted({layer for layer, _ in placed.values()})
    columns = sorted({column for _, column in placed.values()})
    table = np.full((len(layers), len(columns)), np.nan)
    texts = [[""] * len(columns) for _ in layers]
    for name, (layer, column) in placed.items():
        row, place = layers.index(layer), columns.index(column)
        table[row, place] = known[name][0]
        texts[row][place] = hover(name, *known[name])
    notes = [f"{name} {value:+.3g}" for name, (value, *_) in known.items() if name not in placed]
    across = "reader" if any(SLOTS[column.slot] in ("q", "k", "v") for column in columns) else "head, MLP"
    sides = Side("layer", list(map(str, layers))), Side(across, [column.label for column in columns])
    words = words._replace(notes=(*words.notes[:-1], *notes, *words.notes[-1:]))
    return heat(table, *sides, texts, words, unit)


def _place(name: str) -> tuple[int, _Column] | None:
    found = PLACE.fullmatch(name)
    if found is None:
        return None
    if found["mlp"]:
        return int(found["mlp"]), _Column(SLOTS.index("MLP"), 0, "MLP")
    if found["mixer"]:
        return int(found["mixer"]), _Column(SLOTS.index("mixer"), 0, "mixer")
    slot, shared = found["slot"] or "", "kv" if found["kind"] == "kv" else ""
    label = f"{slot} {shared}{found['unit']}".strip()
    return int(found["layer"]), _Column(SLOTS.index(slot), int(found["unit"]), label)


# -------------------------------------------------------------------- bars
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
    """Return horizontal bars, one for each name; names may repeat.

    `intervals`: the 95% interval (low, high) of each value, NaN if there is none. `signed`: blue for positive values,
    red for negative ones; else all grey. `more`: further hover text of each bar.
    """
    length = np.asarray(values, dtype=np.float64)
    ends = np.full((len(length), 2), np.nan) if intervals is None else np.asarray(intervals, dtype=np.float64)
    further = [""] * len(names) if more is None else [f"<br>{safe(text)}" for text in more]
    columns = zip(names, length, ends, further, strict=True)
    said = [hover(name, value, *between) + text for name, value, between, text in columns]
    colours = [style.SUPPORTS if value >= 0 else style.OPPOSES for value in length] if signed else style.NEUTRAL
    look = {"marker": {"color": colours}, "error_x": style.error_bars(length, ends, color="#222", thickness=1, width=3)}
    y = np.arange(len(length))
    trace = graph_objects().Bar(x=length, y=y, orientation="h", hovertext=said, hoverinfo="text", **look)
    across = {"title": {"text": unit}, "zerolinecolor": "#999"}
    grid = {"range": [len(length) - 0.5, -0.5], "automargin": True, "showgrid": False}
    down = grid | style.ticks(names, LONGEST_NAME)
    return figure(trace, words, BARS_WIDE, BAR * len(length) + 20, bargap=0.25, xaxis=across, yaxis=down)
