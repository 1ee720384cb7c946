"""Answers of several tokens: which tokens are read, and what comes before them.

* "first", the field's convention: the tokens with which all right and wrong answers of a row begin are appended to both
  prompts, and the first token that differs is read. Without wrong answers this is the first token.
* "all": the right answer without its last token is appended to both prompts (teacher forcing), every one of its tokens
  is read, and the metric is summed over them. `logprob` is then the log-probability of the whole answer, and `kl` the
  sum of the KL divergences at each of its tokens. A metric that compares right and wrong answers compares them token by
  token, where the wrong answer's n-th token follows the first n-1 tokens of the *right* answer. Both answers then need
  the same number of tokens. The result is not the difference of the two answers' log-probabilities, which would need
  two runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

FIRST, ALL = "first", "all"
Sequences = Sequence[Sequence[int]]  # ids of each answer of a row


class Reading(NamedTuple):
    """What is read of a row's answers.

    appended: ids that are appended to both prompts. answers, wrong: right and wrong ids at the token that is read; with
    "all", the successive tokens of the right and of the wrong answer, and `wrong` is empty if their lengths differ.
    """

    appended: list[int]
    answers: list[int]
    wrong: list[int]


def first(right: Sequences, wrong: Sequences) -> Reading:
    """Return the reading of "first"; raise ValueError if no single token tells right from wrong."""
    every = [*right, *wrong]
    shared = 0
    if wrong:
        shortest = min(map(len, every))
        while shared < shortest and len({ids[shared] for ids in every}) == 1:
            shared += 1
        if shared == shortest:
            raise ValueError(
                "one of the right and wrong answers is the beginning of all others: no token tells them apart"
            )
    sides = [list(dict.fromkeys(ids[shared] for ids in side)) for side in (right, wrong)]
    if set(sides[0]) & set(sides[1]):
        raise ValueError(
            "some right and wrong answers begin alike, others do not, so no one token tells them apart: give one right"
            " and one wrong answer a row"
        )
    return Reading(list(every[0][:shared]), *sides)


def whole(right: Sequences, wrong: Sequences, compared: bool) -> Reading:
    """Return the reading of "all"; raise ValueError if there is none. `compared`: the metric needs wrong answers."""
    if len(right) != 1 or len(wrong) > 1:
        raise ValueError("answer='all' needs one right answer and at most one wrong answer for each row")
    (own,) = right
    other = list(wrong[0]) if wrong else []
    if other == list(own):
        raise ValueError("the right and the wrong answer are the same")
    if compared and other and len(other) != len(own):
        raise ValueError(
            f"the right answer has {len(own)} tokens and the wrong one {len(other)}, and this metric compares them"
            " token by token: use metric='logprob' (the whole answer's log-probability), answer='first', or answers of"
            " equally many tokens"
        )
    return Reading(list(own[:-1]), list(own), other if len(other) == len(own) else [])
