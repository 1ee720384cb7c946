"""From options to a model, a bound task and scores, and the lines that describe them before a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitfind.cli.options import JudgeOptions, ModelOptions, PlacesOptions, RunOptions, ScoringOptions, TaskOptions
from circuitfind.cli.output import Output
from circuitfind.cli.words import count, number, size
from circuitfind.errors import FileError, ModelError, ScoreError, TaskError

if TYPE_CHECKING:
    from circuitfind import Model, NodeScores, Scores, Sweep
    from circuitfind.record import Record
    from circuitfind.tasks.task import BoundTask

DEFAULT_TASK, DEFAULT_PAIRS = "ioi", 64
CHECKPOINT = "exact.part.safetensors"


def quiet() -> None:
    """Silences the libraries' own bars and logs; what a user has set in the environment stays."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import nnsight
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    nnsight.CONFIG.APP.REMOTE_LOGGING = False
    hub_logging.set_verbosity_error()


def load_model(options: ModelOptions, out: Output, check: bool) -> Model:
    """The model, checked unless told otherwise."""
    refuse_behaviour(options.model, out)
    with out.waiting(f"loading {options.model}"):
        quiet()
        import circuitfind as cf

        where: dict[str, Any] = {"dtype": options.dtype, "device": options.device, "backend": options.backend}
        where["remote"] = options.remote == "ndif" or options.remote or False
        return cf.load(options.model, check=check, **where)


def refuse_behaviour(model: str, out: Output) -> None:
    """Says at once that a behaviour's name is no model's: the hub may let one wait for half a minute to say so."""
    from circuitfind.errors import plain
    from circuitfind.tasks.builtin import TASKS

    name, verb = plain(model), out.command[1]
    if name in TASKS and not Path(model).exists():
        instead = {"tasks": f"tasks --show {name}", "doctor": "doctor tiny"}.get(verb, f"{verb} tiny --task {name}")
        raise ModelError(f"'{model}' is a built-in behaviour, not a model: circuitfind {instead}")


def load_task(options: TaskOptions, model: Model) -> BoundTask:
    """The behaviour in the model's tokens."""
    import circuitfind as cf

    given: dict[str, Any] = {"bos": options.bos}
    if options.data is None:
        if options.counterfactual is not None:
            raise TaskError(f"--counterfactual {options.counterfactual} belongs to --data of MIB: use --corruption")
        if options.align is not None:
            raise TaskError(f"--align {options.align} belongs to --data: built-in pairs have equal length")
        given |= {"corruption": options.corruption, "template": options.template}
        given |= {"metric": options.metric, "seed": options.seed}
        return cf.task(options.task or DEFAULT_TASK, model, n=options.n or DEFAULT_PAIRS, **given).on(model)
    if options.task is not None:
        raise TaskError(f"--task {options.task} and --data {options.data}: give one of the two")
    for name in ("corruption", "template"):
        if getattr(options, name) is not None:
            asked = f"--{name} {getattr(options, name)}"
            raise TaskError(f"{asked} belongs to built-in behaviours; pairs of a file are as they are")
    given |= {"align": options.align} | ({} if options.metric is None else {"metric": options.metric})
    try:
        bound = cf.Task.from_file(options.data, counterfactual=options.counterfactual, **given).on(model)
    except TaskError as error:
        raise TaskError(f"{options.data}: {error}") from None
    return bound.subset(range(min(options.n or len(bound), len(bound))))


def split(bound: BoundTask, options: TaskOptions, judge: JudgeOptions) -> tuple[BoundTask | None, BoundTask]:
    """Pairs to score on and pairs to judge on, the same for `find` and `verify`; with holdout 1 all are to judge on."""
    if judge.holdout == 1:
        return None, bound
    if len(bound) < 2:
        raise TaskError("one pair is too few to score on and to judge with: give at least two, better thirty")
    if not 0 < judge.holdout < 1:
        raise TaskError(f"--holdout {judge.holdout:g}: a part of the pairs is needed, between 0 and 1")
    return bound.split(1 - judge.holdout, options.seed)


def open_scores(path: Path, model: Model, scoring: ScoringOptions, run: RunOptions) -> Scores:
    """Scores from a file, refused where they contradict the model or an option."""
    import circuitfind as cf

    scores = cf.Scores.open(path)
    if scores.graph != model.graph:
        raise ScoreError(f"{path}: scores of another model ({scores.graph}); {model.name} has {model.graph}")
    record = scores.record
    made_with = {"method": record.method, "direction": record.direction, "ablation": record.ablation}
    asked = {"method": scoring.method, "direction": scoring.direction, "ablation": run.ablation}
    for name, value in (asked | settings_of(scoring)).items():
        made = made_with.get(name, record.settings.get(name, "none"))
        if value is not None and value != made:
            raise ScoreError(f"{path}: these scores were made with --{name} {made}, not {value}: leave one of them out")
    return scores


def warn_of_overlap(scores: Scores, seen: BoundTask | None, unseen: BoundTask, seed: int, out: Output) -> None:
    """Says so where pairs to judge with were scored on; of scores that do not name their pairs, where they may be."""
    made = scores.record
    if seen is None:
        return
    overlap = made.seen(unseen.record("verify", made.ablation, made.direction, seed))
    if overlap:
        out.warn(
            f"the scores were made on {overlap} of the {count(len(unseen), 'pair')} to judge with: leave --scores out,"
            " or take another --seed"
        )
    elif overlap is None and (made.n_examples, made.seed) != (len(seen), seed):
        out.warn(
            f"the scores were made on {count(made.n_examples, 'pair')} with seed {made.seed}, this run keeps"
            f" {len(seen)} with seed {seed} for that: some pairs to judge with may have been scored on"
        )


def check_scoring(scoring: ScoringOptions, run: RunOptions, **ways: Any) -> None:
    """Refuses, before a model is loaded, what its scores could not be computed with; `ways` as for `scored`."""
    from circuitfind.attribution.methods import method_of, request_of

    level, what = ways.pop("level", "edge"), ways.pop("what", None)
    own = {name: value for name, value in ways.items() if name in ("by_position", "by_span", "layers")}
    options = {name: value for name, value in ways.items() if name not in own and value}
    asked = {"ablation": run.ablation, "direction": scoring.direction, **settings_of(scoring), **options}
    request_of(method_of(scoring.method, level, what), level, what, asked, **own)


def settings_of(scoring: ScoringOptions) -> dict[str, Any]:
    """Steps and rule, as far as they are given."""
    given = {"steps": scoring.steps, "rule": scoring.rule}
    return {name: value for name, value in given.items() if value is not None}


def check_places(
    model: Model, bound: BoundTask, what: str, ablation: str | None, direction: str | None, **ways: Any
) -> None:
    """Refuses places that the model or the pairs do not have, before anything runs (a server says so itself)."""
    from circuitfind.engine.experiment import Experiment
    from circuitfind.patching.patch import Where, planned

    if not model.remote:
        planned(Experiment.of(model, bound, {"ablation": ablation, "direction": direction}), Where(what, **ways))


def scored(
    model: Model,
    pairs: BoundTask,
    seed: int,
    scoring: ScoringOptions,
    run: RunOptions,
    folder: Path,
    out: Output,
    **level: Any,
) -> Scores | NodeScores | Sweep:
    """Scores as the options ask for them; a stopped exact run goes on from the file that it leaves."""
    import circuitfind as cf

    checkpoint = checkpoint_of(model, folder / CHECKPOINT, "measured", out) if scoring.method == "exact" else None
    with out.progress():
        return cf.attribute(
            model,
            pairs,
            scoring.method,
            ablation=run.ablation or "corrupted",
            direction=scoring.direction or "noising",
            batch_size=run.batch_size,
            seed=seed,
            checkpoint=checkpoint,
            **settings_of(scoring),
            **level,
        )


def checkpoint_of(model: Model, path: Path, what: str, out: Output) -> Path | None:
    """Where a long run keeps what it has done, and the line that says so if it is stopped; a server keeps nothing."""
    if model.remote:
        return None
    out.if_stopped = f"what was {what} is kept in {path}; go on with: {out.command_line()}"
    return path


def ways_of(places: PlacesOptions) -> dict[str, Any]:
    """Keywords of `cf.patch`, `cf.approximation` and `cf.attribute`."""
    try:
        layers = None if places.layers is None else [int(part) for part in places.layers.split(",")]
    except ValueError:
        raise ScoreError(f"--layers {places.layers}: give numbers with commas between them, such as 0,5,11") from None
    return {"by_position": places.by_position, "by_span": places.by_span, "layers": layers}


def warn_of_mismatch(what: str, record: Record, model: Model, bound: BoundTask, out: Output) -> None:
    """Says so where a file comes from another model, behaviour or metric than the present run."""
    now = {"model": model.name, "task": bound.name, "metric": bound.metric.name, "bos": bound.bos}
    labels = {"model": "model", "task": "behaviour", "metric": "metric", "bos": "BOS rule"}
    for name, value in now.items():
        made = getattr(record, name)
        if made and made != value:
            out.warn(f"the {what} was made with {labels[name]} '{made}', this run has '{value}'")


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


def memory_line(model: Model, examples: int, length: int, batch_size: int | None) -> str:
    """Batch size and memory for scoring so many examples."""
    if model.remote:
        return f"batches as {model.place} has room for"
    from circuitfind.engine.memory import batch_size_for, estimate_memory

    at_once = min(batch_size or batch_size_for(model.adapter, examples, length), examples)
    weights = sum(value.numel() * value.element_size() for value in model.hf.parameters())
    beside = estimate_memory(model.adapter, at_once, length).total
    return f"batches of {at_once}; about {size(beside)} beside {size(weights)} of weights"


def task_lines(
    model: Model, bound: BoundTask, pairs: str, batch_size: int | None, out: Output
) -> list[tuple[str, str]]:
    """What the behaviour is and how well the model does it, for `Output.facts`; warns of what is wrong with it."""
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
        ("behaviour", f"{summary.name}, {summary.metric}: {pairs}"),
        ("the model", f"{measured}; lower in {summary.lowered:.0%} of pairs"),
        ("notes", notes),
    ]


def described(model: Model, bound: BoundTask, out: Output) -> dict[str, Any]:
    """What ran on what: the head of every JSON document."""
    run = {"command": out.command_line(), "model": model.name, "task": bound.name, "pairs": len(bound)}
    return {"run": {**run, "metric": bound.metric.name, "bos": bound.bos}}
