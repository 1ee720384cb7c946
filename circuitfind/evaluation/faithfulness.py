"""How much of the behaviour a circuit does: exact runs, and faithfulness with an interval.

    faithfulness(C) = (metric(C) - metric(empty)) / (metric(full) - metric(empty))

1. An `Evaluator` prepares a task's pairs once (clean, ablated and empty runs) and then runs any number of circuits.
2. Means over examples are taken first, then the ratio; the interval resamples examples and recomputes the ratio.
3. Where full and empty do not differ beyond noise the ratio means nothing and is refused.
4. Beside the metric, whatever it is: accuracy, top-1, and KL(whole model || circuit) at the read positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from circuitfind.attribution.gradients import Pairs
from circuitfind.batch import Batch
from circuitfind.circuit import Circuit, as_circuit
from circuitfind.engine.circuit_run import run_circuits
from circuitfind.engine.memory import SideBySide, batch_size_for, in_batches
from circuitfind.engine.prepare import Prepared, prepare
from circuitfind.errors import ScoreError
from circuitfind.evaluation.outcome import Evaluation, Outcome, PerExample
from circuitfind.loading import bind
from circuitfind.metrics import METRICS, Function, Metric, correctness
from circuitfind.models.load import Model
from circuitfind.progress import progress
from circuitfind.remote.call import remotable
from circuitfind.statistics import bootstrap_ratio
from circuitfind.tasks.bound import check_seed
from circuitfind.tasks.task import BoundTask, Task

R = TypeVar("R")
KEPT_BYTES = 2 * 2**30  # of prepared runs kept between circuits; beyond that they are computed anew for each call
CIRCUITS = SideBySide(1024, 16384)
ROUNDINGS = 8  # differences of metrics within so many units in the last place are none


class Evaluator:
    """A task's pairs, ready to run circuits on.

    Args:
        ablation, metric: as everywhere; see `circuitfind.attribute`.
        batch_size: pairs at a time; by default as many as a memory budget allows.

    Attributes:
        ends: the whole model and the empty circuit, as `run` would return them.
        full, empty: their metric, `[examples]`.
    """

    def __init__(
        self,
        model: Model,
        task: Task | BoundTask,
        *,
        ablation: str = "corrupted",
        metric: str | Metric | Function | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        check_seed(seed)
        self.bound = bind(model, task).with_metric(metric)
        self.graph, self.seed, self.ablation = model.graph, seed, ablation
        self.pairs = Pairs.of(model.adapter, self.bound.batch, self.bound.metric, ablation, seed, batch_size)
        length = self.bound.batch.clean.ids.shape[1]
        self.batch_size = (
            batch_size_for(model.adapter, len(self.bound), length, streams=True) if batch_size is None else batch_size
        )
        adapter = model.adapter
        per_token = 2 * 10 * adapter.graph.n_layers * adapter.graph.d_model * adapter.work.itemsize
        self._keep = per_token * self.bound.batch.clean.ids.numel() <= KEPT_BYTES
        self._kept: dict[tuple[int, int], Prepared] = {}
        self.ends = self._outcome(lambda prepared: torch.stack([prepared.clean.logits, prepared.empty.logits]))
        self.full, self.empty = self.ends.metric
        self.record = self.bound.record("exact circuit", ablation, "noising", seed)
        self.full_accurate, self.full_top1 = self.ends.accurate[0], self.ends.top1[0]

    def run(self, masks: np.ndarray) -> Outcome:
        """Runs circuits given as `[circuits, writers, readers]` bool masks."""
        at_once = CIRCUITS.runs(self.pairs.adapter.device, self.batch_size * self.bound.batch.clean.ids.shape[1])
        starts, parts = range(0, len(masks), at_once), []
        with progress("circuits", len(masks)) if len(starts) > 1 else nullcontext(lambda done: None) as advance:
            for start in starts:
                some = masks[start : start + at_once]
                parts.append(self._outcome(partial(run_circuits, masks=some)))
                advance(len(some))
        return Outcome(*(np.concatenate(values) for values in zip(*parts, strict=True)))

    def run_distinct(self, masks: Sequence[np.ndarray]) -> Outcome:
        """As `run`, but each distinct circuit once, like sizes side by side, and the two ends not at all."""
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
        """`[circuits]` from the metric `[circuits, examples]`.

        Raises:
            ScoreError: full and empty do not differ beyond noise.
        """
        self.check_contrast()
        return (metric.mean(-1) - self.empty.mean()) / (self.full.mean() - self.empty.mean())

    def share(self, right: np.ndarray) -> np.ndarray:
        """Share of examples that are right, of `[..., examples]`; NaN on a task without answers."""
        return right.mean(-1) if self.bound.batch.answers.shape[-1] else np.full(right.shape[:-1], np.nan)

    def check_contrast(self) -> None:
        """Refuses a task on which ablating everything changes nothing."""
        difference = self.full - self.empty
        error = difference.std(ddof=1) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
        if abs(difference.mean()) <= 2 * error or difference.mean() == 0:
            raise ScoreError(
                f"faithfulness is undefined: the metric is {self.full.mean():.4g} on the whole model and"
                f" {self.empty.mean():.4g} with every edge ablated, which is within noise (standard error"
                f" {error:.2g}, {len(difference)} examples). Does the model do this task,"
                " and do the prompts differ in it?"
            )

    def evaluate(self, circuit: Circuit | Iterable[str]) -> Evaluation:
        """One circuit, with its interval and examples."""
        circuit = as_circuit(self.graph, circuit)
        return self.evaluation(circuit, Outcome(*(values[0] for values in self.run(circuit.mask[None]))))

    def evaluation(self, circuit: Circuit, outcome: Outcome) -> Evaluation:
        """What a circuit's outcome, `[examples]`, amounts to."""
        metric, accurate, top1, kl = outcome
        return Evaluation(
            n_edges=len(circuit),
            faithfulness=float(self.faithfulness(metric)),
            interval=bootstrap_ratio(metric - self.empty, self.full - self.empty, self.seed),
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

    # ---------------------------------------------------------------- running
    def prepared(self) -> Iterator[Prepared]:
        """The pairs in batches, with their clean, ablated and empty runs."""
        return self._in_batches(lambda prepared: prepared)

    def _in_batches(self, function: Callable[[Prepared], R]) -> Iterator[R]:
        """A function of each prepared batch, inside the loop that halves a batch when memory runs out."""
        adapter, means = self.pairs.adapter, self.pairs.means

        def one(batch: Batch, rows: slice) -> R:
            key = (rows.start, rows.stop)
            prepared = self._kept.get(key) or prepare(adapter, batch, self.ablation, means)
            if self._keep:
                self._kept[key] = prepared
            return function(prepared)

        for rows, result in in_batches(adapter, self.pairs.batch, one, self.batch_size, "exact runs"):
            if rows.start == 0 and rows.stop < min(self.batch_size, len(self.bound)):
                self.batch_size = rows.stop  # memory ran out at the size before: do not try that again
                self._kept = {key: value for key, value in self._kept.items() if key[1] - key[0] <= rows.stop}
            yield result

    def _outcome(self, logits_of: Callable[[Prepared], Tensor]) -> Outcome:
        """What is measured of the logits that a function of each prepared batch computes."""

        def measured(prepared: Prepared) -> list[np.ndarray]:
            logits, batch = logits_of(prepared), prepared.batch
            times, flat = len(logits), logits.flatten(0, 1)
            rows = batch.repeat(times)
            right = correctness(flat, rows)
            columns = (self.bound.metric(flat, rows), right.accurate, right.top1, -METRICS["kl"](flat, rows))
            return [column.cpu().view(times, -1).numpy() for column in columns]

        parts = list(self._in_batches(measured))
        outcome = Outcome(*(np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True)))
        outcome = outcome._replace(metric=outcome.metric.astype(np.float64), kl=outcome.kl.astype(np.float64))
        bad = ~np.isfinite(outcome.metric)
        if bad.any():
            row = int(bad.any(axis=0).argmax())
            found = "NaN" if np.isnan(outcome.metric[:, row]).any() else "infinite"
            raise ScoreError(
                f"metric '{self.bound.metric.name}' is {found} on example {row}: {self.bound.prompts[row][:80]!r}"
            )
        return outcome


def rounding(evaluator: Evaluator) -> float:
    """Differences of the metric up to here are none: two computations of one circuit may be so far apart."""
    largest = max(np.abs(evaluator.full).max(), np.abs(evaluator.empty).max())
    return ROUNDINGS * torch.finfo(evaluator.pairs.adapter.dtype).eps * float(largest)


def _key(mask: np.ndarray) -> bytes:
    return np.packbits(mask).tobytes()


@remotable
def evaluate(
    model: Model,
    task: Task | BoundTask,
    circuit: Circuit | Iterable[str],
    *,
    ablation: str = "corrupted",
    metric: str | Metric | Function | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Runs a model as a circuit, exactly, and says how much of the behaviour is left.

    Args:
        circuit: a `Circuit`, or names of edges; everything else carries its ablated value.

    Returns:
        Faithfulness (1 = the whole model, 0 = nothing; it can exceed 1) with a 95% interval, metrics, per example too.

    Raises:
        ScoreError: faithfulness is undefined on this task.
    """
    evaluator = Evaluator(model, task, ablation=ablation, metric=metric, batch_size=batch_size, seed=seed)
    return evaluator.evaluate(circuit)
