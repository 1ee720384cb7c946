"""From options to a model and a task, and the lines that describe them before a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitfind.cli.options import ModelOptions, PlacesOptions, RunOptions, ScoringOptions, TaskOptions, given
from circuitfind.cli.output import Output, number, size
from circuitfind.errors import FileError, ScoreError, TaskError

if TYPE_CHECKING:
    from circuitfind import Circuit, Evaluation, Model, Scores, Task
    from circuitfind.tasks.bound import BoundTask

DEFAULT_TASK = "ioi"
OF_FILES, BUILT_IN = ("counterfactual", "align"), ("corruption", "template")  # options of one kind of task only
CHECKPOINT = "exact.part.safetensors"


# -------------------------------------------------------------------- model and task
def load(model: ModelOptions, task: TaskOptions, out: Output, check: bool = True) -> tuple[Model, BoundTask]:
    """The model, and the task in its tokens; a file of pairs is read before the model is loaded."""
    read = _read(task)
    loaded = load_model(model, out, check)
    if read is None:
        import circuitfind as cf

        words = {"align": "", "counterfactual": "", "data": "", "task": ""}
        return loaded, cf.task(task.task or DEFAULT_TASK, loaded, **given(task, **words)).on(loaded)
    try:
        bound = read.on(loaded)
    except TaskError as error:
        raise TaskError(f"{task.data}: {error}") from None
    return loaded, bound if task.n is None else bound.subset(range(min(task.n, len(bound))))


def _read(options: TaskOptions) -> Task | None:
    """The pairs of a file; None where the task is built in."""
    for name in OF_FILES if options.data is None else BUILT_IN:
        if (value := getattr(options, name)) is not None:
            kind = "pairs of a file (--data)" if options.data is None else "built-in tasks (--task)"
            raise TaskError(f"--{name} {value} belongs to {kind}: leave it out")
    if options.data is None:
        return None
    if options.task is not None:
        raise TaskError(f"--task {options.task} and --data {options.data}: give one of the two")
    import circuitfind as cf

    return cf.Task.from_file(options.data, **given(options, data="", task="", n="", seed=""))


def load_model(options: ModelOptions, out: Output, check: bool) -> Model:
    """The model, checked unless told otherwise."""
    from circuitfind.loading import check_name

    check_name(options.model)
    with out.waiting(f"loading {options.model}"):
        quiet()
        import circuitfind as cf

        where: dict[str, Any] = {"dtype": options.dtype, "device": options.device, "backend": options.backend}
        where["remote"] = options.remote == "ndif" or options.remote or False
        return cf.load(options.model, check=check, **where)


def quiet() -> None:
    """Silences the libraries' own bars and logs; what a user has set in the environment stays."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import nnsight
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    nnsight.CONFIG.APP.REMOTE_LOGGING = False
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


# -------------------------------------------------------------------- what is asked of the library
def run_keywords(task: TaskOptions, *groups: RunOptions | ScoringOptions) -> dict[str, Any]:
    """Keywords of a run: metric and seed of the task, and what the groups hold."""
    return {**given(*groups), **({} if task.metric is None else {"metric": task.metric}), "seed": task.seed}


def check_scoring(asked: dict[str, Any], level: str = "edge", what: str | None = None, **where: Any) -> None:
    """Refuses, before a model is loaded, what cannot be scored."""
    from circuitfind.attribution.methods import method_of, request_of

    known = {name: value for name, value in asked.items() if name != "method"}
    request_of(method_of(asked.get("method"), level, what), level, what, known, **where)


def search_keywords(task: TaskOptions, run: RunOptions, scoring: ScoringOptions) -> dict[str, Any]:
    """`run_keywords` for scores of edges, checked; searches (acdc, learned masks) can make them, too."""
    from circuitfind.search.methods import method_of

    asked = run_keywords(task, run, scoring)
    if scoring.method is not None:
        asked["method"] = method_of(scoring.method)
    check_scoring(asked)
    return asked


def of_the_run(asked: dict[str, Any]) -> Any:
    """The keywords of a run, without the method and its options."""
    from circuitfind.setting import Keywords

    return {name: value for name, value in asked.items() if name in Keywords.__annotations__}


def check_places(model: Model, bound: BoundTask, asked: dict[str, Any], where: dict[str, Any]) -> None:
    """Refuses places that the model or the pairs do not have, before anything runs (a server says so itself)."""
    from circuitfind.engine.experiment import Experiment
    from circuitfind.patching.patch import Where, planned

    if not model.remote:
        planned(
            Experiment.of(model, bound, of_the_run(asked)),
            Where(**{name: value for name, value in where.items() if name != "level"}),
        )


def where_of(places: PlacesOptions, *whats: str | None) -> dict[str, Any]:
    """Keywords of `cf.patch`, `cf.approximation` and `cf.attribute`, for these kinds of place."""
    from circuitfind.patching.places import kind_of

    for what in whats:
        if what is not None:
            kind_of(what)
    try:
        layers = None if places.layers is None else [int(part) for part in places.layers.split(",")]
    except ValueError:
        raise ScoreError(f"--layers {places.layers}: give numbers with commas between them, such as 0,5,11") from None
    return {"by_position": places.by_position, "by_span": places.by_span, "layers": layers}


def open_scores(path: Path, model: Model, asked: Mapping[str, Any] = {}) -> Scores:
    """Scores of a file.

    Raises:
        ScoreError: they are of another model, or were made in another way than is asked for.
    """
    import circuitfind as cf
    from circuitfind.attribution.methods import check_made

    scores = cf.Scores.open(path)
    if scores.graph != model.graph:
        raise ScoreError(f"{path}: scores of another model ({scores.graph}); {model.name} has {model.graph}")
    check_made(scores.record, asked)
    return scores


def open_circuit(path: Path, model: Model) -> Circuit:
    """A circuit of a file.

    Raises:
        FileError: it is of another model.
    """
    import circuitfind as cf

    circuit = cf.Circuit.open(path)
    if circuit.graph != model.graph:
        raise FileError(f"{path}: a circuit of another model ({circuit.graph}); {model.name} has {model.graph}")
    return circuit


def scored(model: Model, pairs: BoundTask, asked: dict[str, Any], folder: Path, out: Output, **ways: Any) -> Any:
    """`cf.attribute`; a stopped exact run goes on from the file that it leaves in the folder."""
    import circuitfind as cf

    if getattr(asked.get("method"), "name", asked.get("method")) == "exact":
        ways["checkpoint"] = checkpoint(model, folder / CHECKPOINT, "measured", out)
    with out.progress():
        return cf.attribute(model, pairs, **asked, **ways)


def checkpoint(model: Model, path: Path, what: str, out: Output) -> Path | None:
    """Where a long run keeps what it has done, and the line that says so if it is stopped; a server keeps nothing."""
    if model.remote:
        return None
    out.if_stopped = f"what was {what} is kept in {path}; go on with: {out.command_line()}"
    return path


def held_out(bound: BoundTask, part: float | None, seed: int) -> tuple[BoundTask, BoundTask]:
    """Pairs to search with, and pairs to judge with."""
    return bound.held_out(seed=seed) if part is None else bound.held_out(part, seed)


def judged(model: Model, pairs: BoundTask, circuit: Circuit, batch_size: int | None, seed: int) -> Evaluation:
    """A circuit on held-out pairs by the task's own metric, whatever metric it was found by."""
    from dataclasses import replace

    import circuitfind as cf

    judged = replace(circuit, record=replace(circuit.record, metric=""))
    return cf.evaluate(model, pairs, judged, batch_size=batch_size, seed=seed)


def folder(path: Path) -> Path:
    """The folder for files, made now, so that a bad place is known before anything is computed."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"--out {path}: no folder can be made there: {error.strerror or error}") from None
    if not os.access(path, os.W_OK):
        raise FileError(f"--out {path}: this folder cannot be written to")
    return path


# -------------------------------------------------------------------- described
def model_line(model: Model) -> str:
    """Family, graph, size, precision, device."""
    kind = getattr(model.config, "model_type", "?")
    dtype = str(model.dtype).removeprefix("torch.")
    graph = model.graph
    counts = f"{graph.n_edges:,} edges, {graph.n_nodes:,} nodes"
    return f"{model.name}: {kind}, {graph}; {counts}; {dtype} on {model.place}"


def memory_line(model: Model, examples: int, length: int, batch_size: int | None = None) -> str:
    """Batch size and memory for scoring so many examples."""
    if model.remote:
        return f"batches as {model.place} has room for"
    from circuitfind.engine.memory import plan_memory

    plan = plan_memory(model.adapter, examples, length, batch_size)
    return f"batches of {plan.batch_size}; about {size(plan.beside)} beside {size(plan.weights)} of weights"


def task_lines(
    model: Model, bound: BoundTask, pairs: str, batch_size: int | None, out: Output
) -> list[tuple[str, str]]:
    """The task and how well the model does it, for `Output.facts`; warns of what is wrong with it."""
    import circuitfind as cf

    with out.progress():
        found = cf.diagnose(model, bound, batch_size=batch_size)
    for line in found.warnings:
        out.warn(line)
    summary = found.summary
    assert summary is not None, "the task is bound"
    measured = f"metric {number(summary.clean)} on clean, {number(summary.corrupted)} on corrupted prompts"
    if summary.accuracy == summary.accuracy:  # NaN without answers
        measured = f"accuracy {summary.accuracy:.0%} (top token {summary.top1:.0%}); {measured}"
    notes = "; ".join([*summary.notes, *(text for severity, text in found.findings if severity == "note")])
    return [
        ("task", f"{summary.name}, {summary.metric}: {pairs}"),
        ("the model", f"{measured}; lower in {summary.lowered:.0%} of pairs"),
        ("notes", notes),
    ]


def described(model: Model, bound: BoundTask, out: Output) -> dict[str, Any]:
    """What ran on what: the head of every JSON document."""
    run = {"command": out.command_line(), "model": model.name, "task": bound.name, "pairs": len(bound)}
    return {"run": {**run, "metric": bound.metric.name, "bos": bound.bos}}
