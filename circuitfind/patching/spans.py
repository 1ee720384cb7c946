"""Division of prompts into spans: sets of positions that a sweep patches together, and that do not overlap.

1. By position: every position is a span, for prompts of one length.
2. By span: one span for each name that every pair gives (`BoundTask.spans`), in the order of their mean first
   positions. The other tokens are "end", the last position at which the metric reads (by default the last token), if it
   is outside the named spans in every pair, and "rest", all others. So every token is in one span.

Positions are those of the clean prompt. The corrupted prompt has the same positions, or is aligned to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from circuitfind.errors import ScoreError
from circuitfind.tasks.bound import BoundTask

END, REST = "end", "rest"


class Spans(NamedTuple):
    """The spans of a task's prompts. `by`: "position" or "span"; `numbers`: the span of each position, `[pairs, pos]`,
    -1 for padding."""

    by: str
    labels: tuple[str, ...]
    numbers: Tensor


def spans_of(bound: BoundTask, by_position: bool, by_span: bool) -> Spans | None:
    """Return the spans; None if all positions are patched together. ScoreError if prompts cannot be divided so."""
    if by_span:
        return _by_name(bound)
    return _by_position(bound) if by_position else None


def position_labels(tokens: Sequence[str]) -> tuple[str, ...]:
    """Return labels such as "3 Mary"."""
    return tuple(f"{position} {token.strip() or repr(token)}" for position, token in enumerate(tokens))


def _by_position(bound: BoundTask) -> Spans:
    mask = bound.batch.clean.mask
    if unequal(bound):
        names = ", ".join(common(bound))
        spans = f"use the spans that they name, {names}" if names else "name spans in them (spans=) and use these"
        raise ScoreError(
            f"by_position=True needs prompts of one length, these have {lengths(bound)} tokens: {spans} (by_span=True,"
            " --by-span), take one template of the task (template=, --template) or a subset of one length, or patch all"
            " positions of a place together (by_position=False, --all-positions)"
        )
    labels = position_labels(bound.tokens[0])  # of the first pair: names differ, the template does not
    return Spans("position", labels, torch.arange(mask.shape[1], device=mask.device).expand(mask.shape))


def _by_name(bound: BoundTask) -> Spans:
    labels, inputs = common(bound), bound.batch.clean
    if not labels:
        given = sorted({name for row in bound.spans for name in row})
        have = f"these pairs name {', '.join(given)}, none of them in every pair" if given else "these pairs name none"
        raise ScoreError(
            f"by_span=True needs spans that every pair names, and {have}: give the task spans=, by pair a mapping such"
            " as {'subject': 'Mary'}, or take a template that has them"
        )
    numbers = torch.full_like(inputs.ids, -1)
    for row, spans in enumerate(bound.spans):
        for first, second in pairwise(sorted(labels, key=lambda name: spans[name])):
            if spans[second][0] < spans[first][1]:
                both = f"{spans[second][0]} to {min(spans[first][1], spans[second][1]) - 1}"
                raise ScoreError(
                    f"by_span=True: row {row}: spans '{first}' and '{second}' overlap, at positions {both}: each"
                    " position belongs to one span, so give spans that do not overlap"
                )
        for number, name in enumerate(labels):
            numbers[row, slice(*spans[name])] = number
    rows, last = torch.arange(len(numbers), device=numbers.device), inputs.read.amax(1)
    if bool((numbers[rows, last] < 0).all()) and END not in labels:
        numbers[rows, last] = len(labels)
        labels.append(END)
    rest = inputs.mask & (numbers < 0)
    if bool(rest.any()):
        if REST in labels:
            raise ScoreError(f"by_span=True: '{REST}' means all tokens outside the spans: give your span another name")
        numbers[rest] = len(labels)
        labels.append(REST)
    return Spans("span", tuple(labels), numbers)


def unequal(bound: BoundTask) -> bool:
    """Whether prompts differ in length, so that their positions do not correspond."""
    return bound.batch.clean.padded or bound.batch.corrupted.padded


def lengths(bound: BoundTask) -> str:
    """Return the prompts' lengths as text, such as "14 to 17"."""
    sizes = torch.cat([bound.batch.clean.mask.sum(1), bound.batch.corrupted.mask.sum(1)])
    return f"{int(sizes.min())} to {int(sizes.max())}"


def common(bound: BoundTask) -> list[str]:
    """Return the names of the spans that every pair has, in the order of their mean first positions."""
    names = [name for name in bound.spans[0] if all(name in row for row in bound.spans)] if bound.spans else []
    return sorted(names, key=lambda name: sum(row[name][0] for row in bound.spans))
