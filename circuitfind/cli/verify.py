"""`circuitfind verify`: measure estimates and a circuit exactly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import circuitfind as cf
from circuitfind.cli import inputs, options, verdicts
from circuitfind.cli.cells import count
from circuitfind.cli.options import given, option
from circuitfind.cli.output import Output
from circuitfind.errors import TaskError


@dataclass(frozen=True)
class WholeOptions:
    PANEL = options.JUDGING
    circuit: Path | None = option(
        "Circuit to verify (circuit.json). Default: the circuit of the strongest edges.", metavar="FILE"
    )


def verify(
    model: options.Model,
    task: options.Task,
    scoring: options.Scoring,
    run: options.Run,
    judge: options.Judge,
    whole: WholeOptions,
    place: options.Out,
    out: Output,
) -> None:
    """Measure the strongest edges and a whole circuit exactly, and compare with the estimates.

    Pairs are split as in "find": estimates come from one part, exact effects from the held-out part. With --scores and
    --holdout 1, exact effects come from all pairs. Writes verify.json.

    Example: circuitfind verify tiny --task ioi --top 20
    """
    asked = inputs.search_keywords(task, run, scoring)
    folder = inputs.folder(place.out, out)
    loaded, bound = inputs.load(model, task, out)
    from circuitfind.attribution.methods import check_made

    scores = None
    if judge.scores is not None:
        scores, bound = inputs.given_scores(judge.scores, loaded, bound, asked)
    seen, held_out = (None, bound) if judge.holdout == 1 else inputs.held_out(bound, judge.holdout, task.seed)
    circuit = None if whole.circuit is None else inputs.of_model(cf.Circuit, whole.circuit, loaded)
    pairs = count(len(held_out), "pair" if seen is None or seen is held_out else "held-out pair")
    about = f"{bound.name}, {bound.metric.name}: measured on {pairs}"
    memory = inputs.task_memory(loaded, held_out, run, None)
    out.facts([("model", inputs.model_line(loaded)), ("memory", memory), ("task", about)])
    if scores is None:
        if seen is None:
            raise TaskError("--holdout 1 leaves no pairs to score on: give --scores, or a smaller fraction")
        scores = inputs.scored(loaded, seen, asked, folder, out)
    made = scores.record
    keywords: Any = {**check_made(made, asked), **given(judge, without=("scores", "holdout"))}
    setting = f"{made.metric}, {made.direction}, ablation {made.ablation}"
    estimates = f"{made.method}, {setting}, {count(made.n_examples, 'pair')}"
    out.facts([("estimates", estimates)])
    out.say()
    with out.progress():
        checks = cf.verify(loaded, held_out, scores, circuit=circuit, **keywords)
    verdicts.checks(f"Edges measured exactly ({checks.evaluation.record.metric})", checks, out)
    out.facts(verdicts.as_a_whole(circuit or scores.top(len(checks.edges)), checks, pairs))
    out.few(checks.record.n_distinct)
    described = inputs.described(loaded, bound, out)
    path = checks.save(folder / "verify.json", **described)
    out.say()
    out.finish({**described, **checks.to_dict()}, [path])
