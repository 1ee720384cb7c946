"""What an edge outside a circuit carries.

* `corrupted` (interchange, the default): the writer's value in the corrupted run, on the clean prompt's positions where
  the two are aligned (`engine/aligned.py`).
* `zero`: nothing.
* `mean`: the writer's mean over the corrupted prompts and all their real positions.
* `mean-position`: its mean over the corrupted prompts at each position; prompts of one length only.
* `resample`: its value in the corrupted run of another, randomly drawn example (seeded); prompts of one length only.

Only `corrupted` makes the run with every edge ablated equal to the corrupted run (of aligned pairs, its logits are).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from circuitfind.batch import Batch
from circuitfind.engine.aligned import refuse_aligned
from circuitfind.engine.capture import Run, Writers, capture
from circuitfind.engine.memory import in_batches
from circuitfind.errors import ScoreError, TaskError
from circuitfind.models.adapter import Adapter
from circuitfind.tasks.bound import check_seed

Ablation = Literal["corrupted", "zero", "mean", "mean-position", "resample"]
SAME_LENGTH = ("mean-position", "resample")


def check_ablation(ablation: str, batch: Batch) -> None:
    """Refuses an unknown ablation, or one that these prompts do not allow.

    Raises:
        TaskError: naming the ablation and the ones that are possible.
    """
    if ablation not in get_args(Ablation):
        raise TaskError(f"ablation '{ablation}' is unknown: use one of {', '.join(get_args(Ablation))}")
    if ablation in SAME_LENGTH and (batch.clean.padded or batch.corrupted.padded):
        raise TaskError(f"ablation '{ablation}' needs prompts of one length, these differ: use 'corrupted' or 'mean'")
    if ablation in SAME_LENGTH:
        refuse_aligned(batch, f"ablation '{ablation}'", "use 'corrupted', 'mean' or 'zero'")


def check_direction(direction: str, ablation: str, batch: Batch | None = None) -> None:
    """Refuses an unknown direction, or one that has no meaning for the ablation or (where given) for the pairs.

    Raises:
        ScoreError, TaskError: naming it.
    """
    if direction not in ("noising", "denoising"):
        raise ScoreError(f"direction '{direction}' is unknown: use 'noising' or 'denoising'")
    if direction == "denoising" and ablation != "corrupted":
        raise ScoreError("direction 'denoising' starts from the corrupted run: it needs ablation='corrupted'")
    if direction == "denoising" and batch is not None:
        refuse_aligned(batch, "direction 'denoising'", "use 'noising', with the sides exchanged if need be")


def resampled(batch: Batch, seed: int) -> Batch:
    """The same pairs with their corrupted prompts dealt out anew; no example keeps its own."""
    check_seed(seed)
    size = len(batch)
    if size < 2:
        raise TaskError("ablation 'resample' needs at least two examples")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return replace(batch, corrupted=batch.corrupted.rows(other.to(batch.corrupted.ids.device)))


def sum_writers(adapter: Adapter, batch: Batch, by_position: bool) -> tuple[Writers, int]:
    """Every writer summed over a batch's corrupted prompts (and their real positions), and how many were summed."""
    weight = batch.corrupted.mask.to(adapter.work)
    axes = 0 if by_position else (0, 1)

    def summed(part: Tensor) -> Tensor:
        broadcast = weight.to(part.device).view(*weight.shape, *[1] * (part.ndim - 2))
        return (part * broadcast).sum(axes, keepdim=True)

    total = capture(adapter, batch.corrupted, stop=True).writers.map(summed)
    return total, len(batch) if by_position else int(weight.sum())


def mean_of(parts: Iterable[tuple[Writers, int]]) -> Writers:
    """Means, shaped to broadcast over `[batch, pos]`, from the sums of all batches."""
    sums, counts = zip(*parts, strict=True)
    total = functools.reduce(lambda a, b: a.minus(b.map(torch.neg)), sums)
    return total.map(lambda value: value / sum(counts))


def writer_means(adapter: Adapter, batch: Batch, ablation: str, batch_size: int | None = None) -> Writers | None:
    """What the mean ablations put in place of each writer; None for the others."""
    if not ablation.startswith("mean"):
        return None
    by_position = ablation == "mean-position"

    def one(part: Batch, _: slice) -> tuple[Writers, int]:
        return sum_writers(adapter, part, by_position)

    return mean_of(part for _, part in in_batches(adapter, batch, one, batch_size, "mean activations"))


def ablated(ablation: str, clean: Run, corrupted: Run | None, means: Writers | None) -> Writers:
    """The writers' ablated values for one batch, of the clean run's shapes.

    Args:
        corrupted: from `capture_corrupted`.
    """
    if ablation == "zero":
        return clean.writers.map(torch.zeros_like)
    if means is None:
        assert corrupted is not None, "interchange needs the corrupted run"
        return corrupted.writers
    embed = means.embed.expand_as(clean.writers.embed)
    heads = [mean.expand_as(value) for mean, value in zip(means.heads, clean.heads, strict=True)]
    return Writers(embed, heads, [mean.expand_as(value) for mean, value in zip(means.mlps, clean.mlps, strict=True)])
