"""Circuits and their evaluations, as tables and lines on the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from circuitfind.cli.cells import BETWEEN, count, fixed, interval, number, percent
from circuitfind.cli.output import Output

if TYPE_CHECKING:
    import circuitfind as cf

ROWS = 15  # of a table, by default
KNOCK_OUTS, WEAKEST = 10, 25
Facts = list[tuple[str, str]]


# -------------------------------------------------------------------- circuits
def checks(
    title: str, found: cf.Verification, out: Output, inside: Collection[str] | None = None, n: int = WEAKEST
) -> None:
    """Print the edges with the largest exact effects; `inside`: only edges of this circuit."""
    chosen = [row for row in found.rows() if inside is None or row.edge in inside]
    chosen.sort(key=lambda row: -abs(row.exact))
    out.rows(title, chosen, "edge estimate exact interval wrong_sign", n)


def as_a_whole(circuit: cf.Circuit, found: cf.Verification, pairs: str) -> Facts:
    """Results of a verification; `pairs` names the pairs that it was made with."""
    graph, value = circuit.graph, found.evaluation
    share = f"{count(len(circuit), 'edge')} of {graph.n_edges:,} ({len(circuit) / graph.n_edges:.2%})"
    lines = [("circuit", f"{share}, {count(len(circuit.nodes), 'node')} of {graph.n_nodes:,}")]
    lines += evaluation(value, pairs)
    if value.seen_pairs:
        lines.append(("seen pairs", f"{value.seen_pairs} of these pairs were used to find the circuit"))
    if found.random:
        between = interval((min(found.random), max(found.random)))
        drawn = f"{count(len(found.random), 'random circuit')} of this size: faithfulness {between}"
        lines.append(("random", f"{drawn}; the circuit is nearer to 1 than {found.beaten} of them"))
    if found.same_nodes:
        between = interval((min(found.same_nodes), max(found.same_nodes)))
        lines.append(("", f"{len(found.same_nodes)} with random edges between the circuit's own nodes: {between}"))
    if found.ranked is not None:
        lines.append(("", f"the same number of edges with the largest |score|: {fixed(found.ranked)}"))
    if not all(math.isnan(edge.estimate) for edge in found.edges):
        r, slope = fixed(found.correlation), fixed(found.slope, 2)
        wrong, measured = count(found.sign_errors, "wrong sign"), count(len(found.edges), "edge")
        lines.append(
            ("estimates", f"compared with {measured} measured exactly: correlation {r}, slope {slope}, {wrong}")
        )
    return [*lines, *overshoot(found.faithfulness)]


def evaluation(value: cf.Evaluation, pairs: str = "") -> Facts:
    metric, full, empty = (number(mean) for mean in (value.metric, value.metric_full, value.metric_empty))
    accuracy, top1 = (
        f"{percent(inside)} in the circuit, {percent(full)} in the whole model" if math.isfinite(full) else ""
        for inside, full in ((value.accuracy, value.accuracy_full), (value.top1, value.top1_full))
    )
    on = f" on {pairs}" if pairs else ""
    level = value.indifferent
    turned = f"{fixed(level)} is where the answer and the wrong answer have equal logits" if level is not None else ""
    return [
        ("faithfulness", f"{fixed(value.faithfulness)} ({BETWEEN} {interval(value.interval)}){on}"),
        ("", turned),
        (
            "pair error",
            f"{fixed(value.pair_error)}: mean distance from the whole model per pair, over the total effect",
        ),
        ("metric", f"{metric} in the circuit, {full} in the whole model, {empty} with every edge ablated"),
        ("accuracy", accuracy),
        ("top token", f"an answer: {top1}" if top1 else ""),
        ("KL divergence", f"{number(value.kl)} nats, KL(whole model || circuit)"),
    ]


def overshoot(faithfulness: float) -> Facts:
    """A line if faithfulness exceeds 1 by more than rounding."""
    if faithfulness <= 1.005:
        return []
    return [("overshoot", f"{faithfulness - 1:.3f} above 1: the circuit leaves out edges that oppose the task")]


def frontier(found: cf.FindResult, out: Output) -> None:
    """Print the circuit nearest to the whole model at each size, on the held-out pairs if there was time."""
    points = found.frontier
    if len(points) < 2:
        return
    judged = all(math.isfinite(point.held_out_distance) for point in points)
    pairs, on = ("held-out", "held_out_") if judged else ("search", "")
    if found.circuit.facts.get("unseen_pairs") == 0:  # one pair, to search with and to judge with
        pairs = "search"
    opposing = "" if points[0].opposing is None else "opposing "
    measured = f"{on}faithfulness=faithfulness {on}pair_error=error {on}kl=KL {on}accuracy=accuracy"
    out.rows(
        f"Frontier: nearest circuit at each size, on the {pairs} pairs",
        points,
        f"n_edges=edges {opposing}{measured}",
        len(points),
    )


class _Known(NamedTuple):
    """An edge of a circuit; None: not estimated, or not measured."""

    edge: str
    estimate: float | None
    exact: float | None


def circuit(found: cf.Circuit, out: Output, n: int = ROWS) -> None:
    known = sorted((row for row in found.rows() if row.effect is not None), key=lambda row: -abs(row.effect or 0))
    if known:
        rows = [_Known(found.graph.edge_name(row.writer, row.reader), row.estimate, row.exact) for row in known]
        out.rows("The strongest edges", rows, "edge estimate exact", n)


def curve(found: cf.Curve, out: Output, title: str = "Faithfulness by number of edges") -> None:
    names = "asked n_edges=kept fraction faithfulness interval accuracy kl=KL"
    out.rows(title, found.points, names, len(found.points), fraction="of all")


def mib(found: cf.Mib, out: Output) -> None:
    signed, absolute = found.signed, found.absolute
    for how, one in (("highest signed score", signed), ("highest magnitude", absolute)):
        curve(one, out, f"Faithfulness ({one.record.metric}) of the edges of {how}")
    cpr = f"{fixed(signed.cpr)} ({BETWEEN} {interval(signed.cpr_interval)}) by signed score"
    cmd = f"{fixed(absolute.cmd)} ({BETWEEN} {interval(absolute.cmd_interval)}) by magnitude"
    others = f"{fixed(absolute.cpr)} by magnitude", f"{fixed(signed.cmd)} by signed score"
    out.facts([("CPR", f"{cpr}; {others[0]}"), ("CMD", f"{cmd}; {others[1]}")])


def tell(
    lines: list[tuple[str, str]],
    circuit: cf.Circuit,
    value: cf.Evaluation,
    seconds: float,
    save: Callable[[], list[Path]],
    content: dict[str, Any],
    out: Output,
) -> None:
    """Print the results, save them, and write the JSON document."""
    out.say()
    out.facts([*lines, *evaluation(value, f"{value.record.n_examples} held-out pairs")])
    out.few(value.record.n_distinct)
    files = save()
    out.say(f"\n{seconds:.1f} s.")
    kept = {"edges": circuit.edges, **circuit.facts, "unseen": value.to_dict()}
    out.finish({**content, "seconds": round(seconds, 2), "circuit": kept}, files)


# -------------------------------------------------------------------- tests of a circuit
def completeness(found: cf.Completeness, out: Output) -> None:
    """Print the complement, and the knock-outs with the largest gaps."""
    ordered = sorted(found.knockouts, key=lambda one: -one.gap)
    if ordered:
        title = f"Knock-outs in circuit and model, largest gaps first ({found.record.metric})"
        names = "removed circuit model difference interval"
        out.rows(title, ordered, names, KNOCK_OUTS, removed=f"{found.level}s knocked out")
    rest = found.complement
    complement = f"faithfulness {fixed(rest.faithfulness)} ({BETWEEN} {interval(rest.interval)}) of the model without"
    mean = f"{number(found.mean_gap)} ({BETWEEN} {interval(found.mean_gap_interval)}) over random sets of"
    nothing = f"{number(found.whole.gap)} with nothing knocked out; the total effect is {number(found.contrast)}"
    complement = f"{complement} the circuit's edges; 0 if the circuit is complete"
    out.facts([("complement", complement), ("mean gap", f"{mean} {found.level}s; {nothing}")])


def minimality(found: cf.Minimality, out: Output) -> None:
    """Print the edges with the smallest effects, and the circuit without the superfluous ones."""
    weakest = sorted(found.edges, key=lambda edge: abs(edge.effect))
    title = f"What the circuit loses without each edge, weakest first ({found.record.metric})"
    out.rows(title, weakest, "edge effect interval superfluous", WEAKEST)
    rule = "the interval includes 0" + (f", or less than {found.threshold:g}" if found.threshold else "")
    before, after = found.evaluation, found.reduced_evaluation
    without = (
        f"faithfulness {fixed(after.faithfulness)} ({BETWEEN} {interval(after.interval)}) instead of"
        f" {fixed(before.faithfulness)}; effect {number(found.joint_effect)} together, {number(found.summed_effect)}"
        " as the sum of each alone"
    )
    superfluous = f"{len(found.superfluous)} of {count(len(weakest), 'edge')}: {rule}"
    out.facts([("superfluous", superfluous), ("without them", without if found.superfluous else "")])


def hypotheses(found: cf.HypothesisTests, out: Output) -> None:
    """Print a row for each test, its reading, and the edges that matter no more than random ones."""
    made = found.record.settings
    title = f"Hypothesis tests (alpha {made['alpha']:g}, correction: {made['correction']})"
    out.rows(title, found.tests, "name=test statistic p_value=p adjusted=corrected supports=speaks", len(found.tests))
    out.facts(line for row in found.tests for line in ((row.name, row.reading), ("", f"null: {row.null}")))
    needless = sorted((one for row in found.tests for one in row.edges if one.rejected), key=lambda one: one.effect)
    if needless:
        out.say()
        title = "Edges that matter no more than random ones"
        out.rows(title, needless, "edge effect share=above adjusted", ROWS, adjusted="corrected p")


def stability(found: cf.Stability, out: Output) -> None:
    """Print the agreement, its baseline, the curve, and the stable edges."""
    sizes, stable = sorted({len(circuit) for circuit in found.circuits}), found.stable
    edges = f"{sizes[0]:,} to {sizes[-1]:,} edges" if len(sizes) > 1 else count(sizes[0], "edge")
    shuffled = "" if found.shuffled is None else f"{fixed(found.shuffled)} if all pairs are divided at random"
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
        out.say()
        names, of_pairs = "n_pairs=pairs jaccard=Jaccard interval", "95% of samples' pairs"
        out.rows("Agreement by number of pairs", found.curve, names, len(found.curve), interval=of_pairs)
    if stable:
        out.say()
        out.rows("Stable edges", stable, "edge frequency=circuits", ROWS)
