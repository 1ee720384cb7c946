"""Results as tables and lines, shared by the verbs that show the same thing."""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.text import Text

from circuitfind.cli.output import Output
from circuitfind.cli.words import DASH, count, fixed, interval, number, percent

if TYPE_CHECKING:
    from circuitfind import Approximation, AttentionPattern, Circuit, Evaluation, PathEffects, Verification

KEYS = 3  # to which a query attends most
FIT_COLUMNS = ("kind", "layer", "places", "r", "slope", "error", "wrong signs", "change")
EFFECT_COLUMNS = (("edge", "left"), ("estimate", "right"), ("exact", "right"), ("95% interval", "right"), ("", "left"))


def effect(value: float, digits: int) -> Text:
    """A signed effect; opposing ones in red."""
    text = fixed(value, digits)
    return Text(text if text.startswith(("-", DASH)) else f"+{text}", style="red" if value < 0 else "")


def digits_for(values: Iterable[float]) -> int:
    """Decimals that show four digits of the largest value, so that a column's points stand below each other."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return min(max(3 - math.floor(math.log10(largest)), 0), 8) if largest else 3


def checks(title: str, found: Verification, inside: Collection[str], rows: int, out: Output) -> None:
    """The edges of largest exact effect among those inside a circuit."""
    pairs = [pair for pair in zip(found.edges, found.intervals, strict=True) if pair[0].name in inside]
    chosen = sorted(pairs, key=lambda pair: -abs(pair[0].exact))
    digits = digits_for(edge.exact for edge, _ in chosen)
    table = [
        (
            edge.name,
            effect(edge.estimate, digits),
            effect(edge.exact, digits),
            interval(between, digits),
            Text("wrong sign" if edge.wrong_sign else "", style="yellow"),
        )
        for edge, between in chosen[:rows]
    ]
    more = f"; {rows} of {len(chosen):,}" if len(chosen) > rows else ""
    out.table(f"{title}{more}", EFFECT_COLUMNS, table)


def whole(circuit: Circuit, found: Verification, pairs: str) -> list[tuple[str, str]]:
    """The circuit as a whole, for `Output.facts`; `pairs` says what it was judged with."""
    graph, value = circuit.graph, found.evaluation
    lines = [
        (
            "circuit",
            f"{count(len(circuit), 'edge')} of {graph.n_edges:,} ({len(circuit) / graph.n_edges:.2%}),"
            f" {count(len(circuit.nodes), 'node')} of {graph.n_nodes:,}",
        ),
        (
            "faithfulness",
            f"{fixed(found.faithfulness)} (95% interval {interval(found.interval)}) on {pairs}",
        ),
        *metric_lines(value),
    ]
    if value.seen_pairs:
        lines.append(("seen pairs", f"{value.seen_pairs} of these pairs were used to find the circuit"))
    if found.random:
        low, high = min(found.random), max(found.random)
        lines.append(
            (
                "random",
                f"{count(len(found.random), 'random circuit')} of that size: {interval((low, high))};"
                f" {found.beaten} of them further from 1",
            )
        )
    return [*lines, *estimate_lines(found), *overshoot(found.faithfulness)]


def unseen_lines(value: Evaluation, pairs: int) -> list[tuple[str, str]]:
    """An `Evaluation` on pairs that the search did not see."""
    said = f"{fixed(value.faithfulness)} (95% interval {interval(value.interval)}) on {pairs} unseen pairs"
    return [("faithfulness", said), *metric_lines(value)]


def metric_lines(value: Evaluation) -> list[tuple[str, str]]:
    """Metric, accuracy and KL of an `Evaluation`."""
    metric, full, empty = (number(mean) for mean in (value.metric, value.metric_full, value.metric_empty))
    lines = [("metric", f"{metric} in the circuit, {full} in the whole model, {empty} with every edge ablated")]
    accuracy, top1 = (
        f"{percent(inside)} in the circuit, {percent(full)} in the whole model" if math.isfinite(full) else ""
        for inside, full in ((value.accuracy, value.accuracy_full), (value.top1, value.top1_full))
    )
    kl = f"{number(value.kl)} nats, KL(whole model || circuit)"
    return [*lines, ("accuracy", accuracy), ("top token", f"an answer: {top1}" if top1 else ""), ("divergence", kl)]


def estimate_lines(found: Verification) -> list[tuple[str, str]]:
    """How good the estimates were, where the scores are any."""
    if all(math.isnan(edge.estimate) for edge in found.edges):
        return []
    wrong = count(found.sign_errors, "wrong sign")
    r, slope = fixed(found.correlation), fixed(found.slope, 2)
    return [("estimates", f"{count(len(found.edges), 'edge')} measured: correlation {r}, slope {slope}, {wrong}")]


def overshoot(faithfulness: float) -> list[tuple[str, str]]:
    """Named where it is more than rounding."""
    if faithfulness <= 1.005:
        return []
    said = f"{faithfulness - 1:.3f} above 1: edges that oppose the behaviour are left out"
    return [("overshoot", said)]


def paths(found: PathEffects, n: int, by: str, out: Output) -> None:
    """The strongest paths."""
    best = found.top(n, by)
    digits = digits_for(row.effect for row in best)
    rows = [
        (row.sender, row.receiver, effect(row.effect, digits), interval((row.low, row.high), digits)) for row in best
    ]
    columns = [("sender", "left"), ("receivers", "left"), ("effect", "right"), ("95% interval", "right")]
    ends = f"{number(found.full.mean())} in full, {number(found.empty.mean())} ablated"
    total = count(int(np.isfinite(found.effects).sum()), "path")
    out.table(f"Strongest of {total}, {found.record.direction} ({found.record.metric} {ends})", columns, rows)


def approximation(found: Approximation, out: Output) -> None:
    """How well each kind of place is estimated, in numbers and in words."""
    rows = []
    for what, one in found.compared.items():
        for layer in (None, *one.layers):
            fit = one.fit(layer)
            said = [fixed(fit.r), fixed(fit.slope, 2), percent(fit.error), f"{fit.wrong_signs} of {fit.matter}"]
            size = "" if layer is None else fixed(one.sizes[layer], 2)
            kind, where = (what, "all") if layer is None else ("", str(layer))
            rows.append([kind, where, f"{fit.n:,}", *said, size])
    record = found.record
    title = f"{record.method} against exact patching, {record.direction} ({record.metric})"
    out.table(title, [(name, "left" if name == "kind" else "right") for name in FIT_COLUMNS], rows)
    for remark in found.remarks:
        out.say(remark)


def attention(found: AttentionPattern, out: Output) -> None:
    """What each token of a prompt attends to most."""
    rows = []
    for query, weights in enumerate(found.pattern):
        best = np.argsort(-weights, kind="stable")[: min(KEYS, query + 1)]
        keys = "  ".join(f"{key} {found.tokens[key].strip()} {fixed(float(weights[key]), 2)}" for key in best)
        rows.append([str(query), found.tokens[query].strip(), keys])
    columns = [("", "right"), ("query", "left"), ("attends most to", "left")]
    settings = found.record.settings
    where = [f"{settings.get('side', '')} prompt {settings['example']}".strip()] if "example" in settings else []
    where += [found.record.task] if found.record.task else []
    out.table(" of ".join([f"{found.head} on {where[0]}" if where else found.head, *where[1:]]), columns, rows)


def positions(out: Output) -> None:
    """What the labels of positions are."""
    out.say("Positions are named by the tokens of the first clean prompt.", style="dim")


def drawable(path: Path) -> str:
    """That a file was written, and how to see its figures."""
    return f"Written: {path} (figures: circuitfind show {shlex.quote(str(path))})"
