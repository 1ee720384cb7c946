"""`circuitfind verify`: what scores estimated, measured exactly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from circuitfind.cli import inputs, shown
from circuitfind.cli.options import (
    JUDGING,
    CheckedModelOptions,
    JudgeOptions,
    OutOptions,
    RunOptions,
    ScoringOptions,
    TaskOptions,
)
from circuitfind.cli.output import Output
from circuitfind.cli.verbs import verb
from circuitfind.cli.words import count

if TYPE_CHECKING:
    from circuitfind import Circuit, Model, Scores
    from circuitfind.tasks.task import BoundTask

CIRCUIT_HELP = "A circuit.json."
ROWS = 25


@dataclass(frozen=True)
class MaybeCircuit:
    """A circuit to judge as a whole."""

    circuit: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"{CIRCUIT_HELP} By default the circuit of the strongest edges.",
            rich_help_panel=JUDGING,
        ),
    ] = None


def register(app: typer.Typer) -> None:
    """Adds the verb to the app."""
    verb(app, "circuitfind verify tiny --task ioi --top 20")(verify)


def verify(
    model: CheckedModelOptions,
    task: TaskOptions,
    scoring: ScoringOptions,
    run: RunOptions,
    judge: JudgeOptions,
    given: MaybeCircuit,
    place: OutOptions,
    out: Output,
) -> None:
    """Measure the strongest edges, and a circuit as a whole, beside their estimates.

    Pairs are split as "find" splits them: estimates come from one part, exact effects from the other. With --scores and
    --holdout 1 all pairs are measured on. Writes verify.json.
    """
    if judge.scores is None:
        inputs.check_scoring(scoring, run)
    folder = inputs.folder(place.out)
    loaded = inputs.load_model(model, out, model.check)
    import circuitfind as cf

    bound = inputs.load_task(task, loaded)
    seen, unseen = inputs.split(bound, task, judge)
    circuit = None if given.circuit is None else open_circuit(given.circuit, loaded, bound, out)
    pairs = count(len(unseen), "pair" if seen is None else "unseen pair")
    lines = [
        ("model", inputs.model_line(loaded)),
        ("behaviour", f"{bound.name}, {bound.metric.name}: {pairs} to judge with"),
    ]
    out.facts(lines)
    scores = _scores(loaded, bound, (seen, unseen), task.seed, scoring, run, judge, folder, out)
    made = scores.record
    estimates = f"{made.method}, {made.direction}, ablation {made.ablation}, {count(made.n_examples, 'pair')}"
    out.facts([("estimates", estimates)])
    out.say()
    with out.progress():
        checks = cf.verify(
            loaded,
            unseen,
            scores,
            judge.top,
            circuit=circuit,
            random=judge.random,
            ablation=run.ablation,
            direction=scoring.direction,
            batch_size=run.batch_size,
            seed=task.seed,
        )
    judged = circuit or scores.top(judge.top)
    names = {edge.name for edge in checks.edges}
    shown.checks(f"Edges measured exactly ({bound.metric.name})", checks, names, ROWS, out)
    out.facts(shown.whole(judged, checks, pairs))
    if not len(judged):
        out.warn(
            f"the strongest {judge.top} edges are not connected from input to logits: raise --top, or give --circuit"
        )
    content = {**inputs.described(loaded, bound, out), **checks.to_dict()}
    path = _write_json(folder / "verify.json", content)
    out.say(f"\nWritten: {path}")
    out.document({**content, "files": [str(path)]})


def open_circuit(path: Path, model: Model, bound: BoundTask, out: Output) -> Circuit:
    """A circuit from a file, refused where it is of another model."""
    from circuitfind import Circuit, FileError

    circuit = Circuit.open(path)
    if circuit.graph != model.graph:
        raise FileError(f"{path}: a circuit of another model ({circuit.graph}); {model.name} has {model.graph}")
    inputs.warn_of_mismatch("circuit", circuit.record, model, bound, out)
    return circuit


def _scores(
    model: Model,
    bound: BoundTask,
    parts: tuple[BoundTask | None, BoundTask],
    seed: int,
    scoring: ScoringOptions,
    run: RunOptions,
    judge: JudgeOptions,
    folder: Path,
    out: Output,
) -> Scores:
    """From the file, or computed on the pairs that are not judged with."""
    import circuitfind as cf

    seen, unseen = parts
    if judge.scores is not None:
        given = inputs.open_scores(judge.scores, model, scoring, run)
        inputs.warn_of_mismatch("scores file", given.record, model, bound, out)
        inputs.warn_of_overlap(given, seen, unseen, seed, out)
        return given
    if seen is None:
        raise cf.TaskError("--holdout 1 leaves no pairs to score on: give --scores, or a smaller part")
    scores = inputs.scored(model, seen, seed, scoring, run, folder, out)
    assert isinstance(scores, cf.Scores), "level='edge' is the default"
    return scores


def _write_json(path: Path, content: dict[str, object]) -> Path:
    from circuitfind.export.files import plain, write_text

    return write_text(path, json.dumps(plain(content), ensure_ascii=False, allow_nan=False, indent=1) + "\n")
