"""Batches of pairs as token ids: both prompts of each pair, their masks, read positions and answers.

Positions are indices into the padded sequence. Answer sets of unequal size are padded with -1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


def side_by_side(value: Tensor, times: int) -> Tensor:
    """Repeat a batch's values along the first axis: `[batch, ...]` -> `[times x batch, ...]`, batch after batch."""
    return value if times == 1 else value.repeat(times, *[1] * (value.ndim - 1))


class Past(NamedTuple):
    """Cached keys and values of the tokens before those of `Inputs`. `mask`: `[batch, past]` bool, true at real tokens;
    `layers`: each layer's keys and values `[batch, kv_heads, past, d_head]`."""

    mask: Tensor
    layers: list[tuple[Tensor, Tensor]]

    def map(self, function: Callable[[Tensor], Tensor]) -> Past:
        """Apply a function to every tensor, and return the new `Past`."""
        return Past(function(self.mask), [(function(keys), function(values)) for keys, values in self.layers])


class Inputs(NamedTuple):
    """One side of a batch of pairs.

    Attributes:
        ids: `[batch, pos]` token ids.
        mask: `[batch, pos]` bool, true at real tokens.
        read: `[batch, reads]` positions at which the metric reads the logits.
        past: earlier tokens that are not run again, if any.
    """

    ids: Tensor
    mask: Tensor
    read: Tensor
    past: Past | None = None

    @property
    def padded(self) -> bool:
        return not bool(self.mask.all())

    @property
    def part(self) -> float:
        """The fraction of the whole prompts' positions that is run."""
        return self.ids.shape[1] / self.whole_mask.shape[1]

    @property
    def whole_mask(self) -> Tensor:
        """The mask of the whole prompts, `[batch, past + pos]` bool."""
        return self.mask if self.past is None else torch.cat([self.past.mask, self.mask], dim=-1)

    @property
    def position_ids(self) -> Tensor:
        """`[batch, pos]`: counted from the first real token, so that padding on the left does not change results."""
        return (self.whole_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """Apply a function to every tensor, and return the new `Inputs`."""
        ids, mask, read, past = self
        return Inputs(function(ids), function(mask), function(read), None if past is None else past.map(function))

    def positions(self, part: slice) -> Inputs:
        """Return a slice of the positions, without `past`."""
        return Inputs(self.ids[:, part], self.mask[:, part], self.read - (part.start or 0))

    def rows(self, index: Tensor | slice) -> Inputs:
        """Return some examples of the batch."""
        return self.map(lambda value: value[index])

    def repeat(self, times: int) -> Inputs:
        """Repeat the whole batch, batch after batch."""
        return self.map(lambda value: side_by_side(value, times))


def wide(logits: Tensor) -> Tensor:
    """Return logits in at least float32: half precision would round a difference of logits to steps of 1/16."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def log_probabilities(logits: Tensor) -> Tensor:
    """Return log probabilities over the last axis, in at least float32.

    (In float32, torch's `log_softmax` sums a large vocabulary term by term, and is wrong by 7e-5 at 262,144 tokens;
    `logsumexp` of logits from which the largest is not subtracted is wrong in its last digit.)
    """
    logits = wide(logits)
    logits = logits - logits.detach().amax(-1, keepdim=True)
    return logits - logits.logsumexp(-1, keepdim=True)


@dataclass(frozen=True)
class Batch:
    """Pairs of prompts with their answers.

    Attributes:
        clean, corrupted: the two sides.
        answers, wrong: `[batch, reads, answers]` token ids, padded with -1; zero columns if there are none.
        reference: `[batch, reads, vocab]` log probabilities of the clean run, for metrics that compare with it.
        alignment: `[batch, pos]`, for each position of the clean prompt the corresponding position of the corrupted
            prompt (`circuitfind.engine.capture`); None if every position corresponds to itself.
        summed: `[batch, reads]` bool, if the read positions are the tokens of a whole answer, over which metrics are
            summed. False marks positions that only pad a shorter answer by repeating its last token, and do not count.
            None: metrics are means over the read positions.
    """

    clean: Inputs
    corrupted: Inputs
    answers: Tensor
    wrong: Tensor
    reference: Tensor | None = None
    alignment: Tensor | None = None
    summed: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """The weight of each read position in a metric, `[batch, reads]`."""
        if self.summed is not None:
            return self.summed.float()
        reads = self.clean.read
        return torch.full(reads.shape, 1 / reads.shape[1], device=reads.device)

    def over_reads(self, values: Tensor) -> Tensor:
        """Reduce a metric's values `[batch, reads]` to `[batch]`: their mean, or their sum over the answer's tokens."""
        return values.mean(-1) if self.summed is None else (values * self.summed.to(values)).sum(-1)

    def __len__(self) -> int:
        return self.clean.ids.shape[0]

    def map(self, inputs: Callable[[Inputs], Inputs], tensor: Callable[[Tensor], Tensor]) -> Batch:
        """Apply `inputs` to both sides and `tensor` to every other tensor, and return the new batch."""
        others = (self.answers, self.wrong, self.reference, self.alignment, self.summed)
        made: list[Any] = [None if value is None else tensor(value) for value in others]
        return Batch(inputs(self.clean), inputs(self.corrupted), *made)

    def rows(self, index: Tensor | slice) -> Batch:
        """Return some examples of the batch."""
        return self.map(lambda side: side.rows(index), lambda value: value[index])

    def each(self, tensor: Callable[[Tensor], Tensor]) -> Batch:
        """Apply a function to every tensor, and return the new batch."""
        return self.map(lambda side: side.map(tensor), tensor)

    def to(self, device: torch.device | str) -> Batch:
        """Return the pairs on a device."""
        return self.each(lambda value: value.to(device))

    def repeat(self, times: int) -> Batch:
        """Repeat the whole batch, batch after batch."""
        return self.each(lambda value: side_by_side(value, times))

    def trimmed(self) -> Batch:
        """Return the pairs without positions at the end that are padding in every prompt."""
        length = int((self.clean.mask | self.corrupted.mask).any(0).nonzero().max()) + 1
        clean, corrupted = (
            side._replace(ids=side.ids[:, :length], mask=side.mask[:, :length]) for side in (self.clean, self.corrupted)
        )
        alignment = None if self.alignment is None else self.alignment[:, :length]
        return replace(self, clean=clean, corrupted=corrupted, alignment=alignment)

    def plain(self) -> Batch:
        """Return the pairs, without the alignment if by it every position corresponds to itself."""
        if self.alignment is None:
            return self
        positions = torch.arange(self.alignment.shape[1], device=self.alignment.device)
        same_length = bool((self.clean.mask == self.corrupted.mask).all())
        plain = same_length and bool((self.alignment == positions)[self.clean.mask].all())
        return replace(self, alignment=None) if plain else self

    def with_reference(self, logits: Tensor) -> Batch:
        """Return the pairs with a reference: the clean run's logits `[batch, reads, vocab]`."""
        return replace(self, reference=log_probabilities(logits.detach()))
