"""`circuitfind find`, `acdc` and `learn`: circuits, judged on held-out pairs, with everything on disk at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import circuitfind as cf
from circuitfind.cli import inputs, options, verdicts
from circuitfind.cli.options import given, listed, option
from circuitfind.cli.output import FAILED, Output, count, fixed, number, size

if TYPE_CHECKING:
    from circuitfind.tasks.bound import BoundTask

HELD_OUT = "Part of the pairs that is held out to judge the circuit with. Default: 0.5."
CHECKPOINT = "acdc.part.safetensors"


# -------------------------------------------------------------------- find
@dataclass(frozen=True)
class SearchOptions(options.Rank):
    tolerance: float | None = option("How far from 1 the faithfulness may be. Default: 0.15.", least=0)
    one_sided: bool = option("Only below 1 counts as too far.", False)
    prune: bool = option("Drop single edges at the end.", True)
    prune_tolerance: float | None = option(
        "How much |1 - faithfulness| may grow by dropping edges. Default: 0.05.", least=0
    )
    knockouts: int | None = option(
        "Parts of the circuit to ablate in it and in the model, which may have a second way. Default: 5.", least=0
    )


def find(
    model: options.Model,
    task: options.Task,
    scoring: options.Scoring,
    run: options.Run,
    search: SearchOptions,
    judge: options.Judge,
    place: options.Out,
    out: Output,
) -> int:
    """Find the smallest circuit that does a task, verify it exactly, draw it.

    Writes circuit.json, scores.safetensors, find.json, circuit.dot, circuit.svg and report.html.
    Exit code 1: no circuit smaller than the whole model is on target.

    Example: circuitfind find tiny --task ioi --n 64
    """
    asked = inputs.search_keywords(task, run, scoring)
    folder = inputs.folder(place.out)
    loaded, bound = inputs.load(model, task, out)
    started = time.monotonic()
    scores = None
    if judge.scores is not None:
        scores, bound = inputs.given_scores(judge.scores, loaded, bound, asked)
    seen, held_out = inputs.held_out(bound, judge.holdout, task.seed)
    pairs = f"{len(bound)} pairs, {len(seen)} to search with and {len(held_out)} to judge with"
    inputs.introduce(loaded, seen, run, out, pairs, scoring=True)
    again: tuple[str, ...] = ()
    if scores is None:
        scores = inputs.scored(loaded, seen, asked, folder, out)
        again = ("--scores", str(scores.save(folder / "scores.safetensors")))
    out.if_stopped = f"the scores are kept; go on with: {out.command_line(*again)}"
    with out.progress():
        result = cf.find(loaded, bound, **{**given(search, judge), **asked, "scores": scores})
    seconds = time.monotonic() - started
    _show(result, seconds, out)
    with out.progress():
        files = result.write(folder, command=out.command_line(), batch_size=run.batch_size, seed=task.seed)
    out.say()
    head = {**inputs.described(loaded, bound, out), "seconds": round(seconds, 2)}
    out.finish({**head, **result.to_dict()}, files)
    return FAILED if len(result.circuit) == loaded.graph.n_edges else 0


def _show(result: cf.FindResult, seconds: float, out: Output) -> None:
    circuit, facts, made = result.circuit, result.circuit.facts, result.circuit.record.settings
    out.say()
    inside = set(circuit.edges)
    verdicts.checks(
        f"The circuit's strongest edges ({circuit.record.metric})", result.checks, out, inside, verdicts.ROWS
    )
    lines = verdicts.as_a_whole(circuit, result.checks, count(facts["unseen_pairs"], "held-out pair"))
    searched = count(facts["search_pairs"], "search pair")
    lines.insert(2, ("", f"{fixed(facts['faithfulness_on_search_pairs'])} on the {searched}"))
    out.facts(lines)
    target = f"at least {1 - made['tolerance']:g}" if made["one_sided"] else f"1 within {made['tolerance']:g}"
    said = f"Target: faithfulness {target}. {len(result.curve)} circuits run; {seconds:.1f} s in all."
    out.say(f"\n{said}", style="dim")
    for step in result.steps:
        out.say(f"{step.stage}: {step.text}", style="dim")
    if len(circuit) == circuit.graph.n_edges:
        out.warn("no circuit smaller than the whole model is on target: nothing was found")
    elif not result.on_target:
        out.warn(
            f"faithfulness on the held-out pairs, {result.checks.faithfulness:.3f}, is off the target that the search"
            " pairs met: more pairs (--n) make the search less lucky"
        )


# -------------------------------------------------------------------- acdc
@dataclass(frozen=True)
class PruningOptions:
    threshold: float | None = option("An edge goes if removing it lowers the metric by less. Default: 0.05.")
    metric_of_pruning: str | None = option("The metric that edges are tried by. Default: kl.", names=("--prune-by",))
    order: str | None = option(
        f"The order in which edges are tried: {listed(options.ORDERS)}. Default: {options.ORDERS[0]}."
    )
    absolute: bool = option("Keep edges that oppose the task, too.", False)
    remove_dangling: str | None = option(
        "tested or untested: what nodes without inputs write goes, too. Default: it stays."
    )
    screen: float | None = option(
        "Edges whose |score| is below this part of the threshold, such as 0.1, go without a test; a sample is"
        " checked. Default: every edge is tested."
    )
    scores: Path | None = option(
        "scores.safetensors for --screen (default: eap-ig-inputs, computed) or --order scores.", metavar="FILE"
    )
    ablation: str | None = option(f"{options.ABLATION_HELP} Default: corrupted.")
    holdout: float | None = option(HELD_OUT)
    batch_size: int | None = option("Pairs at a time. Default: what fits in memory.", least=1)


def acdc(model: options.Model, task: options.Task, pruning: PruningOptions, place: options.Out, out: Output) -> None:
    """Prune the full graph edge by edge (ACDC), and judge what is left on held-out pairs.

    Writes acdc.json, acdc.dot and acdc.svg.

    Example: circuitfind acdc tiny --task ioi --threshold 0.05
    """
    folder = inputs.folder(place.out)
    loaded, bound = inputs.load(model, task, out)
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
        value = _judged(loaded, held_out, circuit, pruning.batch_size, task.seed)
    from circuitfind.report.write import save_circuit

    facts = circuit.facts
    lines = [
        ("circuit", f"{count(len(circuit), 'edge')} of {loaded.graph.n_edges:,}, left unpruned"),
        *_trials(facts),
        ("pruning", f"{circuit.record.metric} {facts['metric_full']:.4g} -> {facts['metric']:.4g}"),
    ]
    title = f"ACDC at {circuit.record.settings['threshold']:g} on {bound.name} in {loaded.name}"
    save = partial(save_circuit, circuit, folder, "acdc", title)
    _tell(lines, circuit, value, seconds, save, inputs.described(loaded, bound, out), out)


def _judged(model: cf.Model, pairs: BoundTask, circuit: cf.Circuit, batch_size: int | None, seed: int) -> cf.Evaluation:
    """A circuit on held-out pairs by the task's own metric, whatever metric it was found by."""
    by_own = replace(circuit, record=replace(circuit.record, metric=""))
    return cf.evaluate(model, pairs, by_own, batch_size=batch_size, seed=seed)


def _tell(
    lines: list[tuple[str, str]],
    circuit: cf.Circuit,
    value: cf.Evaluation,
    seconds: float,
    save: Callable[[], list[Path]],
    content: dict[str, Any],
    out: Output,
) -> None:
    """Says what was found, saves it, and writes the document."""
    out.say()
    out.facts([*lines, *verdicts.evaluation(value, f"{value.record.n_examples} held-out pairs")])
    files = save()
    out.say(f"\n{seconds:.1f} s.")
    kept = {"edges": circuit.edges, **circuit.facts, "unseen": value.to_dict()}
    out.finish({**content, "seconds": round(seconds, 2), "circuit": kept}, files)


def _memory(model: cf.Model, pairs: BoundTask) -> str:
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


# -------------------------------------------------------------------- learn
@dataclass(frozen=True)
class LearningOptions:
    method: str | None = option(f"{listed(options.LEARNED)}. Default: {options.LEARNED[0]}.")
    level: str = option("Gates of edges or of whole nodes.", options.LEVELS[0], words=options.LEVELS)
    edges: int | None = option("How many edges to keep.")
    nodes: int | None = option("How many nodes to keep, at level node.")
    sparsity: float | None = option(
        "Part of the edges (or nodes) to leave out, instead. Default: 0.95 for edge-pruning, others keep open gates."
    )
    steps: int | None = option("Of Adam, at the most. Default: 200.")
    lr: float | None = option("Adam's learning rate. Default: the method's.")
    regularisation: float | None = option("Price of an open gate; not for edge-pruning. Default: from the task.")
    metric_of_learning: str | None = option("The metric that is kept high. Default: kl.", names=("--learn-by",))
    ablation: str | None = option(f"{options.ABLATION_HELP} Default: corrupted.")
    holdout: float | None = option(HELD_OUT)
    batch_size: int | None = option("Pairs at a time. Default: what fits in memory.", least=1)
    checkpoint: Path | None = option("Kept when stopped; the same command goes on from it.", metavar="FILE")


def learn(model: options.Model, task: options.Task, learning: LearningOptions, place: options.Out, out: Output) -> None:
    """Learn which edges to keep by gradient descent, and judge them on held-out pairs.

    Writes learned.json, learned.dot, learned.svg, learned.safetensors (the ranking) and learning.json (the training).

    Example: circuitfind learn tiny --task ioi --method edge-pruning --edges 50
    """
    folder = inputs.folder(place.out)
    loaded, bound = inputs.load(model, task, out)
    seen, held_out = inputs.held_out(bound, learning.holdout, task.seed)
    about = f"{bound.name}: {len(seen)} pairs to learn with and {len(held_out)} to judge with"
    out.facts([("model", inputs.model_line(loaded)), ("task", about)])
    if learning.checkpoint is not None:
        out.if_stopped = f"what was learned is in {learning.checkpoint}; the same command goes on from it"
    asked = given(learning, edges="n_edges", nodes="n_nodes", metric_of_learning="metric", holdout="")
    started = time.monotonic()
    with out.progress():
        found = cf.learn_masks(loaded, seen, **asked, seed=task.seed)
        seconds = time.monotonic() - started
        circuit, last = found.circuit, found.history[-1]
        value = _judged(loaded, held_out, circuit, learning.batch_size, task.seed)
    record = circuit.record
    early = " (stopped early: no new lowest loss)" if last.step < record.settings["steps"] else ""
    lines = [
        ("circuit", f"{count(len(circuit), 'edge')} of {loaded.graph.n_edges:,}, what is connected"),
        ("learning", f"{record.method}, {count(last.step, 'step')}{early}"),
        ("last steps", f"{record.metric} {number(last.metric)}, {last.expected:.0f} gates open"),
    ]
    content = {**inputs.described(loaded, bound, out), "history": [row._asdict() for row in found.history]}
    _tell(lines, circuit, value, seconds, partial(found.write, folder), content, out)
