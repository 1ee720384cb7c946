"""`find`: from a model and a task to a verified circuit, in one call.

1. The pairs are split: search pairs, on which the circuit is found, and held-out pairs, on which it is verified. A
   single pair is used for both: the result is that prompt's own circuit.
2. **Score** every edge by attribution.
3. **Search**, with one of these (`search`):
   * "balanced" (the default): start from the strongest edges and drop more and more of them, re-scored at every size,
     helpful and opposing edges in balance (`rescoring.py`); if no circuit but the whole model results, as "absolute";
   * "absolute", "signed": the smallest size of one ranking, by |score| or by signed score (`ranked.py`).
4. **Choose** the smallest circuit on target; or, if `edges` is given, the circuit nearest to the whole model of at most
   that many edges (`frontier.py`). The target is a distance of at most `tolerance` by the `criterion` (`trials.py`).
5. **Prune**: remove single edges, with an exact run for each removal, while the circuit stays on target (`pruning.py`).
6. With `complete`, **add** what stands in for parts of the circuit (`complete.py`).
7. **Verify** on the held-out pairs: exact effects of the strongest edges, faithfulness of the circuit, random circuits
   of its size.
8. **Knock out** parts of the circuit, inside it and inside the whole model. If the model does without them, it has a
   second way to do the task (`evaluation/completeness.py`).
9. Run the circuits of other sizes on the frontier on the held-out pairs.

A search that is stopped (Ctrl-C) or runs out of time continues at 4 with the circuits that it has run.
"""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Real
from typing import Any, Literal, NamedTuple, Unpack, get_args

import numpy as np

from circuitfind import processes
from circuitfind.attribution.attribute import ScoreKeywords, score
from circuitfind.attribution.method import Method, Request
from circuitfind.attribution.methods import check_made
from circuitfind.calls import model_call
from circuitfind.circuit import Circuit
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import ScoreError, check_count, unknown, warn
from circuitfind.evaluation.completeness import second_way
from circuitfind.evaluation.curve import idle
from circuitfind.evaluation.diagnosis import summarise, summary_of
from circuitfind.evaluation.faithfulness import Evaluator, Outcome
from circuitfind.evaluation.verify import MOST_RANDOM, Verification, verified
from circuitfind.models.load import Model
from circuitfind.progress import stages
from circuitfind.scores import By, Scores
from circuitfind.search.complete import Completion
from circuitfind.search.found import FindResult
from circuitfind.search.frontier import MOST as MOST_POINTS, chosen, measured
from circuitfind.search.methods import method_of, request_of
from circuitfind.search.pruning import FREE, pruned
from circuitfind.search.ranked import SizeSearch
from circuitfind.search.rescoring import START, Rescoring
from circuitfind.search.trials import CRITERIA, Criterion, Deadline, OutOfTime, Trials, Tried, distance
from circuitfind.tasks.task import BoundTask, Task

Search = Literal["balanced", "absolute", "signed"]
SEARCHES: tuple[str, ...] = get_args(Search)
FORMER = {  # keywords of earlier versions, and what to use now
    "top": "max_checks",
    "by": "search='absolute' or search='signed'",
    "one_sided": "criterion='at-least'",
    "prune_tolerance": "prune=False",
}
GROWTH = 0.05  # how much prune=True may add to the distance from the whole model
LAST_RUNS = 12  # circuits that pruning runs at most by default
COMPLETING = 4.0  # duration of completing, relative to the search for the smallest circuit
SEARCHING = 0.7  # fraction of the time limit for the search; the rest is for checks


@model_call
def find(
    model: Model,
    task: Task | BoundTask,
    *,
    method: str | Method | None = None,
    edges: int | None = None,
    criterion: Criterion = "mean",
    tolerance: float = 0.15,
    search: Search = "balanced",
    complete: bool = False,
    prune: bool | None = None,
    holdout: float = 0.5,
    max_checks: int = 40,
    random: int = 10,
    knockouts: int = 3,
    time_limit: float | None = None,
    scores: Scores | None = None,
    **asked: Unpack[ScoreKeywords],
) -> FindResult:
    """Find the smallest circuit that still does the task, and verify it on held-out pairs.

    Args:
        method: the method that scores the edges ("eap-ig-inputs"): any of `circuitfind.attribute`, or "acdc",
            "edge-pruning", "subnetwork-probing", "ugs" or "matryoshka" (`circuitfind.search.methods`).
        edges: return the best circuit of at most this many edges; by default the smallest circuit on target.
        criterion: the distance from the whole model: "mean" (|1 - faithfulness|), "at-least" (the same, but 0 if the
            circuit does more than the model), "pairs" (the error of single pairs) or "kl" (KL divergence).
        tolerance: the largest distance that is on target.
        search: "balanced" (re-scored pruning), or the smallest size of the ranking by "absolute" or "signed" score.
        complete: also find and add what stands in for parts of the circuit: backup heads, heads of which either is
            enough, parts that cancel (`circuitfind.search.complete`). Adds edges whose effect is at least 2% of the
            total. In a large model these may lead off target; then weak edges that compensate are added, too. Takes up
            to about 500 further runs, most of which start in a later layer. Not with `edges`.
        prune: True: try to remove each edge, with exact runs. None: only in the first 12 runs, and only edges that
            change the distance by at most 0.01; with `edges`, do not prune. False: do not prune.
        holdout: the fraction of the pairs that is held out for verification.
        max_checks: how many edges to measure exactly: the circuit's strongest, then the strongest outside of it.
        random: how many random circuits to compare with.
        knockouts: how many parts of the circuit (one layer's heads, or an MLP) to ablate inside it and inside the
            model, to see whether the model has a second way; and at most this many sets of several parts. Each costs
            two runs of a circuit on the search pairs.
        time_limit: seconds that the whole call may take. The search then ends with the best circuit so far, which is
            verified as far as time allows.
        scores: edge scores to use instead of computing them, such as the saved scores of a search that was stopped.
        asked: keywords of the run (by default those of the given scores; the seed is also that of the split and of the
            random circuits), and options of the method.

    Returns:
        The circuit with its verification, the frontier, the scores, and every circuit and decision of the search.

    Raises:
        TaskError: too few pairs, or pairs that do not fit the model.
        ScoreError: scores or faithfulness are undefined on this task; the given scores were made by another method or
            with other options than the call names; or the metric cannot be differentiated (search="absolute" needs no
            gradient).
    """
    deadline = Deadline(time_limit)
    if complete and edges is not None:
        raise ScoreError("complete=True may add any number of edges: leave edges= out")
    check_target(tolerance, criterion, search, edges, time_limit)
    for name, count in {"max_checks": max_checks, "knockouts": knockouts}.items():
        check_count(name, count)
    check_count("random", random, most=MOST_RANDOM)
    chosen_method = method_of(method)
    whole, request = _experiment(model, task, scores, None if method is None else chosen_method, asked)
    seen, held_out = whole.bound.held_out(holdout, whole.setting.seed)
    experiment = whole.on(seen)
    evaluator = Evaluator(experiment)
    # only under this ablation is the empty circuit the corrupted run
    twin = experiment.ablation.twin
    summary = summary_of(evaluator) if twin else summarise(model, seen, batch_size=experiment.setting.batch_size)
    evaluator.check_contrast()
    trials = Trials(evaluator, criterion, tolerance, deadline, SEARCHING)
    work = _Work.of(scores, search, complete, max_checks, random, knockouts)
    with stages("finding a circuit", sum(work)) as stage:
        if scores is None:
            with stage(work.scores):
                found = score(experiment, chosen_method, request)
            assert isinstance(found, Scores)
            scores = found
        with stage(work.search):
            taken, strength = _searched(trials, scores, search, edges, prune, complete)
        if said := _off_size(taken, edges):
            trials.say("size", said)
            warn(said)
        settings: dict[str, Any] = {"criterion": criterion, "tolerance": tolerance, "holdout": holdout, "edges": edges}
        circuit = scores.cut(taken.mask, search=search, **settings)
        with stage(work.judge):
            judge = Evaluator(whole.on(held_out))
        with stage(work.checks):
            # most of the time left is for exact effects, which take about half a run each
            to_patch = _strongest(circuit, strength, scores, int(min(max_checks, trials.affords())))
            others = int(min(random, trials.affords(0.2)))
            checks = verified(whole.on(held_out), judge, scores, circuit, to_patch, others)
        part = None
        with stage(work.knockouts):
            if len(circuit) < circuit.graph.n_edges and 4 * knockouts <= trials.affords():
                effects = np.where(np.isfinite(checks.exact), checks.exact, scores.values)
                part = second_way(evaluator, circuit, effects, knockouts)
        with stage(work.frontier):
            in_time = trials.affords() >= 2 * MOST_POINTS
            estimates = scores.values if scores.record.is_effect else None
            frontier = measured(trials, taken, estimates, judge if in_time else None)
    if scores.record.is_effect:
        trials.say("opposing", _opposing(circuit, scores))
    facts = _facts(taken, trials, circuit, checks, judge)
    if held_out is seen:
        facts["unseen_pairs"] = 0
    if part is not None:
        trials.say("knock-outs", part.reading)
        facts["knocked_out"] = {**part._asdict(), "removed": list(part.removed)}
        if part.second_way:
            remedy = "cf.completeness looks further" if complete else "complete=True, --complete, adds it"
            warn(f"{part.reading} ({remedy})")
    # the given scores may be of other pairs, or of another metric than the search's
    record, run = circuit.record.seeing(evaluator.record), whole.setting
    record = replace(record, metric=run.metric.name, ablation=run.ablation, direction=run.direction)
    circuit = replace(circuit, record=record, exact=checks.exact, facts=facts)
    tried, steps = tuple(trials.curve), tuple(trials.steps)
    return FindResult(circuit, scores, checks, tried, steps, summary, frontier, held_out, model)


def _experiment(
    model: Model, task: Task | BoundTask, scores: Scores | None, method: Method | None, asked: Any
) -> tuple[Experiment, Request]:
    """Return the experiment on all pairs, and the request for scores if none are given. TypeError: a keyword of an
    earlier version; ScoreError: the scores are not edge scores of this model."""
    for name in asked.keys() & FORMER.keys():
        raise TypeError(f"find has no '{name}' any more: use {FORMER[name]}")
    if scores is None:
        request, setting = request_of(method_of(method), asked)
        return Experiment.of(model, task, setting), request
    if not isinstance(scores, Scores):
        raise ScoreError(f"find needs edge scores, not {type(scores).__name__}: use attribute(level='edge')")
    if scores.graph != model.graph:
        raise ScoreError(f"the scores belong to another graph {model.graph.unlike(scores.graph)}")
    setting = check_made(scores.record, {**asked, "method": method})
    return Experiment.of(model, task, setting, inherit=scores.record, made="the scores were"), Request("edge")


class _Work(NamedTuple):
    """The estimated duration of each stage, in runs of the search pairs, for the progress bar."""

    scores: float
    search: float
    checks: float
    knockouts: float
    judge: float = 3.0
    frontier: float = 12.0

    @classmethod
    def of(
        cls, scores: Scores | None, search: str, complete: bool, max_checks: int, random: int, knockouts: int
    ) -> _Work:
        runs = (60.0 if search == "balanced" else 25.0) * (1 + COMPLETING * complete)
        return cls(20.0 if scores is None else 0.0, runs, 0.5 * max_checks + 2 * random, 5.0 * knockouts)


def check_target(
    tolerance: float = 0.15,
    criterion: str = "mean",
    search: str = "balanced",
    edges: int | None = None,
    time_limit: float | None = None,
) -> None:
    """Raise a ScoreError if an option is unknown or out of range."""
    if criterion not in CRITERIA:
        raise ScoreError(unknown("criterion", criterion, CRITERIA))
    if search not in SEARCHES:
        raise ScoreError(unknown("search", search, SEARCHES))
    if edges is not None:
        check_count("edges", edges, 1)
    if time_limit is not None and not (isinstance(time_limit, Real) and float(time_limit) > 0):
        raise ScoreError(f"time_limit={time_limit!r}: give a number of seconds above 0")
    if not isinstance(tolerance, Real) or not 0 <= float(tolerance) < 1:
        raise ScoreError(
            f"tolerance={tolerance!r}: give the largest distance from the whole model that is on target, in [0, 1)"
            " (the empty circuit's distance is 1)"
        )


def _searched(
    trials: Trials, scores: Scores, search: str, edges: int | None, prune: bool | None, complete: bool
) -> tuple[Tried, np.ndarray]:
    """Return the result of the search, and the strength of each of its edges, `[writers, readers]`."""
    strength: np.ndarray = np.abs(scores.values)
    unfinished = "; it has not looked for what stands in for parts of the circuit" if complete else ""
    completion = None
    try:
        with stages("search", 1.0 + COMPLETING * complete) as part:
            with part(0.8):
                if search == "balanced":
                    rescoring = Rescoring(trials, scores)
                    rescoring.run(edges)
                    taken = chosen(trials, edges)
                    strength = rescoring.strength(taken)
                if search != "balanced" or taken.n_edges == trials.graph.n_edges:
                    by: By = "signed" if search == "signed" else "absolute"
                    taken = SizeSearch(trials, scores, by).smallest(edges)
                    if said := idle(scores, by, ((tried.asked, tried.faithfulness) for tried in trials.curve)):
                        warn(said)
            if (prune or (prune is None and edges is None)) and taken.n_edges < trials.graph.n_edges:
                with part(0.2):
                    taken = pruned(trials, taken, strength, *((GROWTH, math.inf) if prune else (FREE, LAST_RUNS)))
            if complete:
                unfinished = "; it has not finished looking for what stands in for parts of the circuit"
                with part(COMPLETING):
                    completion = Completion(trials, scores)
                    taken = completion.completed(taken)
        return taken, strength
    except OutOfTime:
        trials.stop("the time limit has passed", unfinished)
    except KeyboardInterrupt as stop:
        # not after SIGTERM, which leaves no time, nor with several processes, each interrupted at another point
        if type(stop) is not KeyboardInterrupt or not trials.curve or processes.size() > 1:
            raise
        trials.stop("stopped", unfinished)
    return chosen(trials, edges) if completion is None else completion.so_far(taken), strength


def _strongest(circuit: Circuit, strength: np.ndarray, scores: Scores, count: int) -> np.ndarray:
    """Return the mask of the circuit's `count` strongest edges; if it has fewer, also of the strongest by |score|
    outside of it."""

    def ranked(mask: np.ndarray, size: np.ndarray) -> np.ndarray:
        edges = np.argwhere(mask)
        return np.asarray(edges[np.argsort(-size[tuple(edges.T)], kind="stable")])

    outside = ranked(circuit.graph.real & ~circuit.mask, np.abs(scores.values))
    mask = np.zeros_like(circuit.mask)
    mask[tuple(np.concatenate([ranked(circuit.mask, strength), outside])[:count].T)] = True
    return mask


def _opposing(circuit: Circuit, scores: Scores) -> str:
    """Say how many edges with a negative estimated effect are in the circuit, and how many strong ones are not."""
    strong = scores.top(START, prune=False).mask & ~circuit.mask
    inside, outside = (int((scores.values[mask] < 0).sum()) for mask in (circuit.mask, strong))
    said = f"{inside:,} of the circuit's {len(circuit):,} edges have a negative estimated effect"
    return f"{said}, as do {outside:,} of the {int(strong.sum()):,} strongest other edges" if strong.any() else said


def _off_size(taken: Tried, edges: int | None) -> str:
    """Return a warning if the circuit is empty or has more edges than `edges`, else an empty string."""
    if not taken.n_edges:
        return f"the strongest {edges} edges hold no path from input to logits: the circuit is empty"
    if edges is not None and taken.n_edges > edges:
        return f"the search found no circuit of at most {edges:,} edges: this one has {taken.n_edges:,}"
    return ""


def _facts(taken: Tried, trials: Trials, circuit: Circuit, checks: Verification, judge: Evaluator) -> dict[str, Any]:
    """Return the circuit's facts, as JSON values."""
    of_circuit = ("metric", "metric_full", "metric_empty", "accuracy", "accuracy_full", "pair_error")
    each, ends = checks.evaluation.per_example, trials.evaluator.ends
    outcome = Outcome(each.circuit, each.accurate, each.top1, each.kl)
    facts = {"n_edges": len(circuit), "faithfulness": checks.faithfulness, "interval": list(checks.interval)}
    facts |= {name: getattr(checks.evaluation, name) for name in of_circuit}
    facts |= {
        "faithfulness_on_search_pairs": taken.faithfulness,
        "pair_error_on_search_pairs": distance("pairs", taken.outcome, ends),
        "distance": distance(trials.criterion, outcome, judge.ends),
        "distance_on_search_pairs": taken.distance,
        "unseen_pairs": len(judge.full),
        "search_pairs": len(trials.evaluator.full),
    }
    facts |= {"correlation": checks.correlation, "sign_errors": checks.sign_errors, "checked_edges": len(checks.edges)}
    facts |= {"random_circuits": list(checks.random), "random_circuits_beaten": checks.beaten}
    return facts | ({"stopped": trials.stopped} if trials.stopped else {})
