"""Token ids as the engine sees them: the two prompts of each pair, where logits are read, which tokens count.

Positions are indices into the padded sequence. `-1` pads answer sets of unequal size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


def side_by_side(value: Tensor, times: int) -> Tensor:
    """A batch's values `[batch, ...]` several times over, batch after batch."""
    return value if times == 1 else value.repeat(times, *[1] * (value.ndim - 1))


class Past(NamedTuple):
    """The tokens before a batch's own, as attention sees them. `mask`: `[batch, past]` bool, true at real tokens;
    `layers`: of each the keys and values `[batch, kv_heads, past, d_head]`."""

    mask: Tensor
    layers: list[tuple[Tensor, Tensor]]

    def map(self, function: Callable[[Tensor], Tensor]) -> Past:
        """The same function of every tensor."""
        return Past(function(self.mask), [(function(keys), function(values)) for keys, values in self.layers])


class Inputs(NamedTuple):
    """One side of a batch of pairs. `ids`: `[batch, pos]` token ids; `mask`: `[batch, pos]` bool, true at real tokens;
    `read`: `[batch, reads]` positions at which the metric reads the logits; `past`: the tokens before, where they are
    not run again."""

    ids: Tensor
    mask: Tensor
    read: Tensor
    past: Past | None = None

    @property
    def padded(self) -> bool:
        return not bool(self.mask.all())

    @property
    def part(self) -> float:
        """Of the whole prompts' positions."""
        return self.ids.shape[1] / self.whole_mask.shape[1]

    @property
    def whole_mask(self) -> Tensor:
        """`[batch, past + pos]` bool."""
        return self.mask if self.past is None else torch.cat([self.past.mask, self.mask], dim=-1)

    @property
    def position_ids(self) -> Tensor:
        """`[batch, pos]`: 0 at the first real token, so that padding on the left changes nothing."""
        return (self.whole_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same function of every tensor."""
        ids, mask, read, past = self
        return Inputs(function(ids), function(mask), function(read), None if past is None else past.map(function))

    def positions(self, part: slice) -> Inputs:
        """Some positions, with nothing before them."""
        return Inputs(self.ids[:, part], self.mask[:, part], self.read - (part.start or 0))

    def rows(self, index: Tensor | slice) -> Inputs:
        """Some examples of the batch."""
        return self.map(lambda value: value[index])

    def repeat(self, times: int) -> Inputs:
        """The whole batch several times over, batch after batch."""
        return self.map(lambda value: side_by_side(value, times))


def wide(logits: Tensor) -> Tensor:
    """At least float32: half precision would round a difference of logits to steps of 1/16."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def log_probabilities(logits: Tensor) -> Tensor:
    """Over the last axis, at least float32. (Torch's float32 `log_softmax` adds up a large vocabulary term by term and
    is off by 7e-5 at 262,144 tokens; `logsumexp` without the largest logit is off by its last digit.)"""
    logits = wide(logits)
    logits = logits - logits.detach().amax(-1, keepdim=True)
    return logits - logits.logsumexp(-1, keepdim=True)


@dataclass(frozen=True)
class Batch:
    """Pairs of prompts with their answers.

    Attributes:
        answers, wrong: `[batch, reads, answers]` token ids, padded with -1; zero columns where there are none.
        reference: `[batch, reads, vocab]` log-probabilities of the clean run, for metrics that compare with it.
        alignment: `[batch, pos]`, by position of the clean prompt the one of the corrupted prompt that stands for it
            (`circuitfind.engine.capture`); None where positions correspond as they are.
        summed: `[batch, reads]`, true at the tokens of one whole answer, over which metrics are summed; what is false
            repeats the last of them and counts for nothing. None: metrics are means over the read positions.
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
        """`[batch, reads]`: how much each read position counts for a metric."""
        if self.summed is not None:
            return self.summed.float()
        reads = self.clean.read
        return torch.full(reads.shape, 1 / reads.shape[1], device=reads.device)

    def over_reads(self, values: Tensor) -> Tensor:
        """`[batch]` from a metric's values `[batch, reads]`: their mean, or their sum over the tokens of an answer."""
        return values.mean(-1) if self.summed is None else (values * self.summed.to(values)).sum(-1)

    def __len__(self) -> int:
        return self.clean.ids.shape[0]

    def map(self, inputs: Callable[[Inputs], Inputs], tensor: Callable[[Tensor], Tensor]) -> Batch:
        """The same function of both sides, and of everything else."""
        others = (self.answers, self.wrong, self.reference, self.alignment, self.summed)
        made: list[Any] = [None if value is None else tensor(value) for value in others]
        return Batch(inputs(self.clean), inputs(self.corrupted), *made)

    def rows(self, index: Tensor | slice) -> Batch:
        """Some examples of the batch."""
        return self.map(lambda side: side.rows(index), lambda value: value[index])

    def each(self, tensor: Callable[[Tensor], Tensor]) -> Batch:
        """The same function of every tensor."""
        return self.map(lambda side: side.map(tensor), tensor)

    def to(self, device: torch.device | str) -> Batch:
        """The same pairs on a device."""
        return self.each(lambda value: value.to(device))

    def repeat(self, times: int) -> Batch:
        """The whole batch several times over, batch after batch."""
        return self.each(lambda value: side_by_side(value, times))

    def trimmed(self) -> Batch:
        """Without the columns at the end that are padding in every row."""
        length = int((self.clean.mask | self.corrupted.mask).any(0).nonzero().max()) + 1
        clean, corrupted = (
            side._replace(ids=side.ids[:, :length], mask=side.mask[:, :length]) for side in (self.clean, self.corrupted)
        )
        alignment = None if self.alignment is None else self.alignment[:, :length]
        return replace(self, clean=clean, corrupted=corrupted, alignment=alignment)

    def plain(self) -> Batch:
        """Without an alignment by which every position stands for itself."""
        if self.alignment is None:
            return self
        positions = torch.arange(self.alignment.shape[1], device=self.alignment.device)
        same_length = bool((self.clean.mask == self.corrupted.mask).all())
        plain = same_length and bool((self.alignment == positions)[self.clean.mask].all())
        return replace(self, alignment=None) if plain else self

    def with_reference(self, logits: Tensor) -> Batch:
        """The same pairs knowing the clean run's logits `[batch, reads, vocab]`."""
        return replace(self, reference=log_probabilities(logits.detach()))
