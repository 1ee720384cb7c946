"""`circuitfind evaluate`: what a circuit does, measured exactly, and what it lacks or wastes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuitfind.cli import curve, inputs, shown, trial
from circuitfind.cli.judge import CIRCUIT_HELP, open_circuit
from circuitfind.cli.options import JUDGING, CheckedModelOptions, RunOptions, ScoringOptions, TaskOptions
from circuitfind.cli.output import Output
from circuitfind.cli.verbs import verb
from circuitfind.cli.words import count, fixed, interval, number
from circuitfind.errors import FileError

if TYPE_CHECKING:
    from circuitfind import Circuit, Evaluation, Model, Record, Scores
    from circuitfind.tasks.task import BoundTask


@dataclass(frozen=True)
class EvaluateOptions:
    """What to run, and what else to measure of it."""

    circuit: Annotated[Path | None, typer.Option(metavar="FILE", help=CIRCUIT_HELP, rich_help_panel=JUDGING)] = None
    curve: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Scores (scores.safetensors): faithfulness of their strongest edges over ten sizes, CPR and CMD.",
            rich_help_panel=JUDGING,
        ),
    ] = None
    completeness: Annotated[
        bool,
        typer.Option(
            "--completeness",
            help="Run the rest of the model, and knock out random sets of nodes in circuit and model.",
            rich_help_panel=JUDGING,
        ),
    ] = False
    minimality: Annotated[
        bool,
        typer.Option(
            "--minimality", help="Measure what the circuit loses with each of its edges.", rich_help_panel=JUDGING
        ),
    ] = False
    tests: Annotated[
        bool, typer.Option("--tests", help="Hypothesis tests of the circuit.", rich_help_panel=JUDGING)
    ] = False
    stability: Annotated[
        trial.Over | None,
        typer.Option(help="How far circuits agree over pairs, templates or seeds.", rich_help_panel=JUDGING),
    ] = None
    unseen: Annotated[
        bool,
        typer.Option("--unseen", help="Leave out the pairs that the search used.", rich_help_panel=JUDGING),
    ] = False
    per_example: Annotated[
        bool, typer.Option("--per-example", help="List the metric of every example.", rich_help_panel=JUDGING)
    ] = False


def register(app: typer.Typer) -> None:
    """Adds the verb to the app."""
    verb(app, "circuitfind evaluate tiny --circuit circuitfind-out/circuit.json")(evaluate)


def evaluate(
    model: CheckedModelOptions,
    task: TaskOptions,
    run: RunOptions,
    given: EvaluateOptions,
    out: Output,
) -> None:
    """Run the model as a circuit, exactly: how much of the behaviour is left, and what the circuit lacks or wastes.

    With --curve, circuits of ten sizes are cut from scores, and --circuit may be left out.
    """
    _check_asked(given)
    loaded = inputs.load_model(model, out, model.check)
    import circuitfind as cf

    bound = inputs.load_task(task, loaded)
    circuit = None if given.circuit is None else open_circuit(given.circuit, loaded, bound, out)
    scores = None if given.curve is None else inputs.open_scores(given.curve, loaded, ScoringOptions(), RunOptions())
    if scores is not None:
        inputs.warn_of_mismatch("scores file", scores.record, loaded, bound, out)
    found = [each for each in (circuit, scores) if each is not None]
    for each in found if given.unseen else ():
        bound = cf.unseen(loaded, bound, each)
    made = [each.record for each in found]
    ablation = run.ablation or made[0].ablation or "corrupted"
    lines = [
        ("model", inputs.model_line(loaded)),
        ("behaviour", f"{bound.name}, {bound.metric.name}: {count(len(bound), 'pair')}, ablation {ablation}"),
    ]
    if circuit is not None:
        lines.append(("circuit", f"{given.circuit}: {count(len(circuit), 'edge')} of {circuit.graph.n_edges:,}"))
    out.facts(lines)
    out.say()
    same = {"ablation": ablation, "batch_size": run.batch_size, "seed": task.seed}
    content = {**inputs.described(loaded, bound, out), "prompts": bound.prompts}
    if circuit is not None:
        content |= {"circuit": str(given.circuit), **_circuit_alone(loaded, bound, circuit, given, out, same)}
        if given.tests:
            content["hypotheses"] = trial.tests(out, loaded, bound, circuit, **same)
        if given.stability:
            over = trial.variants(given.stability, loaded, bound, task)
            content["stability"] = trial.stability(out, loaded, over, circuit, **same)
    if scores is not None:
        content |= {"scores": str(given.curve), "curve": _curve(loaded, bound, scores, out, same)}
    for record in {record.pairs: record for record in made}.values():
        _say_of_seen_pairs(record, bound.record("evaluate", ablation, "noising", task.seed), out)
    out.document(content)


def _check_asked(given: EvaluateOptions) -> None:
    if given.circuit is not None:
        return
    if given.curve is None:
        raise FileError(
            "--circuit FILE is needed: a circuit.json to run (or --curve FILE: scores to cut circuits from)"
        )
    for name in ("completeness", "minimality", "tests", "stability", "per_example"):
        if getattr(given, name):
            raise FileError(f"--{name.replace('_', '-')} is measured of one circuit: give --circuit FILE, too")


def _circuit_alone(
    model: Model, bound: BoundTask, circuit: Circuit, given: EvaluateOptions, out: Output, same: dict[str, Any]
) -> dict[str, object]:
    """What was asked for of the circuit, shown and for the document."""
    import circuitfind as cf

    with out.progress():
        value = cf.evaluate(model, bound, circuit, **same)
    out.facts(
        [
            ("faithfulness", f"{fixed(value.faithfulness)} (95% interval {interval(value.interval)})"),
            *shown.metric_lines(value),
            *shown.overshoot(value.faithfulness),
        ]
    )
    content = value.to_dict()
    if given.per_example:
        out.say()
        _examples(bound, value, out)
    if given.completeness:
        with out.progress():
            complete = cf.completeness(model, bound, circuit, **same)
        out.say()
        curve.completeness(complete, out)
        content["completeness"] = complete.to_dict()
    if given.minimality:
        with out.progress():
            minimal = cf.minimality(model, bound, circuit, **same)
        out.say()
        curve.minimality(minimal, out)
        content["minimality"] = minimal.to_dict()
    return content


def _curve(model: Model, bound: BoundTask, scores: Scores, out: Output, same: dict[str, Any]) -> dict[str, object]:
    import circuitfind as cf

    with out.progress():
        found = cf.mib(model, bound, scores, **same)
    out.say()
    curve.curves(found, out)
    return found.to_dict()


def _say_of_seen_pairs(made: Record, now: Record, out: Output) -> None:
    """A circuit is never silently judged on the pairs that found it."""
    seen, pairs = made.seen(now), count(now.n_examples, "pair")
    if seen:
        advice = "--unseen leaves them out, another --seed draws others"
        out.say(f"\nThe search ({made.method}) used {seen} of these {pairs}: {advice}.", "yellow")
    elif seen == 0:
        out.say(f"\nThe search used none of these {pairs}.", style="dim")
    elif (made.task, made.seed, made.model) == (now.task, now.seed, now.model):
        out.say("\nThe search may have used some of these pairs; another --seed draws others.", style="dim")


def _examples(bound: BoundTask, value: Evaluation, out: Output) -> None:
    columns = (("prompt", "left"), ("answer", "left"), ("full", "right"), ("circuit", "right"), ("empty", "right"))
    inside, full, empty = value.per_example[:3]
    rows = [
        (prompt, answer, number(f), number(c), number(e))
        for prompt, answer, f, c, e in zip(bound.prompts, bound.answer_texts, full, inside, empty, strict=True)
    ]
    out.table(f"Every example ({value.record.metric})", columns, rows)
