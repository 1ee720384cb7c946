"""ACDC, automatic circuit discovery (Conmy et al. 2023): the same decisions, with far fewer operations.

1. Start from the full graph. Go through the edges in a given order (`orders.py`).
2. Remove the edge on trial: its reader gets the ablated value of what the writer contributes. With
   `r = metric(current) - metric(after removal)` (with `kl` the increase of the divergence), the edge stays out if
   `r < threshold`, strictly, and the circuit without it is what the next edge is compared with; else it is put back.
3. What is left is the circuit; nothing is pruned afterwards.

What makes it fast changes no decision:

* A trial computes only what the removal changes (`engine/revision.py`): a removal from layer L runs no earlier layer,
  and of the later ones only the modules that a kept edge leads to.
* A reader whose node no longer reaches the logits has effect exactly 0: no run is needed (0 < threshold is tested).
* Where a device gains from batching, the next few edges are tried side by side on the assumption that all of them go,
  and accepted up to the first that stays.

Decisions closer to the threshold than 1e-6 are listed: rounding may turn them on another machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from circuitfind.attribution.record import make_record
from circuitfind.circuit import Circuit
from circuitfind.engine.revision import CircuitState, Edge
from circuitfind.errors import ScoreError
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.metrics import Function, Metric
from circuitfind.models.load import Model
from circuitfind.progress import progress
from circuitfind.scores import Scores
from circuitfind.search.orders import edges_in_order
from circuitfind.tasks.task import BoundTask, Task

CLOSE = 1e-6
SIDE_BY_SIDE = {"cpu": 1}  # trials in one batch: on a processor they gain nothing
MANY_SIDE_BY_SIDE = 32


class Decision(NamedTuple):
    """What was decided of an edge: its effect at that moment, whether it stays, and whether that took a run."""

    edge: Edge
    effect: float
    kept: bool
    tested: bool


def acdc(
    model: Model,
    task: Task | BoundTask,
    threshold: float = 0.05,
    *,
    metric: str | Metric | Function | None = "kl",
    order: str | Sequence[str] = "reverse-topological",
    scores: Scores | None = None,
    ablation: str = "corrupted",
    absolute: bool = False,
    side_by_side: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Circuit:
    """Prunes the full graph edge by edge.

    Args:
        threshold: an edge is removed if removing it lowers the metric by less than this (units of the metric).
        metric: higher = more of the behaviour; None takes the task's own.
        order: a name of `circuitfind.search.orders.ORDERS`, or edge names (other edges then stay in).
        scores: for order="scores".
        absolute: compare |r| with the threshold, so that edges that oppose the behaviour stay, too.
        side_by_side: trials in one batch; by default 1 on a processor, more on an accelerator.
        seed: of the shuffled orders.

    Returns:
        The circuit, unpruned. `exact` holds each edge's effect when it was decided; `facts` the number of trials run,
        of edges decided without a run, and the close calls.

    Raises:
        ScoreError: unknown order, or a metric that is NaN.
    """
    evaluator = Evaluator(model, task, ablation=ablation, metric=metric, batch_size=batch_size, seed=seed)
    edges = edges_in_order(model.graph, order, seed, scores)
    pruning = _Pruning(evaluator, threshold, absolute)
    most = side_by_side or SIDE_BY_SIDE.get(model.device.type, MANY_SIDE_BY_SIDE)
    decisions: list[Decision] = []
    with progress("ACDC", len(edges)) as advance:
        while len(decisions) < len(edges):
            decided = pruning.decide(edges[len(decisions) :], most)
            decisions += decided
            advance(len(decided))
    name = order if isinstance(order, str) else "given"
    settings = {"threshold": threshold, "order": name, "absolute": absolute}
    record = make_record(model, evaluator.bound, "acdc", ablation, "noising", seed, **settings)
    exact = np.full(model.graph.real.shape, np.nan, dtype=np.float32)
    for edge, effect, _, _ in decisions:
        exact[edge] = effect
    close = [d for d in decisions if abs((abs(d.effect) if absolute else d.effect) - threshold) <= CLOSE]
    facts = {
        "n_edges": int(pruning.mask.sum()),
        "trials_run": sum(d.tested for d in decisions),
        "decided_without_a_run": sum(not d.tested for d in decisions),
        "close_calls": [{"edge": model.graph.edge_name(*d.edge), "effect": d.effect} for d in close],
        "metric_full": float(evaluator.full.mean()),
        "metric": pruning.current,
    }
    return Circuit(model.graph, pruning.mask, exact=exact, record=record, facts=facts)


@dataclass
class _Pruning:
    """The current circuit on every batch of the task."""

    evaluator: Evaluator
    threshold: float
    absolute: bool

    def __post_init__(self) -> None:
        self.states = [CircuitState(prepared) for prepared in self.evaluator.prepared()]
        self.current = float(self.evaluator.full.mean())
        self._run = 1

    @property
    def mask(self) -> np.ndarray:
        """`[writers, readers]` bool: what is left."""
        return self.states[0].mask

    def goes(self, effect: float) -> bool:
        """The rule: strictly below the threshold."""
        return (abs(effect) if self.absolute else effect) < self.threshold

    def decide(self, edges: list[Edge], most: int) -> list[Decision]:
        """Decides at least the first of the edges."""
        dead = self._dead(edges)
        if dead:
            if self.goes(0.0):
                for state in self.states:
                    state.drop(dead)
            return [Decision(edge, 0.0, not self.goes(0.0), tested=False) for edge in dead]
        trial = edges[: min(self._run, most)]
        metrics = self._metrics(trial)
        decisions, accepted = [], -1
        for number, (edge, after) in enumerate(zip(trial, metrics, strict=True)):
            effect = self.current - after
            if math.isnan(effect):
                name = self.evaluator.graph.edge_name(*edge)
                raise ScoreError(f"the metric is NaN after removing {name}: look for inf or NaN in the model's logits")
            kept = not self.goes(effect)
            decisions.append(Decision(edge, effect, kept, tested=True))
            if kept:
                break
            accepted, self.current = number, after
        if accepted >= 0:
            for state in self.states:
                state.commit(accepted)
        self._run = min(2 * self._run, most) if accepted == len(trial) - 1 else max(1, accepted + 1)
        return decisions

    def _dead(self, edges: list[Edge]) -> list[Edge]:
        """The leading edges whose reader no longer reaches the logits."""
        dead: list[Edge] = []
        known: dict[int, bool] = {}
        for writer, reader in edges:
            if reader not in known:
                known[reader] = self.states[0].reaches_logits([reader])
            if known[reader]:
                break
            dead.append((writer, reader))
        return dead

    def _metrics(self, trial: list[Edge]) -> list[float]:
        """The mean metric after each trial."""
        total = np.zeros(len(trial))
        for state in self.states:
            logits, batch = state.attempt([[edge] for edge in trial]), state.prepared.batch
            values = torch.stack([self.evaluator.bound.metric(one, batch) for one in logits])
            total += values.cpu().double().sum(-1).numpy()
        return (total / len(self.evaluator.full)).tolist()
