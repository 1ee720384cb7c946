"""report.html: one self-contained page about a circuit and the search that found it.

1. `ReportData` holds the contents of the page as plain data, without a model. `report.write` makes it.
2. Each section is a function from `ReportData` to HTML, and escapes all text from outside. `report.explorer` makes the
   circuit with its controls, `report.plots` the plots. Clicking a column's title sorts its table (`tables.js`).
3. Styles and scripts are part of the page, which loads nothing: a content security policy in its head enforces that.
   The page also works in print, on a phone, in dark mode, and without its script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from circuitfind.circuit import Circuit
from circuitfind.errors import count
from circuitfind.export.arrows import signed
from circuitfind.export.files import write_text
from circuitfind.report import explorer, plots
from circuitfind.report.sizes import Size

if TYPE_CHECKING:
    from circuitfind.evaluation.verify import EdgeCheck

STYLES = ("style.css", "explorer.css")
SCRIPTS = ("tables", "plate", "viewport", "hover", "heatmap", "panel", "matrix", "groups", "explorer")


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
        why: by head, `said`, a text that names the explained score, and under `query side`, `key side` and `pairs` the
            strongest contributions to it, as `(name, value)`.
    """

    prompt: str
    tokens: tuple[str, ...]
    heads: Mapping[str, bytes]
    why: Mapping[str, Mapping[str, Any]] = {}


@dataclass(frozen=True)
class ReportData:
    """The contents of the page. A section without data is left out.

    Attributes:
        task: label -> text, such as `{"task": "ioi", "held-out pairs": "64"}`.
        sizes: the slider's circuits, each inside the next; by default cuts by |effect|, of which only the whole circuit
            has a faithfulness.
        faithfulness, interval: of the whole circuit; the interval over examples is at confidence `level` (0.95 = 95%),
            as are `effect_intervals`.
        few: a caution shown if the examples are few, else empty.
        pair_error, accuracy, indifferent: of the circuit, as in `Evaluation`.
        metric, metric_full, metric_empty: means over examples of circuit, full model and empty circuit.
        checks: edges with estimated and exact effect; `correlation` of the two.
        effect_intervals: by edge, the interval of its exact effect.
        attention: attention patterns of the circuit's heads on a prompt or two; attention_note: why there are none.
        curve: circuits that the search tried, each with `n_edges`, `faithfulness` and `stage`.
        frontier: for each size, the circuit nearest to the full model, as in `FindResult`.
        tolerance: half the width of the target band around faithfulness 1; None if the target is not a band.
        random: faithfulness of random circuits of the same size; `beaten` of them are further from 1 than the circuit.
        steps: `(stage, text)` of the search, in order.
        command: the command that made the circuit.
        direct: by node, its direct effect on the logit difference, not through later layers.
        beside: another circuit, compared with this one in the picture.
        places: by edge, the spans or positions where its effect lies, `(place, effect)`, strongest first.
    """

    title: str
    model: str
    task: Mapping[str, str]
    circuit: Circuit
    sizes: Sequence[Size] = ()
    faithfulness: float | None = None
    interval: tuple[float, float] | None = None
    few: str = ""
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
    frontier: Sequence[Any] = ()
    pair_error: float | None = None
    accuracy: float | None = None
    indifferent: float | None = None
    tolerance: float | None = None
    random: Sequence[float] = ()
    beaten: int = 0
    examples: Sequence[ExampleRow] = ()
    steps: Sequence[tuple[str, str]] = ()
    command: str = ""
    direct: Mapping[str, float] = field(default_factory=dict)
    beside: Circuit | None = None
    places: Mapping[str, Sequence[tuple[str, float]]] = field(default_factory=dict)


def head(data: ReportData) -> str:
    """Title, model and key numbers."""
    circuit, graph = data.circuit, data.circuit.graph
    part = len(circuit) / graph.n_edges
    tiles = [
        (f"{len(circuit):,}", f"edges of {graph.n_edges:,} ({part:.{2 if part < 0.1 else 0}%})"),
        (f"{len(circuit.nodes):,}", f"nodes of {graph.n_nodes:,}"),
    ]
    if data.faithfulness is not None:
        tiles.append((_number(data.faithfulness), f"faithfulness{_interval(data)}"))
    if data.accuracy is not None and math.isfinite(data.accuracy):
        tiles.append((f"{data.accuracy:.0%}", "accuracy of the circuit"))
    if data.checks:
        judged = f", {_wrong(data)} with a wrong estimated sign" if _estimated(data) else ""
        tiles.append((f"{len(data.checks):,}", f"edges measured exactly{judged}"))
    figures = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for value, label in tiles)
    title = f'<h1>{escape(data.title)}</h1><p class="model">{escape(data.model)}</p>'
    return f'<header>{title}<dl class="tiles">{figures}</dl></header>'


def whole(data: ReportData) -> str:
    """Faithfulness of the whole circuit and of random circuits of its size."""
    if data.faithfulness is None:
        return ""
    parts = []
    if data.metric is not None and data.metric_full is not None and data.metric_empty is not None:
        name = data.circuit.record.metric or "metric"
        parts.append(
            f"<p>Mean {escape(name)}: <b>{_number(data.metric)}</b> in the circuit, {_number(data.metric_full)} in"
            f" the full model, {_number(data.metric_empty)} with every edge ablated.</p>"
        )
    if data.random:
        parts.append(
            f"<p>{data.beaten} of {len(data.random)} random circuits with as many edges are further from 1.</p>"
            + _legend(("circuit", f"the circuit{' with its interval' if data.interval else ''}"), ("random", "random"))
        )
    plot = plots.strip(data.random, data.faithfulness, data.interval, data.level)
    meaning = "Faithfulness 1: the mean metric of the full model; 0: that of the model with every edge ablated."
    if data.indifferent is not None:
        meaning += f" At faithfulness {_number(data.indifferent)}, the answer and the wrong answer score the same."
    if data.pair_error is not None:
        meaning += f" Pair error {data.pair_error:.0%}: mean |circuit - full|, as a share of mean |full - empty|."
    meaning = f"{meaning} {data.few}".rstrip()
    return f'<section><h2>As a whole</h2>{"".join(parts)}{plot}<p class="hint">{meaning}</p></section>'


def curve(data: ReportData) -> str:
    """Faithfulness by size of every circuit that the search tried."""
    if not data.curve:
        return ""
    chosen = None if data.faithfulness is None else (len(data.circuit), data.faithfulness)
    stages = [stage for stage in plots.STAGES if any(point.stage == stage for point in data.curve)]
    marks = [(stage, stage) for stage in stages] + ([("chosen", "the circuit")] if chosen else [])
    band = "" if data.tolerance is None else f" The band is the target, 1 ± {data.tolerance:g}."
    held_out = [(point.n_edges, point.held_out_faithfulness) for point in data.frontier]
    plot = plots.curve(data.curve, chosen, data.tolerance, held_out)
    hint = f"Faithfulness can fall as a circuit grows, because some edges oppose the task.{band}"
    if not _one_pair(data) and any(math.isfinite(faithfulness) for _, faithfulness in held_out):
        hint += " Marks: every circuit tried, on the search pairs. Line: the frontier, on the held-out pairs."
    return f'<section><h2>Faithfulness by size</h2>{_legend(*marks)}{plot}<p class="hint">{hint}</p></section>'


def frontier(data: ReportData) -> str:
    """A table of the frontier: for each size, the circuit nearest to the full model."""
    if len(data.frontier) < 2:
        return ""
    on = ["faithfulness"] if _one_pair(data) else ["search pairs", "held out"]
    columns = dict.fromkeys(("edges", "opposing", *on, "pair error", "KL", "accuracy"), True)
    rows = []
    for point in data.frontier:
        opposing = _Cell("–" if point.opposing is None else f"{point.opposing:,}", point.opposing)
        on_pairs = (point.faithfulness, point.held_out_faithfulness)[: len(on)]
        measured = (*on_pairs, point.held_out_pair_error, point.held_out_kl, point.held_out_accuracy)
        cells = (_Cell(_number(value), value) for value in measured)
        rows.append([_Cell(f"{point.n_edges:,}", point.n_edges), opposing, *cells])
    found = _table("Frontier: circuits by size", columns, rows)
    held_out = "Search pairs, held out: faithfulness on these pairs. Pair error, KL, accuracy: on the held-out pairs."
    hint = "All columns are measured on the only pair: nothing is held out." if _one_pair(data) else held_out
    hint += " Opposing: edges with a negative estimated effect. KL: KL(full model || circuit) in nats."
    return f'<section class="wide"><h2>Frontier</h2>{found}<p class="hint">{hint}</p></section>'


def checks(data: ReportData) -> str:
    """Exact against estimated effects: a plot and a table."""
    if not data.checks:
        return ""
    rows = []
    for check in data.checks:
        values = map(_value, (check.estimate, check.exact, check.estimate - check.exact))
        sign = _Cell("wrong sign" if check.wrong_sign else "", style="warn")
        rows.append([_Cell(check.name, style="name"), *values, sign])
    columns = {"edge": False, **dict.fromkeys(("estimate", "exact", "difference"), True), "sign": False}
    found = _table("Checked edges: estimated and exact effects", columns, rows)
    said, scatter = f"{count(len(data.checks), 'edge')} patched exactly", ""
    if _estimated(data):
        said += f"; estimates with the wrong sign: {_wrong(data)}"
        marks = (("check", "an edge"), *((("error", "wrong sign"),) if _wrong(data) else ()))
        scatter = f"<div>{_legend(*marks)}{plots.scatter(data.checks)}</div>"
    correlation = (
        "" if data.correlation is None else f" Estimates and exact effects correlate at {data.correlation:.2f}."
    )
    title = f"<h2>Estimates against exact patching</h2><p>{said}.{correlation}</p>"
    return f'<section class="wide">{title}<div class="beside">{scatter}{found}</div></section>'


def examples(data: ReportData) -> str:
    """The metric of every example in the full model, the circuit and the empty circuit."""
    if not data.examples:
        return ""
    rows = [
        [_Cell(row.prompt, style="prompt"), _Cell(row.answer), *map(_value, (row.full, row.circuit, row.empty))]
        for row in data.examples
    ]
    columns = {"prompt": False, "answer": False, "full": True, "circuit": True, "empty": True}
    name = data.circuit.record.metric or "metric"
    found = _table(f"Every example: {name} in the full model, the circuit and the empty circuit", columns, rows)
    return f'<section class="wide"><h2>Every example</h2><p>{escape(name)} on each clean prompt.</p>{found}</section>'


def steps(data: ReportData) -> str:
    """The steps of the search, in order."""
    items = "".join(f"<li><b>{escape(stage)}</b> {escape(text)}</li>" for stage, text in data.steps)
    section = f'<section class="wide"><h2>Steps of the search</h2><ol class="steps">{items}</ol></section>'
    return section if items else ""


def record(data: ReportData) -> str:
    """The record: command, task, method, settings and versions."""
    made = data.circuit.record
    known: dict[str, Any] = {key: getattr(made, key) for key in ("method", "metric", "ablation", "direction")}
    known |= {"examples": made.n_examples, "seed": str(made.seed), "start token": made.bos, "sign": made.sign}
    method = {key: text for key, text in {**known, "graph": data.circuit.graph}.items() if text}
    given = {key: value for key, value in made.settings.items() if value is not None}
    settings = {key: "; ".join(map(str, one)) if isinstance(one, list) else one for key, one in given.items()}
    command = f'<h3>Command</h3><pre tabindex="0"><code>{escape(data.command)}</code></pre>' if data.command else ""
    titles = {"Task": data.task, "Method": method, "Settings": settings, "Versions": made.versions}
    lists = "".join(_list(title, items) for title, items in titles.items())
    return f'<section class="wide"><h2>Record</h2>{command}<div class="columns">{lists}</div></section>'


class _Cell(NamedTuple):
    """A cell's text (not escaped), the number that sorts it, and its CSS class."""

    text: str
    value: float | None = None
    style: str = ""


def _table(caption: str, columns: Mapping[str, bool], rows: Sequence[Sequence[_Cell]]) -> str:
    """Return a table in a scrolling box that the keyboard can reach. `columns`: by title, whether it holds numbers."""
    style = {True: ' class="number"', False: ""}
    head = "".join(
        f'<th scope="col"{style[number]}><button type="button">{escape(title)}</button></th>'
        for title, number in columns.items()
    )
    body = "\n".join("<tr>" + "".join(map(_html, cells, columns.values())) + "</tr>" for cells in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f'<caption class="hush">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _html(cell: _Cell, number: bool) -> str:
    names = " ".join(filter(None, ("number" if number else "", cell.style)))
    style = f' class="{names}"' if names else ""
    value = f' data-value="{float(cell.value)!r}"' if cell.value is not None else ""
    return f"<td{style}{value}>{escape(cell.text)}</td>"


def _value(value: float) -> _Cell:
    known = value if math.isfinite(value) else None
    return _Cell(signed(known), known, "minus" if (known or 0) < 0 else "")


def _list(title: str, items: Mapping[str, Any]) -> str:
    rows = "".join(f"<div><dt>{escape(str(key))}</dt><dd>{escape(str(text))}</dd></div>" for key, text in items.items())
    return f'<div><h3>{title}</h3><dl class="facts">{rows}</dl></div>' if rows else ""


def _legend(*marks: tuple[str, str]) -> str:
    return f'<div class="legend">{"".join(f"<span>{plots.symbol(kind)}{name}</span>" for kind, name in marks)}</div>'


def _one_pair(data: ReportData) -> bool:
    """Whether the circuit was evaluated on the search's only pair, so that nothing is held out."""
    return bool(data.circuit.facts.get("unseen_pairs") == 0)


def _wrong(data: ReportData) -> int:
    return sum(check.wrong_sign for check in data.checks)


def _estimated(data: ReportData) -> bool:
    """Whether any checked edge has an estimated effect: scores of baselines are not estimates."""
    return any(math.isfinite(check.estimate) for check in data.checks)


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"


def _interval(data: ReportData) -> str:
    if data.interval is None:
        return ""
    return f", {data.level:.0%} interval {_number(data.interval[0])} to {_number(data.interval[1])}"


SECTIONS = (head, explorer.picture, whole, curve, frontier, checks, examples, steps, record)


def html(data: ReportData, sections: Sequence[Callable[[ReportData], str]] = SECTIONS) -> str:
    """Return the page, with all sections or the given ones, as HTML."""
    body = "\n".join(filter(None, (section(data) for section in sections)))
    style, script = explorer.pieces(*STYLES), explorer.pieces(*(f"{name}.js" for name in SCRIPTS))
    return explorer.filled("page.html", title=escape(data.title), style=style, script=script, body=body)


class Inline(NamedTuple):
    """The interactive circuit for a notebook: a page in a frame, whose styles and scripts are isolated from the
    notebook's."""

    page: str
    height: int

    def _repr_html_(self) -> str:
        look = f"width:100%;height:{self.height}px;border:0"
        return f'<iframe style="{look}" title="circuit" srcdoc="{escape(self.page)}"></iframe>'

    def __repr__(self) -> str:
        return f"Inline(a page of {len(self.page):,} characters: show it in a notebook)"


def inline(data: ReportData, height: int = 820) -> Inline:
    """Return only the circuit's section, for a notebook; `height` in pixels."""
    return Inline(html(data, (explorer.picture,)), height)


def write(path: str | PathLike[str], data: ReportData) -> Path:
    """Write the page atomically and return its path. Raises FileError if it cannot be written."""
    return write_text(path, html(data))
