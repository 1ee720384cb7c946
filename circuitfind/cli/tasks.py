"""`circuitfind tasks`: the built-in tasks, what a tokenizer can express, and how well a model does them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text

from circuitfind.cli import inputs
from circuitfind.cli.options import MODEL_HELP, ModelOptions, Option
from circuitfind.cli.output import Output, number
from circuitfind.errors import CircuitfindError, ModelError

if TYPE_CHECKING:
    from circuitfind.tasks.builder import SingleTokens, TaskBuilder

MEASURED_ON = 64
EXAMPLES = 4


@dataclass(frozen=True)
class TaskListOptions:
    """Which model's tokenizer is asked, and what is shown."""

    model: Annotated[str | None, Option(f"Say what it can express. {MODEL_HELP}", argument=True, metavar="MODEL")] = (
        None
    )
    measure: Annotated[bool, Option("Also how well the model does each task.")] = False
    show: Annotated[str | None, Option("Print example pairs of one task.", metavar="NAME")] = None
    seed: Annotated[int, Option("Of the example pairs.")] = 0


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
        said = _measured(name, what.seed, out) if what.measure else _expressed(name, out)
        for task, more in said.items():
            found[task] |= more
    rows = [(Text(name, style="bold"), _description(one)) for name, one in found.items()]
    out.table("Built-in tasks", ("name", "what, and from where"), rows)
    out.document({"model": what.model, "tasks": found})


def _plain(one: TaskBuilder) -> dict[str, Any]:
    return {
        "summary": one.summary,
        "metric": one.metric,
        "corruptions": list(one.corruptions),
        "templates": dict(one.templates),
        "source": one.source,
    }


def _description(one: dict[str, Any]) -> Text:
    lines = [
        Text(one["summary"]),
        Text(f"metric {one['metric']}; corruptions {', '.join(one['corruptions'])}{_templates(one)}", style="dim"),
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


def _templates(one: dict[str, Any]) -> str:
    names = list(one["templates"])
    return f"; templates {names[0]} to {names[-1]}" if len(names) > 1 else ""


def _expressed(name: str, out: Output) -> dict[str, dict[str, Any]]:
    """Whether the tokenizer alone has each task's words; the weights are not loaded."""
    from circuitfind.tasks.builtin import TASKS

    words = _words(name, out)
    found: dict[str, dict[str, Any]] = {}
    for task, one in TASKS.items():
        try:
            one.make(words, 1)
            found[task] = {"words": True}
        except CircuitfindError as error:
            found[task] = {"words": False, "refused": str(error)}
    return found


def _measured(name: str, seed: int, out: Output) -> dict[str, dict[str, Any]]:
    """Accuracy and metrics of the model on each task."""
    from circuitfind.tasks.builtin import TASKS

    loaded = inputs.load_model(ModelOptions(model=name), out, check=False)
    import circuitfind as cf

    found: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        try:
            with out.progress():
                summary = cf.summarise(loaded, cf.task(task, loaded, n=MEASURED_ON, seed=seed), warn=False)
            kept = ("n", "accuracy", "top1", "clean", "corrupted", "lowered")
            found[task] = {"words": True} | {key: getattr(summary, key) for key in kept}
        except CircuitfindError as error:
            found[task] = {"words": False, "refused": str(error)}
    return found


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


def _examples(one: TaskBuilder, what: TaskListOptions, out: Output) -> None:
    rows = one.make(_words(what.model or "tiny", out), EXAMPLES, what.seed)
    out.facts([(one.name, one.summary), ("metric", one.metric), ("source", one.source)])
    for row in rows:
        out.say()
        answers = f"{_few(row.answers)} / {_few(row.wrong)}"
        out.facts([("clean", row.clean), ("corrupted", row.corrupted), ("right / wrong", answers)])
    out.document({"name": one.name, **_plain(one), "examples": [row._asdict() for row in rows]})


def _few(answers: tuple[str, ...], most: int = 6) -> str:
    return ", ".join(answers[:most]) + (f", ... ({len(answers)})" if len(answers) > most else "")
