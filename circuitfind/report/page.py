"""report.html: one self-contained page about a circuit and the search that found it.

1. `ReportData` holds what the page shows: plain data, nothing that needs a model. `report.write` makes it.
2. The sections come from `report.sections`, the circuit with its controls from `report.explorer`, the drawings from
   `report.drawing`, the plots from `report.plots`.
3. Style and script stand in the page itself. Nothing is loaded from anywhere, which a content security policy in the
   page's head enforces. The page reads on paper, on a phone, in the dark, and without the script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from os import PathLike
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

from circuitfind.circuit import Circuit
from circuitfind.export.files import write_text
from circuitfind.report import explorer, sections
from circuitfind.report.sizes import Size

if TYPE_CHECKING:
    from circuitfind.evaluation.verify import EdgeCheck

STYLES = ("style.css", "explorer.css")
SCRIPTS = ("tables.js", "plate.js", "viewport.js", "hover.js", "heatmap.js", "panel.js", "explorer.js")


class ExampleRow(NamedTuple):
    """One example: prompt, answer, and the metric in the full model, in the circuit, and with every edge ablated."""

    prompt: str
    answer: str
    full: float
    circuit: float
    empty: float


class Attention(NamedTuple):
    """What heads attend to on one prompt.

    Attributes:
        tokens: the prompt's tokens as text.
        heads: by head, its `[query, key]` weights in steps of 1/255 as bytes: query after query, keys up to the query.
    """

    prompt: str
    tokens: tuple[str, ...]
    heads: Mapping[str, bytes]


@dataclass(frozen=True)
class ReportData:
    """Everything that the page shows; what is left out has no section.

    Attributes:
        task: label -> text, such as `{"task": "ioi", "held-out pairs": "64"}`.
        sizes: circuits inside the circuit, each inside the next, the picture's slider goes through; by default its cuts
            by |effect|, of which only the whole was measured.
        faithfulness, interval: of the circuit as a whole, and its interval over the examples (`level`, 0.95 = 95%).
        metric, metric_full, metric_empty: means over examples of circuit, full model and empty circuit.
        checks: edges with estimated and exact effect; `correlation` of the two.
        effect_intervals: by edge, the interval of its exact effect.
        attention: what the circuit's heads attend to on a prompt or two; attention_note: why there is nothing.
        curve: circuits that the search tried, each with `n_edges`, `faithfulness` and `stage`; `tolerance` is half the
            width of the target, a band around 1.
        random: faithfulness of random circuits of the same size; `beaten` of them are further from 1 than the circuit.
        steps: `(stage, text)` of the search, in order.
        command: the exact command, to be run again.
    """

    title: str
    model: str
    task: Mapping[str, str]
    circuit: Circuit
    sizes: Sequence[Size] = ()
    faithfulness: float | None = None
    interval: tuple[float, float] | None = None
    level: float = 0.95
    metric: float | None = None
    metric_full: float | None = None
    metric_empty: float | None = None
    checks: Sequence[EdgeCheck] = ()
    correlation: float | None = None
    effect_intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    attention: Sequence[Attention] = ()
    attention_note: str = ""
    curve: Sequence[Any] = ()
    tolerance: float | None = None
    random: Sequence[float] = ()
    beaten: int = 0
    examples: Sequence[ExampleRow] = ()
    steps: Sequence[tuple[str, str]] = ()
    command: str = ""


SECTIONS = (
    sections.head,
    explorer.picture,
    sections.whole,
    sections.curve,
    sections.checks,
    sections.examples,
    sections.steps,
    sections.record,
)


def html(data: ReportData) -> str:
    """The page as text."""
    body = "\n".join(text for text in (section(data) for section in SECTIONS) if text)
    page = Template(_pieces(["page.html"]))
    return page.substitute(title=escape(data.title), style=_pieces(STYLES), script=_pieces(SCRIPTS), body=body)


def write(path: str | PathLike[str], data: ReportData) -> Path:
    """Writes the page, whole or not at all.

    Raises:
        FileError: the file cannot be written.
    """
    return write_text(path, html(data))


def _pieces(names: Sequence[str]) -> str:
    """Files of this package, one after the other."""
    folder = files("circuitfind.report")
    return "\n\n".join(folder.joinpath(name).read_text(encoding="utf-8").strip() for name in names)
