"""`circuitfind tasks`, `models` and `doctor`: what there is, and whether it works here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

import circuitfind as cf
from circuitfind.cli import inputs, options
from circuitfind.cli.options import option
from circuitfind.cli.output import FAILED, Cell, Output, Right, number, percent
from circuitfind.errors import CircuitfindError, ModelError

if TYPE_CHECKING:
    from circuitfind.tasks.builder import SingleTokens

MEASURED_ON = 64
EXAMPLES = 4
LEGEND = (
    "clean, corrupted: mean metric; lowered: pairs whose corrupted prompt has the lower metric; flipped: below zero,"
    " where the corruption makes the other answer right"
)
HEADINGS = ("task, corruption", "accuracy", "clean", "corrupted", "lowered", "flipped")


# -------------------------------------------------------------------- tasks
@dataclass(frozen=True)
class TaskListOptions:
    model: str | None = option(f"Say what it can express. {options.MODEL_HELP}", argument=True, metavar="MODEL")
    measure: bool = option("Also how well the model does each task.", False)
    show: str | None = option("Print example pairs of one task.", metavar="NAME")
    seed: int = option("Of the example pairs.", 0)


def tasks(what: TaskListOptions, out: Output) -> None:
    """List the built-in tasks; with MODEL, which of them its tokenizer can express.

    Example: circuitfind tasks tiny --measure
    """
    from circuitfind.tasks.builtin import TASKS, builder_of

    if what.show is not None:
        _examples(builder_of(what.show), what, out)
        return
    found = {name: _plain(one) for name, one in TASKS.items()}
    if what.model is not None or what.measure:
        name = what.model or "tiny"
        ask = _measured(name, what.seed, out) if what.measure else _expressed(name, out)
        for task, one in TASKS.items():
            try:
                found[task] |= {"words": True, **ask(task, one)}
            except CircuitfindError as error:
                found[task] |= {"words": False, "refused": str(error)}
    rows = [(Text(name, style="bold"), _description(one)) for name, one in found.items()]
    out.table("Built-in tasks", ("name", "what, and from where"), rows)
    out.document({"model": what.model, "tasks": found})


def _plain(one: cf.TaskBuilder) -> dict[str, Any]:
    lists = {"corruptions": list(one.corruptions), "templates": dict(one.templates)}
    return {"summary": one.summary, "metric": one.metric, **lists, "source": one.source}


def _description(one: dict[str, Any]) -> Text:
    names = list(one["templates"])
    templates = f"; templates {names[0]} to {names[-1]}" if len(names) > 1 else ""
    lines = [
        Text(one["summary"]),
        Text(f"metric {one['metric']}; corruptions {', '.join(one['corruptions'])}{templates}", style="dim"),
        Text(one["source"], style="dim"),
    ]
    if "refused" in one:
        reason = one["refused"].partition(": ")[2].partition(";")[0]  # without the task's name and the remedy
        lines.append(Text(f"not with this model: {reason}", style="yellow"))
    elif "accuracy" in one:
        clean, corrupted = number(one["clean"]), number(one["corrupted"])
        measured = f"accuracy {one['accuracy']:.0%} on {one['n']} pairs, metric {clean} clean, {corrupted} corrupted"
        lines.append(Text(measured, style="green"))
    elif "words" in one:
        lines.append(Text("yes, this tokenizer has the words", style="green"))
    return Text("\n").join(lines)


def _expressed(name: str, out: Output) -> Callable[[str, cf.TaskBuilder], dict[str, Any]]:
    """Whether the tokenizer alone has each task's words; the weights are not loaded."""
    words = _words(name, out)

    def ask(task: str, one: cf.TaskBuilder) -> dict[str, Any]:
        one.make(words, 1)
        return {}

    return ask


def _measured(name: str, seed: int, out: Output) -> Callable[[str, cf.TaskBuilder], dict[str, Any]]:
    """Accuracy and metrics of the model on each task."""
    loaded = inputs.load_model(options.UncheckedModel(model=name), out)

    def ask(task: str, one: cf.TaskBuilder) -> dict[str, Any]:
        with out.progress():
            summary = cf.summarise(loaded, cf.task(task, loaded, n=MEASURED_ON, seed=seed), warn=False)
        return {key: getattr(summary, key) for key in ("n", "accuracy", "top1", "clean", "corrupted", "lowered")}

    return ask


def _words(name: str, out: Output) -> SingleTokens:
    from circuitfind.loading import check_name

    check_name(name)
    with out.waiting(f"loading the tokenizer of {name}"):
        inputs.quiet()
        from circuitfind.models.load import fetch_tokenizer
        from circuitfind.tasks.builder import SingleTokens

        tokenizer = fetch_tokenizer(name)
    if tokenizer is None:
        raise ModelError(f"'{name}' has no tokenizer that can be loaded: tasks are made of words")
    return SingleTokens(tokenizer)


def _examples(one: cf.TaskBuilder, what: TaskListOptions, out: Output) -> None:
    rows = one.make(_words(what.model or "tiny", out), EXAMPLES, what.seed)
    out.facts([(one.name, one.summary), ("metric", one.metric), ("source", one.source)])
    for row in rows:
        out.say()
        answers = f"{_few(row.answers)} / {_few(row.wrong)}"
        out.facts([("clean", row.clean), ("corrupted", row.corrupted), ("right / wrong", answers)])
    out.document({"name": one.name, **_plain(one), "examples": [row._asdict() for row in rows]})


def _few(answers: tuple[str, ...], most: int = 6) -> str:
    return ", ".join(answers[:most]) + (f", ... ({len(answers)})" if len(answers) > most else "")


# -------------------------------------------------------------------- models
def models(out: Output) -> None:
    """Say how good the embedded model is, and which model families are covered.

    Example: circuitfind models
    """
    from circuitfind.models import tiny
    from circuitfind.models.families import FAMILIES

    figures = tiny.figures()
    made = figures["training"]
    pairs = {one["n"] for corruptions in figures["behaviours"].values() for one in corruptions.values()}
    out.facts(
        [
            ("tiny", f"GPT-2 class, {made['parameters']:,} parameters, in the package, works offline"),
            ("training", f"{made['steps']:,} steps, seed {made['seed']}, {made['seconds'] / 60:.0f} minutes"),
            ("measured", f"on {min(pairs):,} pairs each, held out from training ({made['held_out']})"),
        ]
    )
    out.say()
    rows: list[list[Cell]] = []
    for task, corruptions in figures["behaviours"].items():
        rows.append([Text(task, style="bold"), *[""] * 5])
        rows += [_figures(corruption, one) for corruption, one in corruptions.items()]
    out.table("How well it does the built-in tasks", HEADINGS, rows)
    out.say(LEGEND, style="dim")
    out.say()
    out.facts([("covered", f"{len(FAMILIES)} families: {', '.join(sorted(FAMILIES))}")])
    out.document({"embedded": {"tiny": figures}, "families": sorted(FAMILIES)})


def _figures(corruption: str, one: dict[str, Any]) -> list[Cell]:
    metrics = [number(one[name]) for name in ("metric_clean", "metric_corrupted")]
    flipped = percent(one["flipped"], 1) if one["flips"] else ""
    return [f"  {corruption}", percent(one["accuracy"], 1), *metrics, percent(one["lowered"], 1), flipped]


# -------------------------------------------------------------------- doctor
@dataclass(frozen=True)
class BatchOptions:
    examples: int = option("Pairs in the batch of the memory estimate.", 32, least=1)
    length: int = option("Tokens in each of its prompts.", 16, least=1)


def doctor(model: options.UncheckedModel, batch: BatchOptions, out: Output) -> int:
    """Check a model: identities, size of its graph, memory, versions.

    Three identities compare circuitfind's arithmetic with the model's own. Exit code 1 if one fails.

    Example: circuitfind doctor tiny
    """
    loaded = inputs.load_model(model, out)
    from circuitfind.loading import identities as identities_of
    from circuitfind.record import library_versions

    with out.waiting("checking identities"):
        identities = identities_of(loaded)
    found = _facts(loaded)
    memory = inputs.memory_line(loaded, (batch.examples, batch.length, 1))
    dot = shutil.which("dot")
    versions = library_versions()
    out.facts(
        [
            ("model", inputs.model_line(loaded)),
            ("grouped", _ungrouped_line(loaded)),
            ("attention", str(found["attention"])),
            ("tokenizer", str(found["tokenizer"])),
            ("memory", f"{batch.examples} pairs of {batch.length} tokens: {memory}"),
            ("graphviz", dot or "'dot' is not on the PATH: circuits are written as .dot, pictures are not drawn"),
            ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ]
    )
    out.say()
    rows = [
        (one.name, Right(f"{one.error:.1e}"), Right(f"{one.tolerance:.0e}"), _verdict(one.holds)) for one in identities
    ]
    out.table("Identities, error relative to the largest value", ("identity", "error", "allowed", ""), rows)
    fine = all(one.holds for one in identities)
    out.say("All hold: what circuitfind computes is this model." if fine else "Do not trust scores of this model here.")
    checks = [{**one._asdict(), "holds": one.holds} for one in identities]
    found |= {"memory": memory, "identities": checks, "dot": dot, "versions": versions}
    out.document({"model": loaded.name, **found})
    return 0 if fine else FAILED


def _verdict(holds: bool) -> Text:
    return Text("holds", style="green") if holds else Text("FAILS", style="bold red")


def _facts(model: cf.Model) -> dict[str, object]:
    graph, tokenizer = model.graph, model.tokenizer
    return {
        "family": getattr(model.config, "model_type", "?"),
        "edges": graph.n_edges,
        "nodes": graph.n_nodes,
        "edges_ungrouped": graph.ungrouped().n_edges,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": getattr(model.config, "_attn_implementation", None) or "?",
        "tokenizer": "none: tasks are given as token ids" if tokenizer is None else _tokenizer_line(model),
    }


def _tokenizer_line(model: cf.Model) -> str:
    first = model.tokenizer("probe")["input_ids"][:1]
    bos = model.tokenizer.bos_token_id
    own = "adds a BOS token by itself" if bos is not None and first == [bos] else "adds no BOS token by itself"
    return f"{type(model.tokenizer).__name__}, vocabulary of {model.vocabulary:,}, {own}"


def _ungrouped_line(model: cf.Model) -> str:
    """For grouped-query models: the count with one key and value per query head, as other tools count."""
    if model.graph.group == 1:
        return ""
    return f"{model.graph.ungrouped().n_edges:,} edges as other tools count, with keys and values for every query head"
