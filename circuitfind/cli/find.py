"""`circuitfind find`: score, search, verify and draw, with everything on disk at the end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import typer

from circuitfind.cli import inputs, shown
from circuitfind.cli.options import (
    CheckedModelOptions,
    JudgeOptions,
    OutOptions,
    RunOptions,
    ScoringOptions,
    SearchOptions,
    TaskOptions,
)
from circuitfind.cli.output import Output
from circuitfind.cli.verbs import FAILED, verb
from circuitfind.cli.words import count, fixed

if TYPE_CHECKING:
    from circuitfind import FindResult

ROWS = 15


def register(app: typer.Typer) -> None:
    """Adds the verb to the app."""
    verb(app, "circuitfind find tiny --task ioi --n 64")(find)


def find(
    model: CheckedModelOptions,
    task: TaskOptions,
    scoring: ScoringOptions,
    run: RunOptions,
    search: SearchOptions,
    judge: JudgeOptions,
    place: OutOptions,
    out: Output,
) -> int:
    """Find the smallest circuit that does a behaviour, verify it exactly, draw it.

    Writes circuit.json, scores.safetensors, circuit.dot, circuit.svg and report.html.
    Exit code 1: no circuit smaller than the whole model is on target.
    """
    if judge.scores is None:
        inputs.check_scoring(scoring, run)
    folder = inputs.folder(place.out)
    loaded = inputs.load_model(model, out, model.check)
    import circuitfind as cf

    started = time.monotonic()
    bound = inputs.load_task(task, loaded)
    seen, unseen = inputs.split(bound, task, judge)
    if seen is None:
        raise cf.TaskError("--holdout 1 leaves no pairs to search with")
    pairs = f"{len(bound)} pairs, {len(seen)} to search with and {len(unseen)} to judge with"
    length = seen.batch.clean.ids.shape[1]
    memory = inputs.memory_line(loaded, len(seen), length, run.batch_size)
    behaviour = inputs.task_lines(loaded, seen, pairs, run.batch_size, out)
    out.facts([("model", inputs.model_line(loaded)), ("memory", memory), *behaviour])
    resumed: tuple[str, ...] = ()
    if judge.scores is None:
        made = inputs.scored(loaded, seen, task.seed, scoring, run, folder, out)
        assert isinstance(made, cf.Scores), "level='edge' is the default"
        scores = made
        saved = scores.save(folder / "scores.safetensors")
        resumed = ("--scores", str(saved))
    else:
        scores = inputs.open_scores(judge.scores, loaded, scoring, run)
        inputs.warn_of_mismatch("scores file", scores.record, loaded, bound, out)
        inputs.warn_of_overlap(scores, seen, unseen, task.seed, out)
        saved = judge.scores
    out.if_stopped = f"the scores are kept; go on with: {out.command_line(*resumed)}"
    with out.progress():
        result = cf.find(
            loaded,
            bound,
            scores=scores,
            tolerance=search.tolerance,
            one_sided=search.one_sided,
            by=search.by.value,
            prune=search.prune,
            prune_tolerance=search.prune_tolerance,
            holdout=judge.holdout,
            top=judge.top,
            random=judge.random,
            ablation=scores.record.ablation,
            batch_size=run.batch_size,
            seed=task.seed,
        )
    seconds = time.monotonic() - started
    _show(result, search, seconds, out)
    from circuitfind.report.write import save_circuit, write_report

    with out.waiting("drawing"):
        files = [saved, *save_circuit(result.circuit, folder, title=f"{bound.name} in {loaded.name}")]
    with out.progress():
        made_of = {name: getattr(result, name) for name in ("scores", "checks", "curve", "steps", "summary")}
        more = {"command": out.command_line(), "batch_size": run.batch_size, "seed": task.seed}
        files.append(write_report(folder / "report.html", result.circuit, loaded, result.unseen, **made_of, **more))
    out.say(f"\nWritten: {', '.join(map(str, files))}")
    found = {"seconds": round(seconds, 2), "files": [str(path) for path in files]}
    out.document({**inputs.described(loaded, bound, out), **found, **result.to_dict()})
    return FAILED if len(result.circuit) == loaded.graph.n_edges else 0


def _show(result: FindResult, search: SearchOptions, seconds: float, out: Output) -> None:
    circuit, checks, facts = result.circuit, result.checks, result.circuit.facts
    out.say()
    inside = set(circuit.edges)
    shown.checks(f"The circuit's strongest edges ({circuit.record.metric})", checks, inside, ROWS, out)
    target = "at least" if search.one_sided else "1 within"
    limit = 1 - search.tolerance if search.one_sided else search.tolerance
    lines = shown.whole(circuit, checks, count(facts["unseen_pairs"], "unseen pair"))
    searched = count(facts["search_pairs"], "search pair")
    lines.insert(2, ("", f"{fixed(facts['faithfulness_on_search_pairs'])} on the {searched}"))
    out.facts(lines)
    tried = len(result.curve)
    out.say(f"\nTarget: faithfulness {target} {limit:g}. {tried} circuits run; {seconds:.1f} s in all.", style="dim")
    for step in result.steps:
        out.say(f"{step.stage}: {step.text}", style="dim")
    if len(circuit) == circuit.graph.n_edges:
        out.warn("no circuit smaller than the whole model is on target: nothing was found")
    elif not _on_target(checks.faithfulness, search):
        out.warn(
            f"faithfulness on the unseen pairs, {checks.faithfulness:.3f}, is off the target that the search pairs met:"
            " more pairs (--n) make the search less lucky"
        )


def _on_target(value: float, search: SearchOptions) -> bool:
    return value >= 1 - search.tolerance and (search.one_sided or value <= 1 + search.tolerance)
