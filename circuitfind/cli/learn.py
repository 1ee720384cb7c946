"""`circuitfind learn`: a circuit by learned masks, judged like everything else on pairs that it did not see."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from circuitfind.cli import inputs, shown
from circuitfind.cli.options import CheckedModelOptions, Level, OutOptions, TaskOptions
from circuitfind.cli.output import Output
from circuitfind.cli.verbs import verb
from circuitfind.cli.words import count, number


@dataclass(frozen=True)
class LearningOptions:
    """How masks are learned."""

    method: Annotated[str, typer.Option(help="edge-pruning, subnetwork-probing or ugs.")] = "edge-pruning"
    level: Annotated[Level, typer.Option(help="Gates of edges or of whole nodes.")] = Level.edge
    edges: Annotated[int | None, typer.Option(help="How many edges to keep.")] = None
    nodes: Annotated[int | None, typer.Option(help="How many nodes to keep, at level node.")] = None
    sparsity: Annotated[
        float | None, typer.Option(help="Part of the edges (or nodes) to leave out, instead. Default: 0.95.")
    ] = None
    steps: Annotated[int, typer.Option(help="Of Adam, at the most.")] = 200
    lr: Annotated[float | None, typer.Option(help="Adam's learning rate. Default: the method's.")] = None
    regularisation: Annotated[
        float | None, typer.Option(help="Price of an open gate; not for edge-pruning. Default: from the behaviour.")
    ] = None
    metric_of_learning: Annotated[str, typer.Option("--learn-by", help="The metric that is kept high.")] = "kl"
    ablation: Annotated[
        str, typer.Option(help="What a closed edge carries: corrupted, zero, mean, mean-position or resample.")
    ] = "corrupted"
    holdout: Annotated[float, typer.Option(help="Part of the pairs that is kept to judge the circuit with.")] = 0.5
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pairs at a time.")] = None
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Kept when stopped; the same command goes on from it.")
    ] = None


DEFAULT_SPARSITY = 0.95


def register(app: typer.Typer) -> None:
    """Adds the verb to the app."""
    verb(app, "circuitfind learn tiny --task ioi --method edge-pruning --edges 50")(learn)


def learn(
    model: CheckedModelOptions, task: TaskOptions, learning: LearningOptions, place: OutOptions, out: Output
) -> None:
    """Learn which edges to keep by gradient descent, and judge them on unseen pairs.

    Writes learned.json, learned.dot, learned.svg and learned.safetensors (the ranking).
    """
    folder = inputs.folder(place.out)
    loaded = inputs.load_model(model, out, model.check)
    import circuitfind as cf

    bound = inputs.load_task(task, loaded)
    seen, unseen = bound.split(1 - learning.holdout, task.seed)
    out.facts(
        [
            ("model", inputs.model_line(loaded)),
            ("behaviour", f"{bound.name}: {len(seen)} pairs to learn with and {len(unseen)} to judge with"),
        ]
    )
    if learning.checkpoint is not None:
        out.if_stopped = f"what was learned is in {learning.checkpoint}; the same command goes on from it"
    sparsity = learning.sparsity
    if learning.edges is None and learning.nodes is None and sparsity is None:
        sparsity = DEFAULT_SPARSITY
    started = time.monotonic()
    with out.progress():
        found = cf.learn_masks(
            loaded,
            seen,
            learning.method,
            level=learning.level.value,
            n_edges=learning.edges,
            n_nodes=learning.nodes,
            sparsity=sparsity,
            steps=learning.steps,
            lr=learning.lr,
            regularisation=learning.regularisation,
            metric=learning.metric_of_learning,
            ablation=learning.ablation,
            batch_size=learning.batch_size,
            seed=task.seed,
            checkpoint=learning.checkpoint,
        )
        seconds = time.monotonic() - started
        circuit, last = found.circuit, found.history[-1]
        same = {"ablation": learning.ablation, "batch_size": learning.batch_size, "seed": task.seed}
        value = cf.evaluate(loaded, unseen, circuit, **same)  # type: ignore[arg-type]
    early = " (stopped early: no new lowest loss)" if last.step < learning.steps else ""
    out.say()
    out.facts(
        [
            ("circuit", f"{count(len(circuit), 'edge')} of {loaded.graph.n_edges:,}, what is connected"),
            ("learning", f"{learning.method}, {count(last.step, 'step')}{early}"),
            ("last steps", f"{learning.metric_of_learning} {number(last.metric)}, {last.expected:.0f} gates open"),
            *shown.unseen_lines(value, len(unseen)),
        ]
    )
    title = f"{learning.method} on {bound.name} in {loaded.name}"
    from circuitfind.report.write import save_circuit

    files = save_circuit(circuit, folder, "learned", title)
    files.append(found.scores.save(folder / "learned.safetensors"))
    out.say(f"\n{seconds:.1f} s. Written: {', '.join(map(str, files))}")
    made = {"seconds": round(seconds, 2), "files": [str(path) for path in files]}
    kept = {"edges": circuit.edges, **circuit.facts, "unseen": value.to_dict()}
    history = [row._asdict() for row in found.history]
    out.document({**inputs.described(loaded, bound, out), **made, "circuit": kept, "history": history})
