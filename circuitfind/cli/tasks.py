"""`circuitfind tasks`: the built-in tasks, and how well a model does them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

import circuitfind as cf
from circuitfind.cli import inputs, options
from circuitfind.cli.cells import number
from circuitfind.cli.options import option
from circuitfind.cli.output import Output
from circuitfind.errors import CircuitfindError, ModelError

if TYPE_CHECKING:
    from circuitfind.tasks.builder import SingleTokens

EXAMPLES = 4


@dataclass(frozen=True)
class TaskListOptions:
    model: str | None = option(f"Model whose tokenizer to check. {options.MODEL_HELP}", argument=True, metavar="MODEL")
    measure: bool = option("Also measure how well the model does each task.", False)
    n: int = option("Number of pairs to measure on.", 64, least=1)
    show: str | None = option("Print example pairs of one task.", metavar="NAME")
    seed: int = option("Random seed of the example pairs.", 0, least=0)
    allow_missing: bool = option(options.ALLOW_MISSING, False)


def tasks(what: TaskListOptions, out: Output) -> None:
    """List the built-in tasks and, with MODEL, which of them its tokenizer can express.

    Example: circuitfind tasks tiny --measure
    """
    from circuitfind.progress import track
    from circuitfind.tasks.builtin import TASKS, builder_of

    if what.show is not None:
        _examples(builder_of(what.show), what, out)
        return
    found = {name: _plain(one) for name, one in TASKS.items()}
    if what.model is not None or what.measure:
        name = what.model or "tiny"
        ask = _measured(name, what, out) if what.measure else _expressed(name, out)
        with out.progress():
            for task, one in track(list(TASKS.items()), "tasks"):
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
    """Check whether the tokenizer has the words of each task, without loading the weights."""
    words = _words(name, out)

    def ask(task: str, one: cf.TaskBuilder) -> dict[str, Any]:
        one.make(words, 1)
        return {}

    return ask


def _measured(name: str, what: TaskListOptions, out: Output) -> Callable[[str, cf.TaskBuilder], dict[str, Any]]:
    loaded = inputs.load_model(options.UncheckedModel(model=name, allow_missing=what.allow_missing), out)

    def ask(task: str, one: cf.TaskBuilder) -> dict[str, Any]:
        summary = cf.summarise(loaded, cf.task(task, loaded, n=what.n, seed=what.seed), warn=False)
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
        raise ModelError(f"'{name}' has no tokenizer that can be loaded, and tasks need one")
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
