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

from dataclasses import dataclass, replace
from typing import Any, Unpack

from circuitfind.attribution.attribute import ScoreKeywords, score
from circuitfind.attribution.method import Method, Request
from circuitfind.attribution.methods import method_of, request_of
from circuitfind.circuit import Circuit
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import ScoreError, TaskError
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.evaluation.summary import TaskSummary, summarise, summary_of
from circuitfind.evaluation.verify import Verification, verify
from circuitfind.models.load import Model
from circuitfind.remote.call import remotable
from circuitfind.scores import By, Scores
from circuitfind.search.sizes import CurvePoint, SizeSearch, Step
from circuitfind.tasks.task import BoundTask, Task


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


@remotable
def find(
    model: Model,
    task: Task | BoundTask,
    *,
    method: str | Method = "eap-ig-inputs",
    tolerance: float = 0.15,
    one_sided: bool = False,
    by: By = "absolute",
    prune: bool = True,
    prune_tolerance: float = 0.05,
    holdout: float = 0.5,
    top: int = 50,
    random: int = 20,
    scores: Scores | None = None,
    **asked: Unpack[ScoreKeywords],
) -> FindResult:
    """Finds the smallest circuit that still does the behaviour, and verifies it.

    Args:
        method: of the scores; see `circuitfind.attribute`.
        tolerance: how far from 1 the exact faithfulness may be, above or below (`one_sided`: below only).
        by: rank edges by |effect| or by signed effect.
        prune: try to drop single edges from the circuit of the right size.
        prune_tolerance: how much |1 - faithfulness| may grow by that, in all; it never leaves `tolerance`.
        holdout: part of the pairs that is kept for verification.
        top: how many edges to verify besides the circuit's own; random: how many random circuits to compare with.
        scores: take these instead of computing them (a search that was stopped goes on from its saved scores).
        asked: keywords of the run (by default those of the given scores; seed: of the split, the intervals and the
            random circuits, too) and options of the method, as for `circuitfind.attribute`.

    Raises:
        TaskError: too few pairs, or they do not fit the model.
        ScoreError: scores or faithfulness are undefined on this task.
    """
    if tolerance < 0 or prune_tolerance < 0:
        raise ScoreError(f"tolerance={tolerance} and prune_tolerance={prune_tolerance} are distances: not negative")
    if scores is not None and not isinstance(scores, Scores):
        raise ScoreError(f"find needs edge scores, not {type(scores).__name__}: attribute(level='edge') makes them")
    if scores is not None and scores.graph != model.graph:
        raise ScoreError(f"the scores belong to another graph ({scores.graph}); this model has {model.graph}")
    chosen = method_of(method)
    request, setting = (Request("edge"), asked) if scores is not None else request_of(chosen, "edge", None, asked)
    whole = Experiment.of(
        model, task, setting, inherit=None if scores is None else scores.record, made="the scores were"
    )
    if len(whole) < 2:
        raise TaskError("one pair is too few to find a circuit and to judge it: give at least two, better thirty")
    seen, unseen = whole.bound.split(1 - holdout, whole.setting.seed)
    experiment = whole.on(seen)
    evaluator = Evaluator(experiment.set(direction="noising"))
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
    if prune:
        mask = search.pruned(mask, prune_tolerance)
    settings: dict[str, Any] = {"tolerance": tolerance, "one_sided": one_sided, "by": by, "holdout": holdout}
    circuit = scores.cut(mask, search="find", prune_tolerance=prune_tolerance if prune else None, **settings)
    asked_again: Any = {
        name: getattr(whole.setting, name) for name in ("metric", "ablation", "direction", "batch_size", "seed")
    }
    checks = verify(model, unseen, scores, top, circuit=circuit, random=random, **asked_again)
    # given scores may be of other pairs
    record = circuit.record.seeing(evaluator.record)
    record = replace(record, ablation=whole.setting.ablation, direction=whole.setting.direction)
    circuit = replace(circuit, record=record, exact=checks.exact, facts=_facts(search, circuit, checks, seen, unseen))
    return FindResult(circuit, scores, checks, tuple(search.curve), tuple(search.steps), summary, unseen)


def _facts(
    search: SizeSearch, circuit: Circuit, checks: Verification, seen: BoundTask, unseen: BoundTask
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
