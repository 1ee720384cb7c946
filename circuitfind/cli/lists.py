"""`circuitfind tasks` and `circuitfind models`: what is built in, and how good it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from circuitfind.cli import inputs
from circuitfind.cli.options import MODEL_HELP
from circuitfind.cli.output import Output
from circuitfind.cli.verbs import verb
from circuitfind.cli.words import number
from circuitfind.errors import CircuitfindError, ModelError

if TYPE_CHECKING:
    from circuitfind import Model
    from circuitfind.tasks.builder import SingleTokens, TaskBuilder

MEASURED_ON = 64
EXAMPLES = 4
LEGEND = (
    "clean, corrupted: mean metric; lowered: pairs whose corrupted prompt has the lower metric; flipped: below zero,"
    " where the corruption makes the other answer right"
)


@dataclass(frozen=True)
class TaskListOptions:
    """Which model's tokenizer is asked, and what is shown."""

    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=f"Say what it can express. {MODEL_HELP}")] = None
    measure: Annotated[bool, typer.Option("--measure", help="Also how well the model does each behaviour.")] = False
    show: Annotated[str | None, typer.Option(metavar="NAME", help="Print example pairs of one behaviour.")] = None
    seed: Annotated[int, typer.Option(help="Of the example pairs.")] = 0


def register(app: typer.Typer) -> None:
    """Adds the verbs to the app."""
    verb(app, "circuitfind tasks tiny --measure")(tasks)
    verb(app, "circuitfind models")(models)


# -------------------------------------------------------------------- tasks
def tasks(what: TaskListOptions, out: Output) -> None:
    """List the built-in behaviours; with MODEL, which of them its tokenizer can express."""
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
    out.table("Built-in behaviours", (("name", "left"), ("what, and from where", "left")), rows)
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
        reason = one["refused"].partition(": ")[2].partition(";")[0]  # without the behaviour's name and the remedy
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
    """Whether the tokenizer alone can say each behaviour's words; the weights are not loaded."""
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
    """Accuracy and metrics of the model on each behaviour."""
    from circuitfind.cli.options import ModelOptions
    from circuitfind.tasks.builtin import TASKS

    loaded: Model = inputs.load_model(ModelOptions(model=name), out, check=False)
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
    inputs.refuse_behaviour(name, out)
    with out.waiting(f"loading the tokenizer of {name}"):
        inputs.quiet()
        from circuitfind.models.load import fetch_tokenizer
        from circuitfind.tasks.builder import SingleTokens

        tokenizer = fetch_tokenizer(name)
    if tokenizer is None:
        raise ModelError(f"'{name}' has no tokenizer that can be loaded: behaviours are made of words")
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


# -------------------------------------------------------------------- models
def models(out: Output) -> None:
    """Say how good the embedded model is, and which model families are covered."""
    from circuitfind.models import tiny
    from circuitfind.models.families import FAMILIES

    figures = tiny.figures()
    made = figures["training"]
    pairs = {one["n"] for corruptions in figures["behaviours"].values() for one in corruptions.values()}
    out.facts(
        [
            ("tiny", f"GPT-2 class, {made['parameters']:,} parameters, in the package, works offline"),
            ("training", f"{made['steps']:,} steps, seed {made['seed']}, {made['seconds'] / 60:.0f} minutes"),
            (
                "measured",
                f"on {min(pairs):,} pairs each, held out from training ({made['held_out']})",
            ),
        ]
    )
    out.say()
    columns = [("behaviour, corruption", "left")]
    columns += [(name, "right") for name in ("accuracy", "clean", "corrupted", "lowered", "flipped")]
    rows: list[list[str | Text]] = []
    for task, corruptions in figures["behaviours"].items():
        rows.append([Text(task, style="bold"), *[""] * 5])
        rows += [_figures(corruption, one) for corruption, one in corruptions.items()]
    out.table("How well it does the built-in behaviours", columns, rows)
    out.say(LEGEND, style="dim")
    out.say()
    out.facts([("covered", f"{len(FAMILIES)} families: {', '.join(sorted(FAMILIES))}")])
    out.document({"embedded": {"tiny": figures}, "families": sorted(FAMILIES)})


def _figures(corruption: str, one: dict[str, Any]) -> list[str | Text]:
    return [
        f"  {corruption}",
        f"{one['accuracy']:.1%}",
        number(one["metric_clean"]),
        number(one["metric_corrupted"]),
        f"{one['lowered']:.1%}",
        f"{one['flipped']:.1%}" if one["flips"] else "",
    ]
