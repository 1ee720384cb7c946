"""`circuitfind find`: score, search, verify and draw, with everything on disk at the end."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from circuitfind.cli import inputs, options, tables
from circuitfind.cli.options import Option, given
from circuitfind.cli.output import FAILED, Output, count, fixed

if TYPE_CHECKING:
    from circuitfind import FindResult


@dataclass(frozen=True)
class SearchOptions(options.RankOptions):
    """What the search aims at."""

    tolerance: Annotated[float | None, Option("How far from 1 the faithfulness may be. Default: 0.15.", least=0)] = None
    one_sided: Annotated[bool, Option("Only below 1 counts as too far.")] = False
    prune: Annotated[bool, Option("Drop single edges at the end.")] = True
    prune_tolerance: Annotated[
        float | None, Option("How much |1 - faithfulness| may grow by dropping edges. Default: 0.05.", least=0)
    ] = None


def find(
    model: options.CheckedModelOptions,
    task: options.TaskOptions,
    scoring: options.ScoringOptions,
    run: options.RunOptions,
    search: SearchOptions,
    judge: options.ScoresOptions,
    place: options.OutOptions,
    out: Output,
) -> int:
    """Find the smallest circuit that does a task, verify it exactly, draw it.

    Writes circuit.json, scores.safetensors, find.json, circuit.dot, circuit.svg and report.html.
    Exit code 1: no circuit smaller than the whole model is on target.

    Example: circuitfind find tiny --task ioi --n 64
    """
    asked = inputs.search_keywords(task, run, scoring)
    folder = inputs.folder(place.out)
    loaded, bound = inputs.load(model, task, out, model.check)
    import circuitfind as cf

    started = time.monotonic()
    seen, held_out = inputs.held_out(bound, judge.holdout, task.seed)
    pairs = f"{len(bound)} pairs, {len(seen)} to search with and {len(held_out)} to judge with"
    memory = inputs.memory_line(loaded, len(seen), seen.batch.clean.ids.shape[1], run.batch_size)
    about = inputs.task_lines(loaded, seen, pairs, run.batch_size, out)
    out.facts([("model", inputs.model_line(loaded)), ("memory", memory), *about])
    again: tuple[str, ...] = ()
    if judge.scores is None:
        scores = inputs.scored(loaded, seen, asked, folder, out)
        again = ("--scores", str(scores.save(folder / "scores.safetensors")))
    else:
        scores = inputs.open_scores(judge.scores, loaded)
    out.if_stopped = f"the scores are kept; go on with: {out.command_line(*again)}"
    keywords = {**given(search, judge), **asked, "scores": scores}
    with out.progress():
        result = cf.find(loaded, bound, **keywords)
    seconds = time.monotonic() - started
    _show(result, seconds, out)
    with out.progress():
        files = result.write(folder, command=out.command_line(), batch_size=run.batch_size, seed=task.seed)
    out.say()
    out.written(files)
    found = {"seconds": round(seconds, 2), "files": [str(path) for path in files]}
    out.document({**inputs.described(loaded, bound, out), **found, **result.to_dict()})
    return FAILED if len(result.circuit) == loaded.graph.n_edges else 0


def _show(result: FindResult, seconds: float, out: Output) -> None:
    circuit, facts, made = result.circuit, result.circuit.facts, result.circuit.record.settings
    out.say()
    inside = set(circuit.edges)
    tables.checks(f"The circuit's strongest edges ({circuit.record.metric})", result.checks, out, inside, tables.ROWS)
    lines = tables.as_a_whole(circuit, result.checks, count(facts["unseen_pairs"], "held-out pair"))
    searched = count(facts["search_pairs"], "search pair")
    lines.insert(2, ("", f"{fixed(facts['faithfulness_on_search_pairs'])} on the {searched}"))
    out.facts(lines)
    target = f"at least {1 - made['tolerance']:g}" if made["one_sided"] else f"1 within {made['tolerance']:g}"
    said = f"Target: faithfulness {target}. {len(result.curve)} circuits run; {seconds:.1f} s in all."
    out.say(f"\n{said}", style="dim")
    for step in result.steps:
        out.say(f"{step.stage}: {step.text}", style="dim")
    if len(circuit) == circuit.graph.n_edges:
        out.warn("no circuit smaller than the whole model is on target: nothing was found")
    elif not result.on_target:
        out.warn(
            f"faithfulness on the held-out pairs, {result.checks.faithfulness:.3f}, is off the target that the search"
            " pairs met: more pairs (--n) make the search less lucky"
        )
