"""`circuitfind learn`: learn masks by gradient descent."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import circuitfind as cf
from circuitfind.cli import inputs, options, verdicts
from circuitfind.cli.cells import count, number
from circuitfind.cli.options import given, listed, option
from circuitfind.cli.output import Output

if TYPE_CHECKING:
    from circuitfind.tasks.bound import BoundTask

FILES = (".json", ".pt", ".safetensors")  # of scores and circuits
CHECKPOINT = "learn.part.safetensors"


@dataclass(frozen=True)
class LearningOptions:
    method: str | None = option(f"Method: {listed(options.LEARNED)}. Default: {options.LEARNED[0]}.")
    level: str = option("Learn gates of edges or of whole nodes.", options.LEVELS[0], words=options.LEVELS)
    edges: int | None = option("Number of edges to keep.", keyword="n_edges")
    nodes: int | None = option("Number of nodes to keep, with --level node.", keyword="n_nodes")
    sparsity: float | None = option(
        "Fraction of edges (or nodes) to remove, instead of a number to keep. Default: 0.95; subnetwork-probing and ugs"
        " keep all open gates."
    )
    steps: int | None = option("Most steps of Adam. Default: 200 (matryoshka: 300).")
    lr: float | None = option("Learning rate of Adam. Default: that of the method.")
    regularisation: float | None = option("Penalty of an open gate; not for edge-pruning. Default: set from the task.")
    metric_of_learning: str | None = option(
        "Metric of the loss. Default: kl (matryoshka: the task's metric).", names=("--learn-by",), keyword="metric"
    )
    objective: str | None = option(
        "For matryoshka: raise the metric, match the whole model's, or alternate.", words=options.OBJECTIVES
    )
    start: str | None = option(
        "Start: scores of a method, 'alike' (all gates equal), a file of scores, or a circuit file (then only its edges"
        " are learned). Default: alike (matryoshka: eap-ig-inputs).",
        metavar="NAME|FILE",
    )
    ablation: str | None = option(f"{options.ABLATION_HELP} Default: corrupted.")
    holdout: float | None = option(options.HELD_OUT)
    batch_size: int | None = option("Pairs per batch. Default: as many as fit in memory.", least=1)
    checkpoint: Path | None = option(
        f"Kept when stopped; the same command goes on from it. Default: {CHECKPOINT} in --out.", metavar="FILE"
    )


def learn(model: options.Model, task: options.Task, learning: LearningOptions, place: options.Out, out: Output) -> None:
    """Learn which edges to keep by gradient descent, and evaluate them on held-out pairs.

    Writes learned.json, learned.dot, learned.svg, learned.safetensors (the ranking) and learning.json (training).

    Example: circuitfind learn tiny --task ioi --method edge-pruning --edges 50
    """
    start = _start(learning.start)
    folder = inputs.folder(place.out, out)
    loaded, bound = inputs.load(model, task, out)
    seen, held_out = inputs.held_out(bound, learning.holdout, task.seed)
    about = f"{bound.name}: {inputs.shares(seen, held_out, 'learn')}"
    out.facts([("model", inputs.model_line(loaded)), ("memory", _memory(loaded, seen, learning)), ("task", about)])
    checkpoint = inputs.checkpoint(loaded, learning.checkpoint or folder / CHECKPOINT, "learned", out)
    asked = given(learning, without=("holdout", "checkpoint")) | ({} if start is None else {"start": start})
    started = time.monotonic()
    with out.progress():
        found = cf.learn_masks(loaded, seen, **asked, seed=task.seed, checkpoint=checkpoint)
        seconds = time.monotonic() - started
        circuit, last = found.circuit, found.history[-1]
        value = inputs.judged(loaded, held_out, circuit, learning.batch_size, task.seed)
    record = circuit.record
    early = " (stopped early: no new lowest loss)" if last.step < record.settings["steps"] else ""
    lines = [
        ("circuit", f"{count(len(circuit), 'edge')} of {loaded.graph.n_edges:,} (connected ones)"),
        ("learning", f"{record.method}, {count(last.step, 'step')}{early}"),
        ("last steps", f"{record.metric} {number(last.metric)}, {last.expected:.0f} gates open"),
    ]
    content = {**inputs.described(loaded, bound, out), "history": [row._asdict() for row in found.history]}
    verdicts.tell(lines, circuit, value, seconds, partial(found.write, folder), content, out)


def _memory(model: cf.Model, pairs: BoundTask, learning: LearningOptions) -> str:
    """Memory of the steps, by their own metric."""
    from circuitfind.engine.memory_plan import sizes_of
    from circuitfind.search.learn import learner_of

    learner = learner_of(learning.method or options.LEARNED[0])
    metric = learning.metric_of_learning or learner.metric or pairs.metric.name
    sizes, per_step = sizes_of(pairs.batch), learner.pairs_per_step
    return inputs.memory_line(model, sizes, learning.batch_size, metric != "logit_diff", per_step=per_step)


def _start(given: str | None) -> Any:
    """The scores or circuit in a file, or else the name of a method."""
    is_file = given is not None and (Path(given).is_file() or Path(given).suffix in FILES)
    return cf.open(given) if given is not None and is_file else given
