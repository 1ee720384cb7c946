"""What an edge outside a circuit carries: one record for each ablation, in a registry that users can add to.

* `corrupted` (interchange, the default): the writer's value in the corrupted run, on the clean prompt's positions where
  the two are aligned (`engine/capture.py`).
* `zero`: nothing.
* `mean`: the writer's mean over the corrupted prompts and all their real positions.
* `mean-position`: its mean over the corrupted prompts at each position; prompts of one length only.
* `resample`: its value in the corrupted run of another, randomly drawn example (seeded); prompts of one length only.

Only `corrupted` makes the run with every edge ablated equal to the corrupted run (with aligned pairs, only its logits).
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
        carried: from a value of the clean run `[batch, pos, ...]`, the same value of the corrupted run and its mean
            `[1, 1 or pos, ...]` (each None unless asked for below) to what is carried instead, of the clean value's
            shape. It is applied to every writer's output, and to every value that a sweep patches.
        corrupted: it needs the corrupted run.
        mean: it needs means over the corrupted prompts: over all real positions ("all") or at each ("position").
        interchange: what is carried is the value of one run: a node that nothing reaches differs from it by exactly 0.
        redealt: each example is paired with another one's corrupted prompt, drawn with the seed.
        equal_lengths: prompts of one length only.
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
        """The clean run and the run that ablated values come from are the two sides of a pair."""
        return self.interchange and not self.redealt

    def check(self, batch: Batch, direction: str = "noising") -> None:
        """TaskError or ScoreError for pairs that this ablation, or this direction under it, is not defined for."""
        if self.equal_lengths:
            if batch.clean.padded or batch.corrupted.padded:
                what = f"ablation '{self.name}' needs prompts of one length, these differ"
                raise TaskError(f"{what}: use 'corrupted' or 'mean'")
            refuse_aligned(batch, f"ablation '{self.name}'", "use 'corrupted', 'mean' or 'zero'")
        self.check_direction(direction)
        if direction == "denoising":
            refuse_aligned(batch, "direction 'denoising'", "use 'noising', with the sides exchanged if need be")

    def check_direction(self, direction: str) -> None:
        """What can be said of the direction before there are pairs."""
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
    """Gives an ablation its name, in this process; TaskError where the name is taken, or it is not an `Ablation`."""
    return entered(ablation, Ablation, ABLATIONS, TaskError, "ablation '{}' exists: give yours another name")


def ablation_of(name: str | Ablation) -> Ablation:
    """The ablation of this name; TaskError with those that there are if there is none."""
    if isinstance(name, Ablation):
        return name
    if name not in ABLATIONS:
        raise TaskError(unknown("ablation", name, ABLATIONS))
    return ABLATIONS[name]


def resampled(batch: Batch, seed: int, copies: np.ndarray | None = None) -> Batch:
    """The same pairs with their corrupted prompts dealt out anew; no example keeps its own, or that of a copy."""
    group = torch.arange(len(batch)) if copies is None else torch.as_tensor(copies)
    sizes = group.bincount()
    most = int(sizes.max())
    if len(sizes) < 2:
        raise TaskError("ablation 'resample' needs at least two examples of different prompts")
    if 2 * most > len(batch):
        raise TaskError(f"ablation 'resample' needs other prompts for each: {most} of {len(batch)} pairs are copies")
    place = torch.empty_like(sizes)
    place[torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))] = torch.arange(len(sizes))
    order = place[group].argsort(stable=True)  # copies beside each other
    other = torch.empty_like(order)
    other[order] = order.roll(most)
    return replace(batch, corrupted=batch.corrupted.rows(other.to(batch.corrupted.ids.device)))


# -------------------------------------------------------------------- means over all corrupted prompts
def summed(value: Tensor, mask: Tensor, by_position: bool) -> Tensor:
    """`[1, 1 or pos, ...]`: the sum of a value `[batch, pos, ...]` over a batch (and its real positions)."""
    weight = mask.to(value.device, value.dtype)
    return (value * weight.view(*weight.shape, *[1] * (value.ndim - 2))).sum(0 if by_position else (0, 1), keepdim=True)


def count_of(batch: Batch, by_position: bool) -> int:
    """How many values such a sum adds up."""
    return len(batch) if by_position else int(batch.corrupted.mask.sum())


def sum_writers(adapter: Adapter, batch: Batch, by_position: bool) -> tuple[Writers, int]:
    """Every writer summed over a batch's corrupted prompts (and their real positions), and how many were summed."""
    writers = capture(adapter, batch.corrupted, stop=True).writers
    total = writers.map(lambda part: summed(part.to(adapter.work), batch.corrupted.mask, by_position))
    return total, count_of(batch, by_position)


def mean_of(parts: Iterable[tuple[Writers, int]]) -> Writers:
    """Means from the sums of all batches."""
    sums, counts = zip(*parts, strict=True)
    total: Writers = functools.reduce(lambda a, b: a.map(torch.add, b), sums)
    return total.map(lambda value: value / sum(counts))
