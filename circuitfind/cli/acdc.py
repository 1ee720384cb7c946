"""`circuitfind acdc`: the pruning baseline, judged like everything else on held-out pairs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from circuitfind.cli import inputs, options, tables
from circuitfind.cli.options import Option, given, listed
from circuitfind.cli.output import Output, count, size

if TYPE_CHECKING:
    from circuitfind import Model
    from circuitfind.tasks.bound import BoundTask

CHECKPOINT = "acdc.part.safetensors"


@dataclass(frozen=True)
class PruningOptions:
    """How ACDC prunes."""

    threshold: Annotated[
        float | None, Option("An edge goes if removing it lowers the metric by less. Default: 0.05.")
    ] = None
    metric_of_pruning: Annotated[
        str | None, Option("The metric that edges are tried by. Default: kl.", names=("--prune-by",))
    ] = None
    order: Annotated[
        str | None,
        Option(f"The order in which edges are tried: {listed(options.ORDERS)}. Default: {options.ORDERS[0]}."),
    ] = None
    absolute: Annotated[bool, Option("Keep edges that oppose the task, too.")] = False
    remove_dangling: Annotated[
        str | None, Option("tested or untested: what nodes without inputs write goes, too. Default: it stays.")
    ] = None
    screen: Annotated[
        float | None,
        Option(
            "Edges whose |score| is below this part of the threshold, such as 0.1, go without a test; a sample is"
            " checked. Default: every edge is tested."
        ),
    ] = None
    scores: Annotated[
        Path | None,
        Option("scores.safetensors for --screen (default: eap-ig-inputs, computed) or --order scores.", metavar="FILE"),
    ] = None
    ablation: Annotated[str | None, Option(f"{options.ABLATION_HELP} Default: corrupted.")] = None
    holdout: Annotated[
        float | None, Option("Part of the pairs that is held out to judge the circuit with. Default: 0.5.")
    ] = None
    batch_size: Annotated[int | None, Option("Pairs at a time. Default: what fits in memory.", least=1)] = None


def acdc(
    model: options.CheckedModelOptions,
    task: options.TaskOptions,
    pruning: PruningOptions,
    place: options.OutOptions,
    out: Output,
) -> None:
    """Prune the full graph edge by edge (ACDC), and judge what is left on held-out pairs.

    Writes acdc.json, acdc.dot and acdc.svg.

    Example: circuitfind acdc tiny --task ioi --threshold 0.05
    """
    folder = inputs.folder(place.out)
    loaded, bound = inputs.load(model, task, out, model.check)
    import circuitfind as cf

    seen, held_out = inputs.held_out(bound, pruning.holdout, task.seed)
    about = f"{bound.name}: {len(seen)} pairs to prune with and {len(held_out)} to judge with"
    out.facts([("model", inputs.model_line(loaded)), ("task", about), ("memory", _memory(loaded, seen))])
    started = time.monotonic()
    asked = given(pruning, metric_of_pruning="metric", scores="", holdout="")
    if pruning.scores is not None:
        asked["scores"] = cf.Scores.open(pruning.scores)
    checkpoint = inputs.checkpoint(loaded, folder / CHECKPOINT, "decided", out)
    with out.progress():
        circuit = cf.acdc(loaded, seen, **asked, seed=task.seed, checkpoint=checkpoint)
        seconds = time.monotonic() - started
        value = inputs.judged(loaded, held_out, circuit, pruning.batch_size, task.seed)
    facts, metric = circuit.facts, circuit.record.metric
    out.say()
    out.facts(
        [
            ("circuit", f"{count(len(circuit), 'edge')} of {loaded.graph.n_edges:,}, left unpruned"),
            *_trials(facts),
            ("pruning", f"{metric} {facts['metric_full']:.4g} -> {facts['metric']:.4g}"),
            *tables.evaluation(value, f"{len(held_out)} held-out pairs"),
        ]
    )
    from circuitfind.report.write import save_circuit

    title = f"ACDC at {circuit.record.settings['threshold']:g} on {bound.name} in {loaded.name}"
    files = save_circuit(circuit, folder, "acdc", title)
    out.say(f"\n{seconds:.1f} s.")
    out.written(files)
    found = {"seconds": round(seconds, 2), "files": [str(path) for path in files]}
    kept = {"edges": circuit.edges, **facts, "unseen": value.to_dict()}
    out.document({**inputs.described(loaded, bound, out), **found, "circuit": kept})


def _memory(model: Model, pairs: BoundTask) -> str:
    """What the runs that pruning starts from take."""
    from circuitfind.engine.revision import held_bytes

    if model.remote:
        return f"of {model.place}"
    return f"about {size(held_bytes(model.adapter, pairs.batch.clean.ids.numel()))} for their runs"


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
