"""Ablations: the value that an edge outside a circuit carries. One record each, in a registry that users can add to.

* `corrupted` (interchange, the default): the writer's value in the corrupted run. Where pairs are aligned by spans, it
  is moved to the clean prompt's positions (`engine/capture.py`).
* `zero`: zero.
* `mean`: the writer's mean over the corrupted prompts and all their real positions.
* `mean-position`: its mean over the corrupted prompts at each position; prompts of equal length only.
* `resample`: its value in the corrupted run of another example, drawn at random (seeded); prompts of equal length only.

Only under `corrupted` is the run with every edge ablated the corrupted run (between aligned pairs: only its logits).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from circuitfind.batch import Batch
from circuitfind.engine.capture import capture, refuse_aligned
from circuitfind.engine.writers import Writers
from circuitfind.errors import NoFile, ScoreError, TaskError, entered, unknown
from circuitfind.models.adapter import Adapter

Carried = Callable[[Tensor, "Tensor | None", "Tensor | None"], Tensor]


@dataclass(frozen=True)
class Ablation(NoFile):
    """One kind of ablation.

    Attributes:
        carried: a function that returns the ablated value, in the shape of the clean value. Its arguments: the clean
            value `[batch, pos, ...]`, the corrupted one, and the mean `[1, 1 or pos, ...]`; the last two are None
            unless requested below. Applied to every writer's output and to every value that a sweep patches.
        corrupted: whether `carried` needs the corrupted run.
        mean: None, or which means over the corrupted prompts `carried` needs: over all real positions ("all") or at
            each position ("position").
        interchange: whether all ablated values come from one run of the model. A node that no kept edge reaches then
            has exactly its ablated value.
        redealt: whether each example gets another example's corrupted prompt, drawn with the seed.
        equal_lengths: whether all prompts must have equal length.
    """

    name: str
    carried: Carried
    corrupted: bool = False
    mean: str | None = None
    interchange: bool = False
    redealt: bool = False
    equal_lengths: bool = False

    @property
    def twin(self) -> bool:
        """Whether the ablated values come from the run of the pair's own corrupted prompt."""
        return self.interchange and not self.redealt

    def check(self, batch: Batch, direction: str = "noising") -> None:
        """Raise a TaskError or ScoreError if this ablation, or the direction under it, is not defined for the pairs."""
        if self.equal_lengths:
            if batch.clean.padded or batch.corrupted.padded:
                what = f"ablation '{self.name}' needs prompts of one length, these differ"
                raise TaskError(f"{what}: use 'corrupted' or 'mean'")
            refuse_aligned(batch, f"ablation '{self.name}'", "use 'corrupted', 'mean' or 'zero'")
        self.check_direction(direction)
        if direction == "denoising":
            refuse_aligned(batch, "direction 'denoising'", "use 'noising', with the sides exchanged if need be")

    def check_direction(self, direction: str) -> None:
        """Raise a ScoreError if the direction is not defined under this ablation, whatever the pairs."""
        if direction == "denoising" and not self.twin:
            raise ScoreError("direction 'denoising' starts from the corrupted run: it needs ablation='corrupted'")


def _corrupted(own: Tensor, corrupted: Tensor | None, mean: Tensor | None) -> Tensor:
    assert corrupted is not None, "interchange needs the corrupted run"
    return corrupted


def _mean(own: Tensor, corrupted: Tensor | None, mean: Tensor | None) -> Tensor:
    assert mean is not None, "mean ablation needs the means"
    return mean.expand_as(own)


def _zero(own: Tensor, corrupted: Tensor | None, mean: Tensor | None) -> Tensor:
    return torch.zeros_like(own)


CORRUPTED = Ablation("corrupted", _corrupted, corrupted=True, interchange=True)
_BUILT_IN = (
    CORRUPTED,
    Ablation("zero", _zero),
    Ablation("mean", _mean, mean="all"),
    Ablation("mean-position", _mean, mean="position", equal_lengths=True),
    Ablation("resample", _corrupted, corrupted=True, interchange=True, redealt=True, equal_lengths=True),
)
ABLATIONS: dict[str, Ablation] = {ablation.name: ablation for ablation in _BUILT_IN}


def register(ablation: Ablation) -> Ablation:
    """Register an ablation under its name, in this process. TaskError if the name is taken or it is no `Ablation`."""
    return entered(ablation, Ablation, ABLATIONS, TaskError, "ablation '{}' exists: give yours another name")


def ablation_of(name: str | Ablation) -> Ablation:
    """Return the ablation of this name. TaskError, which lists the known names, if there is none."""
    if isinstance(name, Ablation):
        return name
    if name not in ABLATIONS:
        raise TaskError(unknown("ablation", name, ABLATIONS))
    return ABLATIONS[name]


def resampled(batch: Batch, seed: int, copies: np.ndarray | None = None) -> Batch:
    """Return the pairs with their corrupted prompts shuffled: no example gets its own, or that of a copy of it.

    `copies`: `[batch]` a group number for each example, equal for copies; by default there are none. TaskError if there
    are too few different prompts.
    """
    group = torch.arange(len(batch)) if copies is None else torch.as_tensor(copies)
    sizes = group.bincount()
    most = int(sizes.max())
    if len(sizes) < 2:
        raise TaskError("ablation 'resample' needs at least two examples of different prompts")
    if 2 * most > len(batch):
        raise TaskError(f"ablation 'resample' needs other prompts for each: {most} of {len(batch)} pairs are copies")
    place = torch.empty_like(sizes)
    place[torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))] = torch.arange(len(sizes))
    order = place[group].argsort(stable=True)  # copies stand next to each other
    other = torch.empty_like(order)
    other[order] = order.roll(most)
    return replace(batch, corrupted=batch.corrupted.rows(other.to(batch.corrupted.ids.device)))


# -------------------------------------------------------------------- means over all corrupted prompts
def summed(value: Tensor, mask: Tensor, by_position: bool) -> Tensor:
    """Sum `value [batch, pos, ...]` over the batch, and unless `by_position` over its real positions: `[1, 1 or pos,
    ...]`."""
    weight = mask.to(value.device, value.dtype)
    return (value * weight.view(*weight.shape, *[1] * (value.ndim - 2))).sum(0 if by_position else (0, 1), keepdim=True)


def count_of(batch: Batch, by_position: bool) -> int:
    """Return how many values `summed` adds up."""
    return len(batch) if by_position else int(batch.corrupted.mask.sum())


def sum_writers(adapter: Adapter, batch: Batch, by_position: bool) -> tuple[Writers, int]:
    """Return `summed` values of every writer in the corrupted runs of a batch, and how many values were added up."""
    writers = capture(adapter, batch.corrupted, stop=True).writers
    total = writers.map(lambda part: summed(part.to(adapter.work), batch.corrupted.mask, by_position))
    return total, count_of(batch, by_position)


def mean_of(parts: Iterable[tuple[Writers, int]]) -> Writers:
    """Return the means, from the sums and counts of all batches."""
    sums, counts = zip(*parts, strict=True)
    total: Writers = functools.reduce(lambda a, b: a.map(torch.add, b), sums)
    return total.map(lambda value: value / sum(counts))
