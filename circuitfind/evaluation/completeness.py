"""Completeness: whether a circuit contains everything that the model uses for the task.

1. **The complement.** Run the model on all edges outside the circuit. If the circuit is complete, the complement does
   nothing (faithfulness 0).
2. **Knock-outs** (Wang et al. 2022, "Interpretability in the wild", section 4.1). Ablate a set K inside the circuit and
   inside the whole model. A complete circuit fails in the same way as the model: |F(C \\ K) - F(M \\ K)|, F the mean
   metric, is small for every K. Only this test shows backups that the circuit lacks. K is a set of the circuit's edges,
   or of its nodes (heads and MLPs, never `input`; all edges out of them are ablated, in the model also those outside
   the circuit). Its size is drawn uniformly from 1 to all, then the set uniformly among those of that size; repeated
   sets count once.
3. **Greedy search for the worst K** (the same paper). Starting from the empty set, each step draws at most ten
   candidates and adds the one that gives the largest gap, until all are in K. The worst set found is kept. It is chosen
   on the pairs that it is measured on, so its gap is biased upwards and its interval ignores the choice.

`second_way` is a cheap form of 2 for searches. K is one part of the circuit (its heads of one layer, or an MLP), for
the few parts with the largest effects. If the circuit fails without a part and the model does not, the model has a
second way to do the task, which the circuit leaves out. If no single part shows this, several parts may back each other
up: parts are added to K, those that the model needs least first (several at a time if there are many), and stay in K
unless the model then fails. This does not find a second way through the same nodes along other edges: use
`completeness` with sets of edges for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple, Unpack

import numpy as np

from circuitfind.calls import model_call
from circuitfind.circuit import Circuit
from circuitfind.errors import ScoreError, check_count
from circuitfind.evaluation.faithfulness import AT_ONCE, Evaluation, Evaluator
from circuitfind.models.load import Model
from circuitfind.progress import track
from circuitfind.record import Record
from circuitfind.result import Result
from circuitfind.setting import JudgeKeywords
from circuitfind.statistics import UNKNOWN, Interval, as_intervals, left_out, magnitude_intervals, mean_intervals
from circuitfind.tasks.task import BoundTask, Task

CANDIDATES = 10  # at each step of the greedy search
FEW = 4  # heads named in a sentence
MOST = 0.8  # of the total effect: the model still does the task
SECOND_WAY = 0.25  # of the total effect: if the model keeps so much more than the circuit, it has a second way


class KnockOut(NamedTuple):
    """A set K ablated inside the circuit and inside the model.

    circuit, model: mean metrics without K; difference, interval: their difference and its 95% interval.
    how: how K was chosen: "random", "greedy", "part", or "none" for the empty set.
    """

    removed: tuple[str, ...]
    circuit: float
    model: float
    difference: float
    interval: Interval
    how: str

    @property
    def gap(self) -> float:
        return abs(self.difference)


@dataclass(frozen=True, eq=False, repr=False)
class Completeness(Result):
    """Completeness of a circuit; rows are the knock-outs.

    Attributes:
        level: what was knocked out, "node" or "edge".
        complement: the model without the circuit's edges; its faithfulness is 0 for a complete circuit.
        whole: the empty K: the gap F(C) - F(M) without knock-outs.
        knockouts: random ones first.
        mean_gap: mean |difference| over the random K, with its interval over examples (noise biases it upwards near 0);
            NaN if the circuit has nothing to knock out.
        contrast: metric of the whole model minus metric with every edge ablated, the scale of the gaps.
    """

    FORMAT, ROWS, DERIVED = "circuitfind.completeness", "knockouts", ("worst",)

    level: str
    complement: Evaluation
    whole: KnockOut
    knockouts: tuple[KnockOut, ...]
    mean_gap: float
    mean_gap_interval: Interval
    contrast: float
    seen_pairs: int | None
    record: Record

    @property
    def worst(self) -> KnockOut:
        """The knock-out with the largest gap; the empty one if there is no other."""
        return max(self.knockouts, key=lambda one: one.gap, default=self.whole)


@model_call
def completeness(
    model: Model,
    task: Task | BoundTask,
    circuit: Circuit | Iterable[str],
    *,
    knockouts: int = 20,
    level: str = "node",
    greedy: int = 0,
    **asked: Unpack[JudgeKeywords],
) -> Completeness:
    """Measure what a circuit lacks, by its complement and by knock-outs inside circuit and model.

    Args:
        circuit: a `Circuit`, or names of edges.
        knockouts: number of random sets.
        level: whether sets consist of "node"s or "edge"s.
        greedy: number of greedy searches for the worst set.
        asked: metric, ablation (default: the circuit's own), batch_size, seed (also of the sets); see
            `circuitfind.setting`.

    Raises:
        ScoreError: faithfulness is undefined on this task, or an argument is invalid.
    """
    if level not in ("node", "edge"):
        raise ScoreError(f"level '{level}' is unknown: knock out 'node's or 'edge's")
    check_count("knockouts", knockouts)
    check_count("greedy", greedy)
    evaluator, chosen = Evaluator.judging(model, task, circuit, **asked)
    complement = chosen.complement()
    evaluation = evaluator.evaluation(complement, evaluator.run_distinct([complement.mask]).of(0))
    trials = _Trials(evaluator, chosen, level)
    drawn = trials.draw(knockouts)
    differences = trials.differences([(), *drawn])
    gap = np.abs(differences[1:].mean(-1)).mean(keepdims=True) if drawn else np.array([np.nan])
    gaps = np.abs(left_out(differences[1:], evaluator.bound.copies)).mean(0, keepdims=True)
    rows = [trials.row(removed, "random") for removed in drawn]
    rows += [trials.row(trials.search(number), "greedy") for number in range(greedy if len(trials.names) else 0)]
    return Completeness(
        level,
        evaluation,
        trials.row((), "none"),
        tuple(rows),
        mean_gap=float(gap[0]),
        mean_gap_interval=as_intervals(magnitude_intervals(gap, gaps))[0] if drawn else UNKNOWN,
        contrast=evaluation.metric_full - evaluation.metric_empty,
        seen_pairs=evaluation.seen_pairs,
        record=evaluator.record.with_settings(level=level, knockouts=knockouts, greedy=greedy),
    )


class Part(NamedTuple):
    """A part of a circuit, and the fractions of the total effect that circuit and model keep without it.

    second_way: the model keeps much more than the circuit, beyond what the circuit lacks anyway.
    """

    removed: tuple[str, ...]
    circuit: float
    model: float
    second_way: bool

    @property
    def reading(self) -> str:
        """The meaning, in a sentence."""
        named, others = ", ".join(self.removed[:FEW]), len(self.removed) - FEW
        if others > 0:
            one_part, more = len({name.partition(".")[0] for name in self.removed}) == 1, "s" * (others > 1)
            named += f" and {others} more {f'head{more} of that layer' if one_part else f'node{more}'}"
        model, circuit = (f"{round(share, 2) + 0.0:.0%}" for share in (self.model, self.circuit))  # no -0%
        shares = f"without {named}, the model keeps {model} of the total effect and the circuit {circuit}"
        if self.second_way:
            task = "the task" if self.model >= MOST else "part of the task"
            return f"{shares}: the model has a second way to do {task}, which the circuit leaves out"
        return f"{shares} (the largest difference found): no sign of a second way"


def second_way(evaluator: Evaluator, circuit: Circuit, effects: np.ndarray, count: int) -> Part | None:
    """Find the part of a circuit, or the set of parts, without which circuit and model differ most; None without parts.

    Costs two runs of a circuit for each set, and one more.

    Args:
        effects: `[writers, readers]`, effects of the circuit's edges, by which parts are ranked.
        count: number of parts to knock out singly, and the most sets of several parts.
    """
    trials, graph = _Trials(evaluator, circuit, "node"), circuit.graph
    size = np.abs(np.where(circuit.mask, np.nan_to_num(effects), 0)).sum(1)
    parts: dict[tuple[int, bool], list[int]] = {}
    for place, writer in enumerate(trials.cells):
        layer = graph.layer_of(writer)
        parts.setdefault((layer, writer == graph.mlp(layer)), []).append(place)
    ranked = sorted(parts.values(), key=lambda part: -sum(size[trials.cells[place]] for place in part))
    sets = [tuple(part) for part in ranked[:count]]
    if not sets:
        return None
    trials.differences([(), *sets])  # all at once
    found = [trials.part(removed) for removed in sets]
    if not any(part.second_way for part in found):
        missed = sorted(range(len(sets)), key=lambda number: -found[number].model)  # least first
        found += _together(trials, [*ranked[count:][::-1], *(sets[number] for number in missed)], count)
    return max(found, key=lambda part: part.model - part.circuit)


def _together(trials: _Trials, parts: Sequence[Sequence[int]], most: int) -> Iterator[Part]:
    """Knock out parts together, adding one (or several, for at most `most` sets) at a time."""
    inside: tuple[int, ...] = ()
    for start in range(0, len(parts), step := -(-len(parts) // most)):
        tried = tuple(sorted(chain(inside, *parts[start : start + step])))
        found = trials.part(tried)
        yield found
        inside = tried if found.model >= MOST else inside


class _Trials:
    """Knock-outs of one circuit, each run once. A set is a sorted tuple of indices into `names`."""

    def __init__(self, evaluator: Evaluator, circuit: Circuit, level: str) -> None:
        self.evaluator, self.circuit = evaluator, circuit
        if level == "node":
            self.cells: Sequence[Any] = (np.flatnonzero(circuit.mask[1:].any(axis=1)) + 1).tolist()  # 0 is `input`
            self.names = [evaluator.graph.writer_names[u] for u in self.cells]
        else:
            self.cells = [(writer, reader) for reader, writer in np.argwhere(circuit.mask.T).tolist()]
            self.names = circuit.edges
        self._known: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    def draw(self, count: int) -> list[tuple[int, ...]]:
        """Draw random sets, without repeats."""
        rng, size = np.random.default_rng(self.evaluator.seed), len(self.cells)
        draws = (rng.choice(size, rng.integers(1, size + 1), replace=False) for _ in range(count if size else 0))
        return list(dict.fromkeys(tuple(sorted(draw.tolist())) for draw in draws))

    def differences(self, sets: Sequence[tuple[int, ...]]) -> np.ndarray:
        """`[sets, examples]`: metric of the circuit minus metric of the model, both without the set."""
        new = [removed for removed in sets if removed not in self._known]
        chunks = [new[start : start + AT_ONCE] for start in range(0, len(new), AT_ONCE)]
        for chunk in track(chunks, "knock-outs"):
            both = []  # separately, because circuits in one batch use the arithmetic of the largest
            for whole in (self.circuit.mask, self.evaluator.graph.real):
                masks = [whole.copy() for _ in chunk]
                for mask, removed in zip(masks, chunk, strict=True):
                    for place in removed:
                        mask[self.cells[place]] = False
                both.append(self.evaluator.run_distinct(masks).metric)
            self._known.update(zip(chunk, zip(*both, strict=True), strict=True))
        return np.stack([np.subtract(*self._known[removed]) for removed in sets])

    def search(self, number: int) -> tuple[int, ...]:
        """The worst set found by a greedy search."""
        rng = np.random.default_rng([self.evaluator.seed, number + 1])
        inside: tuple[int, ...] = ()
        met: list[tuple[float, tuple[int, ...]]] = []
        for _ in track(range(len(self.cells)), "greedy search"):
            left = np.setdiff1d(np.arange(len(self.cells)), inside)
            tried = rng.choice(left, min(CANDIDATES, len(left)), replace=False).tolist()
            sets = [tuple(sorted((*inside, place))) for place in tried]
            gaps = np.abs(self.differences(sets).mean(-1))
            inside = sets[int(gaps.argmax())]
            met.append((float(gaps.max()), inside))
        return max(met, key=itemgetter(0))[1]

    def part(self, removed: tuple[int, ...]) -> Part:
        """The fractions of the total effect that circuit and model keep without a set."""
        rows = [self.row(one, "part") for one in ((), removed)]
        means = np.array([[mean] for row in rows for mean in (row.circuit, row.model)])
        before, whole, circuit, model = self.evaluator.faithfulness(means).tolist()
        return Part(rows[1].removed, circuit, model, model - circuit - (whole - before) >= SECOND_WAY)

    def row(self, removed: tuple[int, ...], how: str) -> KnockOut:
        (difference,) = self.differences([removed])
        circuit, model = (float(values.mean()) for values in self._known[removed])
        (interval,) = as_intervals(mean_intervals(difference[None], self.evaluator.bound.copies))
        names = tuple(self.names[place] for place in removed)
        return KnockOut(names, circuit, model, float(difference.mean()), interval, how)
