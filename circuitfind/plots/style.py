"""Parts of all figures: the lazy import of plotly, colours, captions, labels, subplots.

1. Effects are coloured by plotly's "RdBu" from -limit to limit, the largest magnitude shown: 0 is white, blue is
   positive (supports the behaviour), red is negative (opposes it). Shares, which have no sign, go from white to blue.
2. A caption names the quantity, the task and the model, then metric, direction, ablation and number of pairs.
3. Text from outside (tokens, names) is escaped, because plotly interprets text as HTML.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from circuitfind.errors import FileError, count, installing

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from circuitfind.record import Record

SIGNED, SHARES, GAP = "RdBu", "Blues", "#e4e4e4"
SUPPORTS, OPPOSES, NEUTRAL = "#2166ac", "#b2182b", "#8a949e"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5a5a5a", "#7f3c8d", "#a5aa00", "#000000")
METHODS = {
    "patch": "activation patching",
    "atp": "attribution patching",
    "atp-qk": "attribution patching through the softmax",
    "eap": "edge attribution patching",
    "direct": "direct logit attribution",
}
LONGEST = 20  # characters of a tick label
CHARACTER, NOTE_CHARACTER = 9.0, 5.9  # width in pixels of a letter in the title and in the notes, generously
BUTTONS = 190  # width in pixels of plotly's buttons, beside the title
WIDEST = 1120  # width in pixels of a figure; subplots that do not fit go into the next row
MARGINS, SUBTITLE = 100, 14  # pixels: left and right of the plots together; height of a letter in a plot's own title


class Caption(NamedTuple):
    """A figure's title, the notes in a smaller line below it, and remarks below these, one a line."""

    title: str
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


class Side(NamedTuple):
    """An axis of a heat map: its name, and a label for each row or column; labels may repeat."""

    name: str
    labels: Sequence[str]


def graph_objects() -> Any:
    """Return the module `plotly.graph_objects`; a FileError if plotly is not installed."""
    try:
        import plotly.graph_objects
    except ImportError:
        raise FileError(f"plots need plotly, which is not installed: {installing('plotly')}") from None
    return plotly.graph_objects


# -------------------------------------------------------------------- words
def caption(what: str, record: Record, *more: str) -> Caption:
    """Return the caption of a figure of `what`, by the record; the notes end with `more`."""
    subject = " in ".join(name for name in (record.task, record.model) if name)
    pairs = count(record.n_examples, "pair") if record.n_examples else ""
    ablation = f"ablation {record.ablation}" if record.ablation else ""
    notes = (record.metric, record.direction, ablation, pairs, *more)
    return Caption(f"{what}: {subject}" if subject else what, tuple(note for note in notes if note))


def made_by(record: Record) -> str:
    """The name of the record's method, written out."""
    return METHODS.get(record.method, record.method or "an unknown method")


def unit(record: Record) -> str:
    """The label of a colour bar or an axis: the unit of the values."""
    if record.method == "direct":
        return "logits"
    if not record.is_effect:
        return f"score of {record.method}"
    return f"effect ({record.metric})" if record.metric else "effect"


def colours(record: Record) -> str:
    """The meaning of the two colours, for a caption; only effects support or oppose."""
    if record.method == "direct":
        return "blue raises the logit difference, red lowers it"
    return "blue supports, red opposes" if record.is_effect else "scores, not effects"


def safe(text: object) -> str:
    """Escape text from outside, so that plotly shows it literally."""
    return escape(str(text).replace("\n", "⏎"), quote=False)


def tokens_at(tokens: Sequence[str]) -> list[str]:
    """Return a label for each position: its number and its token."""
    return [f"{place} {token.strip() or repr(token)}" for place, token in enumerate(tokens)]


def ticks(labels: Sequence[str], longest: int = LONGEST) -> dict[str, Any]:
    """Return ticks for an axis of 0, 1, 2, ... from labels, which may repeat; long ones are cut to `longest`."""
    short = [label if len(label) <= longest else f"{label[: longest - 1]}…" for label in map(str, labels)]
    return {"tickmode": "array", "tickvals": list(range(len(short))), "ticktext": list(map(safe, short))}


def largest(sizes: np.ndarray, n: int) -> np.ndarray:
    """Return the indices of the n largest sizes, in increasing order."""
    return np.sort(np.argsort(-sizes, kind="stable")[:n])


def left_out(kept: int, total: int, what: str = "") -> list[str]:
    """Return a note if fewer than all are shown, else an empty list."""
    return [f"the strongest {kept} of {total:,} {what}".rstrip()] if kept < total else []


def hover(name: str, value: float, low: float = np.nan, high: float = np.nan) -> str:
    """Return the hover text of a mark: its name, its value, and its 95% interval if there is one."""
    if np.isnan(value):
        return f"<b>{safe(name)}</b><br>no value"
    return f"<b>{safe(name)}</b><br>{value:+.4g}" + (f"<br>95% {low:.4g} to {high:.4g}" if np.isfinite(low) else "")


def error_bars(values: np.ndarray, ends: np.ndarray, **look: Any) -> dict[str, Any]:
    """Return plotly's error bars for the intervals `ends` `[values, 2]` of values `[values]`."""
    arms = {"array": ends[:, 1] - values, "arrayminus": values - ends[:, 0]}
    return {"type": "data", **arms, "visible": bool(np.isfinite(ends).any()), **look}


def marks(x: Any, y: Any, texts: Sequence[str], name: str, mode: str = "markers", **look: Any) -> Any:
    """Return points, or lines through them; `texts` are their hover texts, already escaped."""
    return graph_objects().Scatter(x=x, y=y, mode=mode, name=name, hovertext=texts, hoverinfo="text", **look)


# -------------------------------------------------------------------- figures
def figure(data: Any, words: Caption, width: float, height: float, **layout: Any) -> Figure:
    """Return a figure of traces under a caption; `height` is the plot's alone, without the caption."""
    titles = textwrap.wrap(words.title, int((width - 40 - BUTTONS) / CHARACTER), break_on_hyphens=False)
    small_print = ["; ".join(words.notes), *words.remarks]
    notes = [line for text in small_print for line in textwrap.wrap(text, int((width - 40) / NOTE_CHARACTER))]
    small = [f'<span style="font-size:12px;color:#555">{safe(line)}</span>' for line in notes]
    top = 34 + 24 * len(titles) + 17 * len(notes)
    text = "<br>".join([*(f"<b>{safe(line)}</b>" for line in titles), *small])
    corner = {"x": 0, "y": 1, "xanchor": "left", "yanchor": "top", "pad": {"l": 16, "t": 14}}
    made = graph_objects().Figure(data)
    made.update_layout(
        template="plotly_white",
        title={"text": text, "font": {"size": 16}, **corner},
        width=round(width),
        height=round(height + top + 60),
        margin={"l": 70, "r": 30, "t": top, "b": 60},
        hoverlabel={"align": "left"},
        modebar={"bgcolor": "rgba(255,255,255,0)"},  # the notes start behind the buttons
    )
    return made.update_layout(**layout)


class Subplot(NamedTuple):
    """A subplot: its title (escaped, lines separated by <br>), its traces, and its axes as plotly layouts."""

    title: str
    traces: Sequence[Any]
    xaxis: dict[str, Any]
    yaxis: dict[str, Any]


def subplots(
    parts: Sequence[Subplot],
    words: Caption,
    wide: float,
    high: float,
    gap: tuple[float, float],
    legend: float,
    **layout: Any,
) -> Figure:
    """Return a figure of subplots, row by row. In pixels: width and height of each (`wide`, `high`), the `gap` between
    them (across, down) for labels and titles, and the width at the right for a colour bar (`legend`)."""
    columns = max(1, min(len(parts), int((WIDEST - MARGINS - legend + gap[0]) // (wide + gap[0]))))
    rows = -(-len(parts) // columns)
    across, down = columns * wide + (columns - 1) * gap[0], rows * high + (rows - 1) * gap[1]
    corner = {"x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom", "showarrow": False, "align": "left"}
    font = {"size": SUBTITLE - 1, "color": "#2a3f5f"}
    axes: dict[str, Any] = {}
    traces, titles = [], []
    for at, part in enumerate(parts):
        row, column = divmod(at, columns)
        number = "" if at == 0 else str(at + 1)
        left, top = column * (wide + gap[0]), row * (high + gap[1])
        sideways, upwards = [left / across, (left + wide) / across], [max(0.0, 1 - (top + high) / down), 1 - top / down]
        axes[f"xaxis{number}"] = {**part.xaxis, "anchor": f"y{number}", "domain": sideways}
        axes[f"yaxis{number}"] = {**part.yaxis, "anchor": f"x{number}", "domain": upwards}
        traces += [trace.update(xaxis=f"x{number}", yaxis=f"y{number}") for trace in part.traces]
        place = {"xref": f"x{number} domain", "yref": f"y{number} domain"}
        titles.append({**corner, **place, "text": part.title, "font": font})
    lines = max(part.title.count("<br>") for part in parts) + 1
    made = figure(traces, words, MARGINS + across + legend, down, annotations=titles, **axes, **layout)
    room = 1.5 * SUBTITLE * lines  # the first row's titles stand below the caption
    return made.update_layout(height=made.layout.height + room, margin_t=made.layout.margin.t + room)


def heading(*lines: str) -> str:
    """Return a subplot's title, escaped, with its first line bold."""
    return "<br>".join([f"<b>{safe(lines[0])}</b>", *map(safe, lines[1:])])
