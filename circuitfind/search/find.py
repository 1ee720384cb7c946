"""`find`: from a model and a task to a verified circuit, in one call.

1. Pairs are split: one part for the search, the held-out other part to judge its result.
2. **Score** every edge by attribution.
3. **Grid**: circuits of the top 1, 2, 4, ... edges (pruned to what is connected) are run exactly. Faithfulness is not
   monotone in size, so the first size that meets the target, or lies on its other side than the size before, is
   looked into.
4. **Bisection** between that size and the one before, towards the smallest size that meets the target; if there is
   none, the grid goes on.
5. **Pruning**: edges are removed, weakest first, as long as |1 - faithfulness| stays within what it was plus a stated
   tolerance. Runs of edges that all go are taken together; a run that may not go is halved.
6. **Knock-outs**: parts of the circuit are ablated inside it and inside the whole model. If the model does not miss
   them, it has a second way to do the task (`evaluation/completeness.py`).
7. **Verify** on the held-out pairs: exact effects of the top candidates and of the circuit's own edges, the circuit as
   a whole, random circuits of its size.

The target is |1 - faithfulness| <= tolerance, from above or below (`one_sided`: faithfulness >= 1 - tolerance).
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from numbers import Real
from typing import Any, Unpack

import numpy as np

from circuitfind.attribution.attribute import ScoreKeywords, score
from circuitfind.attribution.method import Method, Request
from circuitfind.attribution.methods import check_made
from circuitfind.calls import model_call
from circuitfind.circuit import Circuit, connected
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import ScoreError, check_count, warn
from circuitfind.evaluation.completeness import second_way
from circuitfind.evaluation.diagnosis import summarise, summary_of
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.evaluation.idle import idle
from circuitfind.evaluation.verify import MOST_RANDOM, Verification, verified
from circuitfind.models.load import Model
from circuitfind.progress import progress, track
from circuitfind.scores import By, Scores
from circuitfind.search.found import FindResult, Step, TriedCircuit
from circuitfind.search.methods import method_of, request_of
from circuitfind.tasks.task import BoundTask, Task


@model_call
def find(
    model: Model,
    task: Task | BoundTask,
    *,
    method: str | Method | None = None,
    tolerance: float = 0.15,
    one_sided: bool = False,
    by: By = "absolute",
    prune: bool = True,
    prune_tolerance: float = 0.05,
    holdout: float = 0.5,
    top: int = 50,
    random: int = 20,
    knockouts: int = 5,
    scores: Scores | None = None,
    **asked: Unpack[ScoreKeywords],
) -> FindResult:
    """Finds the smallest circuit that still does the task, and verifies it.

    Args:
        method: of the scores ("eap-ig-inputs"): as for `circuitfind.attribute`, or "acdc", "edge-pruning",
            "subnetwork-probing" or "ugs" (`circuitfind.search.methods`).
        tolerance: how far from 1 the exact faithfulness may be, above or below (`one_sided`: below only).
        by: rank edges by |effect| or by signed effect.
        prune: try to drop single edges from the circuit of the right size.
        prune_tolerance: how much |1 - faithfulness| may grow by that, in all; it never leaves `tolerance`.
        holdout: the part of the pairs that is held out for verification.
        top: how many edges to verify besides the circuit's own; random: how many random circuits to compare with.
        knockouts: how many parts of the circuit (its heads of a layer, an MLP) to ablate inside it and inside the
            model, to see whether the model has a second way, and at most so many sets of several; each costs two runs
            of a circuit on the search pairs.
        scores: take these instead of computing them (a search that was stopped goes on from its saved scores).
        asked: keywords of the run (by default those of the given scores; seed: of the split and the random circuits,
            too) and options of the method.

    Raises:
        TaskError: too few pairs, or they do not fit the model.
        ScoreError: scores or faithfulness are undefined on this task, or the given scores were made by another method
            or with other options than those asked for.
    """
    check_target(tolerance, prune_tolerance)
    check_count("top", top)
    check_count("random", random, most=MOST_RANDOM)
    if scores is not None and not isinstance(scores, Scores):
        raise ScoreError(f"find needs edge scores, not {type(scores).__name__}: attribute(level='edge') makes them")
    if scores is not None and scores.graph != model.graph:
        raise ScoreError(f"the scores belong to another graph ({scores.graph}); this model has {model.graph}")
    check_count("knockouts", knockouts)
    chosen = method_of(method)
    if scores is None:
        request, setting = request_of(chosen, asked)
        made = None
    else:
        made = scores.record
        request, setting = Request("edge"), check_made(made, {**asked, "method": method and chosen})
    whole = Experiment.of(model, task, setting, inherit=made, made="the scores were")
    seen, held_out = whole.bound.held_out(holdout, whole.setting.seed)
    experiment = whole.on(seen)
    evaluator = Evaluator(experiment)
    # the empty circuit is the corrupted run under this ablation only
    twin = experiment.ablation.twin
    summary = summary_of(evaluator) if twin else summarise(model, seen, batch_size=experiment.setting.batch_size)
    evaluator.check_contrast()
    if scores is None:
        found = score(experiment, chosen, request)
        assert isinstance(found, Scores)
        scores = found
    search = SizeSearch(evaluator, scores, by, tolerance, one_sided)
    mask = search.smallest()
    if said := idle(scores, by, ((tried.asked, tried.faithfulness) for tried in search.curve)):
        warn(said)
    if prune:
        mask = search.pruned(mask, prune_tolerance)
    settings: dict[str, Any] = {"tolerance": tolerance, "one_sided": one_sided, "by": by, "holdout": holdout}
    circuit = scores.cut(mask, search="find", prune_tolerance=prune_tolerance if prune else None, **settings)
    checks = verified(whole.on(held_out), scores, top, circuit, random)
    part = second_way(evaluator, circuit, checks.exact, knockouts) if len(circuit) < circuit.graph.n_edges else None
    if part is not None:
        search.say("knock-outs", part.reading)
    if part is not None and part.second_way:
        warn(f"{part.reading} (cf.completeness looks further)")
    # scores may be of other pairs, or of another metric than the one that the search was judged by
    record, run = circuit.record.seeing(evaluator.record), whole.setting
    record = replace(record, metric=run.metric.name, ablation=run.ablation, direction=run.direction)
    facts = _facts(search, circuit, checks, {"unseen_pairs": len(held_out), "search_pairs": len(seen)})
    facts |= {} if part is None else {"knocked_out": {**part._asdict(), "removed": list(part.removed)}}
    circuit = replace(circuit, record=record, exact=checks.exact, facts=facts)
    return FindResult(circuit, scores, checks, tuple(search.curve), tuple(search.steps), summary, held_out, model)


def check_target(tolerance: float = 0.15, prune_tolerance: float = 0.05) -> None:
    """Refuses what is no distance of a faithfulness from 1."""
    if not isinstance(tolerance, Real) or not 0 <= float(tolerance) < 1:
        raise ScoreError(
            f"tolerance={tolerance!r}: give how far from 1 the faithfulness may be, 0 or more and below 1 (at 1 the"
            " empty circuit would do)"
        )
    if not isinstance(prune_tolerance, Real) or not float(prune_tolerance) >= 0:
        raise ScoreError(f"prune_tolerance={prune_tolerance!r}: give how much |1 - faithfulness| may grow, 0 or more")


def _facts(search: SizeSearch, circuit: Circuit, checks: Verification, pairs: dict[str, int]) -> dict[str, Any]:
    of_circuit = ("metric", "metric_full", "metric_empty", "accuracy", "accuracy_full")
    facts = {"n_edges": len(circuit), "faithfulness": checks.faithfulness, "interval": list(checks.interval)}
    facts |= {"faithfulness_on_search_pairs": search.faithfulness_of(circuit.mask), **pairs}
    facts |= {name: getattr(checks.evaluation, name) for name in of_circuit}
    facts |= {"correlation": checks.correlation, "sign_errors": checks.sign_errors, "checked_edges": len(checks.edges)}
    return facts | {"random_circuits": list(checks.random), "random_circuits_beaten": checks.beaten}


# -------------------------------------------------------------------- steps 3 to 5
class SizeSearch:
    """The search over sizes and the pruning, with every circuit that was run on record, every decision in words."""

    def __init__(self, evaluator: Evaluator, scores: Scores, by: By, tolerance: float, one_sided: bool) -> None:
        self.evaluator, self.scores, self.graph, self.by = evaluator, scores, scores.graph, by
        self.tolerance, self.one_sided = tolerance, one_sided
        self.curve: list[TriedCircuit] = []
        self.steps: list[Step] = []
        self._known: dict[bytes, float] = {}

    # ---------------------------------------------------------------- measuring
    def faithfulness_of(self, mask: np.ndarray) -> float:
        """Exact faithfulness, run once per distinct circuit."""
        key = hashlib.blake2b(np.packbits(mask).tobytes()).digest()
        if key not in self._known:
            metric = self.evaluator.run(mask[None]).metric
            self._known[key] = float(self.evaluator.faithfulness(metric)[0])
        return self._known[key]

    def _top(self, n: int, stage: str) -> tuple[np.ndarray, float]:
        mask = self.scores.top(n, self.by).mask
        value = self.faithfulness_of(mask)
        self.curve.append(TriedCircuit(stage, n, int(mask.sum()), value))
        return mask, value

    def meets(self, value: float) -> bool:
        """Whether a faithfulness is on target."""
        return value >= 1 - self.tolerance and (self.one_sided or value <= 1 + self.tolerance)

    # ---------------------------------------------------------------- the right size
    def smallest(self) -> np.ndarray:
        """Mask of the smallest top-n circuit on target that the grid and the bisections see."""
        sizes = [2**k for k in range((self.graph.n_edges - 1).bit_length())] + [self.graph.n_edges]
        before, over_before = 0, False
        for n in track(sizes, "search over sizes"):
            tried, value = self._top(n, "grid")
            best, over = (tried if self.meets(value) else None), value > 1 + self.tolerance
            what = f"the top {n} edges ({tried.sum()} connected)"
            if best is not None:
                self.say("grid", f"{what} reach faithfulness {value:.3f}: on target")
            elif over:
                self.say("grid", f"{what} overshoot: faithfulness {value:.3f}")
            if best is not None or over != over_before:
                best = self._bisect(before, over_before, n, best)
                if best is not None:
                    return best
            before, over_before = n, over
        return self.graph.real.copy()  # the full graph has faithfulness 1: the grid always ends there

    def _bisect(self, low: int, low_is_over: bool, high: int, best: np.ndarray | None) -> np.ndarray | None:
        """Halves (low, high] towards the smallest size on target, or where the target is crossed first.

        Args:
            low_is_over: `low` overshoots, otherwise it undershoots; `high` is on the other side, or on target.
            best: the circuit at `high` if that is on target.
        """
        found = high
        while high - low > 1:
            middle = (low + high) // 2
            mask, value = self._top(middle, "bisection")
            if self.meets(value):
                best, found, high = mask, middle, middle
            elif (value > 1 + self.tolerance) == low_is_over:
                low = middle
            else:
                high = middle
        if best is not None:
            self.say("bisection", f"the smallest size on target is the top {found} edges ({best.sum()} connected)")
        else:
            self.say("bisection", f"faithfulness jumps over the target between {low} and {high} edges: going on")
        return best

    # ---------------------------------------------------------------- pruning
    def pruned(self, mask: np.ndarray, growth: float) -> np.ndarray:
        """Removes edges, weakest first, within the tolerance."""
        start = self.faithfulness_of(mask)
        limit = min(abs(1 - start) + growth, max(self.tolerance, abs(1 - start)))
        ranked = self.scores.ranked(self.by)
        order = ranked[mask[ranked[:, 0], ranked[:, 1]]][::-1]
        before, run, at = int(mask.sum()), 1, 0
        with progress("pruning", len(order)) as advance:
            while at < len(order):
                trial = mask.copy()
                trial[tuple(order[at : at + run].T)] = False
                trial = connected(self.graph, trial)
                value = self.faithfulness_of(trial)
                goes = abs(1 - value) <= limit and (self.meets(value) or not self.meets(start))
                if goes and trial.sum() < mask.sum():
                    mask = trial
                    self.curve.append(TriedCircuit("pruning", int(mask.sum()), int(mask.sum()), value))
                if run == 1 or goes:
                    advance(min(run, len(order) - at))
                    at += run
                run = 2 * run if goes else max(1, run // 2)
        value = self.faithfulness_of(mask)
        self.say(
            "pruning", f"{before - int(mask.sum())} of {before} edges removed; faithfulness {start:.3f} -> {value:.3f}"
        )
        if value > 1:
            self.say("pruning", f"overshoot of {value - 1:.3f}: edges that oppose the behaviour are left out")
        return mask

    def say(self, stage: str, text: str) -> None:
        self.steps.append(Step(stage, text))
