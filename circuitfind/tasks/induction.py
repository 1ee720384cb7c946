"""Induction: a list of random words, then its beginning again: "... cup river old map ... cup river" -> old.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022, "In-context
Learning and Induction Heads". All words of a list are different, so what followed the last word the first
time is the only clue. Spans, where the list is ... A B ... A -> B: A1 and B1; the second A is the last token.

Corruptions:
* `next-swap`: in the first half the answer changes places with another word that is not repeated: that word
  followed instead, it is the wrong answer, and the metric flips.
* `no-repeat`: the first half has other words: nothing comes again.
"""

from __future__ import annotations

import random

from circuitfind.tasks.behaviour import Behaviour, Choice, Draw
from circuitfind.tasks.filled import filled
from circuitfind.tasks.lexicon import ADJECTIVES, EVENTS, OBJECTS, PLACES
from circuitfind.tasks.rows import Row
from circuitfind.tasks.words import SingleTokens

NAME = "induction"
CORRUPTIONS = ("next-swap", "no-repeat")

WORDS: tuple[str, ...] = tuple(dict.fromkeys(OBJECTS + PLACES + ADJECTIVES + EVENTS))
PREFIX = "Words:"
SPANS = {"a": ["A1"], "b": ["B1"]}

_SHORTEST, _LONGEST = 6, 10
_LEAST_WORDS = 2 * _LONGEST


def _prepare(words: SingleTokens, choice: Choice) -> Draw:
    pool = words.need(WORDS, _LEAST_WORDS, NAME, "common words")

    def draw(rng: random.Random, number: int) -> Row:
        length = rng.randint(_SHORTEST, _LONGEST)
        drawn = rng.sample(pool, 2 * length)
        first, fresh = drawn[:length], drawn[length:]
        # The word to give, at `at`, and a later one to give instead must both be outside of what is repeated.
        at = rng.randint(2, length - 2)
        other = rng.randint(at + 1, length - 1)
        if choice.corruption == "next-swap":
            twin = list(first)
            twin[at], twin[other] = first[other], first[at]
        else:
            twin = fresh
        again = first[:at]
        pattern = " ".join([PREFIX, *first[: at - 1], "{a}", "{b}", *first[at + 1 :], *again])
        clean, spans = filled(pattern, SPANS, a=first[at - 1], b=first[at])
        return Row(
            clean=clean,
            corrupted=" ".join([PREFIX, *twin, *again]),
            answers=(first[at],),
            wrong=(first[other],),
            flips=choice.corruption == "next-swap",
            spans=spans,
        )

    return draw


BEHAVIOUR = Behaviour(
    name=NAME,
    summary="continue a list of random words that starts again: Words: cup river old map cup river -> old",
    source="Olsson et al. 2022, In-context Learning and Induction Heads (arXiv:2209.11895)",
    metric="logit_diff",
    corruptions=CORRUPTIONS,
    prepare=_prepare,
)
