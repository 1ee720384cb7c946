"""Indirect object identification: "When Mary and John went to the store, John gave a drink to" -> Mary.

Wang et al. 2022, "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small".
Two names, one of which (the subject, S) comes again: the other (the indirect object, IO) is the answer. Rows
alternate between the two orders of the first clause, IO first (ABBA) and S first (BABA).

Corruptions:
* `s2-io-flip`: the second mention is the IO instead of S. Now S is the answer: the metric's sign flips.
* `s1-io-flip`: the first clause's names change places (ABBA becomes BABA). The answer stays; only what the
  model does by order and position is disturbed.
* `abc`: three different names that the clean prompt does not have (the paper's p_ABC): none comes twice.
* `random-names`: IO and S are two other names throughout: the pattern stays, the names go.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from circuitfind.tasks.behaviour import Behaviour, Draw
from circuitfind.tasks.lexicon import FEMALE_NAMES, MALE_NAMES, OBJECTS, PLACES
from circuitfind.tasks.rows import Row
from circuitfind.tasks.words import SingleTokens

NAME = "ioi"
CORRUPTIONS = ("s2-io-flip", "s1-io-flip", "abc", "random-names")

TEMPLATES: tuple[str, ...] = (
    "When {a} and {b} went to the {place}, {s} gave a {object} to",
    "After {a} and {b} went to the {place}, {s} gave a {object} to",
    "Then, {a} and {b} went to the {place}. {s} gave a {object} to",
    "Then, {a} and {b} had a lot of fun at the {place}. {s} gave a {object} to",
    "Then, {a} and {b} were working at the {place}. {s} decided to give a {object} to",
    "While {a} and {b} were working at the {place}, {s} gave a {object} to",
    "Friends {a} and {b} found a {object} at the {place}. {s} gave it to",
    "The {place} {a} and {b} went to had a {object}. {s} gave it to",
)

_LEAST_NAMES, _LEAST_PLACES, _LEAST_OBJECTS = 8, 2, 2


def drawer(names: Sequence[str], places: Sequence[str], objects: Sequence[str], corruption: str) -> Draw:
    """Draws rows over the given words (at least five names)."""

    def draw(rng: random.Random, number: int) -> Row:
        template = rng.choice(TEMPLATES)
        io, s, x, y, z = rng.sample(names, 5)
        place, thing = rng.choice(places), rng.choice(objects)
        io_first = number % 2 == 0

        def say(io: str, s: str, second: str, io_first: bool = io_first) -> str:
            a, b = (io, s) if io_first else (s, io)
            return template.format(a=a, b=b, s=second, place=place, object=thing)

        corrupted = {
            "s2-io-flip": lambda: say(io, s, io),
            "s1-io-flip": lambda: say(io, s, s, not io_first),
            "abc": lambda: say(x, y, z),
            "random-names": lambda: say(x, y, y),
        }[corruption]()
        return Row(say(io, s, s), corrupted, (io,), (s,), flips=corruption == "s2-io-flip")

    return draw


def _prepare(words: SingleTokens, corruption: str) -> Draw:
    names = words.need(FEMALE_NAMES + MALE_NAMES, _LEAST_NAMES, NAME, "names")
    places = words.need(PLACES, _LEAST_PLACES, NAME, "places")
    objects = words.need(OBJECTS, _LEAST_OBJECTS, NAME, "objects")
    return drawer(names, places, objects, corruption)


BEHAVIOUR = Behaviour(
    name=NAME,
    summary="of two names, the one not said twice: When Mary and John went ..., John gave a drink to -> Mary",
    source="Wang et al. 2022, Interpretability in the Wild (arXiv:2211.00593)",
    metric="logit_diff",
    corruptions=CORRUPTIONS,
    prepare=_prepare,
)
