"""`circuitfind find`: find the smallest circuit and evaluate it on held-out pairs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import circuitfind as cf
from circuitfind.cli import inputs, options, verdicts
from circuitfind.cli.cells import count, fixed
from circuitfind.cli.options import given, option
from circuitfind.cli.output import FAILED, Output
from circuitfind.errors import FileError

TARGETS = {
    "mean": "|1 - faithfulness|",
    "at-least": "1 - faithfulness",
    "pairs": "pair error",
    "kl": "KL divergence, relative to that of the empty circuit,",
}


@dataclass(frozen=True)
class SearchOptions:
    PANEL = options.SEARCH
    edges: int | None = option(
        "Find the best circuit with at most this many edges. Default: the smallest circuit on target.", least=1
    )
    criterion: str | None = option(
        "Distance from the whole model. mean: of the mean metric. at-least: the same, but exceeding the whole model"
        " counts as on target. pairs: pair by pair. kl: KL divergence. Default: mean.",
        words=options.CRITERIA,
    )
    tolerance: float | None = option("Largest distance from the whole model that is on target. Default: 0.15.")
    search: str | None = option(
        "How to search: balanced pruning with re-scoring, or the best size of one ranking by absolute or signed score."
        " Default: balanced.",
        words=options.SEARCHES,
    )
    complete: bool = option("Also find backups: parts that take over when parts of the circuit are ablated.", False)
    prune: bool | None = option(
        "Try to remove single edges at the end, by exact runs. Default: only a few edges that are not needed.",
        names=("--prune/--no-prune",),
    )
    knockouts: int | None = option(
        "Number of parts to ablate in the circuit and in the model, to see if the model has a second way. Default: 3.",
        least=0,
    )
    time_limit: float | None = option(
        "Time limit of the search and checks; the best circuit so far is kept.", metavar="SECONDS"
    )


@dataclass(frozen=True)
class JudgeOptions:
    PANEL = options.JUDGING
    scores: Path | None = option(
        "Use the scores in this file (scores.safetensors) instead of computing them.", metavar="FILE"
    )
    holdout: float | None = option(options.HELD_OUT)
    max_checks: int | None = option("Number of strongest edges to measure exactly. Default: 40.", least=0)
    random: int | None = option("Number of random circuits of each kind to compare with. Default: 10.", least=0)


@dataclass(frozen=True)
class PrintOptions:
    top: int = option(options.SHOW, verdicts.ROWS, least=0)


def find(
    model: options.Model,
    task: options.Task,
    scoring: options.Scoring,
    run: options.Run,
    search: SearchOptions,
    judge: JudgeOptions,
    show: PrintOptions,
    place: options.Out,
    out: Output,
) -> int:
    """Find the smallest circuit that does a task, verify it exactly and draw it.

    Writes circuit.json, scores.safetensors, find.json, circuit.dot, circuit.svg and report.html.
    Exit code 1: no circuit smaller than the whole model was on target.

    Example: circuitfind find tiny --task ioi --n 64
    """
    from circuitfind.search.find import check_target

    check_target(**given(search, without=("prune", "knockouts", "complete")))
    asked = inputs.search_keywords(task, run, scoring)
    folder = inputs.folder(place.out, out)
    loaded, bound = inputs.load(model, task, out)
    started = time.monotonic()
    scores = None
    if judge.scores is not None:
        scores, bound = inputs.given_scores(judge.scores, loaded, bound, asked)
    seen, held_out = inputs.held_out(bound, judge.holdout, task.seed)
    kept = inputs.kept_by(asked, "edge")._replace(masks=True)
    inputs.introduce(loaded, seen, run, out, inputs.shares(seen, held_out, "search"), kept=kept)
    again: tuple[str, ...] = ()
    if scores is None:
        scores = inputs.scored(loaded, seen, asked, folder, out)
        try:
            again = ("--scores", str(scores.save(folder / "scores.safetensors")))
        except FileError as error:  # the search can run without a picture
            out.warn(str(error))
    if again or judge.scores is not None:
        out.if_stopped, out.state = f"the scores are kept; go on with: {out.command_line(*again)}", folder
    wanted = {**given(search, judge), **asked, "scores": scores}
    if search.time_limit is not None:
        wanted["time_limit"] = max(search.time_limit - (time.monotonic() - started), 1.0)
    with out.progress():
        result = cf.find(loaded, bound, **wanted)
    seconds = time.monotonic() - started
    _show(result, seconds, show.top, out)
    with out.progress():
        files = result.write(folder, command=out.command_line(), batch_size=run.batch_size, seed=task.seed)
    out.say()
    head = {**inputs.described(loaded, bound, out), "seconds": round(seconds, 2)}
    out.finish({**head, **result.to_dict()}, files)
    return FAILED if len(result.circuit) == loaded.graph.n_edges else 0


def _show(result: cf.FindResult, seconds: float, top: int, out: Output) -> None:
    circuit, facts, made = result.circuit, result.circuit.facts, result.circuit.record.settings
    out.say()
    inside = set(circuit.edges)
    title = f"The circuit's strongest edges, measured exactly ({circuit.record.metric})"
    verdicts.checks(title, result.checks, out, inside, top)
    verdicts.frontier(result, out)
    pairs = count(facts["unseen_pairs"], "held-out pair") if facts["unseen_pairs"] else "the pair itself"
    lines = verdicts.as_a_whole(circuit, result.checks, pairs)
    searched = count(facts["search_pairs"], "search pair")
    lines.insert(2, ("", f"{fixed(facts['faithfulness_on_search_pairs'])} on the {searched}"))
    out.facts(lines)
    out.few(result.checks.record.n_distinct)
    size = f" with at most {made['edges']:,} edges" if made["edges"] else ""
    said = f"Target: {TARGETS[made['criterion']]} at most {made['tolerance']:g}{size}."
    out.say(f"\n{said} {len(result.curve)} circuits run, {seconds:.1f} s in total.", style="dim")
    for step in result.steps:
        out.say(f"{step.stage}: {step.text}", style="dim")
    if len(circuit) == circuit.graph.n_edges:
        out.warn("no circuit found: none smaller than the whole model is on target")
    elif made["edges"]:
        return
    elif not result.on_target:
        off = f"distance {facts['distance']:.3f} instead of {facts['distance_on_search_pairs']:.3f}"
        said = f"the circuit is on target on the search pairs, but not on the held-out pairs ({off})"
        out.warn(f"{said}: use more pairs")
