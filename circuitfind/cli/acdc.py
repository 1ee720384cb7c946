"""`circuitfind acdc`: the full graph pruned edge by edge."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import circuitfind as cf
from circuitfind.cli import inputs, options, verdicts
from circuitfind.cli.cells import count, size
from circuitfind.cli.options import given, listed, option
from circuitfind.cli.output import Output

if TYPE_CHECKING:
    from circuitfind.tasks.bound import BoundTask

CHECKPOINT = "acdc.part.safetensors"


@dataclass(frozen=True)
class PruningOptions:
    threshold: float | None = option("Remove an edge if this lowers the metric by less. Default: 0.05.")
    metric_of_pruning: str | None = option(
        "Metric of the trials. Default: kl.", names=("--prune-by",), keyword="metric"
    )
    order: str | None = option(f"Order of the trials: {listed(options.ORDERS)}. Default: {options.ORDERS[0]}.")
    absolute: bool = option("Also keep edges that oppose the task.", False)
    remove_dangling: str | None = option(
        "Also remove outgoing edges of nodes that have lost their last input: 'tested' one by one, or 'untested'."
        " Default: no."
    )
    screen: float | None = option(
        "Remove edges without a trial if |score| is below this fraction of the threshold, such as 0.1; a sample of them"
        " is checked. Default: every edge is tried."
    )
    scores: Path | None = option(
        "Scores (scores.safetensors) for --screen or --order scores. Default for --screen: compute eap-ig-inputs.",
        metavar="FILE",
    )
    ablation: str | None = option(f"{options.ABLATION_HELP} Default: corrupted.")
    holdout: float | None = option(options.HELD_OUT)
    batch_size: int | None = option("Pairs per batch. Default: as many as fit in memory.", least=1)


def acdc(model: options.Model, task: options.Task, pruning: PruningOptions, place: options.Out, out: Output) -> None:
    """Prune the full graph edge by edge (ACDC) and evaluate the remaining circuit on held-out pairs.

    Writes acdc.json, acdc.dot and acdc.svg.

    Example: circuitfind acdc tiny --task ioi --threshold 0.05
    """
    folder = inputs.folder(place.out, out)
    loaded, bound = inputs.load(model, task, out)
    seen, held_out = inputs.held_out(bound, pruning.holdout, task.seed)
    about = f"{bound.name}: {inputs.shares(seen, held_out, 'prune')}"
    out.facts([("model", inputs.model_line(loaded)), ("task", about), ("memory", _memory(loaded, seen))])
    started = time.monotonic()
    asked = given(pruning, without=("scores", "holdout"))
    if pruning.scores is not None:
        asked["scores"] = cf.Scores.open(pruning.scores)
    checkpoint = inputs.checkpoint(loaded, folder / CHECKPOINT, "decided", out)
    with out.progress():
        circuit = cf.acdc(loaded, seen, **asked, seed=task.seed, checkpoint=checkpoint)
        seconds = time.monotonic() - started
        value = inputs.judged(loaded, held_out, circuit, pruning.batch_size, task.seed)
    from circuitfind.report.write import save_circuit

    facts = circuit.facts
    lines = [
        ("circuit", f"{count(len(circuit), 'edge')} of {loaded.graph.n_edges:,}, left after pruning"),
        *_trials(facts),
        ("pruning", f"{circuit.record.metric} {facts['metric_full']:.4g} -> {facts['metric']:.4g}"),
    ]
    title = f"ACDC at {circuit.record.settings['threshold']:g} on {bound.name} in {loaded.name}"
    save = partial(save_circuit, circuit, folder, "acdc", title)
    verdicts.tell(lines, circuit, value, seconds, save, inputs.described(loaded, bound, out), out)


def _memory(model: cf.Model, pairs: BoundTask) -> str:
    """Memory of the runs that pruning starts from."""
    from circuitfind.engine.revision import held_bytes

    if model.remote:
        return f"of {model.place}"
    return f"about {size(held_bytes(model.adapter, pairs.batch.clean.ids.numel()))} for their runs"


def _trials(facts: dict[str, Any]) -> list[tuple[str, str]]:
    close = f"; {count(len(facts['close_calls']), 'close call')}" if facts["close_calls"] else ""
    without = ", ".join(f"{number:,} {how}" for how, number in facts["without_a_run"].items())
    lines = [
        ("trials", f"{facts['trials_run']:,} run, {facts['decided_without_a_run']:,} decided without a run{close}")
    ]
    lines += [("without a run", without)]
    if "screening" in facts:
        found = facts["screening"]
        wrong = f"{len(found['wrong'])} of {count(found['checked'], 'skipped edge')} measured should have stayed"
        if found["checked"] < found["skipped"]:
            low, high = found["interval"]
            wrong += f": {found['rate']:.1%} (95% interval {low:.1%} to {high:.1%}) of {found['skipped']:,}"
        lines += [("wrong skips", wrong)]
    return lines
