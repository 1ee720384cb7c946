"""First-order effects from gradients averaged over points between the corrupted and the clean prompt.

    effect(u -> v) ~ (u's clean value - u's ablated value) . mean over points of the gradient at v's input

A method is a list of `Point`s: where on the line `corrupted + alpha (clean - corrupted)` a gradient is taken, and its
weight. The line interpolates the residual stream that enters layer 0, or one component's output. EAP (noising) has one
point, the clean prompt. For aligned pairs, the corrupted end is the clean prompt with the corrupted embedding moved to
its positions (`engine/capture.py`). Effects of edges are computed in `engine/edge_effects.py`, those of nodes and
places in `engine/stream_effects.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from contextlib import nullcontext
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from circuitfind.attribution.method import Method, Point
from circuitfind.batch import Batch
from circuitfind.engine.backward_rules import Ruled, backward_rules
from circuitfind.engine.capture import OUTPUTS, WRITTEN, Run, capture, capture_corrupted
from circuitfind.engine.edge_effects import EdgeSum
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.memory_plan import batch_size_for, sizes_of
from circuitfind.engine.reader_gradients import ReaderGradients, capture_gradients
from circuitfind.engine.writers import Writers
from circuitfind.errors import ScoreError, warn
from circuitfind.metrics import Metric
from circuitfind.models.adapter import Adapter
from circuitfind.patching.spans import Spans

UNDERFLOW = 0.02  # a larger fraction of exact zeros among the gradients is not chance in any precision
SMALLEST = 1e-6  # scores below this fraction of the metric are rounding noise around a vanishing gradient

Effects = Callable[[Adapter, Writers, Run, ReaderGradients], Tensor]


class Ends:
    """The clean and the corrupted run of a batch, and the writers' differences, each computed at its first use.

    `run`: the pairs that are run; if `divided`, without the tokens before the first difference. `batch`: the pairs that
    the metric gets, with the clean logits if it needs them. `keep`: the lists of the runs that are kept, as for
    `capture`; None for all. Unless all are kept, `delta` frees the runs' writers.
    """

    def __init__(
        self, experiment: Experiment, batch: Batch, divided: bool = False, keep: Set[str] | None = None
    ) -> None:
        self._experiment, self._pairs, self.keep = experiment, batch, keep
        self.run = experiment.after_prefix(batch) if divided else batch

    @cached_property
    def clean(self) -> Run:
        stop = not self._experiment.metric.reference
        return capture(self._experiment.adapter, self.run.clean, stop, keep=self.keep)

    @cached_property
    def corrupted(self) -> Run:
        return capture_corrupted(self._experiment.adapter, self.run, stop=True, keep=self.keep)

    @cached_property
    def batch(self) -> Batch:
        return self._pairs.with_reference(self.clean.logits) if self._experiment.metric.reference else self._pairs

    @cached_property
    def delta(self) -> Writers:
        """Writers' clean values minus ablated values. Afterwards both runs keep only the ends of the lines."""
        corrupted = self.corrupted if self._experiment.ablation.corrupted else None
        written, other = self.clean.writers, self._experiment.ablated(self.clean, corrupted)
        self.clean = _ends_of_lines(self.clean)
        if corrupted is not None:
            self.corrupted = _ends_of_lines(corrupted)
        if self.keep is None:
            return written.minus(other)
        if corrupted is not None:  # `other` holds the tensors that are still needed
            corrupted.heads.clear()
            corrupted.mlps.clear()
        return written.less(other)


def _ends_of_lines(run: Run) -> Run:
    return Run(resid=run.resid[:1], attn_out=run.attn_out, mlp_out=run.mlp_out, logits=run.logits)


class Pass(NamedTuple):
    """The gradients at one point, the run in which they were taken, and the adapter to pull them back with."""

    weight: float
    adapter: Adapter
    ends: Ends
    run: Run
    gradients: ReaderGradients

    def effects(self, effects: Effects) -> Tensor:
        """Return the effects at this point, times its weight."""
        return self.weight * effects(self.adapter, self.ends.delta, self.run, self.gradients)


def mean_over(experiment: Experiment, one: Callable[[Batch, slice], Tensor], label: str) -> Tensor:
    """Return the mean over examples; `one` returns the sum over the examples of a batch."""
    parts = [part for _, part in experiment.in_batches(one, label)]
    return torch.stack(parts).sum(0) / len(experiment)


def mean_effects(
    experiment: Experiment, points: list[Point], effects: Effects, label: str, divided: bool = True
) -> Tensor:
    """Return the weighted sum of effects over points, averaged over examples. ScoreError if the gradient vanishes.

    `effects` returns the sum over a batch's examples. `divided`: as for `Ends`; only if effects are summed over
    positions.
    """

    def one(batch: Batch, _: slice) -> tuple[Tensor, float]:
        found: list[Tensor] = []
        largest = each_point(experiment, batch, points, lambda at: found.append(at.effects(effects)), divided)
        return torch.stack(found).sum(0), largest

    return _mean(experiment, one, label, points)


def mean_edge_effects(experiment: Experiment, points: list[Point], spans: Spans | None = None) -> Tensor:
    """Return `mean_effects` for edges: `[writers, readers]`, or with spans `[spans, writers, readers]`."""

    def one(batch: Batch, rows: slice) -> tuple[Tensor, float]:
        if spans is None:
            effects, largest = edges_of(experiment, batch, points)
            return effects[0], largest
        return edges_of(experiment, batch, points, spans.numbers[rows], len(spans.labels))

    return _mean(experiment, one, "edge scores", points)


def patterns_of(points: list[Point]) -> int:
    """Return how many attention patterns per head autograd keeps in addition: two under a rule for attention (the
    model's softmax and the rule's), else 0."""
    return 2 if any(point.rules is not None and point.rules.attention for point in points) else 0


def _mean(
    experiment: Experiment, one: Callable[[Batch, slice], tuple[Tensor, float]], label: str, points: list[Point]
) -> Tensor:
    total: Tensor | float = 0.0
    size = 0.0
    at_once = batch_size_for(experiment.adapter, *sizes_of(experiment.batch), patterns=patterns_of(points))
    # Sum as the batches come in: a batch's scores by position may be large.
    for _, (part, largest) in experiment.in_batches(one, label, at_once):
        total, size = total + part, max(size, largest)
    mean = torch.as_tensor(total) / len(experiment)
    check_not_flat(experiment.metric, mean, size)
    return mean


def edges_of(
    experiment: Experiment, batch: Batch, points: list[Point], groups: Tensor | None = None, n_groups: int = 1
) -> tuple[Tensor, float]:
    """Return a batch's edge effects, as `EdgeSum.value` does, and the metric's largest magnitude at the points.

    `groups` `[batch, pos]`, `n_groups`: as for `EdgeSum`, for all tokens of the batch.
    """
    sums: list[EdgeSum] = []

    def add(at: Pass) -> None:
        if not sums:
            length = at.ends.run.clean.ids.shape[1]  # without the tokens before the first difference
            sums.append(EdgeSum(at.adapter, at.ends.delta, None if groups is None else groups[:, -length:], n_groups))
        sums[0].add(at.weight, at.run, at.gradients)

    keep = WRITTEN | (OUTPUTS if any(point.component for point in points) else set())
    largest = each_point(experiment, batch, points, add, divided=True, keep=keep)
    with torch.no_grad():
        return sums[0].value(), largest


def each_point(
    experiment: Experiment,
    batch: Batch,
    points: list[Point],
    use: Callable[[Pass], None],
    divided: bool = False,
    keep: Set[str] | None = None,
) -> float:
    """Take the gradients at each point and call `use` with them; return the metric's largest magnitude at the points.

    `use` must not keep the pass, because the next one needs its memory. If the first point is the clean or the
    corrupted prompt, its pass also serves as the run of that prompt. `divided`, `keep`: as for `Ends`.
    """
    metric, adapter, ends, sizes = experiment.metric, experiment.adapter, Ends(experiment, batch, divided, keep), []
    for number, (weight, alpha, component, rules) in enumerate(points):
        embed, outputs = None, None
        at_corrupted = alpha == 0 and component is None and batch.alignment is None
        if component is not None:
            site, layer = component
            low, high = getattr(ends.corrupted, site)[layer], getattr(ends.clean, site)[layer]
            outputs = {component: low + alpha * (high - low)}
        elif alpha != 1 and not at_corrupted:
            low, high = ends.corrupted.resid[0], ends.clean.resid[0]
            embed = low + alpha * (high - low)
        inputs = ends.run.corrupted if at_corrupted else ends.run.clean
        is_clean = number == 0 and embed is None and outputs is None and not (at_corrupted or metric.reference)
        is_corrupted = number == 0 and at_corrupted
        wanted = keep if keep is None or is_clean or is_corrupted else set[str]()
        with backward_rules(adapter, rules) if rules else nullcontext(Ruled(adapter)) as ruled:
            run, gradients, values = capture_gradients(
                adapter, inputs, lambda logits: metric(logits, ends.batch), embed, outputs, ruled.hand_on, wanted
            )
        if number == 0 and adapter.dtype != adapter.work:
            check_precision(gradients, str(adapter.dtype).removeprefix("torch."))
        if is_corrupted:
            ends.corrupted = run
        elif is_clean:
            ends.clean = run
        with torch.no_grad():
            use(Pass(weight, ruled.adapter, ends, run, gradients))
        del run, gradients
        sizes.append(values.abs().max())
    return float(torch.stack(sizes).max())


def check_precision(gradients: ReaderGradients, dtype: str) -> None:
    """Warn if gradients in half precision underflow: exact zeros at tokens that a later layer reads. ScoreError if a
    gradient is NaN or infinite."""
    counts, reached = [], gradients.final.any(-1)  # tokens whose stream a later layer reads
    for heads, mlp in zip(reversed(gradients.qkv), reversed(gradients.mlp), strict=True):
        read = reached | heads.v.flatten(2).any(-1)
        for gradient, where in ((mlp, reached), (heads.v.flatten(2), read)):
            at = gradient[where]
            counts.append(torch.stack([(~at.isfinite()).sum(), (at == 0).sum(), where.sum() * gradient.shape[-1]]))
        reached = read
    broken, zeros, of = torch.stack(counts).sum(0).tolist()
    if broken:
        raise ScoreError(
            f"{broken:,} gradients in {dtype} are NaN or infinite: load the model with dtype='float32', or one of"
            " float16 with dtype='bfloat16'"
        )
    if zeros > UNDERFLOW * of:
        warn(
            f"gradients underflow in {dtype}: more than {UNDERFLOW:.0%} of them are exactly zero, and so may scores of"
            " early layers be: load the model with dtype='float32', or one of float16 with dtype='bfloat16'"
        )


def check_slope(experiment: Experiment, method: Method) -> None:
    """Raise ScoreError if the method takes its only gradient at the clean run, and the metric's is zero there by
    definition."""
    if experiment.metric.flat_at_clean and method.at_clean and experiment.setting.noising:
        raise ScoreError(
            f"metric '{experiment.metric.name}' is flat at the clean run (its gradient is zero there), so"
            f" '{method.name}' would return noise: use method='eap-ig-inputs' or 'clean-corrupted', or"
            " direction='denoising'"
        )


def check_not_flat(metric: Metric, total: Tensor, largest: float) -> None:
    """Raise ScoreError if the scores `total` are rounding noise; `largest`: the metric's largest magnitude where the
    gradients were taken."""
    size = float(total.abs().max())
    if size <= SMALLEST * largest or size == 0:
        raise ScoreError(
            f"the gradient of metric '{metric.name}' vanishes: the largest score is {size:.1g} where the metric itself"
            f" is {largest:.3g}. Scores would be rounding noise: use method='eap-ig-inputs', 'clean-corrupted' or"
            " 'exact', or another metric"
        )
