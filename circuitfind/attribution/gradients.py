"""Gradients averaged over points between the corrupted and the clean embedding: what EAP and its descendants share.

    effect(u -> v) ~ (u's clean value - u's ablated value) . mean over points of the gradient at v's input

A method is a list of `Point`s: where on the line `corrupted + alpha (clean - corrupted)` a gradient is taken, and with
what weight. The line is that of the residual entering layer 0, or of one component's output. The clean point alone is
EAP. Where prompts are aligned, the line's corrupted end is the clean prompt with the corrupted embedding laid on its
positions (`engine/aligned.py`).

What follows is shared by edges (`engine/contract.py`) and nodes (`engine/node_effects.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from circuitfind.batch import Batch
from circuitfind.engine.ablation import ablated, check_ablation, check_direction, resampled, writer_means
from circuitfind.engine.aligned import capture_corrupted
from circuitfind.engine.capture import ReaderGradients, Run, Writers, capture, capture_gradients
from circuitfind.engine.memory import in_batches
from circuitfind.engine.relevance import relevance_rules
from circuitfind.errors import ScoreError
from circuitfind.metrics import Metric
from circuitfind.models.adapter import Adapter

SMALLEST = 1e-6  # scores below this part of the metric are rounding noise around a vanishing gradient


class Point(NamedTuple):
    """A gradient's weight and place: alpha 1 is the clean prompt, 0 the corrupted one.

    component: ("attn_out" or "mlp_out", layer), whose output alone is at alpha while the prompt is the clean one; None
    for the residual entering layer 0.
    relevance: what is taken is no gradient, but goes back by RelP's rules (`engine/relevance.py`).
    """

    weight: float
    alpha: float
    component: tuple[str, int] | None = None
    relevance: bool = False


Effects = Callable[[Adapter, Writers, Run, ReaderGradients], Tensor]


@dataclass(frozen=True)
class Pairs:
    """A batch of pairs with what an ablated writer carries: the common input of all methods."""

    adapter: Adapter
    batch: Batch
    metric: Metric
    ablation: str
    means: Writers | None

    @property
    def interchange(self) -> bool:
        """In the run with every edge ablated each writer writes its ablated value."""
        return self.from_corrupted and self.batch.alignment is None

    @property
    def from_corrupted(self) -> bool:
        """Ablated values are those of a corrupted run."""
        return self.ablation in ("corrupted", "resample")

    def check_direction(self, direction: str) -> None:
        """Refuses a direction that has no meaning for the ablation or the pairs.

        Raises:
            ScoreError, TaskError: naming it.
        """
        check_direction(direction, self.ablation, self.batch)

    @classmethod
    def of(
        cls, adapter: Adapter, batch: Batch, metric: Metric, ablation: str, seed: int, batch_size: int | None = None
    ) -> Pairs:
        """Checks the ablation and prepares what it needs of all pairs (means, another pairing)."""
        check_ablation(ablation, batch)
        if ablation == "resample":
            batch = resampled(batch, seed)
        return cls(adapter, batch, metric, ablation, writer_means(adapter, batch, ablation, batch_size))

    def mean_effects(self, points: list[Point], effects: Effects, batch_size: int | None, label: str) -> Tensor:
        """Weighted sum of effects over points, mean over examples.

        Args:
            effects: `edge_effects`, `node_effects` or the like: sums over a batch's examples.

        Raises:
            ScoreError: the gradient vanishes.
        """

        def one(batch: Batch, _: slice) -> tuple[Tensor, float]:
            passes = list(self._effects(batch, points, effects))
            return torch.stack([found for found, _ in passes]).sum(0), max(size for _, size in passes)

        parts, sizes = zip(
            *(part for _, part in in_batches(self.adapter, self.batch, one, batch_size, label)), strict=True
        )
        total = torch.stack(parts).sum(0) / len(self.batch)
        self._check_not_flat(total, max(sizes))
        return total

    def _effects(self, batch: Batch, points: list[Point], effects: Effects) -> Iterator[tuple[Tensor, float]]:
        """One gradient pass a point: its weighted effects, and the metric's largest magnitude there."""
        metric, adapter, clean, corrupted = self.metric, self.adapter, None, None
        if metric.reference or any(point.alpha != 1 or point.component for point in points):
            clean = capture(adapter, batch.clean, stop=not metric.reference)
            batch = batch.with_reference(clean.logits) if metric.reference else batch
        if self.from_corrupted:
            corrupted = capture_corrupted(adapter, batch, stop=True)
        for weight, alpha, component, relevance in points:
            embed, outputs = None, None
            if clean is not None and corrupted is not None:
                if component is not None:
                    low, high = _output(corrupted, component), _output(clean, component)
                    outputs = {component: low + alpha * (high - low)}
                elif 0 < alpha < 1 or (alpha == 0 and batch.alignment is not None):
                    embed = corrupted.resid[0] + alpha * (clean.resid[0] - corrupted.resid[0])
            at_corrupted = alpha == 0 and component is None and batch.alignment is None
            inputs = batch.corrupted if at_corrupted else batch.clean
            with relevance_rules(adapter) if relevance else nullcontext(adapter) as ruled:
                run, gradients, values = capture_gradients(
                    adapter, inputs, lambda logits: metric(logits, batch), embed, outputs
                )
            clean = run if clean is None else clean  # then the first point is the clean one
            delta = clean.writers.minus(ablated(self.ablation, clean, corrupted, self.means))
            with torch.no_grad():
                yield weight * effects(ruled, delta, run, gradients), float(values.abs().max())

    def _check_not_flat(self, total: Tensor, largest: float) -> None:
        size = float(total.abs().max())
        if size <= SMALLEST * largest or size == 0:
            raise ScoreError(
                f"the gradient of metric '{self.metric.name}' vanishes: the largest score is {size:.1g} where the"
                f" metric itself is {largest:.3g}. Scores would be rounding noise: use method='eap-ig-inputs',"
                " 'clean-corrupted' or 'exact', or another metric"
            )


def _output(run: Run, component: tuple[str, int]) -> Tensor:
    site, layer = component
    return (run.attn_out if site == "attn_out" else run.mlp_out)[layer]
