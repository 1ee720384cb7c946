"""Load the model and task that options name, and describe them before a run."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import circuitfind as cf
from circuitfind import processes
from circuitfind.cli import options
from circuitfind.cli.cells import count, number, size
from circuitfind.cli.options import given
from circuitfind.cli.output import Output
from circuitfind.errors import FileError, ModelError, ScoreError, TaskError
from circuitfind.export import files

if TYPE_CHECKING:
    from circuitfind.engine.memory_plan import Kept
    from circuitfind.tasks.bound import BoundTask

Read = TypeVar("Read", "cf.Circuit", "cf.Scores")
DEFAULT_TASK = "ioi"
OF_FILES, BUILT_IN = ("counterfactual", "align"), ("corruption", "template")  # options for one kind of task only
OF_PAIRS = ("chat", "answer", "spelling", "unusable")
CHECKPOINT = "exact.part.safetensors"


# -------------------------------------------------------------------- model and task
def load(model: options.Model, task: options.Task, out: Output) -> tuple[cf.Model, BoundTask]:
    """Load the model and bind the task to it. A file of pairs is read first, so that its errors come early."""
    for name in OF_FILES if task.data is None else BUILT_IN:
        if (value := getattr(task, name)) is not None:
            kind = "pairs of a file (--data)" if task.data is None else "built-in tasks (--task)"
            raise TaskError(f"--{name} {value} belongs to {kind}: leave it out")
    if task.data is None:
        loaded = load_model(model, out, model.check)
        made = cf.task(DEFAULT_TASK if task.task is None else task.task, loaded, **drawn(task))
        return loaded, replace(made, **asked_of_pairs(task)).on(loaded)
    if task.task is not None:
        raise TaskError(f"--task {task.task} and --data {task.data}: give one of the two")
    source = "/dev/stdin" if str(task.data) == "-" else task.data
    asked = given(task, without=("data", "task", "n", "seed"))
    try:
        read = processes.of_first(lambda: cf.Task.from_file(source, **asked))  # standard input is read once
        loaded = load_model(model, out, model.check)
        bound = read.on(loaded)
    except TaskError as error:
        raise TaskError(f"{task.data}: {error}") from None
    return loaded, bound if task.n is None else bound.subset(range(min(task.n, len(bound))))


def drawn(task: options.Task) -> dict[str, Any]:
    return given(task, without=("align", "counterfactual", "data", "task", *OF_PAIRS))


def asked_of_pairs(task: options.Task) -> dict[str, Any]:
    """Options on how prompts and answers are read. Prompts of a built-in task are continued text, so --chat changes the
    default spelling of their answers."""
    asked = {name: value for name in OF_PAIRS if (value := getattr(task, name)) is not None}
    return {**({"spelling": None} if task.chat else {}), **asked}


def load_model(which: options.UncheckedModel, out: Output, check: bool = False) -> cf.Model:
    from circuitfind.loading import check_name

    check_name(which.model)
    with out.waiting(f"loading {which.model}"):
        quiet()
        names = ("dtype", "device", "backend", "allow_missing", "family")
        where: dict[str, Any] = {name: getattr(which, name) for name in names}
        where |= _places(which)
        where["remote"] = which.remote == "ndif" or which.remote or False
        return cf.load(which.model, check=check, **where)


def _places(which: options.UncheckedModel) -> dict[str, Any]:
    """Keywords for a model spread over devices."""
    given_map: Any = which.device_map
    if given_map is None:
        return {}
    if given_map.lstrip().startswith("{"):
        try:
            given_map = json.loads(given_map)
        except ValueError as error:
            raise ModelError(f"--device-map is not valid JSON: {error}") from None
    folder = which.offload_folder
    return {"device_map": given_map, **({} if folder is None else {"offload_folder": os.fspath(folder)})}


def quiet() -> None:
    """Silence progress bars and logs of libraries, except what the user has set in the environment."""
    told = "TRANSFORMERS_VERBOSITY" in os.environ
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import nnsight
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    nnsight.CONFIG.APP.REMOTE_LOGGING = False
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not told:  # the variable has no effect once transformers is imported
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]


# -------------------------------------------------------------------- keywords for the library
def run_keywords(task: options.Task, *groups: options.Run | options.Scoring) -> dict[str, Any]:
    """Keywords of a run: metric and seed of the task, and the options of the groups."""
    return {**given(*groups), **({} if task.metric is None else {"metric": task.metric}), "seed": task.seed}


def check_scoring(asked: dict[str, Any], level: str = "edge", what: str | None = None, **where: Any) -> None:
    """Refuse unsuitable scoring options before a model is loaded."""
    from circuitfind.attribution.methods import method_of, request_of

    known = {name: value for name, value in asked.items() if name != "method"}
    request_of(method_of(asked.get("method"), level, what, asked.get("ablation")), level, what, known, **where)


def method_line(asked: dict[str, Any], *kinds: str) -> str:
    """Name the method for edges, nodes or kinds of place; explain if it is not the usual default."""
    from circuitfind.attribution.methods import default_of

    if asked.get("method") is not None:
        return str(asked["method"])
    ablation = asked.get("ablation")
    of: dict[str, list[str]] = {}
    for kind in kinds:
        of.setdefault(default_of(kind, ablation), []).append(kind)
    said = "; ".join(f"{name} for {', '.join(of[name])}" if len(of) > 1 else name for name in of)
    usual = {default_of(kind) for kind in kinds if default_of(kind) not in of}
    return said + "".join(f": the default, {name}, needs ablation corrupted, not {ablation}" for name in usual)


def search_keywords(task: options.Task, run: options.Run, scoring: options.Scoring) -> dict[str, Any]:
    """`run_keywords` for scores of edges, checked; searches (acdc, learned masks) can make them, too."""
    from circuitfind.attribution.methods import METHODS
    from circuitfind.search.methods import method_of, request_of

    asked, chosen = run_keywords(task, run, scoring), method_of(scoring.method)
    request_of(chosen, {name: value for name, value in asked.items() if name != "method"})
    if scoring.method is not None:  # `cf.attribute` knows the searches as records only; names travel to a server
        asked["method"] = scoring.method if scoring.method in METHODS else chosen
    return asked


def check_places(model: cf.Model, bound: BoundTask, asked: dict[str, Any], where: dict[str, Any]) -> None:
    """Refuses places that the model or the pairs do not have, before anything runs (a server says so itself)."""
    from circuitfind.engine.experiment import Experiment
    from circuitfind.patching.patch import Where, planned
    from circuitfind.setting import Keywords

    if not model.remote:
        run: Any = {name: value for name, value in asked.items() if name in Keywords.__annotations__}
        places = {name: value for name, value in where.items() if name != "level"}
        planned(Experiment.of(model, bound, run), Where(**places))


def places_line(bound: BoundTask, where: dict[str, Any], *whats: str) -> str:
    """What divides the prompts where that was not asked for: spans, for places by position in unequal prompts."""
    from circuitfind.patching.places import kind_of
    from circuitfind.patching.spans import common, lengths, unequal

    kinds = [what for what in whats if kind_of(what).by_position]
    asked = where["by_span"] or where["by_position"] is not None
    if asked or not kinds or not unequal(bound) or not (names := common(bound)):
        return ""
    said = f"{', '.join(kinds)} by named span ({', '.join(names)})"
    return f"{said}, not by position: the prompts have {lengths(bound)} tokens"


def where_of(places: options.Places, *whats: str | None) -> dict[str, Any]:
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


def of_model(kind: type[Read], path: Path, model: cf.Model) -> Read:
    """What a file holds; that of another tool over the model's own graph, in which heads may share a key and value.
    A FileError where it is of another model."""
    found = kind.open(path)
    if found.graph != model.graph:
        found = kind.open(path, graph=model.graph)
    if found.graph != model.graph:
        what = "a circuit" if isinstance(found, cf.Circuit) else "scores"
        raise FileError(f"{path}: {what} of another model {model.graph.unlike(found.graph)}")
    return found


def scored(model: cf.Model, pairs: BoundTask, asked: dict[str, Any], folder: Path, out: Output, **ways: Any) -> Any:
    """`cf.attribute`; a stopped exact run goes on from the file that it leaves in the folder."""
    if getattr(asked.get("method"), "name", asked.get("method")) == "exact":
        ways["checkpoint"] = checkpoint(model, folder / CHECKPOINT, "measured", out)
    with out.progress():
        return cf.attribute(model, pairs, **asked, **ways)


def checked(
    model: cf.Model, pairs: BoundTask, scores: Any, asked: dict[str, Any], run: options.Run, out: Output
) -> cf.Checks | None:
    """`cf.check` of the strongest estimates; None of what estimates no effect, where it was not asked for."""
    from circuitfind.evaluation.check import can_be_checked

    if asked.get("top") == 0 or ("top" not in asked and not can_be_checked(scores.record)):
        return None
    with out.progress():
        return cf.check(model, pairs, scores, **asked, batch_size=run.batch_size)


def checkpoint(model: cf.Model, path: Path, what: str, out: Output) -> Path | None:
    """Where a long run keeps what it has done, and the line that says so if it is stopped; a server keeps nothing."""
    if model.remote:
        return None
    out.if_stopped, out.state = f"what was {what} is kept in {path}; go on with: {out.command_line()}", path
    return path


def given_scores(path: Path, model: cf.Model, bound: BoundTask, asked: dict[str, Any]) -> tuple[cf.Scores, BoundTask]:
    """The scores of a file, and the pairs under the metric they are judged by: the scores' own if none is asked for."""
    from circuitfind.attribution.methods import check_made
    from circuitfind.engine.experiment import Experiment

    scores = of_model(cf.Scores, path, model)
    run = check_made(scores.record, asked)
    return scores, Experiment.of(model, bound, run, inherit=scores.record, made="the scores were").bound


def held_out(bound: BoundTask, part: float | None, seed: int) -> tuple[BoundTask, BoundTask]:
    return bound.held_out(seed=seed) if part is None else bound.held_out(part, seed)


def shares(seen: BoundTask, held_out: BoundTask, doing: str) -> str:
    """Describe how pairs are split; `doing`: the purpose of the first part."""
    if held_out is seen:
        return f"1 pair, used both to {doing} and to evaluate"
    return f"{len(seen) + len(held_out)} pairs: {len(seen)} to {doing}, {len(held_out)} held out"


def judged(model: cf.Model, pairs: BoundTask, circuit: cf.Circuit, batch_size: int | None, seed: int) -> cf.Evaluation:
    """Evaluate a circuit on held-out pairs by the task's own metric, whichever metric it was found with."""
    by_own = replace(circuit, record=replace(circuit.record, metric=""))
    return cf.evaluate(model, pairs, by_own, batch_size=batch_size, seed=seed)


def folder(path: Path, out: Output) -> Path:
    """Create the output folder and hold it until the verb ends. A bad folder, or one that another process writes to, is
    thus reported before anything is computed."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"--out {path}: cannot create this folder: {error.strerror or error}") from None
    if not os.access(path, os.W_OK):
        raise FileError(f"--out {path}: cannot write to this folder")
    out.at_end.enter_context(files.held(path, out.command_line()))
    return path


def names_in(words: str) -> list[str]:
    return [name.strip() for name in words.split(",") if name.strip()]


# -------------------------------------------------------------------- descriptions
def model_line(model: cf.Model) -> str:
    """Family, graph, size, precision, device."""
    graph = model.graph
    extent = f"{graph.n_edges:,} edges, {graph.n_nodes:,} nodes"
    weights = model.dequantised or str(model.dtype).removeprefix("torch.")
    return f"{model.name}: {model.kind}, {graph}; {extent}; {weights} on {model.place}"


def memory_line(
    model: cf.Model,
    sizes: tuple[int, int, int],
    batch_size: int | None = None,
    softmax: bool = True,
    kept: Kept | None = None,
    per_step: int | None = None,
) -> str:
    """Describe batch size and memory of scoring, or, with `per_step`, of learning masks. Arguments as for `plan_memory`
    (kept=None: circuits are evaluated) and `plan_learning`."""
    if model.remote:
        return f"batch size chosen by {model.place}"
    from circuitfind.engine.memory_plan import JUDGING, plan_learning, plan_memory

    if per_step is None:
        plan = plan_memory(model.adapter, sizes, batch_size, softmax, kept or JUDGING)
    else:
        plan = plan_learning(model.adapter, sizes, per_step, batch_size, softmax)
    at_once = f"batches of {plan.batch_size}, {plan.chunk:,} tokens at a time" + ", block by block" * plan.by_block
    return f"{at_once}; about {size(plan.beside)} plus {size(plan.weights)} of weights"


def kept_by(asked: dict[str, Any], kind: str) -> Kept:
    """What the method for an "edge", a "node" or a kind of place keeps in memory."""
    from circuitfind.attribution.gradients import patterns_of
    from circuitfind.attribution.methods import METHODS, default_of
    from circuitfind.engine.memory_plan import PATCHING, Kept

    method = asked.get("method") or default_of(kind, asked.get("ablation"))
    record = METHODS.get(method) if isinstance(method, str) else method
    if record is None or record.name == "exact":
        return PATCHING
    points = int(asked.get("steps") or record.options.get("steps", 1))
    return Kept(points, patterns_of(record.points("noising", 1, record.options)) if record.points else 0)


def task_memory(model: cf.Model, bound: BoundTask, run: options.Run, kept: Kept | None) -> str:
    """`memory_line` for the pairs of a task."""
    from circuitfind.engine.memory_plan import sizes_of

    return memory_line(model, sizes_of(bound.batch), run.batch_size, bound.metric.name != "logit_diff", kept)


def introduce(
    model: cf.Model,
    bound: BoundTask,
    run: options.Run,
    out: Output,
    pairs: str = "",
    kept: Kept | None = None,
    method: str = "",
    places: str = "",
    whole: bool = False,
) -> None:
    """Print the model, task, memory, method and places of a run and how well the model does the task, and warn of
    problems with the task.

    Args:
        pairs: how they are split; kept: what the method keeps in memory, for the memory line.
        whole: also print the model's answers on the first pairs and how answers are read, as --verbose does; without
            it, the answers are printed only if the diagnosis has findings.
    """
    whole = whole or out.verbose
    lines = [("model", model_line(model)), ("memory", task_memory(model, bound, run, kept))]
    with out.progress():
        found = cf.diagnose(model, bound, batch_size=run.batch_size)
    for line in found.warnings:
        out.warn(line)
    summary = found.summary
    assert summary is not None, "the task is bound"
    measured = f"metric {number(summary.clean)} on clean, {number(summary.corrupted)} on corrupted prompts"
    if summary.accuracy == summary.accuracy:  # NaN without answers
        measured = f"accuracy {summary.accuracy:.0%} (top token {summary.top1:.0%}); {measured}"
    remarks = [text for severity, text in found.findings if severity == "note"]
    notes = "; ".join([*(summary.notes if whole else ()), *remarks])
    lines += [
        ("task", f"{summary.name}, {summary.metric}: {pairs or count(len(bound), 'pair')}"),
        ("the model", f"{measured}; corrupted is lower in {summary.lowered:.0%} of pairs"),
        *(said_lines(found) if whole or found.findings else ()),
        ("notes", notes),
        ("method", method),
        ("places", places),
    ]
    out.facts(lines)


def said_lines(found: cf.Diagnosis) -> list[tuple[str, str]]:
    """The model's answers on the first pairs, as facts."""
    return [("" if at else "answers", f"pair {one.pair}: {one}") for at, one in enumerate(found.said)]


def described(model: cf.Model, bound: BoundTask, out: Output) -> dict[str, Any]:
    """Model, task and command: the head of every JSON document."""
    run = {"command": out.command_line(), "model": model.name, "task": bound.name, "pairs": len(bound)}
    if bound.weights:
        run["weights"] = bound.weights
    return {"run": {**run, "metric": bound.metric.name, "bos": bound.bos}}
