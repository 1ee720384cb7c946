"""How much of a task a circuit does: exact runs, and faithfulness with an interval.

    faithfulness(C) = (metric(C) - metric(empty)) / (metric(full) - metric(empty))

1. An `Evaluator` prepares the pairs of a task once (clean, ablated and empty runs), then runs any number of circuits.
2. Faithfulness is a ratio of means over examples. Its interval is a jackknife (`statistics.py`).
3. If full and empty do not differ beyond noise or rounding, the ratio is refused.
4. Besides the metric: accuracy, top-1 accuracy, and KL(whole model || circuit) at the read positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from circuitfind import processes
from circuitfind.batch import wide
from circuitfind.calls import model_call
from circuitfind.circuit import Circuit, as_circuit
from circuitfind.engine.circuit_run import run_circuits
from circuitfind.engine.experiment import Experiment, check_model
from circuitfind.engine.memory_plan import CIRCUITS, batch_size_for, budget, circuits_at_once, sizes_of
from circuitfind.engine.prepare import Prepared, PreparedRuns
from circuitfind.errors import ScoreError
from circuitfind.evaluation import rounding
from circuitfind.metrics import METRICS, correctness
from circuitfind.models.load import Model
from circuitfind.processes import Division
from circuitfind.progress import progress
from circuitfind.record import Record
from circuitfind.result import Result
from circuitfind.setting import JudgeKeywords
from circuitfind.statistics import Interval, ratio_interval, standard_error
from circuitfind.tasks.task import BoundTask, Task

LABEL = "exact runs"
AT_ONCE = 64  # masks held in memory at a time


class Outcome(NamedTuple):
    """Results of circuits, `[circuits, examples]` each.

    metric; accurate: the answers beat the wrong ones; top1: the top token is an answer; kl: KL(whole model || circuit)
    in nats.
    """

    metric: np.ndarray
    accurate: np.ndarray
    top1: np.ndarray
    kl: np.ndarray

    def of(self, circuit: int) -> Outcome:
        """Results of one circuit, `[examples]` each."""
        return Outcome(*(values[circuit] for values in self))


class PerExample(NamedTuple):
    """`[examples]` each: metric of the circuit, of the whole model, and with every edge ablated; the other fields are
    those of the circuit, as in `Outcome`.
    """

    circuit: np.ndarray
    full: np.ndarray
    empty: np.ndarray
    accurate: np.ndarray
    top1: np.ndarray
    kl: np.ndarray


class MeasuredExample(NamedTuple):
    """`PerExample` for one example. `pair` counts from 0."""

    pair: int
    circuit: float
    full: float
    empty: float
    accurate: bool
    top1: bool
    kl: float


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Result):
    """A circuit evaluated on a task; rows are the examples.

    Metrics are means over examples. `interval`: 95% interval of the faithfulness. `kl`: KL(whole model || circuit) in
    nats. `accuracy`, `top1`: fractions of examples, NaN on a task without answers. `seen_pairs`: number of pairs that
    were also used to find the circuit; None if not known.
    """

    FORMAT, ROWS, DERIVED = "circuitfind.evaluation", "per_example", ("metric_name", "ablation", "pair_error")
    SHOWN = (
        "n_edges",
        "faithfulness",
        "interval",
        "pair_error",
        "metric_name",
        "metric",
        "metric_full",
        "metric_empty",
        "ablation",
    )

    n_edges: int
    faithfulness: float
    interval: Interval
    metric: float
    metric_full: float
    metric_empty: float
    accuracy: float
    accuracy_full: float
    top1: float
    top1_full: float
    kl: float
    seen_pairs: int | None
    per_example: PerExample
    record: Record

    @property
    def metric_name(self) -> str:
        return self.record.metric

    @property
    def ablation(self) -> str:
        return self.record.ablation

    @property
    def pair_error(self) -> float:
        """Mean over pairs of |circuit - model|, divided by the mean of |model - empty circuit|, of the metric.

        It is 0 only if every pair is right, while a faithfulness of 1 may hide errors that cancel.
        """
        each = self.per_example
        return float(np.abs(each.circuit - each.full).mean() / np.abs(each.full - each.empty).mean())

    @property
    def indifferent(self) -> float | None:
        """The faithfulness at which the metric is 0, so that answer and wrong answer score the same.

        None for metrics that compare no two answers, and if the corrupted prompt does not reverse the preference.
        """
        full, empty = self.metric_full, self.metric_empty
        turned = self.metric_name in ("logit_diff", "prob_diff") and full > 0 > empty
        return empty / (empty - full) if turned else None

    def rows(self) -> tuple[MeasuredExample, ...]:
        columns = (values.tolist() for values in self.per_example)
        return tuple(map(MeasuredExample, range(len(self.per_example.full)), *columns))


class Evaluator:
    """Runs circuits on the pairs of an experiment.

    Attributes:
        ends: outcome of the whole model and of the empty circuit, as `run` would return it.
        full, empty: their metric, `[examples]`.
    """

    def __init__(self, experiment: Experiment) -> None:
        experiment = experiment.set(
            direction="noising"
        )  # circuits run on clean prompts, whatever the direction of the scores
        self.experiment, self.bound, self.graph = experiment, experiment.bound, experiment.graph
        sizes = sizes_of(experiment.bound.batch)
        size = experiment.setting.batch_size or batch_size_for(experiment.adapter, *sizes, streams=True)
        self.runs, self._free = PreparedRuns(experiment, experiment.batch, size), budget(experiment.adapter.device)
        self.ends = self._outcome(lambda prepared: [torch.stack([prepared.clean.logits, prepared.empty.logits])])
        self.full, self.empty = self.ends.metric
        self.record = experiment.record("exact circuit")
        self.full_accurate, self.full_top1 = self.ends.accurate[0], self.ends.top1[0]

    @classmethod
    def of(
        cls,
        model: Model,
        task: Task | BoundTask,
        inherit: Record | None = None,
        made: str = "the circuit was",
        **asked: Unpack[JudgeKeywords],
    ) -> Evaluator:
        """The evaluator for the keywords of a public call; see `Experiment.of`."""
        return cls(Experiment.of(model, task, asked, inherit=inherit, made=made, direction=False))

    @classmethod
    def judging(
        cls, model: Model, task: Task | BoundTask, circuit: Circuit | Iterable[str], **asked: Unpack[JudgeKeywords]
    ) -> tuple[Evaluator, Circuit]:
        """The evaluator for a public call that evaluates a circuit, and the circuit."""
        check_model(model)
        chosen = as_circuit(model.graph, circuit)
        return cls.of(model, task, chosen.record, **asked), chosen

    @property
    def seed(self) -> int:
        return self.experiment.setting.seed

    def run(self, masks: np.ndarray) -> Outcome:
        """Run circuits, given as `[circuits, writers, readers]` bool masks.

        Several processes divide the pairs, or the circuits if there are fewer pairs than processes.
        """
        if len(self.full) < (several := processes.size()) and len(masks) > 1:
            own = range(processes.group().rank, len(masks), several)
            parts = processes.gathered(lambda: self.run(masks[own]) if own else None)
            order = np.argsort([at for rank in range(several) for at in range(rank, len(masks), several)])
            done = [part for part in parts if part is not None]
            return Outcome(*(np.concatenate(values)[order] for values in zip(*done, strict=True)))
        device = self.experiment.adapter.device
        at_once = CIRCUITS.runs(device, self.runs.size * self.bound.batch.clean.ids.shape[1])
        starts, parts = range(0, len(masks), at_once), []
        with progress("circuits", len(masks)) if len(starts) > 1 else nullcontext(lambda done: None) as advance:
            for start in starts:
                some = masks[start : start + at_once]

                def logits(prepared: Prepared, some: np.ndarray = some) -> Iterator[Tensor]:
                    tokens, writers = prepared.inputs.ids.numel(), int(some.any(axis=(0, 2)).sum())
                    fit = circuits_at_once(self.experiment.adapter, tokens, writers, self._free)
                    return (run_circuits(prepared, some[at : at + fit]) for at in range(0, len(some), fit))

                parts.append(self._outcome(logits))
                advance(len(some))
        return Outcome(*(np.concatenate(values) for values in zip(*parts, strict=True)))

    def metrics(self, masks: Iterable[np.ndarray], count: int, label: str) -> np.ndarray:
        """`[circuits, examples]`: the metric of `count` circuits, from an iterable of masks."""
        masks, parts = iter(masks), [np.empty((0, len(self.full)))]
        with progress(label, count) as advance:
            while some := list(islice(masks, AT_ONCE)):
                parts.append(self.run(np.stack(some)).metric)
                advance(len(some))
        return np.concatenate(parts)

    def run_distinct(self, masks: Sequence[np.ndarray]) -> Outcome:
        """`run`, but run each distinct circuit once, similar sizes in one batch, and the two ends not at all."""
        rows = {_key(self.graph.real): 0, _key(np.zeros_like(self.graph.real)): 1}  # of `ends`
        new: list[np.ndarray] = []
        for mask in sorted(masks, key=np.count_nonzero):
            if _key(mask) not in rows:
                rows[_key(mask)] = 2 + len(new)
                new.append(mask)
        outcome = self.ends
        if new:
            outcome = Outcome(*map(np.concatenate, zip(self.ends, self.run(np.stack(new)), strict=True)))
        return Outcome(*(values[[rows[_key(mask)] for mask in masks]] for values in outcome))

    def faithfulness(self, metric: np.ndarray) -> np.ndarray:
        """`[circuits]`: faithfulness from the metric `[circuits, examples]`; raises like `check_contrast`."""
        self.check_contrast()
        return np.asarray((metric.mean(-1) - self.empty.mean()) / (self.full.mean() - self.empty.mean()))

    def share(self, right: np.ndarray) -> np.ndarray:
        """Fraction of right examples in `[..., examples]`; NaN on a task without answers."""
        return right.mean(-1) if self.bound.batch.answers.shape[-1] else np.full(right.shape[:-1], np.nan)

    def check_contrast(self) -> None:
        """Raise a ScoreError if full and empty do not differ beyond noise."""
        difference = self.full - self.empty
        error = standard_error(difference, self.bound.copies)
        if abs(difference.mean()) <= max(2 * error, self.rounding_of_contrast):
            raise ScoreError(
                f"faithfulness is undefined: the metric is {self.full.mean():.4g} on the whole model and"
                f" {self.empty.mean():.4g} with every edge ablated, which is within noise (standard error"
                f" {error:.2g}, rounding {self.rounding_of_contrast:.1g}, {len(difference)} examples)."
                " Does the model do this task, and do the prompts differ in it?"
            )

    def rounding(self, mask: np.ndarray) -> np.ndarray:
        """`[examples]`: bound on the rounding of this circuit's metric (`rounding.py`)."""

        def one(prepared: Prepared) -> rounding.Parts:
            logits, ends = run_circuits(prepared, mask[None])[0], (prepared.clean.logits, prepared.empty.logits)
            return rounding.parts(self.bound.metric, logits, ends, prepared.batch, prepared.adapter.dtype)

        found = list(self.runs.each(one, LABEL))
        return rounding.Parts(*map(np.concatenate, zip(*found, strict=True))).bound()

    @cached_property
    def rounding_of_contrast(self) -> float:
        """Bound on the rounding of means over examples."""
        return rounding.of_mean(self.rounding(self.graph.real))

    def evaluate(self, circuit: Circuit | Iterable[str]) -> Evaluation:
        circuit = as_circuit(self.graph, circuit)
        return self.evaluation(circuit, self.run(circuit.mask[None]).of(0))

    def evaluation(self, circuit: Circuit, outcome: Outcome) -> Evaluation:
        """The evaluation of a circuit from its outcome, `[examples]`."""
        metric, accurate, top1, kl = outcome
        return Evaluation(
            n_edges=len(circuit),
            faithfulness=float(self.faithfulness(metric)),
            interval=ratio_interval(metric - self.empty, self.full - self.empty, self.bound.copies),
            metric=float(metric.mean()),
            metric_full=float(self.full.mean()),
            metric_empty=float(self.empty.mean()),
            accuracy=float(self.share(accurate)),
            accuracy_full=float(self.share(self.full_accurate)),
            top1=float(self.share(top1)),
            top1_full=float(self.share(self.full_top1)),
            kl=float(kl.mean()),
            seen_pairs=circuit.record.seen(self.record),
            per_example=PerExample(metric, self.full, self.empty, accurate, top1, kl),
            record=self.record,
        )

    def prepared(self, division: Division = Division()) -> list[Prepared]:  # noqa: B008 (a constant)
        """Batches with their clean, ablated and empty runs: of all pairs, or of this process's part."""
        with processes.alone():
            some = self.runs.of(division.batches(0, len(self.full), len(self.full))[division.block])
            return list(some.each(lambda prepared: prepared, LABEL))

    def _outcome(self, logits_of: Callable[[Prepared], Iterable[Tensor]]) -> Outcome:
        """Measure the logits `[circuits, batch, reads, vocab]` that a function yields for each batch, for some circuits
        at a time."""

        def measured(prepared: Prepared) -> list[np.ndarray]:
            found = []
            for logits in logits_of(prepared):
                flat, rows = logits.flatten(0, 1), prepared.batch.repeat(len(logits))
                right, value = correctness(flat, rows), wide(self.bound.metric(flat, rows))
                columns = (value, right.accurate, right.top1, -METRICS["kl"](flat, rows))
                found.append([column.cpu().view(len(logits), -1).numpy() for column in columns])
            return list(map(np.concatenate, zip(*found, strict=True)))

        parts = zip(*self.runs.each(measured, LABEL), strict=True)
        metric, accurate, top1, kl = (np.concatenate(columns, axis=1) for columns in parts)
        if (bad := ~np.isfinite(metric).all(axis=0)).any():
            row = int(bad.argmax())
            found = "NaN" if np.isnan(metric[:, row]).any() else "infinite"
            raise ScoreError(
                f"metric '{self.bound.metric.name}' is {found} on example {row}: {self.bound.prompts[row][:80]!r}"
            )
        return Outcome(metric.astype(np.float64), accurate, top1, kl.astype(np.float64))


def _key(mask: np.ndarray) -> bytes:
    return np.packbits(mask).tobytes()


@model_call
def evaluate(
    model: Model, task: Task | BoundTask, circuit: Circuit | Iterable[str], **asked: Unpack[JudgeKeywords]
) -> Evaluation:
    """Run a model as a circuit, exactly, and measure how much of the task it still does.

    Args:
        circuit: a `Circuit`, or names of edges; all other edges carry their ablated value.
        asked: metric, ablation (default: the circuit's own), batch_size, seed; see `circuitfind.setting`.

    Returns:
        Faithfulness (1 = the whole model, 0 = nothing; it can exceed 1) with a 95% interval, and metrics, also for
        each example.

    Raises:
        ScoreError: faithfulness is undefined on this task.
    """
    evaluator, chosen = Evaluator.judging(model, task, circuit, **asked)
    return evaluator.evaluate(chosen)
