"""Hypothesis tests and stability of a circuit for people: tables, and the same as plain data for `--json`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from rich.text import Text

from circuitfind.cli.inputs import DEFAULT_PAIRS, DEFAULT_TASK
from circuitfind.cli.options import TaskOptions
from circuitfind.cli.output import Output
from circuitfind.cli.words import DASH, count, fixed, interval, number
from circuitfind.errors import TaskError

if TYPE_CHECKING:
    from circuitfind import Circuit, HypothesisTests, Model, Stability, Task
    from circuitfind.tasks.bound import BoundTask

ROWS = 15


class Over(StrEnum):
    """What stability is measured over."""

    pairs = "pairs"
    templates = "templates"
    seeds = "seeds"


def tests(out: Output, model: Model, task: BoundTask, circuit: Circuit, **settings: Any) -> dict[str, object]:
    """Makes the tests, shows them, and returns them for the document; `settings` are those of `hypotheses`."""
    import circuitfind as cf

    with out.progress():
        found = cf.hypotheses(model, task, circuit, **settings)
    show_tests(found, out)
    return found.to_dict()


def show_tests(found: HypothesisTests, out: Output) -> None:
    """One row a test, what each means, and the edges that count for no more than random ones."""
    columns = (("test", "left"), ("statistic", "right"), ("p", "right"), ("corrected", "right"), ("speaks", "left"))
    rows = [
        (row.name, fixed(row.statistic), _chance(row.p_value), _chance(row.adjusted), _verdict(row.supports))
        for row in found.rows
    ]
    made = found.record.settings
    out.table(f"Hypothesis tests (alpha {made['alpha']:g}, correction: {made['correction']})", columns, rows)
    out.facts(line for row in found.rows for line in ((row.name, row.reading), ("", f"null: {row.null}")))
    needless = sorted((edge for row in found.rows for edge in row.edges if edge.rejected), key=lambda edge: edge.effect)
    if needless:
        table = [(edge.name, number(edge.effect), fixed(edge.share, 2), _chance(edge.adjusted)) for edge in needless]
        headings = (("edge", "left"), ("effect", "right"), ("above", "right"), ("corrected p", "right"))
        more = f"; {ROWS} of {len(needless):,}" if len(needless) > ROWS else ""
        out.say()
        out.table(f"Edges that count for no more than random ones{more}", headings, table[:ROWS])


def stability(
    out: Output, model: Model, task: BoundTask | Mapping[str, Task], circuit: Circuit, **settings: Any
) -> dict[str, object]:
    """Measures how stable a circuit of this size and method is, shows it, and returns it for the document.

    Args:
        task: pairs to resample, or several tasks by name (`variants`).
        settings: of `stability`; by default the circuit's own size, method and ranking.
    """
    import circuitfind as cf
    from circuitfind.attribution.by_example import METHODS

    made = circuit.record
    own: dict[str, Any] = {"n_edges": max(1, len(circuit)), "by": made.settings.get("by", "absolute")}
    if made.method in METHODS:
        own |= {"method": made.method, "direction": made.direction}
        own |= {name: made.settings[name] for name in ("steps", "rule") if name in made.settings}
    elif settings.get("ablation", "corrupted") != "corrupted":
        own["method"] = "eap"  # the default one knows no other ablation
    with out.progress():
        found = cf.stability(model, task, **{**own, **settings})
    show_stability(found, out)
    return found.to_dict()


def variants(over: Over, model: Model, bound: BoundTask, options: TaskOptions) -> BoundTask | dict[str, Task]:
    """The pairs themselves, or the built-in behaviour that they come from in each template or several seeds."""
    if over is Over.pairs:
        return bound
    if options.data is not None:
        raise TaskError(
            f"stability over {over} needs a built-in behaviour, whose rows can be drawn anew: {options.data} is a file"
        )
    import circuitfind as cf

    given: dict[str, Any] = {"n": options.n or DEFAULT_PAIRS, "corruption": options.corruption}
    given |= {"metric": options.metric, "bos": options.bos}
    name = options.task or DEFAULT_TASK
    if over is Over.templates:
        if options.template is not None:
            raise TaskError("stability over templates takes every template: leave --template out")
        return cf.by_template(name, model, seed=options.seed, **given)
    return cf.by_seed(name, model, range(options.seed, options.seed + 5), template=options.template, **given)


def show_stability(found: Stability, out: Output) -> None:
    """Agreement, what to hold it against, the curve, and the edges that stay."""
    circuits = count(len(found.circuits), "circuit")
    made = found.record
    sizes = sorted({len(circuit) for circuit in found.circuits})
    edges = f"{sizes[0]:,} to {sizes[-1]:,} edges" if len(sizes) > 1 else count(sizes[0], "edge")
    lines = [
        ("stability", f"{circuits} of {edges} by {made.method}"),
        ("Jaccard", f"{fixed(found.jaccard)} on average; 95% of the pairs {interval(found.interval)}"),
        ("shuffled", "" if found.shuffled is None else f"{fixed(found.shuffled)} with all pairs dealt out at random"),
        ("ranks", "" if found.rank_correlations is None else f"correlation {fixed(found.rank_correlation)}"),
        ("stable", f"{count(len(found.stable), 'edge')} in at least 90% of the circuits"),
    ]
    out.facts(lines)
    if len(found.curve) > 1:
        columns = (("pairs", "right"), ("Jaccard", "right"), ("95% of samples' pairs", "right"))
        rows = [(f"{point.n_pairs:,}", fixed(point.jaccard), interval(point.interval)) for point in found.curve]
        out.say()
        out.table("Agreement by number of pairs", columns, rows)
    if found.stable:
        more = f"; {ROWS} of {len(found.stable):,}" if len(found.stable) > ROWS else ""
        out.say()
        edges_and_shares = [(name, f"{share:.0%}") for name, share in found.stable[:ROWS]]
        out.table(f"Edges that stay{more}", (("edge", "left"), ("circuits", "right")), edges_and_shares)


def _chance(value: float) -> str:
    """A p-value."""
    if value != value:
        return DASH
    return f"{value:.3f}" if value >= 1e-3 else f"{value:.1e}"


def _verdict(supports: bool | None) -> Text:
    if supports is None:
        return Text("not tested", style="dim")
    return Text("for the circuit", style="green") if supports else Text("against it", style="red")
