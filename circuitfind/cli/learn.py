"""`circuitfind learn`: a circuit by learned masks, judged like everything else on held-out pairs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from circuitfind.cli import inputs, options, tables
from circuitfind.cli.options import Option, given, listed
from circuitfind.cli.output import Output, count, number


@dataclass(frozen=True)
class LearningOptions:
    """How masks are learned."""

    method: Annotated[str | None, Option(f"{listed(options.LEARNED)}. Default: {options.LEARNED[0]}.")] = None
    level: Annotated[str, Option("Gates of edges or of whole nodes.", words=options.LEVELS)] = options.LEVELS[0]
    edges: Annotated[int | None, Option("How many edges to keep.")] = None
    nodes: Annotated[int | None, Option("How many nodes to keep, at level node.")] = None
    sparsity: Annotated[
        float | None,
        Option("Part of the edges (or nodes) to leave out, instead. Default: 0.95 of edge-pruning."),
    ] = None
    steps: Annotated[int | None, Option("Of Adam, at the most. Default: 200.")] = None
    lr: Annotated[float | None, Option("Adam's learning rate. Default: the method's.")] = None
    regularisation: Annotated[
        float | None, Option("Price of an open gate; not for edge-pruning. Default: from the task.")
    ] = None
    metric_of_learning: Annotated[
        str | None, Option("The metric that is kept high. Default: kl.", names=("--learn-by",))
    ] = None
    ablation: Annotated[str | None, Option(f"{options.ABLATION_HELP} Default: corrupted.")] = None
    holdout: Annotated[
        float | None, Option("Part of the pairs that is held out to judge the circuit with. Default: 0.5.")
    ] = None
    batch_size: Annotated[int | None, Option("Pairs at a time. Default: what fits in memory.", least=1)] = None
    checkpoint: Annotated[
        Path | None, Option("Kept when stopped; the same command goes on from it.", metavar="FILE")
    ] = None


def learn(
    model: options.CheckedModelOptions,
    task: options.TaskOptions,
    learning: LearningOptions,
    place: options.OutOptions,
    out: Output,
) -> None:
    """Learn which edges to keep by gradient descent, and judge them on held-out pairs.

    Writes learned.json, learned.dot, learned.svg, learned.safetensors (the ranking) and learning.json (the training).

    Example: circuitfind learn tiny --task ioi --method edge-pruning --edges 50
    """
    folder = inputs.folder(place.out)
    loaded, bound = inputs.load(model, task, out, model.check)
    import circuitfind as cf

    seen, held_out = inputs.held_out(bound, learning.holdout, task.seed)
    about = f"{bound.name}: {len(seen)} pairs to learn with and {len(held_out)} to judge with"
    out.facts([("model", inputs.model_line(loaded)), ("task", about)])
    if learning.checkpoint is not None:
        out.if_stopped = f"what was learned is in {learning.checkpoint}; the same command goes on from it"
    renamed = {"edges": "n_edges", "nodes": "n_nodes", "metric_of_learning": "metric", "holdout": ""}
    asked = given(learning, **renamed)
    started = time.monotonic()
    with out.progress():
        found = cf.learn_masks(loaded, seen, **asked, seed=task.seed)
        seconds = time.monotonic() - started
        circuit, last = found.circuit, found.history[-1]
        value = inputs.judged(loaded, held_out, circuit, learning.batch_size, task.seed)
    record = circuit.record
    early = " (stopped early: no new lowest loss)" if last.step < record.settings["steps"] else ""
    out.say()
    out.facts(
        [
            ("circuit", f"{count(len(circuit), 'edge')} of {loaded.graph.n_edges:,}, what is connected"),
            ("learning", f"{record.method}, {count(last.step, 'step')}{early}"),
            ("last steps", f"{record.metric} {number(last.metric)}, {last.expected:.0f} gates open"),
            *tables.evaluation(value, f"{len(held_out)} held-out pairs"),
        ]
    )
    files = found.write(folder)
    out.say(f"\n{seconds:.1f} s.")
    out.written(files)
    made = {"seconds": round(seconds, 2), "files": [str(path) for path in files]}
    kept = {"edges": circuit.edges, **circuit.facts, "unseen": value.to_dict()}
    history = [row._asdict() for row in found.history]
    out.document({**inputs.described(loaded, bound, out), **made, "circuit": kept, "history": history})
