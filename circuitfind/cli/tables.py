"""Results as tables and lines on the terminal, each kind in one place for every verb that shows it.

Effects have a sign, opposing ones are red. The decimals of a table follow its largest value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from circuitfind.cli.output import (
    Cell,
    Output,
    Right,
    chance,
    count,
    digits_for,
    effect,
    fixed,
    interval,
    number,
    percent,
    whole,
)
from circuitfind.errors import ScoreError

if TYPE_CHECKING:
    import circuitfind as cf
    from circuitfind.record import Record

ROWS = 15  # of a table, where nothing else is asked for
KEYS, KNOCK_OUTS, WEAKEST, NAMED = 3, 10, 25, 6  # tokens attended to, sets, edges, names in a set
CELL, FIRST = 6, 14  # widths in the heat table
BETWEEN = "95% interval"
FITS = ("kind", "layer", "places", "r", "slope", "error", "wrong signs", "change")
POINTS = ("asked", "kept", "of all", "faithfulness", BETWEEN, "accuracy", "KL")
Facts = list[tuple[str, str]]


def _some(shown: int, total: int) -> str:
    """What a title adds where a table has not all rows."""
    return f"; {shown} of {total:,}" if total > shown else ""


# -------------------------------------------------------------------- scores and sweeps
def scores(found: cf.Scores, out: Output, n: int = ROWS, by: Any = "absolute") -> None:
    """The strongest edges."""
    best = [(found.graph.edge_name(u, r), float(found.values[u, r])) for u, r in found.ranked(by)[:n].tolist()]
    digits = digits_for(value for _, value in best)
    rows = [(name, _scored(found.record, value, digits)) for name, value in best]
    _strongest(found.record, "edge", len(found), (), rows, out)


def node_scores(found: cf.NodeScores, out: Output, n: int = ROWS, by: Any = "absolute") -> None:
    """The strongest nodes, and of scores by position where each is strongest."""
    rows, record = [], found.record
    digits = digits_for(np.ravel(found.values).tolist())
    for name in found.top(n, by):
        each = np.asarray(found[name])
        cells: list[Cell] = [name, _scored(record, float(each.sum()), digits)]
        if each.ndim:
            at = int(np.abs(each).argmax())
            cells += [Right(found.positions[at] if found.positions else at), _scored(record, float(each[at]), digits)]
        rows.append(cells)
    more = ("strongest position", "there") if found.values.ndim == 2 else ()
    _strongest(record, "node", len(found.graph.writer_names), more, rows, out)
    if found.positions and rows:
        _positions(out)


def _scored(record: Record, value: float, digits: int) -> Cell:
    """A score; effects with their sign."""
    return effect(value, digits) if record.is_effect else fixed(value, digits)


def _strongest(
    record: Record, what: str, total: int, more: tuple[str, ...], rows: Sequence[Sequence[Cell]], out: Output
) -> None:
    """Scores under what they are: exact effects, estimates, or neither."""
    heading = "score" if not record.is_effect else "exact" if record.method == "exact" else "estimate"
    method = f" by {record.method}" if record.method else ""
    metric = f" ({record.metric})" if record.is_effect and record.metric else ""
    out.table(f"Strongest of {count(total, what)}{method}{metric}", (what, heading, *more), rows)
    if not record.is_effect:
        out.say(record.sign, style="dim")


def _positions(out: Output) -> None:
    out.say("Positions are named by the tokens of the first clean prompt.", style="dim")


def sweep(found: cf.Sweep, out: Output, n: int = ROWS, by: str = "absolute") -> None:
    """The strongest places, and a heat table where it fits the width."""
    best, parts, record = found.top(n, by), _parts(found), found.record
    total = None if parts is None else float(found.full.mean() - found.empty.mean())
    digits, by_place = digits_for(row.effect for row in best), any(found.positions)
    rows = [
        [
            *(row.name, *((row.position,) if by_place else ())),
            _scored(record, row.effect, digits),
            interval((row.low, row.high), digits),
            fixed(row.effect / total if total else None),
        ]
        for row in best
    ]
    headings = ["place", *((found.axes[-1].name,) if by_place else ())]
    headings += ["effect" if record.is_effect else "score", BETWEEN, "normalised"]
    method = "" if record.method == "patch" else f" by {record.method}"
    title = f"Strongest of {count(found.effects.size, 'place')}{method}, {record.direction} ({record.metric}"
    out.table(f"{title} {number(found.full.mean())} in full, {number(found.empty.mean())} ablated)", headings, rows)
    if found.by_position and best:
        _positions(out)
    _heat(found, parts, out)


def _parts(found: cf.Sweep) -> np.ndarray | None:
    """Normalised effects; None where they are undefined, or the values are not effects."""
    try:
        return found.normalised if found.record.is_effect else None
    except ScoreError:
        return None


def _heat(found: cf.Sweep, parts: np.ndarray | None, out: Output) -> None:
    """Layers across and positions or spans down, or layers down and heads across."""
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
    """Red where it opposes, bold from half of the strongest on, faint below a twentieth."""
    size = abs(value) / largest if largest else 0.0
    weight = "bold" if size >= 0.5 else "dim" if size < 0.05 else ""
    return Text(fixed(value, digits), style=f"{weight} {'red' if value < 0 else ''}".strip(), justify="right")


def paths(found: cf.PathEffects, out: Output, n: int = ROWS, by: str = "absolute") -> None:
    """The strongest paths."""
    best, record = found.top(n, by), found.record
    digits = digits_for(row.effect for row in best)
    rows = [
        (row.sender, row.receiver, effect(row.effect, digits), interval((row.low, row.high), digits)) for row in best
    ]
    ends = f"{number(found.full.mean())} in full, {number(found.empty.mean())} ablated"
    total = count(int(np.isfinite(found.effects).sum()), "path")
    title = f"Strongest of {total}, {record.direction} ({record.metric} {ends})"
    out.table(title, ("sender", "receivers", "effect", BETWEEN), rows)


def approximation(found: cf.Approximation, out: Output) -> None:
    """How well each kind of place is estimated, in numbers and in words."""
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
    """What each token of a prompt attends to most."""
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


# -------------------------------------------------------------------- circuits
def checks(title: str, found: cf.Verification, out: Output, inside: Collection[str] | None = None, n: int = 25) -> None:
    """The edges of largest exact effect, among those inside a circuit where one is given."""
    pairs = zip(found.edges, found.intervals, strict=True)
    chosen = [(edge, ends) for edge, ends in pairs if inside is None or edge.name in inside]
    chosen.sort(key=lambda pair: -abs(pair[0].exact))
    digits = digits_for(edge.exact for edge, _ in chosen)
    rows = [
        (
            *(edge.name, effect(edge.estimate, digits), effect(edge.exact, digits), interval(ends, digits)),
            Text("wrong sign" if edge.wrong_sign else "", style="yellow"),
        )
        for edge, ends in chosen[:n]
    ]
    out.table(f"{title}{_some(n, len(chosen))}", ("edge", "estimate", "exact", BETWEEN, ""), rows)


def as_a_whole(circuit: cf.Circuit, found: cf.Verification, pairs: str) -> Facts:
    """What verification says of the circuit; `pairs` says what it was judged with."""
    graph, value = circuit.graph, found.evaluation
    share = f"{count(len(circuit), 'edge')} of {graph.n_edges:,} ({len(circuit) / graph.n_edges:.2%})"
    lines = [("circuit", f"{share}, {count(len(circuit.nodes), 'node')} of {graph.n_nodes:,}")]
    lines += evaluation(value, pairs)
    if value.seen_pairs:
        lines.append(("seen pairs", f"{value.seen_pairs} of these pairs were used to find the circuit"))
    if found.random:
        between = interval((min(found.random), max(found.random)))
        drawn = f"{count(len(found.random), 'random circuit')} of that size: {between}"
        lines.append(("random", f"{drawn}; {found.beaten} of them further from 1"))
    if not all(math.isnan(edge.estimate) for edge in found.edges):
        r, slope = fixed(found.correlation), fixed(found.slope, 2)
        wrong, measured = count(found.sign_errors, "wrong sign"), count(len(found.edges), "edge")
        lines.append(("estimates", f"{measured} measured: correlation {r}, slope {slope}, {wrong}"))
    return [*lines, *overshoot(found.faithfulness)]


def evaluation(value: cf.Evaluation, pairs: str = "") -> Facts:
    """Faithfulness, metric, accuracy and KL divergence."""
    metric, full, empty = (number(mean) for mean in (value.metric, value.metric_full, value.metric_empty))
    accuracy, top1 = (
        f"{percent(inside)} in the circuit, {percent(full)} in the whole model" if math.isfinite(full) else ""
        for inside, full in ((value.accuracy, value.accuracy_full), (value.top1, value.top1_full))
    )
    on = f" on {pairs}" if pairs else ""
    return [
        ("faithfulness", f"{fixed(value.faithfulness)} ({BETWEEN} {interval(value.interval)}){on}"),
        ("metric", f"{metric} in the circuit, {full} in the whole model, {empty} with every edge ablated"),
        ("accuracy", accuracy),
        ("top token", f"an answer: {top1}" if top1 else ""),
        ("KL divergence", f"{number(value.kl)} nats, KL(whole model || circuit)"),
    ]


def overshoot(faithfulness: float) -> Facts:
    """Named where it is more than rounding."""
    if faithfulness <= 1.005:
        return []
    return [("overshoot", f"{faithfulness - 1:.3f} above 1: edges that oppose the task are left out")]


def circuit(found: cf.Circuit, out: Output) -> None:
    """The edges whose effects are known, the strongest first."""
    known = sorted((row for row in found.rows() if row.effect is not None), key=lambda row: -abs(row.effect or 0))
    both = [[math.nan if value is None else value for value in (row.estimate, row.exact)] for row in known[:ROWS]]
    digits = digits_for(value for values in both for value in values)
    names = [found.graph.edge_name(row.writer, row.reader) for row in known[:ROWS]]
    rows = [(name, effect(a, digits), effect(b, digits)) for name, (a, b) in zip(names, both, strict=True)]
    if rows:
        out.table(f"The strongest edges{_some(ROWS, len(known))}", ("edge", "estimate", "exact"), rows)


def curve(found: cf.Curve, out: Output, title: str = "Faithfulness by number of edges") -> None:
    """One row a size."""
    rows = [
        (
            *(whole(point.asked), whole(point.n_edges), percent(point.fraction, 1), fixed(point.faithfulness)),
            *(interval(point.interval), percent(point.accuracy), number(point.kl)),
        )
        for point in found.points
    ]
    out.table(title, POINTS, rows)


def mib(found: cf.Mib, out: Output) -> None:
    """Faithfulness by size for both selections, and their areas."""
    signed, absolute = found.signed, found.absolute
    for how, one in (("highest signed score", signed), ("highest magnitude", absolute)):
        curve(one, out, f"Faithfulness of the edges of {how}")
    cpr = f"{fixed(signed.cpr)} ({BETWEEN} {interval(signed.cpr_interval)}) by signed score"
    cmd = f"{fixed(absolute.cmd)} ({BETWEEN} {interval(absolute.cmd_interval)}) by magnitude"
    others = f"{fixed(absolute.cpr)} by magnitude", f"{fixed(signed.cmd)} by signed score"
    out.facts([("CPR", f"{cpr}; {others[0]}"), ("CMD", f"{cmd}; {others[1]}")])


# -------------------------------------------------------------------- tests of a circuit
def completeness(found: cf.Completeness, out: Output) -> None:
    """The complement and the knock-outs with the largest gaps."""
    ordered = sorted(found.knockouts, key=lambda one: -one.gap)
    digits = digits_for(value for one in ordered for value in (one.circuit, one.model))
    rows = [
        (
            *(_named(one.removed), fixed(one.circuit, digits), fixed(one.model, digits)),
            *(effect(one.difference, digits), interval(one.interval, digits)),
        )
        for one in ordered[:KNOCK_OUTS]
    ]
    of = f"{len(rows)} of {len(ordered)}" if len(ordered) > len(rows) else str(len(rows))
    if rows:
        title = f"Knocked out in circuit and model, largest gaps ({of}; {found.record.metric})"
        out.table(title, (f"{found.level}s knocked out", "circuit", "model", "difference", BETWEEN), rows)
    rest = found.complement
    complement = f"faithfulness {fixed(rest.faithfulness)} ({BETWEEN} {interval(rest.interval)}) of the model without"
    mean = f"{number(found.mean_gap)} ({BETWEEN} {interval(found.mean_gap_interval)}) over random sets of"
    nothing = f"{number(found.whole.gap)} with nothing knocked out; the total effect is {number(found.contrast)}"
    out.facts(
        [
            ("complement", f"{complement} the circuit's edges; 0 if the circuit is complete"),
            ("mean gap", f"{mean} {found.level}s; {nothing}"),
        ]
    )


def _named(names: tuple[str, ...]) -> str:
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def minimality(found: cf.Minimality, out: Output) -> None:
    """The edges that matter least, and what is left without the superfluous ones."""
    weakest, total = sorted(found.edges, key=lambda edge: abs(edge.effect))[:WEAKEST], len(found.edges)
    digits = digits_for(edge.effect for edge in weakest)
    rows = [
        (
            *(edge.name, effect(edge.effect, digits), interval(edge.interval, digits)),
            Text("superfluous" if edge.superfluous else "", style="yellow"),
        )
        for edge in weakest
    ]
    which = f"the weakest {len(rows)} of {total:,}" if total > len(rows) else "weakest first"
    title = f"What the circuit loses with each edge, {which} ({found.record.metric})"
    out.table(title, ("edge", "effect", BETWEEN, ""), rows)
    rule = "the interval includes 0" + (f", or less than {found.threshold:g}" if found.threshold else "")
    before, after = found.evaluation, found.reduced_evaluation
    without = (
        f"faithfulness {fixed(after.faithfulness)} ({BETWEEN} {interval(after.interval)}) instead of"
        f" {fixed(before.faithfulness)}; effect {number(found.joint_effect)} together, {number(found.summed_effect)}"
        " as the sum of each alone"
    )
    superfluous = f"{len(found.superfluous)} of {count(total, 'edge')}: {rule}"
    out.facts([("superfluous", superfluous), ("without them", without if found.superfluous else "")])


def hypotheses(found: cf.HypothesisTests, out: Output) -> None:
    """One row a test, what each means, and the edges that count for no more than random ones."""
    made = found.record.settings
    rows = [
        (row.name, fixed(row.statistic), chance(row.p_value), chance(row.adjusted), _verdict(row.supports))
        for row in found.tests
    ]
    title = f"Hypothesis tests (alpha {made['alpha']:g}, correction: {made['correction']})"
    out.table(title, ("test", "statistic", "p", "corrected", "speaks"), rows)
    out.facts(line for row in found.tests for line in ((row.name, row.reading), ("", f"null: {row.null}")))
    needless = sorted(
        (edge for row in found.tests for edge in row.edges if edge.rejected), key=lambda edge: edge.effect
    )
    if needless:
        edges = [
            (edge.name, number(edge.effect), fixed(edge.share, 2), chance(edge.adjusted)) for edge in needless[:ROWS]
        ]
        title = f"Edges that count for no more than random ones{_some(ROWS, len(needless))}"
        out.say()
        out.table(title, ("edge", "effect", "above", "corrected p"), edges)


def _verdict(supports: bool | None) -> Text:
    if supports is None:
        return Text("not tested", style="dim")
    return Text("for the circuit", style="green") if supports else Text("against it", style="red")


def stability(found: cf.Stability, out: Output) -> None:
    """Agreement, what to compare it with, the curve, and the edges that stay."""
    sizes, stable = sorted({len(circuit) for circuit in found.circuits}), found.stable
    edges = f"{sizes[0]:,} to {sizes[-1]:,} edges" if len(sizes) > 1 else count(sizes[0], "edge")
    shuffled = "" if found.shuffled is None else f"{fixed(found.shuffled)} with all pairs dealt out at random"
    out.facts(
        [
            ("stability", f"{count(len(found.circuits), 'circuit')} of {edges} by {found.record.method}"),
            ("Jaccard", f"{fixed(found.jaccard)} on average; 95% of the pairs {interval(found.interval)}"),
            ("shuffled", shuffled),
            ("ranks", "" if found.rank_correlations is None else f"correlation {fixed(found.rank_correlation)}"),
            ("stable", f"{count(len(stable), 'edge')} in at least 90% of the circuits"),
        ]
    )
    if len(found.curve) > 1:
        points = [(whole(point.n_pairs), fixed(point.jaccard), interval(point.interval)) for point in found.curve]
        out.say()
        out.table("Agreement by number of pairs", ("pairs", "Jaccard", "95% of samples' pairs"), points)
    if stable:
        out.say()
        shares = [(name, percent(share)) for name, share in stable[:ROWS]]
        out.table(f"Edges that stay{_some(ROWS, len(stable))}", ("edge", "circuits"), shares)


# -------------------------------------------------------------------- methods beside each other
def summary(found: cf.Comparison, out: Output) -> None:
    """One row a method."""
    from circuitfind.comparison import result as tables

    _text(tables.summary(found, intervals=False), out)


def comparison(found: cf.Comparison, out: Output) -> None:
    """The summary, faithfulness by size, the nearest circuit of each size, overlap; and which methods are left out."""
    from circuitfind.comparison import result as tables

    summary(found, out)
    for one in (tables.faithfulness(found), tables.closest(found), tables.overlap(found)):
        if one.title.startswith("Overlap") and one.rows and one.width > out.text.width:
            out.say(f"{one.title}: wider than this window, see compare.md")
        else:
            _text(one, out)
    for entry in found.entries:
        if entry.refused:
            out.warn(f"{entry.method} is not in the tables: {entry.refused}")


def _text(table: Any, out: Output) -> None:
    """A table of text, if it has rows; its first column is left, the others right."""
    if table.rows:
        out.table(table.title, table.headings, ([row[0], *map(Right, row[1:])] for row in table.rows))


# -------------------------------------------------------------------- any result
TABLES: dict[str, Callable[..., None]] = {
    "Sweep": sweep,
    "Scores": scores,
    "NodeScores": node_scores,
    "Circuit": circuit,
    "PathEffects": paths,
    "DirectEffects": lambda found, out: node_scores(found.scores, out),
    "Approximation": approximation,
    "AttentionPattern": attention,
    "Verification": lambda found, out: checks("Edges measured exactly", found, out),
    "Curve": curve,
    "Mib": mib,
    "Completeness": completeness,
    "Minimality": minimality,
    "HypothesisTests": hypotheses,
    "Stability": stability,
    "Comparison": summary,
}
NAMES = {"Scores": "edge scores", "PathEffects": "effects of paths"}


def show(found: Any, out: Output, *options: Any) -> None:
    """The table of a result, of its rows where it has none of its own; `options`: how many rows, ranked by what."""
    name = type(found).__name__
    if name in TABLES:
        TABLES[name](found, out, *options)
    elif columns := found.columns():
        rows = [[_cell(value) for value in row] for row in zip(*columns.values(), strict=True)]
        out.table(f"Rows{_some(ROWS, len(rows))}", columns, rows[:ROWS])


def _cell(value: Any) -> Cell:
    return number(value) if isinstance(value, float) else Right(value) if isinstance(value, int) else str(value)


def of(found: Any, out: Output) -> str:
    """What a result is, and its first rows; returns the name of its kind."""
    name = type(found).__name__
    kind = NAMES.get(name, re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower())
    record = getattr(found, "record", None)
    made = [] if record is None else [("model", record.model), ("task", record.task)]
    edges = f"{count(len(found), 'edge')} of {found.graph.n_edges:,}" if kind == "circuit" else ""
    out.facts([("holds", kind), *made, ("edges", edges)])
    out.say()
    show(found, out)
    return kind
