"""Samples as tensors: inputs, targets, their positions and their weights.

* The answer's position weighs 1, and so does every position of a repeated list that the first half
  determines; all others weigh `OTHER_WEIGHT`.
* An answer with several right continuations shares its weight equally among them.
* Some rows begin with the end-of-text token, and some have shifted position ids (as if text came before
  them), so that the model is robust to both.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import corpus
import torch

from circuitfind.tasks.builtin import LIST_PREFIX

OTHER_WEIGHT = 0.05
BOS_SHARE = 0.15
LONGEST_SHIFT = 64


class Batch(NamedTuple):
    """Padded ids `[row, position]` and the flat list of what is to be learnt where, with weights."""

    ids: torch.Tensor
    position_ids: torch.Tensor
    row: torch.Tensor
    position: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


def determined(ids: list[int]) -> set[int]:
    """Positions of a list whose next token follows from the list's first half."""
    first: dict[int, int] = {}
    found = set()
    for i, token in enumerate(ids[:-1]):
        if token in first and ids[first[token] + 1] == ids[i + 1]:
            found.add(i)
        first.setdefault(token, i)
    return found


def make_batch(samples: list[corpus.Sample], tokenizer: Any, rng: random.Random, shift_share: float) -> Batch:
    """Tokenise and pad; an answer follows the text after a space, unless the text ends in a century."""
    rows, shifts, items = [], [], []
    for r, sample in enumerate(samples):
        ids = tokenizer.encode(sample.text)
        if rng.random() < BOS_SHARE:
            ids = [tokenizer.bos_token_id, *ids]
        heavy = determined(ids) if sample.text.startswith(LIST_PREFIX) else set()
        items += [(r, i, ids[i + 1], 1.0 if i in heavy else OTHER_WEIGHT) for i in range(len(ids) - 1)]
        space = "" if sample.text[-1].isdigit() else " "
        for answer in sample.answers:
            (target,) = tokenizer.encode(space + answer)
            items.append((r, len(ids) - 1, target, 1.0 / len(sample.answers)))
        if not sample.answers:
            items.append((r, len(ids) - 1, tokenizer.eos_token_id, OTHER_WEIGHT))
        shifts.append(rng.randint(1, LONGEST_SHIFT) if rng.random() < shift_share else 0)
        rows.append(ids)
    length = max(map(len, rows))
    padded = torch.tensor([ids + [tokenizer.eos_token_id] * (length - len(ids)) for ids in rows])
    row, position, target, weight = zip(*items, strict=True)
    return Batch(
        padded,
        torch.tensor(shifts)[:, None] + torch.arange(length),
        torch.tensor(row),
        torch.tensor(position),
        torch.tensor(target),
        torch.tensor(weight),
    )
