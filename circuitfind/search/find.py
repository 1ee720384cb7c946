"""`find`: from a model and a behaviour to a verified circuit, in one call.

1. Pairs are split: one part for the search, the other to judge its result, never the same.
2. **Score** every edge by attribution.
3. **Grid**: circuits of the top 1, 2, 4, ... edges (pruned to what is connected) are run exactly. Faithfulness is not
   monotone in size, so the first size that meets the target, or lies on its other side than the size before, is
   looked into.
4. **Bisection** between that size and the one before, towards the smallest size that meets the target. If the two
   sides hide no such size, the grid goes on.
5. **Pruning**: edges are removed, weakest first, as long as |1 - faithfulness| stays within what it was plus a stated
   tolerance. Runs of edges that all go are taken together; a run that may not go is halved.
6. **Verify** on the unseen pairs: exact effects of the top candidates and of the circuit's own edges, the circuit as a
   whole, random circuits of its size.

The target is |1 - faithfulness| <= tolerance, from above or below (`one_sided`: faithfulness >= 1 - tolerance).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from circuitfind.attribution.attribute import attribute
from circuitfind.circuit import Circuit, connected
from circuitfind.errors import ScoreError, TaskError
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.evaluation.summary import TaskSummary, summarise, summary_of
from circuitfind.evaluation.verify import Verification, verify
from circuitfind.loading import bind
from circuitfind.metrics import Function, Metric
from circuitfind.models.load import Model
from circuitfind.progress import progress, track
from circuitfind.scores import By, Scores
from circuitfind.tasks.task import BoundTask, Task


class CurvePoint(NamedTuple):
    """A circuit that was run: stage ("grid", "bisection", "pruning"), edges asked for and kept, exact faithfulness."""

    stage: str
    asked: int
    n_edges: int
    faithfulness: float


class Step(NamedTuple):
    """One decision of the search, in words."""

    stage: str
    text: str


@dataclass(frozen=True, eq=False)
class FindResult:
    """What `find` found.

    Attributes:
        circuit: the circuit, with estimates, exact effects and the facts measured of it.
        scores: every edge's estimate, from the search pairs.
        checks: the verification on pairs that the search did not see.
        curve: every circuit that was run, in order.
        steps: every decision, in words.
        summary: how well the model does the task on the search pairs.
        unseen: the pairs that verification used.
    """

    circuit: Circuit
    scores: Scores
    checks: Verification
    curve: tuple[CurvePoint, ...]
    steps: tuple[Step, ...]
    summary: TaskSummary
    unseen: BoundTask

    def to_dict(self) -> dict[str, object]:
        """JSON values (scores are saved on their own)."""
        return {
            "circuit": {"edges": self.circuit.edges, "nodes": self.circuit.nodes, **self.circuit.facts},
            "task": self.summary._asdict(),
            "checks": self.checks.to_dict(),
            "curve": [point._asdict() for point in self.curve],
            "steps": [step._asdict() for step in self.steps],
        }


def find(
    model: Model,
    task: Task | BoundTask,
    *,
    method: str = "eap-ig-inputs",
    steps: int = 5,
    rule: str = "left",
    tolerance: float = 0.15,
    one_sided: bool = False,
    by: By = "absolute",
    prune: bool = True,
    prune_tolerance: float = 0.05,
    holdout: float = 0.5,
    top: int = 50,
    random: int = 20,
    scores: Scores | None = None,
    metric: str | Metric | Function | None = None,
    ablation: str = "corrupted",
    direction: str = "noising",
    batch_size: int | None = None,
    seed: int = 0,
) -> FindResult:
    """Finds the smallest circuit that still does the behaviour, and verifies it.

    Args:
        method, steps, rule, ablation, direction, metric, batch_size: of the scores; see `circuitfind.attribute`.
        tolerance: how far from 1 the exact faithfulness may be, above or below (`one_sided`: below only).
        by: rank edges by |effect| or by signed effect.
        prune: try to drop single edges from the circuit of the right size.
        prune_tolerance: how much |1 - faithfulness| may grow by that, in all; it never leaves `tolerance`.
        holdout: part of the pairs that is kept for verification.
        top: how many edges to verify besides the circuit's own; random: how many random circuits to compare with.
        scores: take these instead of computing them (a search that was stopped goes on from its saved scores).
        seed: of the split, the intervals, the random circuits.

    Raises:
        TaskError: too few pairs, or they do not fit the model.
        ScoreError: scores or faithfulness are undefined on this task.
    """
    bound = bind(model, task).with_metric(metric)
    if tolerance < 0 or prune_tolerance < 0:
        raise ScoreError(f"tolerance={tolerance} and prune_tolerance={prune_tolerance} are distances: not negative")
    if len(bound) < 2:
        raise TaskError("one pair is too few to find a circuit and to judge it: give at least two, better thirty")
    seen, unseen = bound.split(1 - holdout, seed)
    evaluator = Evaluator(model, seen, ablation=ablation, batch_size=batch_size, seed=seed)
    # the empty circuit is the corrupted run under this ablation only
    summary = summary_of(evaluator) if ablation == "corrupted" else summarise(model, seen, batch_size=batch_size)
    evaluator.check_contrast()
    if scores is None:
        options: dict[str, Any] = {"steps": steps, "rule": rule, "ablation": ablation, "direction": direction}
        found = attribute(model, seen, method, batch_size=batch_size, seed=seed, **options)
        assert isinstance(found, Scores)
        scores = found
    elif not isinstance(scores, Scores):
        raise ScoreError(f"find needs edge scores, not {type(scores).__name__}: attribute(level='edge') makes them")
    elif scores.graph != model.graph:
        raise ScoreError(f"the scores belong to another graph ({scores.graph}); this model has {model.graph}")
    search = _Search(evaluator, scores, by, tolerance, one_sided)
    mask = search.smallest()
    if prune:
        mask = search.pruned(mask, prune_tolerance)
    settings: dict[str, Any] = {"tolerance": tolerance, "one_sided": one_sided, "by": by, "holdout": holdout}
    circuit = scores.cut(mask, search="find", prune_tolerance=prune_tolerance if prune else None, **settings)
    same: dict[str, Any] = {"ablation": ablation, "direction": direction, "batch_size": batch_size, "seed": seed}
    checks = verify(model, unseen, scores, top, circuit=circuit, random=random, **same)
    record = replace(circuit.record, ablation=ablation, direction=direction)  # given scores may be of another
    circuit = replace(circuit, record=record, exact=checks.exact, facts=_facts(search, circuit, checks, seen, unseen))
    return FindResult(circuit, scores, checks, tuple(search.curve), tuple(search.steps), summary, unseen)


def _facts(
    search: _Search, circuit: Circuit, checks: Verification, seen: BoundTask, unseen: BoundTask
) -> dict[str, object]:
    return {
        "n_edges": len(circuit),
        "faithfulness": checks.faithfulness,
        "interval": list(checks.interval),
        "unseen_pairs": len(unseen),
        "faithfulness_on_search_pairs": search.faithfulness_of(circuit.mask),
        "search_pairs": len(seen),
        "metric": checks.evaluation.metric,
        "metric_full": checks.evaluation.metric_full,
        "metric_empty": checks.evaluation.metric_empty,
        "accuracy": checks.evaluation.accuracy,
        "accuracy_full": checks.evaluation.accuracy_full,
        "correlation": checks.correlation,
        "sign_errors": checks.sign_errors,
        "checked_edges": len(checks.edges),
        "random_circuits": list(checks.random),
        "random_circuits_beaten": checks.beaten,
    }


class _Search:
    """The search over sizes and the pruning, with every circuit that was run on record."""

    def __init__(self, evaluator: Evaluator, scores: Scores, by: By, tolerance: float, one_sided: bool) -> None:
        self.evaluator, self.scores, self.graph, self.by = evaluator, scores, scores.graph, by
        self.tolerance, self.one_sided = tolerance, one_sided
        self.curve: list[CurvePoint] = []
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
        self.curve.append(CurvePoint(stage, n, int(mask.sum()), value))
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
                self._say("grid", f"{what} reach faithfulness {value:.3f}: on target")
            elif over:
                self._say("grid", f"{what} overshoot: faithfulness {value:.3f}")
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
            self._say("bisection", f"the smallest size on target is the top {found} edges ({best.sum()} connected)")
        else:
            self._say("bisection", f"faithfulness jumps over the target between {low} and {high} edges: going on")
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
                    self.curve.append(CurvePoint("pruning", int(mask.sum()), int(mask.sum()), value))
                if run == 1 or goes:
                    advance(min(run, len(order) - at))
                    at += run
                run = 2 * run if goes else max(1, run // 2)
        value = self.faithfulness_of(mask)
        self._say(
            "pruning", f"{before - int(mask.sum())} of {before} edges removed; faithfulness {start:.3f} -> {value:.3f}"
        )
        if value > 1:
            self._say("pruning", f"overshoot of {value - 1:.3f}: edges that oppose the behaviour are left out")
        return mask

    def _say(self, stage: str, text: str) -> None:
        self.steps.append(Step(stage, text))
