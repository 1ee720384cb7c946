"""Answers of several tokens: which tokens are read, and what comes before them.

* "first", the field's convention: the tokens that the right and the wrong answers of a row have in common at their
  beginning are appended to both prompts, and the logits are read where they first differ. Without wrong answers that is
  the first token.
* "all": the right answer without its last token is appended to both prompts (teacher forcing), and the logits are read
  before each of its tokens; the metric is the sum over them. `logprob` is then the log-probability of the whole answer,
  and `kl` the KL divergence of the distributions after each of its beginnings. A metric that compares takes the wrong
  answer's token at the same place, after the *right* answer's tokens before it. Both need as many tokens, and it is not
  the difference of the two answers' log-probabilities, which no single run has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

FIRST, ALL = "first", "all"
Sequences = Sequence[Sequence[int]]  # ids of each answer of a row


class Reading(NamedTuple):
    """appended: ids that both prompts get. answers, wrong: ids of either side at the one token that is read; with "all"
    the token at each place, `wrong` empty where no place compares."""

    appended: list[int]
    answers: list[int]
    wrong: list[int]


def first(right: Sequences, wrong: Sequences) -> Reading:
    """The first token that tells right from wrong; a ValueError says why none does."""
    every = [*right, *wrong]
    shared = 0
    if wrong:
        shortest = min(map(len, every))
        while shared < shortest and len({ids[shared] for ids in every}) == 1:
            shared += 1
        if shared == shortest:
            raise ValueError(
                "one of the right and wrong answers is the beginning of the others: no token tells them apart"
            )
    sides = [list(dict.fromkeys(ids[shared] for ids in side)) for side in (right, wrong)]
    if set(sides[0]) & set(sides[1]):
        raise ValueError(
            "some right and wrong answers begin alike, others do not, so no one token tells them apart: give one right"
            " and one wrong answer a row"
        )
    return Reading(list(every[0][:shared]), *sides)


def whole(right: Sequences, wrong: Sequences, compared: bool) -> Reading:
    """Every token of the answer; `compared`: the metric needs wrong answers. A ValueError says what is not defined."""
    if len(right) != 1 or len(wrong) > 1:
        raise ValueError("answer='all' follows one right answer beside at most one wrong one: give one of each a row")
    (own,) = right
    other = list(wrong[0]) if wrong else []
    if other == list(own):
        raise ValueError("the right and the wrong answer are the same")
    if compared and other and len(other) != len(own):
        raise ValueError(
            f"the right answer has {len(own)} tokens and the wrong one {len(other)}, and this metric compares them"
            " place by place: use metric='logprob' (the whole answer's log-probability), answer='first', or answers of"
            " as many tokens"
        )
    return Reading(list(own[:-1]), list(own), other if len(other) == len(own) else [])
