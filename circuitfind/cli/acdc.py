"""`circuitfind acdc`: the pruning baseline, judged like everything else on pairs that it did not see."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated

import typer

from circuitfind.cli import inputs, pages, shown
from circuitfind.cli.options import CheckedModelOptions, OutOptions, TaskOptions
from circuitfind.cli.output import Output
from circuitfind.cli.verbs import verb
from circuitfind.cli.words import count, fixed, interval
from circuitfind.errors import FileError
from circuitfind.export.files import write_text


@dataclass(frozen=True)
class PruningOptions:
    """How ACDC prunes."""

    threshold: Annotated[float, typer.Option(help="An edge goes if removing it lowers the metric by less.")] = 0.05
    metric_of_pruning: Annotated[str, typer.Option("--by", help="The metric that edges are tried by.")] = "kl"
    order: Annotated[
        str,
        typer.Option(help="reverse-topological[-earliest|-shuffled] or shuffled: edges are tried in this order."),
    ] = "reverse-topological"
    absolute: Annotated[bool, typer.Option("--absolute", help="Keep edges that oppose the behaviour, too.")] = False
    ablation: Annotated[str, typer.Option(help="What a removed edge carries: corrupted, zero or mean.")] = "corrupted"
    holdout: Annotated[float, typer.Option(help="Part of the pairs that is kept to judge the circuit with.")] = 0.5
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pairs at a time.")] = None


def register(app: typer.Typer) -> None:
    """Adds the verb to the app."""
    verb(app, "circuitfind acdc tiny --task ioi --threshold 0.05")(acdc)


def acdc(
    model: CheckedModelOptions, task: TaskOptions, pruning: PruningOptions, place: OutOptions, out: Output
) -> None:
    """Prune the full graph edge by edge (ACDC), and judge what is left on unseen pairs.

    Writes acdc.json, acdc.dot and acdc.svg.
    """
    folder = inputs.folder(place.out)
    loaded = inputs.load_model(model, out, model.check)
    import circuitfind as cf

    bound = inputs.load_task(task, loaded)
    seen, unseen = bound.split(1 - pruning.holdout, task.seed)
    out.facts(
        [
            ("model", inputs.model_line(loaded)),
            ("behaviour", f"{bound.name}: {len(seen)} pairs to prune with and {len(unseen)} to judge with"),
        ]
    )
    started = time.monotonic()
    options = {"absolute": pruning.absolute, "ablation": pruning.ablation, "batch_size": pruning.batch_size}
    with out.progress():
        circuit = cf.acdc(
            loaded,
            seen,
            pruning.threshold,
            metric=pruning.metric_of_pruning,
            order=pruning.order,
            seed=task.seed,
            **options,  # type: ignore[arg-type]
        )
        seconds = time.monotonic() - started
        value = cf.evaluate(loaded, unseen, circuit, ablation=pruning.ablation, batch_size=pruning.batch_size)
    facts = circuit.facts
    close = f"; {count(len(facts['close_calls']), 'close call')}" if facts["close_calls"] else ""
    out.say()
    out.facts(
        [
            ("circuit", f"{count(len(circuit), 'edge')} of {loaded.graph.n_edges:,}, left unpruned"),
            ("trials", f"{facts['trials_run']:,} run, {facts['decided_without_a_run']:,} decided without one{close}"),
            ("pruning", f"{pruning.metric_of_pruning} {facts['metric_full']:.4g} -> {facts['metric']:.4g}"),
            (
                "faithfulness",
                f"{fixed(value.faithfulness)} (95% interval {interval(value.interval)}) on {len(unseen)} unseen pairs",
            ),
            *shown.metric_lines(value),
        ]
    )
    files = [circuit.save(folder / "acdc.json")]
    drawn = pages.strongest(circuit, pages.MOST_DRAWN) if len(circuit) > pages.MOST_DRAWN else circuit
    title = f"ACDC at {pruning.threshold:g} on {bound.name} in {loaded.name}: {len(circuit)} edges"
    files.append(write_text(folder / "acdc.dot", drawn.to_dot(title=title)))
    try:
        files.append(drawn.render(folder / "acdc.svg", title=title))
    except FileError as error:
        out.warn(str(error))
    out.say(f"\n{seconds:.1f} s. Written: {', '.join(map(str, files))}")
    found = {"seconds": round(seconds, 2), "files": [str(path) for path in files]}
    kept = {"edges": circuit.edges, **circuit.facts, "unseen": value.to_dict()}
    out.document({**inputs.described(loaded, bound, out), **found, "circuit": kept})
