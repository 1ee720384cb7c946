"""`check`: the strongest estimates of a method, each beside its exact effect.

A method's scores of edges, nodes or places are ranked, and the strongest are patched, one at a time, as method="exact"
patches all of them:

1. an edge restarted at its reader's layer, a node by all its outgoing edges together (`attribution/exact.py`);
2. a place of a sweep as `circuitfind.patch` does (`patching/patch.py`).

Each costs about half a forward pass of the pairs, besides one pass each for the clean and the corrupted prompts. An
estimate is *off* if its error is more than half of the exact effect; a wrong sign is always off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import numpy as np

from circuitfind.attribution.exact import exact_effects, exact_node_effects
from circuitfind.calls import model_call
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import ScoreError, check_count
from circuitfind.models.load import Model
from circuitfind.patching.patch import Where, measured, planned
from circuitfind.patching.sweep import Sweep
from circuitfind.placed_scores import PLACE, PlacedScores
from circuitfind.record import Record
from circuitfind.result import By, Result, strongest
from circuitfind.scores import NodeScores, Scores
from circuitfind.setting import Keywords
from circuitfind.statistics import Interval, as_intervals, mean_intervals
from circuitfind.tasks.task import BoundTask, Task

EXACT = ("exact", "patch")  # methods whose scores are exact effects
OFF = 0.5  # of the exact effect


class _Named(NamedTuple):
    name: str
    position: str = ""


class _Measured(NamedTuple):
    """The strongest items in the graph's order: `[items]` estimates, and `[items, examples]` exact effects."""

    level: str
    names: list[_Named]
    estimates: np.ndarray
    effects: np.ndarray


class Checked(NamedTuple):
    """An edge, node or place: its estimate and its exact effect, in units of the metric, with the 95% interval of the
    exact effect over examples. position: its position or span; empty if all positions are ablated together."""

    name: str
    position: str
    estimate: float
    exact: float
    interval: Interval

    @property
    def wrong_sign(self) -> bool:
        return self.estimate * self.exact < 0

    @property
    def off(self) -> bool:
        return abs(self.estimate - self.exact) > OFF * abs(self.exact)


@dataclass(frozen=True, eq=False, repr=False)
class Checks(Result):
    """Estimates beside exact effects; rows are the edges, nodes or places.

    Attributes:
        level: "edge", "node", or the kind of place.
        checked: the strongest estimate first.
        wrong_signs: how many of them have the wrong sign.
        off: how many are off by more than half of the exact effect, those with a wrong sign included.
        record: of the estimates.
        n_distinct: number of different pairs that the exact effects are measured on.
    """

    FORMAT, ROWS, DERIVED = "circuitfind.checks", "checked", ("wrong_signs", "off")

    level: str
    checked: tuple[Checked, ...]
    record: Record
    n_distinct: int

    @property
    def wrong_signs(self) -> int:
        return sum(row.wrong_sign for row in self.checked)

    @property
    def off(self) -> int:
        return sum(row.off for row in self.checked)

    def shown(self) -> dict[str, Any]:
        return {"method": self.record.method, "checked": len(self.checked), **super().shown()}


@model_call
def check(
    model: Model,
    task: Task | BoundTask,
    scores: Scores | NodeScores | Sweep,
    top: int = 10,
    *,
    by: By = "absolute",
    **asked: Unpack[Keywords],
) -> Checks:
    """Measure the exact effects of the strongest estimates. `circuitfind.verify` does so for edges, and also runs their
    circuit.

    Args:
        task: the pairs that were scored, or others.
        scores: estimates of edges, nodes (by position: their sums are checked) or places, as from
            `circuitfind.attribute`.
        top: how many, ranked by magnitude or (by="signed") the most positive ones.
        asked: metric, ablation, direction (by default those of the scores), batch_size, seed; see
            `circuitfind.setting`.

    Raises:
        ScoreError: the scores are exact, no estimates of effects, or of another graph or other places.
    """
    if not isinstance(scores, (Scores, PlacedScores, NodeScores, Sweep)):
        raise ScoreError(f"check needs scores of edges, nodes or places, not {type(scores).__name__}")
    if isinstance(scores, PlacedScores) or PLACE in scores.record.settings:
        raise ScoreError(
            "check measures an edge at all tokens together: give it scores.total(), or leave --max-checks out"
        )
    if not can_be_checked(scores.record):
        why = "are measured" if scores.record.method in EXACT else "estimate no effect of an ablation"
        raise ScoreError(f"scores of method '{scores.record.method}' {why}: there is nothing to check")
    by_head = scores.graph == model.graph.ungrouped()
    if scores.graph != model.graph and not by_head:
        raise ScoreError(f"the scores belong to another graph {model.graph.unlike(scores.graph)}")
    check_count("top", top)
    experiment = Experiment.of(model, task, asked, inherit=scores.record, made="the scores were")
    experiment = experiment.ungrouped() if by_head else experiment
    level, names, estimates, effects = _measured(experiment, scores, top, by)
    order = strongest(estimates, top, by)
    exact, intervals = effects.mean(axis=1), as_intervals(mean_intervals(effects, experiment.bound.copies)[order])
    rows = [
        Checked(names[at].name, names[at].position, float(estimates[at]), float(exact[at]), interval)
        for at, interval in zip(order.tolist(), intervals, strict=True)
    ]
    distinct = experiment.record(scores.record.method).n_distinct
    return Checks(level, tuple(rows), scores.record, distinct)


def can_be_checked(record: Record) -> bool:
    """Whether scores are estimates of an ablation's effect that `check` can measure: not exact effects, and not edges
    by position."""
    return PLACE not in record.settings and record.is_effect and bool(record.ablation) and record.method not in EXACT


def _measured(experiment: Experiment, scores: Scores | NodeScores | Sweep, top: int, by: By) -> _Measured:
    if isinstance(scores, Sweep):
        return _places(experiment, scores, np.sort(strongest(scores.effects.ravel(), top, by)))
    graph = experiment.graph
    if isinstance(scores, NodeScores):
        total = scores.key("signed")
        writers = np.sort(strongest(total, top, by))
        names = [_Named(graph.writer_names[writer]) for writer in writers]
        return _Measured("node", names, total[writers], exact_node_effects(experiment, writers=writers))
    edges, effects = exact_effects(experiment, scores.top(top, by, prune=False).mask)
    names = [_Named(graph.edge_name(*edge)) for edge in edges]
    return _Measured("edge", names, scores.values[edges[:, 0], edges[:, 1]], effects)


def _places(experiment: Experiment, scores: Sweep, chosen: np.ndarray) -> _Measured:
    layers = [int(label) for label in scores.axes[0].labels]
    by_position = None if scores.by_span else scores.by_position
    plan = planned(experiment, Where(scores.what, by_position, scores.by_span, layers))
    mine, given = (" x ".join(map(str, shape)) for shape in (plan.shape, scores.effects.shape))
    if mine != given:
        raise ScoreError(f"these pairs have {mine} places and the scores {given}: score pairs of the same positions")
    names, labels = scores.names(), scores.positions
    named = [_Named(names[at], labels[at % len(labels)]) for at in chosen.tolist()]
    return _Measured(scores.what, named, scores.effects.ravel()[chosen], measured(plan, chosen).effects)
