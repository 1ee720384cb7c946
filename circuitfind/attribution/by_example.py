"""Edge scores of every example apart: any weighted mean of examples is a matrix product away.

A score is a mean over examples of `sum over points of weight * contraction(example)`, and examples do not see each
other. So the gradients are taken in batches as for `attribute`, and only the contraction is done row by row:

    scores of a resample with counts w  =  (w / sum w) @ effects,        effects [examples, edges]

What the "mean" ablations put in place of a writer, and the pairing of "resample", are those of all examples: a weighted
mean keeps them, where `attribute` on a part of the pairs would compute them of that part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuitfind.attribution import clean_corrupted, eap, eap_ig_inputs, relp
from circuitfind.attribution.exact import exact_effects
from circuitfind.attribution.gradients import Pairs, Point
from circuitfind.batch import Batch
from circuitfind.engine.ablation import check_direction
from circuitfind.engine.capture import ReaderGradients, Run, Writers
from circuitfind.engine.contract import edge_effects
from circuitfind.engine.memory import in_batches
from circuitfind.errors import ScoreError
from circuitfind.models.adapter import Adapter
from circuitfind.models.layout import Heads
from circuitfind.models.load import Model
from circuitfind.tasks.bound import BoundTask

METHODS = ("eap", "eap-ig-inputs", "clean-corrupted", "relp", "exact")
LARGEST_BYTES = 4 * 2**30


@dataclass(frozen=True)
class ExampleScoring:
    """How examples are scored; every field means what it means for `circuitfind.attribute`.

    Raises:
        ScoreError: the method's scores are no means over examples, or it does not fit direction or ablation.
    """

    method: str = "eap-ig-inputs"
    steps: int = 5
    rule: str = "left"
    ablation: str = "corrupted"
    direction: str = "noising"
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ScoreError(
                f"method '{self.method}' does not score edges example by example: use one of {', '.join(METHODS)}, or"
                " give search=, a function from a task to its circuit"
            )
        check_direction(self.direction, self.ablation)
        if self.ablation != "corrupted" and self.method in ("eap-ig-inputs", "clean-corrupted"):
            raise ScoreError(
                f"method '{self.method}' goes between the clean and the corrupted run: it needs ablation='corrupted'"
            )

    def points(self) -> list[Point]:
        """Where gradients are taken."""
        if self.method == "eap-ig-inputs":
            return eap_ig_inputs.points(self.steps, self.rule)
        if self.method == "relp":
            return relp.points(self.direction)
        return clean_corrupted.points() if self.method == "clean-corrupted" else eap.points(self.direction)


def example_effects(model: Model, bound: BoundTask, scoring: ExampleScoring) -> np.ndarray:
    """`[examples, edges]` float32 in units of the metric, positive = supports; edges as `Scores.to_dict` orders them.

    Raises:
        ScoreError: the metric is flat, the gradient vanishes on all examples, or the result would not fit in memory.
    """
    graph = model.graph
    if bound.metric.flat_at_clean and scoring.method in ("eap", "relp") and scoring.direction == "noising":
        raise ScoreError(
            f"metric '{bound.metric.name}' is flat at the clean run, so '{scoring.method}' would return noise:"
            " use method='eap-ig-inputs' or 'clean-corrupted', or direction='denoising'"
        )
    size = len(bound) * graph.n_edges * 4
    if size > LARGEST_BYTES:
        raise ScoreError(
            f"scores of {len(bound)} pairs x {graph.n_edges:,} edges take {size / 2**30:.0f} GiB: give at most"
            f" {LARGEST_BYTES // (graph.n_edges * 4)} pairs, task.on(model).subset(range(...)), or search="
        )
    pairs = Pairs.of(model.adapter, bound.batch, bound.metric, scoring.ablation, scoring.seed, scoring.batch_size)
    pairs.check_direction(scoring.direction)
    if scoring.method == "exact":
        found = exact_effects(pairs, graph.real, scoring.direction, scoring.batch_size)
        return found.values.T.astype(np.float32)
    cells, points = torch.from_numpy(graph.real.T), scoring.points()

    def one(batch: Batch, _: slice) -> tuple[np.ndarray, float]:
        passes = list(pairs._effects(batch, points, _row_by_row))
        effects = torch.stack([found for found, _ in passes]).sum(0)
        found = effects.transpose(1, 2)[:, cells.to(effects.device)]
        return found.to(torch.float32).cpu().numpy(), max(size for _, size in passes)

    batches = in_batches(model.adapter, pairs.batch, one, scoring.batch_size, "edge scores by example")
    parts, sizes = zip(*(part for _, part in batches), strict=True)
    effects = np.concatenate(parts)
    pairs._check_not_flat(torch.from_numpy(effects.mean(0)), max(sizes))
    return effects


def _row_by_row(adapter: Adapter, delta: Writers, run: Run, gradients: ReaderGradients) -> Tensor:
    """`[batch, writers, readers]`."""

    def contracted(row: slice) -> Tensor:
        pick: Callable[[Tensor], Tensor] = lambda value: value[row]  # noqa: E731
        at = ReaderGradients(
            [Heads(*map(pick, heads)) for heads in gradients.qkv], [*map(pick, gradients.mlp)], pick(gradients.final)
        )
        read = Run(resid=[*map(pick, run.resid)], middle=[*map(pick, run.middle)])
        return edge_effects(adapter, delta.map(pick), read, at)

    return torch.stack([contracted(slice(row, row + 1)) for row in range(len(delta.embed))])
