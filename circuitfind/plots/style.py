"""What all figures share: plotly, imported when it is needed; colours, captions, labels.

1. Effects are coloured by plotly's "RdBu" from -limit to limit, the largest magnitude shown: 0 is white, blue is
   positive (supports the behaviour), red is negative (opposes it). Shares, which have no sign, go from white to blue.
2. A caption says what is shown, of which task in which model, then metric, direction, ablation and number of pairs.
3. Whatever comes from outside (tokens, names) is escaped, because plotly reads all text as a kind of HTML.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from circuitfind.errors import FileError

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
LONGEST = 20  # characters of an axis' label
CHARACTER, NOTE_CHARACTER = 9.0, 5.9  # pixels of a letter in the title and below it, with some air
BUTTONS = 190  # pixels that plotly's own buttons take of the title's first line


class Caption(NamedTuple):
    """A figure's title, the smaller line below it, and sentences below that, each on a line of its own."""

    title: str
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


class Side(NamedTuple):
    """One side of a heat map: what it counts, and a label for each row or column; labels may repeat."""

    name: str
    labels: Sequence[str]


def graph_objects() -> Any:
    """The module `plotly.graph_objects`.

    Raises:
        FileError: plotly is not installed.
    """
    try:
        import plotly.graph_objects
    except ImportError:
        raise FileError("plots need plotly, which is not installed: pip install 'circuitfind[plots]'") from None
    return plotly.graph_objects


# -------------------------------------------------------------------- words
def caption(what: str, record: Record, *more: str) -> Caption:
    """What is shown, of which task in which model; `more` ends the notes."""
    subject = " in ".join(name for name in (record.task, record.model) if name)
    pairs = f"{record.n_examples:,} pair{'' if record.n_examples == 1 else 's'}" if record.n_examples else ""
    ablation = f"ablation {record.ablation}" if record.ablation else ""
    notes = (record.metric, record.direction, ablation, pairs, *more)
    return Caption(f"{what}: {subject}" if subject else what, tuple(note for note in notes if note))


def made_by(record: Record) -> str:
    """The method in words."""
    return METHODS.get(record.method, record.method or "an unknown method")


def unit(record: Record) -> str:
    """What a colour bar or an axis counts."""
    if record.method == "direct":
        return "logits"
    if not record.is_effect:
        return f"score of {record.method}"
    return f"effect ({record.metric})" if record.metric else "effect"


def colours(record: Record) -> str:
    """What the two colours mean, for a caption; scores that are no effects neither support nor oppose."""
    if record.method == "direct":
        return "blue raises the logit difference, red lowers it"
    return "blue supports, red opposes" if record.is_effect else "scores, not effects"


def safe(text: object) -> str:
    """Text from outside as plotly shows it literally."""
    return escape(str(text).replace("\n", "⏎"), quote=False)


def tokens_at(tokens: Sequence[str]) -> list[str]:
    """A label a position: its number and its token."""
    return [f"{place} {token.strip() or repr(token)}" for place, token in enumerate(tokens)]


def ticks(labels: Sequence[str], longest: int = LONGEST) -> dict[str, Any]:
    """An axis that counts 0, 1, 2, ... under labels, which may repeat and need not be short."""
    short = [label if len(label) <= longest else f"{label[: longest - 1]}…" for label in map(str, labels)]
    return {"tickmode": "array", "tickvals": list(range(len(short))), "ticktext": list(map(safe, short))}


def limit(values: np.ndarray) -> float:
    """The largest finite magnitude: the end of a symmetric scale; 1 where all is zero or unknown."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


# -------------------------------------------------------------------- figures
def figure(data: Any, words: Caption, width: float, height: float, **layout: Any) -> Figure:
    """Traces under a caption; `height` is that of the plot alone, to which the caption's is added."""
    titles = textwrap.wrap(words.title, int((width - 40 - BUTTONS) / CHARACTER), break_on_hyphens=False)
    small_print = ["; ".join(words.notes), *words.remarks]
    notes = [line for text in small_print for line in textwrap.wrap(text, int((width - 40) / NOTE_CHARACTER))]
    small = [f'<span style="font-size:12px;color:#555">{safe(line)}</span>' for line in notes]
    top = 34 + 24 * len(titles) + 17 * len(notes)
    made = graph_objects().Figure(data)
    made.update_layout(
        template="plotly_white",
        title={
            "text": "<br>".join([*(f"<b>{safe(line)}</b>" for line in titles), *small]),
            "font": {"size": 16},
            "x": 0,
            "y": 1,
            "xanchor": "left",
            "yanchor": "top",
            "pad": {"l": 16, "t": 14},
        },
        width=round(width),
        height=round(height + top + 60),
        margin={"l": 70, "r": 30, "t": top, "b": 60},
        hoverlabel={"align": "left"},
    )
    made.update_layout(**layout)
    return made
