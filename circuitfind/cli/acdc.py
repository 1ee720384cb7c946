"""`circuitfind acdc`: the pruning baseline, judged like everything else on pairs that it did not see."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuitfind.cli import inputs, shown
from circuitfind.cli.options import CheckedModelOptions, OutOptions, TaskOptions
from circuitfind.cli.output import Output
from circuitfind.cli.verbs import verb
from circuitfind.cli.words import count, size

if TYPE_CHECKING:
    from circuitfind import Model, Scores
    from circuitfind.tasks.bound import BoundTask

CHECKPOINT = "acdc.part.safetensors"
SCREENED_BY = "eap-ig-inputs"


@dataclass(frozen=True)
class PruningOptions:
    """How ACDC prunes."""

    threshold: Annotated[float, typer.Option(help="An edge goes if removing it lowers the metric by less.")] = 0.05
    metric_of_pruning: Annotated[str, typer.Option("--prune-by", help="The metric that edges are tried by.")] = "kl"
    order: Annotated[
        str,
        typer.Option(
            help="reverse-topological[-earliest|-shuffled], shuffled or scores: edges are tried in this order."
        ),
    ] = "reverse-topological"
    absolute: Annotated[bool, typer.Option("--absolute", help="Keep edges that oppose the behaviour, too.")] = False
    remove_dangling: Annotated[
        str | None,
        typer.Option(help="tested or untested: what nodes without inputs write goes, too. Default: it stays."),
    ] = None
    screen: Annotated[
        float | None,
        typer.Option(
            help="Edges whose |score| is below so much of the threshold go without a test, such as 0.1; a sample is"
            " checked. Default: every edge is tested."
        ),
    ] = None
    scores: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"scores.safetensors for --screen (default: {SCREENED_BY}, computed) or --order scores.",
        ),
    ] = None
    ablation: Annotated[
        str, typer.Option(help="What a removed edge carries: corrupted, zero, mean, mean-position or resample.")
    ] = "corrupted"
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
            ("memory", _memory(loaded, seen)),
        ]
    )
    started, checkpoint = time.monotonic(), inputs.checkpoint_of(loaded, folder / CHECKPOINT, "decided", out)
    with out.progress():
        circuit = cf.acdc(
            loaded,
            seen,
            pruning.threshold,
            metric=pruning.metric_of_pruning,
            order=pruning.order,
            scores=_scores(pruning, loaded, seen, task.seed),
            ablation=pruning.ablation,
            absolute=pruning.absolute,
            remove_dangling=pruning.remove_dangling,
            screen=pruning.screen,
            batch_size=pruning.batch_size,
            seed=task.seed,
            checkpoint=checkpoint,
        )
        seconds = time.monotonic() - started
        same = {"ablation": pruning.ablation, "batch_size": pruning.batch_size, "seed": task.seed}
        value = cf.evaluate(loaded, unseen, circuit, **same)  # type: ignore[arg-type]
    facts = circuit.facts
    out.say()
    out.facts(
        [
            ("circuit", f"{count(len(circuit), 'edge')} of {loaded.graph.n_edges:,}, left unpruned"),
            *_trials(facts),
            ("pruning", f"{pruning.metric_of_pruning} {facts['metric_full']:.4g} -> {facts['metric']:.4g}"),
            *shown.unseen_lines(value, len(unseen)),
        ]
    )
    title = f"ACDC at {pruning.threshold:g} on {bound.name} in {loaded.name}"
    from circuitfind.report.write import save_circuit

    files = save_circuit(circuit, folder, "acdc", title)
    out.say(f"\n{seconds:.1f} s. Written: {', '.join(map(str, files))}")
    found = {"seconds": round(seconds, 2), "files": [str(path) for path in files]}
    kept = {"edges": circuit.edges, **circuit.facts, "unseen": value.to_dict()}
    out.document({**inputs.described(loaded, bound, out), **found, "circuit": kept})


def _memory(model: Model, pairs: BoundTask) -> str:
    """What the runs that pruning starts from take."""
    from circuitfind.engine.revision import held_bytes

    if model.remote:
        return f"of {model.place}"
    return f"about {size(held_bytes(model.adapter, pairs.batch.clean.ids.numel()))} for their runs"


def _scores(pruning: PruningOptions, model: Model, pairs: BoundTask, seed: int) -> Scores | None:
    """The scores of a file, or those that screening needs."""
    import circuitfind as cf

    if pruning.scores is not None:
        return cf.Scores.open(pruning.scores)
    if pruning.screen is None:
        return None
    same = {"metric": pruning.metric_of_pruning, "ablation": pruning.ablation, "batch_size": pruning.batch_size}
    return cf.attribute(model, pairs, SCREENED_BY, seed=seed, **same)  # type: ignore[arg-type,return-value]


def _trials(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """How the edges were decided."""
    close = f"; {count(len(facts['close_calls']), 'close call')}" if facts["close_calls"] else ""
    without = ", ".join(f"{number:,} {how}" for how, number in facts["without_a_run"].items())
    lines = [("trials", f"{facts['trials_run']:,} run, {facts['decided_without_a_run']:,} decided without one{close}")]
    lines += [("without a run", without)]
    if "screening" in facts:
        found = facts["screening"]
        wrong = f"{len(found['wrong'])} of {count(found['checked'], 'skipped edge')} measured should have stayed"
        if found["checked"] < found["skipped"]:
            low, high = found["interval"]
            wrong += f": {found['rate']:.1%} (95% interval {low:.1%} to {high:.1%}) of {found['skipped']:,}"
        lines += [("wrong skips", wrong)]
    return lines
