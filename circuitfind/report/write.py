"""Make the report of a circuit from whatever is known about it, and save a circuit's files.

`write_report` makes the page:

1. Faithfulness and the metric of every example come from a verification or from a run on the task's pairs; without
   either, the facts in the circuit's file are shown.
2. With a model, cuts of the circuit at increasing sizes (`report.sizes`) are run exactly, with intervals over pairs.
3. With a model, the attention patterns of the circuit's heads on the first short clean prompts are kept: `[query, key]`
   weights in steps of 1/255, one byte each, keys up to the query only. If they exceed a budget of bytes, the second
   prompt is dropped, then the heads with the weakest edges.
4. The largest weight of each of the strongest heads on the first prompt is explained (`attention_attribution`). Weights
   on the first token, a common attention sink, and on the query's own token do not count.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import Unpack

from circuitfind.attribution.direct import direct_effects
from circuitfind.calls import model_call
from circuitfind.circuit import Circuit
from circuitfind.engine.experiment import bind
from circuitfind.engine.sites import capture_site
from circuitfind.errors import FileError, ModelError, TaskError
from circuitfind.evaluation.curve import curve as run_curve
from circuitfind.evaluation.diagnosis import TaskSummary
from circuitfind.evaluation.faithfulness import Evaluation, evaluate
from circuitfind.evaluation.verify import EdgeCheck, Verification
from circuitfind.export.files import write_text
from circuitfind.models.load import Model
from circuitfind.patching.attention_attribution import attention_attribution
from circuitfind.placed_scores import PlacedScores
from circuitfind.report.page import Attention, ExampleRow, ReportData, write
from circuitfind.report.sizes import Size, cuts
from circuitfind.scores import Scores
from circuitfind.setting import JudgeKeywords
from circuitfind.statistics import FEW, correlation, of_few
from circuitfind.tasks.bound import BoundTask
from circuitfind.tasks.task import Task

PROMPTS = 2
EXPLAINED, PARTS = 6, 6  # heads whose attention is explained; contributions shown for each
LONGEST = 192  # tokens; the pattern of a longer prompt would be illegible
BUDGET = 900_000  # bytes of attention patterns
MEASURED = ("faithfulness", "metric", "metric_full", "metric_empty", "pair_error", "accuracy", "indifferent")


def write_report(
    path: str | PathLike[str],
    circuit: Circuit,
    model: Model | None = None,
    task: Task | BoundTask | None = None,
    **more: Any,
) -> Path:
    """Write the report of a circuit as one HTML page that needs no network, and return its path. Arguments as for
    `report_data`.

    Raises:
        FileError: the page cannot be written.
        ScoreError: faithfulness is undefined on this task.
        TaskError: the task is not bound to a model, and no model is given.
    """
    return write(path, report_data(circuit, model, task, **more))


def report_data(
    circuit: Circuit,
    model: Model | None = None,
    task: Task | BoundTask | None = None,
    *,
    scores: Scores | PlacedScores | None = None,
    checks: Verification | None = None,
    curve: Sequence[Any] = (),
    steps: Sequence[tuple[str, str]] = (),
    frontier: Sequence[Any] = (),
    summary: TaskSummary | None = None,
    command: str = "",
    beside: Circuit | None = None,
    **asked: Unpack[JudgeKeywords],
) -> ReportData:
    """Return the contents of a circuit's report.

    Args:
        model: runs the circuit at several sizes and gives its heads' attention patterns; without a model, only what is
            given is shown.
        task: preferably held-out pairs; bound to the model if no model is given.
        scores: the scores that the circuit was cut from, which rank the edges of its smaller sizes (default: |effect|);
            with scores by position or span, the page also shows where an edge's effect lies.
        checks: the verification of this circuit on `task`; default: the effects stored in the circuit, and a run of it.
        curve, steps, frontier, summary: from `find`: the circuits tried, the search's steps, its frontier, and the
            summary of the task on the search pairs.
        command: the command that made the circuit.
        beside: another circuit of the same graph; the picture shows the edges of both, and which belong to which.
        asked: metric and ablation (by default the circuit's own), batch_size, seed; see `circuitfind.setting`.
    """
    bound = _bound(model, task)
    known: dict[str, Any] = {"curve": curve, "steps": steps, "frontier": frontier, "command": command}
    known["beside"] = beside
    if isinstance(scores, PlacedScores):
        known["places"], scores = _places(circuit, scores), scores.total()
    value = None if checks is None else checks.evaluation
    if model is not None and bound is not None:
        value = evaluate(model, bound, circuit, **asked) if value is None else value
        order = None if scores is None else scores.ranked(circuit.record.settings.get("by", "absolute"))
        inside = cuts(circuit, order)
        known["sizes"] = measure_sizes(model, bound, inside, **asked) if beside is None else ()
        with suppress(TaskError):  # without wrong answers there is no logit difference
            effects = direct_effects(model, bound, batch_size=asked.get("batch_size")).scores
            known["direct"] = dict(zip(circuit.graph.writer_names, effects.values.tolist(), strict=True))
        try:
            known["attention"] = attention(model, bound, inside[-1])
        except ModelError as error:
            known["attention_note"] = "This model does not hand out its attention patterns."
            warnings.warn(f"the report has no attention patterns: {error}", stacklevel=2)
    name, made = bound.name if bound is not None else circuit.record.task, circuit.record.settings
    return ReportData(
        f"A circuit for {name}" if name else "A circuit",
        next(filter(None, (getattr(model, "name", ""), getattr(bound, "model", ""))), circuit.record.model),
        _task(circuit, bound, summary),
        circuit,
        tolerance=made.get("tolerance") if made.get("criterion", "mean") == "mean" else None,
        **_measured(circuit, value, bound),
        **_checked(circuit, checks),
        **known,
    )


def save_circuit(circuit: Circuit, folder: str | PathLike[str], name: str = "circuit", title: str = "") -> list[Path]:
    """Write NAME.json, NAME.dot and NAME.svg into a folder and return the paths written.

    The SVG needs Graphviz: without it, there is a warning and no SVG. Above 400 edges the drawing is folded by layer.

    Raises:
        FileError: NAME.json or NAME.dot cannot be written.
    """
    folder = Path(folder)
    title = f"{title}: {len(circuit)} edges" if title else f"{len(circuit)} edges"
    files = [circuit.save(folder / f"{name}.json")]
    files.append(write_text(folder / f"{name}.dot", circuit.to_dot(title=title)))
    try:
        files.append(circuit.render(folder / f"{name}.svg", title=title))
    except FileError as error:
        warnings.warn(str(error), stacklevel=2)
    return files


def _places(circuit: Circuit, scores: PlacedScores) -> dict[str, list[tuple[str, float]]]:
    """By edge, the places of its strongest effects, strongest first: those of at least a tenth of the largest."""
    result = {}
    for name in circuit.edges:
        here = scores[name]
        size = np.abs(here)
        order = [at for at in np.argsort(-size, kind="stable")[:PARTS] if size[at] >= 0.1 * size.max()]
        result[name] = [(scores.positions[at], float(here[at])) for at in order]
    return result


def _bound(model: Model | None, task: Task | BoundTask | None) -> BoundTask | None:
    if task is None or (model is None and isinstance(task, BoundTask)):
        return task
    if model is None:
        raise TaskError("a report on a task needs the model, too, or the task bound to it: task.on(model)")
    return bind(model, task)


def _measured(circuit: Circuit, value: Evaluation | None, pairs: BoundTask | None) -> dict[str, Any]:
    """Fields on the whole circuit, from an evaluation or from the facts stored in the circuit."""
    if value is None:
        ends: Sequence[Any] = circuit.facts.get("interval") or (None,)
        interval = None if None in ends else _finite(ends)
        few = of_few(circuit.facts.get("unseen_pairs", FEW) or 1) if "interval" in circuit.facts else ""
        return {"faithfulness": circuit.facts.get("faithfulness"), "interval": interval, "few": few}
    found = {name: getattr(value, name) for name in MEASURED}
    if pairs is not None:
        each = value.per_example
        values = (side.tolist() for side in (each.full, each.circuit, each.empty))
        rows = zip(pairs.prompts, pairs.answer_texts, *values, strict=True)
        found["examples"] = [ExampleRow(*row) for row in rows]
    return {**found, "interval": _finite(value.interval), "few": of_few(value.record.n_distinct)}


def _checked(circuit: Circuit, checks: Verification | None) -> dict[str, Any]:
    """Fields on edges with exact effects, from a verification or from the effects stored in the circuit."""
    if checks is not None:
        pairs = zip(checks.edges, checks.intervals, strict=True)
        intervals = {edge.name: ends for edge, ends in pairs if _finite(ends)}
        known: dict[str, Any] = {"checks": checks.edges, "effect_intervals": intervals}
        known |= {"random": checks.random, "beaten": checks.beaten}
        agree = checks.correlation
    else:
        edges = [
            EdgeCheck(name, math.nan if row.estimate is None else row.estimate, row.exact)
            for name, row in zip(circuit.edges, circuit.rows(), strict=True)
            if row.exact is not None
        ]
        known = {"checks": sorted(edges, key=lambda edge: -abs(edge.exact))}
        both = [edge[1:] for edge in known["checks"] if math.isfinite(edge.estimate)]
        agree = correlation(*np.array(both).reshape(-1, 2).T)
    return {**known, "correlation": agree if math.isfinite(agree) else None}


def _task(circuit: Circuit, pairs: BoundTask | None, summary: TaskSummary | None) -> Mapping[str, str]:
    """Labels and texts of the section on the task."""
    said = {"task": circuit.record.task, "metric": circuit.record.metric}
    if pairs is not None:
        said = {"task": pairs.name, "metric": pairs.metric.name, "pairs": str(len(pairs))}
    if summary is not None:
        accuracy = f"{summary.accuracy:.0%} on the search pairs" if math.isfinite(summary.accuracy) else ""
        said = {
            "task": summary.name,
            "metric": summary.metric,
            "search pairs": str(summary.n),
            "held-out pairs": "" if pairs is None else str(circuit.facts.get("unseen_pairs", len(pairs))),
            "accuracy": accuracy,
            "clean metric": f"{summary.clean:.4g}",
            "corrupted metric": f"{summary.corrupted:.4g}",
        }
    first = "" if pairs is None else f"{pairs.prompts[0]} / {pairs.corrupted_prompts[0]}"
    return {label: text for label, text in {**said, "first pair": first}.items() if text}


def _finite(ends: Sequence[float]) -> tuple[float, float] | None:
    return (ends[0], ends[1]) if all(map(math.isfinite, ends)) else None


def measure_sizes(
    model: Model, task: Task | BoundTask, circuits: Sequence[Circuit], **asked: Unpack[JudgeKeywords]
) -> list[Size]:
    """Run every cut of a circuit exactly; `asked` and errors as for `circuitfind.evaluate`."""
    found = run_curve(model, task, circuits, **asked)
    pairs = zip(found.circuits, found.points, strict=True)
    return [Size(circuit, point.faithfulness, point.interval) for circuit, point in pairs]


@model_call
def attention(
    model: Model, task: Task | BoundTask, circuit: Circuit, *, prompts: int = PROMPTS, budget: int = BUDGET
) -> list[Attention]:
    """Return the attention patterns of a circuit's heads on the first clean prompts of at most `LONGEST` tokens.

    Args:
        prompts: the most prompts.
        budget: the most bytes of all patterns together.

    Raises:
        ModelError: the model does not hand out its attention patterns.
    """
    bound, graph = bind(model, task), circuit.graph
    heads = _heads(circuit)
    rows = [row for row, tokens in enumerate(bound.tokens) if len(tokens) <= LONGEST][:prompts]
    lengths = [len(bound.tokens[row]) for row in rows]
    while len(rows) > 1 and len(heads) * sum(map(_cells, lengths)) > budget:
        rows, lengths = rows[:-1], lengths[:-1]
    if not rows or not heads:
        return []
    heads = heads[: budget // sum(map(_cells, lengths))]
    layers = sorted({graph.layer_of(head) for head in heads})
    result = []
    for row in rows:
        inputs = bound.batch.clean.rows(slice(row, row + 1))
        _, patterns = capture_site(model.adapter, inputs, "pattern", layers)
        packed, why = {}, {}
        for rank, head in enumerate(heads):
            layer = graph.layer_of(head)
            weights = patterns[layer][0, :, head - graph.head(layer)].to(torch.float32)
            real = inputs.mask[0].to(weights.device)
            packed[name := graph.writer_names[head]] = pack(weights := weights[real][:, real])
            if rank < EXPLAINED and row == rows[0] and (found := _why(model, bound, row, name, weights)):
                why[name] = found
        result.append(Attention(bound.prompts[row], bound.tokens[row], packed, why))
    return result


def _why(model: Model, bound: BoundTask, row: int, head: str, weights: torch.Tensor) -> dict[str, Any]:
    """Explain a head's largest attention weight; empty if there is none, or its scores cannot be decomposed."""
    sharp = weights.tril(-1)
    sharp[:, 0] = 0
    if not bool(sharp.any()):
        return {}
    query, key = divmod(int(sharp.argmax()), len(sharp))
    try:
        found = attention_attribution(model, bound, head, key, query, example=row)
    except ModelError:
        return {}
    pairs = [(f"{one.query_side} x {one.key_side}", one.relative) for one in found.top(PARTS)]
    sides = {"query side": found.query_side(PARTS), "key side": found.key_side(PARTS)}
    return {
        "said": "The largest weight on the first prompt, apart from those on the first token and on the query itself."
        f" From {found.query} to {found.key}: weight {found.weight:.2f}, score {found.score:.2f}, which is"
        f" {found.relative:+.2f} relative to the mean over the other keys. Contributions to this difference:",
        **{name: [(one.node, one.relative) for one in parts] for name, parts in sides.items()},
        "pairs": pairs,
    }


def pack(weights: torch.Tensor) -> bytes:
    """Pack `[query, key]` weights in 0..1 as bytes, 255 = 1: row by row, with each query's keys up to itself."""
    whole = (weights.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return bytes(whole[np.tril_indices(len(whole))].tobytes())


def _cells(length: int) -> int:
    return length * (length + 1) // 2


def _heads(circuit: Circuit) -> list[int]:
    """Writer indices of the circuit's heads, by summed |effect| of their outgoing edges, largest first."""
    graph, strength = circuit.graph, np.zeros(circuit.graph.n_writers)
    for row in circuit.rows():
        strength[row.writer] += abs(row.effect or 0.0)
    inside = np.flatnonzero(circuit.node_mask[:-1]).tolist()
    heads = [writer for writer in inside if ".h" in graph.writer_names[writer]]
    return sorted(heads, key=lambda writer: -strength[writer])
