"""Token ids as the engine sees them: the two prompts of each pair, where logits are read, which tokens count.

Positions are indices into the padded sequence. `-1` pads answer sets of unequal size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """One side of a batch of pairs.

    ids: `[batch, pos]` token ids; mask: `[batch, pos]` bool, true at real tokens;
    read: `[batch, reads]` positions at which the metric reads the logits.
    """

    ids: Tensor
    mask: Tensor
    read: Tensor

    @property
    def padded(self) -> bool:
        return not bool(self.mask.all())

    @property
    def position_ids(self) -> Tensor:
        """`[batch, pos]`: 0 at the first real token, so that padding on the left changes nothing."""
        return (self.mask.long().cumsum(-1) - 1).clamp(min=0)

    def rows(self, index: Tensor | slice) -> Inputs:
        """Some examples of the batch."""
        return Inputs(*(value[index] for value in self))

    def repeat(self, times: int) -> Inputs:
        """The whole batch several times over, batch after batch."""
        return Inputs(*(value.repeat(times, 1) for value in self))

    def to(self, device: torch.device) -> Inputs:
        return Inputs(*(value.to(device) for value in self))


@dataclass(frozen=True)
class Batch:
    """Pairs of prompts with their answers.

    Attributes:
        answers, wrong: `[batch, reads, answers]` token ids, padded with -1; zero columns where there are none.
        reference: `[batch, reads, vocab]` log-probabilities of the clean run, for metrics that compare with it.
    """

    clean: Inputs
    corrupted: Inputs
    answers: Tensor
    wrong: Tensor
    reference: Tensor | None = None

    def __len__(self) -> int:
        return self.clean.ids.shape[0]

    def rows(self, index: Tensor | slice) -> Batch:
        """Some examples of the batch."""
        reference = None if self.reference is None else self.reference[index]
        return Batch(
            self.clean.rows(index), self.corrupted.rows(index), self.answers[index], self.wrong[index], reference
        )

    def repeat(self, times: int) -> Batch:
        """The whole batch several times over, batch after batch."""
        reference = None if self.reference is None else self.reference.repeat(times, 1, 1)
        return Batch(
            self.clean.repeat(times),
            self.corrupted.repeat(times),
            self.answers.repeat(times, 1, 1),
            self.wrong.repeat(times, 1, 1),
            reference,
        )

    def trimmed(self) -> Batch:
        """Without the columns at the end that are padding in every row."""
        real = (self.clean.mask | self.corrupted.mask).any(0)
        length = int(real.nonzero().max()) + 1
        sides = [
            Inputs(side.ids[:, :length], side.mask[:, :length], side.read) for side in (self.clean, self.corrupted)
        ]
        return replace(self, clean=sides[0], corrupted=sides[1])

    def with_reference(self, logits: Tensor) -> Batch:
        """The same pairs knowing the clean run's logits `[batch, reads, vocab]`."""
        return replace(self, reference=logits.detach().float().log_softmax(-1))

    def to(self, device: torch.device) -> Batch:
        reference = None if self.reference is None else self.reference.to(device)
        return Batch(
            self.clean.to(device), self.corrupted.to(device), self.answers.to(device), self.wrong.to(device), reference
        )
