"""`circuitfind verify`: what scores estimated, measured exactly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from circuitfind.cli import inputs, options, tables
from circuitfind.cli.options import Option, given
from circuitfind.cli.output import Output, count
from circuitfind.errors import TaskError


@dataclass(frozen=True)
class WholeOptions:
    """A circuit to judge as a whole."""

    PANEL: ClassVar[str] = options.JUDGING

    circuit: Annotated[
        Path | None, Option("A circuit.json. Default: the circuit of the strongest edges.", metavar="FILE")
    ] = None


def verify(
    model: options.CheckedModelOptions,
    task: options.TaskOptions,
    scoring: options.ScoringOptions,
    run: options.RunOptions,
    judge: options.ScoresOptions,
    whole: WholeOptions,
    place: options.OutOptions,
    out: Output,
) -> None:
    """Measure the strongest edges, and a circuit as a whole, beside their estimates.

    Pairs are split as "find" splits them: estimates come from one part, exact effects from the other. With --scores and
    --holdout 1 all pairs are measured on. Writes verify.json.

    Example: circuitfind verify tiny --task ioi --top 20
    """
    asked = inputs.search_keywords(task, run, scoring)
    folder = inputs.folder(place.out)
    loaded, bound = inputs.load(model, task, out, model.check)
    import circuitfind as cf

    seen, held_out = (None, bound) if judge.holdout == 1 else inputs.held_out(bound, judge.holdout, task.seed)
    circuit = None if whole.circuit is None else inputs.open_circuit(whole.circuit, loaded)
    pairs = count(len(held_out), "pair" if seen is None else "held-out pair")
    about = f"{bound.name}, {bound.metric.name}: {pairs} to judge with"
    out.facts([("model", inputs.model_line(loaded)), ("task", about)])
    if judge.scores is not None:
        scores = inputs.open_scores(judge.scores, loaded, asked)
    elif seen is not None:
        scores = inputs.scored(loaded, seen, asked, folder, out)
    else:
        raise TaskError("--holdout 1 leaves no pairs to score on: give --scores, or a smaller part")
    made = scores.record
    estimates = f"{made.method}, {made.direction}, ablation {made.ablation}, {count(made.n_examples, 'pair')}"
    out.facts([("estimates", estimates)])
    out.say()
    keywords = inputs.of_the_run(asked) | given(judge, scores="", holdout="")
    with out.progress():
        checks = cf.verify(loaded, held_out, scores, circuit=circuit, **keywords)
    judged = circuit or scores.top(len(checks.edges))
    tables.checks(f"Edges measured exactly ({checks.evaluation.record.metric})", checks, out)
    out.facts(tables.as_a_whole(judged, checks, pairs))
    described = inputs.described(loaded, bound, out)
    path = checks.save(folder / "verify.json", **described)
    out.say()
    out.written([path])
    out.document({**described, **checks.to_dict(), "files": [str(path)]})
