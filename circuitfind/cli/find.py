"""`circuitfind find`: the smallest circuit, judged on held-out pairs."""

from __future__ import annotations

import time
from dataclasses import dataclass

import circuitfind as cf
from circuitfind.cli import inputs, options, verdicts
from circuitfind.cli.cells import count, fixed
from circuitfind.cli.options import given, option
from circuitfind.cli.output import FAILED, Output
from circuitfind.errors import FileError


@dataclass(frozen=True)
class SearchOptions(options.Rank):
    tolerance: float | None = option("How far from 1 the faithfulness may be. Default: 0.15.")
    one_sided: bool = option("Only below 1 counts as too far.", False)
    prune: bool = option("Drop single edges at the end.", True)
    prune_tolerance: float | None = option("How much |1 - faithfulness| may grow by dropping edges. Default: 0.05.")
    knockouts: int | None = option(
        "Parts of the circuit to ablate in it and in the model, which may have a second way. Default: 5.", least=0
    )


def find(
    model: options.Model,
    task: options.Task,
    scoring: options.Scoring,
    run: options.Run,
    search: SearchOptions,
    judge: options.Judge,
    place: options.Out,
    out: Output,
) -> int:
    """Find the smallest circuit that does a task, verify it exactly, draw it.

    Writes circuit.json, scores.safetensors, find.json, circuit.dot, circuit.svg and report.html.
    Exit code 1: no circuit smaller than the whole model is on target.

    Example: circuitfind find tiny --task ioi --n 64
    """
    from circuitfind.search.find import check_target

    check_target(**given(search, without=("by", "one_sided", "prune", "knockouts")))
    asked = inputs.search_keywords(task, run, scoring)
    folder = inputs.folder(place.out, out)
    loaded, bound = inputs.load(model, task, out)
    started = time.monotonic()
    scores = None
    if judge.scores is not None:
        scores, bound = inputs.given_scores(judge.scores, loaded, bound, asked)
    seen, held_out = inputs.held_out(bound, judge.holdout, task.seed)
    pairs = f"{len(bound)} pairs, {len(seen)} to search with and {len(held_out)} to judge with"
    inputs.introduce(loaded, seen, run, out, pairs, scoring=True)
    again: tuple[str, ...] = ()
    if scores is None:
        scores = inputs.scored(loaded, seen, asked, folder, out)
        try:
            again = ("--scores", str(scores.save(folder / "scores.safetensors")))
        except FileError as error:  # the search can still be made, and its result be read
            out.warn(str(error))
    if again or judge.scores is not None:
        out.if_stopped, out.state = f"the scores are kept; go on with: {out.command_line(*again)}", folder
    with out.progress():
        result = cf.find(loaded, bound, **{**given(search, judge), **asked, "scores": scores})
    seconds = time.monotonic() - started
    _show(result, seconds, out)
    with out.progress():
        files = result.write(folder, command=out.command_line(), batch_size=run.batch_size, seed=task.seed)
    out.say()
    head = {**inputs.described(loaded, bound, out), "seconds": round(seconds, 2)}
    out.finish({**head, **result.to_dict()}, files)
    return FAILED if len(result.circuit) == loaded.graph.n_edges else 0


def _show(result: cf.FindResult, seconds: float, out: Output) -> None:
    circuit, facts, made = result.circuit, result.circuit.facts, result.circuit.record.settings
    out.say()
    inside = set(circuit.edges)
    verdicts.checks(
        f"The circuit's strongest edges ({circuit.record.metric})", result.checks, out, inside, verdicts.ROWS
    )
    lines = verdicts.as_a_whole(circuit, result.checks, count(facts["unseen_pairs"], "held-out pair"))
    searched = count(facts["search_pairs"], "search pair")
    lines.insert(2, ("", f"{fixed(facts['faithfulness_on_search_pairs'])} on the {searched}"))
    out.facts(lines)
    out.few(result.checks.record.n_distinct)
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
