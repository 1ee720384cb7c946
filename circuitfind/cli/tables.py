"""Results as tables and lines on the terminal: one function for each kind of result, used by every verb.

Effects show their sign; opposing effects are red. The decimals of a table depend on its largest effect.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.text import Text

from circuitfind.cli import verdicts
from circuitfind.cli.cells import DASH, Cell, Right, count, digits_for, effect, fixed, number, percent, some, whole
from circuitfind.cli.output import Output
from circuitfind.cli.verdicts import ROWS
from circuitfind.errors import ScoreError

if TYPE_CHECKING:
    import circuitfind as cf
    from circuitfind.record import Record

    Checked = cf.Checks | None

FINDERS = ("find", "find-complete")  # these return circuits, not rankings
KEYS = 3  # tokens attended to
PAIRS = 10  # of nodes that make a score
CELL, FIRST = 6, 14  # widths in the heat table
FITS = ("kind", "layer", "places", "r", "slope", "error", "wrong signs", "change")


# -------------------------------------------------------------------- scores and sweeps
class _Scored(NamedTuple):
    """A score with its strongest position, or with the interval and fraction of the total effect of a place."""

    name: str
    effect: float
    position: str = ""
    there: float = math.nan
    low: float = math.nan
    high: float = math.nan
    normalised: float = math.nan
    exact: float = math.nan
    verdict: str = ""


def scores(found: cf.Scores, out: Output, n: int = ROWS, by: Any = "absolute", checked: Checked = None) -> None:
    best = [_Scored(found.graph.edge_name(u, r), float(found.values[u, r])) for u, r in found.ranked(by)[:n].tolist()]
    _strongest(found.record, "edge", len(found), best, "", out, checked)


def placed_scores(
    found: cf.PlacedScores, out: Output, n: int = ROWS, by: Any = "absolute", checked: Checked = None
) -> None:
    best = [_Scored(row.edge, row.score, row.place) for row in found.top(n, by)]
    by_position = found.record.settings.get("place") == "each position"
    place = "position" if by_position else "span"
    _strongest(found.record, "edge", found.graph.n_edges, best, " position", out, checked, position=place)
    if by_position:
        _positions(out)


def node_scores(
    found: cf.NodeScores, out: Output, n: int = ROWS, by: Any = "absolute", checked: Checked = None
) -> None:
    """Print the strongest nodes; with scores by position, also the position where each is strongest."""
    rows, more = [], " position there" if found.values.ndim == 2 else ""
    for name in found.top(n, by):
        each = np.atleast_1d(found[name])
        at = int(np.abs(each).argmax())
        position = found.positions[at] if found.positions else str(at)
        rows.append(_Scored(name, float(each.sum()), position, float(each[at])))
    _strongest(found.record, "node", len(found.graph.writer_names), rows, more, out, checked)
    if found.positions and rows:
        _positions(out)


def _beside(rows: list[_Scored], checked: Checked) -> list[_Scored]:
    """Add the exact effects that were measured to the rows."""
    known = {} if checked is None else {(row.name, row.position): row for row in checked.checked}

    def one(row: _Scored) -> _Scored:
        found = known.get((row.name, row.position)) or known.get((row.name, ""))
        if found is None:
            return row._replace(low=math.nan, high=math.nan)
        verdict = "wrong sign" if found.wrong_sign else "off" if found.off else ""
        return row._replace(exact=found.exact, low=found.interval.low, high=found.interval.high, verdict=verdict)

    return list(map(one, rows)) if checked else rows


def checks(found: cf.Checks, out: Output, n: int = ROWS) -> None:
    """Print estimates and exact effects side by side."""
    rows = _beside([_Scored(row.name, row.estimate, row.position) for row in found.checked], found)
    what = found.level if found.level in ("edge", "node") else "place"
    names = f"name {'position ' * any(row.position for row in rows)}effect exact interval verdict"
    out.rows(f"Measured exactly ({found.record.metric})", rows, names, n, name=what, effect="estimate")
    said_of_checks(found, out)


def said_of_checks(found: cf.Checks, out: Output) -> None:
    """Print in one line how many estimates are wrong."""
    n, wrong, off = len(found.checked), found.wrong_signs, found.off - found.wrong_signs
    method = f" by {found.record.method}" if found.record.method else ""
    said = f"{count(n, 'estimate')}{method} measured exactly: {wrong} with the wrong sign, {off} more wrong by"
    out.say(f"{said} more than half the exact effect.", style="yellow" if wrong or off else "")
    out.few(found.n_distinct)


def _strongest(
    record: Record, what: str, total: int, rows: list[_Scored], more: str, out: Output, checked: Checked, **heads: str
) -> None:
    """Print scores as exact effects, estimates or plain scores; `heads`: headings of further columns."""
    heading = "score" if not record.is_effect else "exact" if record.method == "exact" else "estimate"
    method = f" by {record.method}" if record.method else ""
    metric = f" ({record.metric})" if record.is_effect and record.metric else ""
    called = {"name": what, "effect": heading}
    title = f"Strongest of {count(total, what)}{method}{metric}"
    more = f"{' exact interval verdict' if checked else ''}{more}"
    out.rows(title, _beside(rows, checked), f"name effect{more}", len(rows), record.is_effect, **called, **heads)
    if checked:
        said_of_checks(checked, out)
    if not record.is_effect:
        out.say(record.sign, style="dim")


def _positions(out: Output) -> None:
    out.say("Positions are named by the tokens of the first clean prompt.", style="dim")


def sweep(found: cf.Sweep, out: Output, n: int = ROWS, by: str = "absolute", checked: Checked = None) -> None:
    """Print the strongest places, and a heat table if it fits the width."""
    best, parts, record = found.top(n, by), _parts(found), found.record
    total = math.nan if parts is None else float(found.full.mean() - found.empty.mean())
    rows = [
        _Scored(row.name, row.effect, str(row.position), math.nan, row.low, row.high, row.effect / (total or math.nan))
        for row in best
    ]
    method = "" if record.method == "patch" else f" by {record.method}"
    title = f"Strongest of {count(found.effects.size, 'place')}{method}, {record.direction} ({record.metric}"
    title = f"{title} {number(found.full.mean())} unablated, {number(found.empty.mean())} ablated)"
    called = {"name": "place", "position": found.axes[-1].name, "effect": "effect" if record.is_effect else "score"}
    called |= {"effect": "estimate"} if checked else {}
    more = "exact interval verdict" if checked else "interval normalised"
    names = f"name {'position ' * any(found.positions)}effect {more}"
    out.rows(title, _beside(rows, checked), names, len(rows), record.is_effect, **called)
    if checked:
        said_of_checks(checked, out)
    if found.by_position and best:
        _positions(out)
    _heat(found, parts, out)


def _parts(found: cf.Sweep) -> np.ndarray | None:
    """Normalised effects; None if they are undefined or the values are not effects."""
    try:
        return found.normalised if found.record.is_effect else None
    except ScoreError:
        return None


def _heat(found: cf.Sweep, parts: np.ndarray | None, out: Output) -> None:
    """Print a heat table: positions or spans by layers, or layers by heads."""
    values, unit = (found.effects, "metric") if parts is None else (100 * parts, "% of full - ablated")
    axes, note = list(found.axes), ""
    if values.ndim == 3:  # a head at the position where it is strongest
        where = np.abs(values).argmax(-1)[..., None]
        note = f", each at its strongest {axes[-1].name}"
        values, axes = np.take_along_axis(values, where, -1)[..., 0], axes[:2]
    if values.ndim == 1:
        values, axes = values[:, None], [axes[0], axes[0]._replace(name=found.what, labels=(found.what,))]
    down, across = axes
    if across.name in ("position", "span"):
        values, down, across = values.T, across, down
    if across.name == "neuron" or FIRST + CELL * len(across.labels) > out.text.width:
        return
    digits = 0 if parts is not None else digits_for(values.ravel().tolist())
    largest = float(np.abs(values).max())
    rows: list[list[Cell]] = [
        [label, *(_shaded(value, largest, digits) for value in row)]
        for label, row in zip(down.labels, values.tolist(), strict=True)
    ]
    shows = "Effects" if found.record.is_effect else "Scores"
    title = f"{shows} by {down.name} and {across.name} ({unit}){note}"
    out.table(title, (f"{down.name} \\ {across.name}", *across.labels), rows)


def _shaded(value: float, largest: float, digits: int) -> Text:
    """Red: opposes the task. Bold: at least half the strongest. Faint: below a twentieth of it."""
    size = abs(value) / largest if largest else 0.0
    weight = "bold" if size >= 0.5 else "dim" if size < 0.05 else ""
    return Text(fixed(value, digits), style=f"{weight} {'red' if value < 0 else ''}".strip(), justify="right")


def paths(found: cf.PathEffects, out: Output, n: int = ROWS, by: str = "absolute") -> None:
    record, best = found.record, found.top(n, by)
    ends = f"{number(found.full.mean())} unablated, {number(found.empty.mean())} ablated"
    total = count(int(np.isfinite(found.effects).sum()), "path")
    title = f"Strongest of {total}, {record.direction} ({record.metric} {ends})"
    out.rows(title, best, "sender receiver=receivers effect interval", len(best))


def approximation(found: cf.Approximation, out: Output) -> None:
    """Print how well each kind of place is estimated, in numbers and in words."""
    rows: list[list[Cell]] = []
    for what, one in found.compared.items():
        for layer in (None, *one.layers):
            fit = one.fit(layer)
            kind, where = (what, "all") if layer is None else ("", str(layer))
            said = [fixed(fit.r), fixed(fit.slope, 2), percent(fit.error), Right(f"{fit.wrong_signs} of {fit.matter}")]
            size = Right() if layer is None else fixed(one.sizes[layer], 2)
            rows.append([kind, Right(where), whole(fit.n), *said, size])
    record = found.record
    out.table(f"{record.method} against exact patching, {record.direction} ({record.metric})", FITS, rows)
    for remark in found.remarks:
        out.say(remark)


def attention(found: cf.AttentionPattern, out: Output) -> None:
    names, rows = [token.strip() for token in found.tokens], []
    for query, weights in enumerate(found.pattern):
        best = np.argsort(-weights, kind="stable")[: min(KEYS, query + 1)]
        keys = "  ".join(f"{key} {names[key]} {fixed(float(weights[key]), 2)}" for key in best)
        rows.append((Right(query), names[query], keys))
    settings = found.record.settings
    where = [f"{settings.get('side', '')} prompt {settings['example']}".strip()] if "example" in settings else []
    where += [found.record.task] if found.record.task else []
    title = " of ".join([f"{found.head} on {where[0]}" if where else found.head, *where[1:]])
    out.table(title, ("", "query", "attends most to"), rows)


def attention_attribution(found: cf.AttentionAttribution, out: Output, n: int = PAIRS, by: str = "absolute") -> None:
    """Print the strongest nodes of each side, and the strongest pairs."""
    queries, keys, pairs = found.query_side(n, by), found.key_side(n, by), found.top(n, by)
    digits = digits_for([row.relative for row in (*queries, *keys)] + [row.relative for row in pairs])
    rows: list[list[Cell]] = []
    for query, key, pair in zip(queries, keys, pairs, strict=False):
        named = ((query.node, query), (key.node, key), (f"{pair.query_side} x {pair.key_side}", pair))
        rows.append([cell for name, row in named for cell in (name, effect(row.relative, digits))])
    capped = "" if found.cap is None else f" before the cap of {found.cap:g}"
    said = f"score {number(found.score)}{capped}, attention {number(found.weight)}"
    title = f"Why {found.head} attends from {found.query} to {found.key}: {said}"
    out.table(title, ("query side", "adds", "key side", "adds", "pair", "adds"), rows)
    out.say(
        f"Contributions to the score minus that of {found.against}; they sum to {number(found.relative)}.", style="dim"
    )


# -------------------------------------------------------------------- comparison of methods
def comparison(found: cf.Comparison, out: Output, whole: bool = False) -> None:
    """The summary; of the whole also faithfulness by size, the nearest circuit of each size, overlap, and which methods
    are left out."""
    from circuitfind.comparison import result as tables

    more: tuple[Any, ...] = ()
    if whole:
        more = (tables.faithfulness(found), tables.accuracy(found), tables.closest(found), tables.overlap(found))
    for one in (tables.summary(found, intervals=False), *more):
        if one.rows:
            out.table(one.title, one.headings, ([row[0], *map(Right, row[1:])] for row in one.rows))
    for _, said in found.idle:
        out.warn(said)
    for entry in found.entries if whole else ():
        if entry.refused:
            out.warn(f"{entry.method} is not in the tables: {entry.refused}")


def recovery(found: cf.Recovery, out: Output) -> None:
    """Print a row for each method, then for each circuit the methods that miss some of it."""
    head = ("method", "exact", "AUROC", "AP", "nodes", "passes", "x eap")
    rows: list[list[Cell]] = []
    for row in found.summary():
        rates, costs = (row.auroc, row.average_precision, row.auroc_nodes), (row.passes, row.of_eap)
        rows.append([Text(row.method, style="bold"), Right(f"{row.exact} of {row.circuits}"), *map(fixed, rates)])
        rows[-1] += [fixed(value, 1) for value in costs]
    title = "Circuits recovered exactly; AUROC and average precision of edges, AUROC of nodes, passes"
    out.table(title, head, rows)
    missed: list[list[Cell]] = []
    for circuit in found.circuits:
        own = [row for row in found.recovered if row.circuit == circuit and not row.refused]
        said = (
            f"{row.method} {row.found}" + (f" (+{row.extra})" if row.method in FINDERS else "")
            for row in own
            if not row.exact
        )
        missed.append([Text(circuit, style="bold"), whole(own[0].edges if own else 0), ", ".join(said) or DASH])
    out.table("Not recovered exactly: true edges found (+ spurious ones)", ("circuit", "edges", "methods"), missed)
    for method, reason in {row.method: row.refused for row in found.recovered if row.refused}.items():
        circuits = ", ".join(row.circuit for row in found.of(method) if row.refused)
        out.warn(f"{method} gives no ranking on {circuits}: {reason}")


# -------------------------------------------------------------------- any result
TABLES: dict[str, Callable[..., None]] = {
    "Sweep": sweep,
    "Scores": scores,
    "PlacedScores": placed_scores,
    "NodeScores": node_scores,
    "Circuit": verdicts.circuit,
    "PathEffects": paths,
    "DirectEffects": lambda found, out: node_scores(found.scores, out),
    "Checks": checks,
    "Approximation": approximation,
    "AttentionPattern": attention,
    "AttentionAttribution": attention_attribution,
    "Verification": lambda found, out: verdicts.checks("Edges measured exactly", found, out),
    "Curve": verdicts.curve,
    "Mib": verdicts.mib,
    "Completeness": verdicts.completeness,
    "Minimality": verdicts.minimality,
    "HypothesisTests": verdicts.hypotheses,
    "Stability": verdicts.stability,
    "Comparison": comparison,
    "Recovery": recovery,
}
RANKED = ("Circuit", "Scores", "PlacedScores", "NodeScores", "Sweep", "PathEffects", "Checks", "AttentionAttribution")
WITH_INTERVALS = ("Sweep", "PathEffects", "Verification", "Curve", "Mib", "Completeness", "Minimality")
NAMES = {"Scores": "edge scores", "PathEffects": "effects of paths"}


def show(found: Any, out: Output, *options: Any) -> None:
    """Print the table of a result, or its rows. `options`: number of rows, and the ranking."""
    name = type(found).__name__
    if name in TABLES:
        TABLES[name](found, out, *options)
        if name in WITH_INTERVALS:
            out.few(found.record.n_distinct)
    elif found.columns():
        by_column(found, out, ROWS, None)


def _cell(value: Any) -> Cell:
    if value is None:
        return DASH
    return number(value) if isinstance(value, float) else Right(value) if isinstance(value, int) else str(value)


def by_column(found: Any, out: Output, n: int, column: str | None) -> None:
    """Print the first rows, sorted by a column: numbers by magnitude, text from a to z, unknown values last."""
    columns = found.columns()

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        value = row[column] if column else None
        unknown = value is None or value != value
        return (True,) if unknown else (False, -abs(value) if isinstance(value, (int, float)) else str(value))

    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    chosen = [[_cell(value) for value in row.values()] for row in sorted(rows, key=key)[:n]]
    out.table(f"Rows{'' if column is None else f' by {column}'}{some(n, len(rows))}", columns, chosen)


def of(found: Any, out: Output, n: int | None = None, column: str | None = None) -> str:
    """Print the kind of a result and its first `n` rows, sorted by a column; return the kind."""
    name = type(found).__name__
    kind = NAMES.get(name, re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower())
    record = getattr(found, "record", None)
    made = [] if record is None else [("model", record.model), ("task", record.task)]
    edges = f"{count(len(found), 'edge')} of {found.graph.n_edges:,}" if kind == "circuit" else ""
    out.facts([("kind", kind), *made, ("edges", edges)])
    out.say()
    if column is not None or (n is not None and name not in RANKED):
        by_column(found, out, ROWS if n is None else n, column)
    else:
        show(found, out, *([] if n is None else [n]))
    return kind
