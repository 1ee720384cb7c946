"""Indirect object identification: "When Mary and John went to the store, John gave a drink to" -> Mary.

Wang et al. 2022, "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small".
Two names, one of which (the subject, S) comes again: the other (the indirect object, IO) is the answer. Rows
alternate between the two orders of the first clause, IO first (ABBA) and S first (BABA). Spans, with the paper's names:
IO, S1 and S2, the subject's second mention; the paper's END is the last token, where the metric reads.

Corruptions:
* `s2-io-flip`: the second mention is the IO instead of S. Now S is the answer: the metric's sign flips.
* `s1-io-flip`: the first clause's names change places (ABBA becomes BABA). The answer stays; only what the
  model does by order and position is disturbed.
* `abc`: three different names that the clean prompt does not have (the paper's p_ABC): none comes twice.
* `random-names`: IO and S are two other names throughout: the pattern stays, the names go.
* the flips together, and after `random-names` (the names of MIB's counterfactuals, Mueller et al. 2025): with
  both flips S comes first and IO twice, so the metric's sign flips.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from circuitfind.tasks.behaviour import Behaviour, Choice, Draw, numbered
from circuitfind.tasks.filled import Filled, filled
from circuitfind.tasks.lexicon import FEMALE_NAMES, MALE_NAMES, OBJECTS, PLACES
from circuitfind.tasks.rows import Row
from circuitfind.tasks.words import SingleTokens

NAME = "ioi"
CORRUPTIONS = (
    "s2-io-flip",
    "s1-io-flip",
    "abc",
    "random-names",
    "s1-io-flip-s2-io-flip",
    "random-names-s1-io-flip",
    "random-names-s2-io-flip",
    "random-names-s1-io-flip-s2-io-flip",
)

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

ORDERS: dict[str, dict[str, str]] = {  # the paper's letters: A is the IO, B is S
    "abba": {"a": "{io}", "b": "{s}"},
    "baba": {"a": "{s}", "b": "{io}"},
}
SPANS = {"io": ["IO"], "s": ["S1"], "second": ["S2"]}
_KEPT = {"s": "{second}", "place": "{place}", "object": "{object}"}
PATTERNS: dict[str, str] = {
    name: pattern
    for order, letters in ORDERS.items()
    for name, pattern in numbered((text.format(**letters, **_KEPT) for text in TEMPLATES), f"{order}-").items()
}

_LEAST_NAMES, _LEAST_PLACES, _LEAST_OBJECTS = 8, 2, 2


def drawer(
    names: Sequence[str],
    places: Sequence[str],
    objects: Sequence[str],
    corruption: str,
    templates: Mapping[str, str] = PATTERNS,
) -> Draw:
    """Draws rows over the given words (at least five names), alternating between the orders among the templates."""
    by_order = [[p for name, p in templates.items() if name.startswith(order)] for order in ORDERS]
    by_order = [patterns for patterns in by_order if patterns]

    def draw(rng: random.Random, number: int) -> Row:
        pattern = rng.choice(by_order[number % len(by_order)])
        io, s, x, y, z = rng.sample(names, 5)
        place, thing = rng.choice(places), rng.choice(objects)

        def say(io: str, s: str, second: str) -> Filled:
            return filled(pattern, SPANS, io=io, s=s, second=second, place=place, object=thing)

        clean, spans = say(io, s, s)
        if corruption == "abc":
            return Row(clean, say(x, y, z).text, (io,), (s,), spans=spans)
        first, again = (x, y) if corruption.startswith("random-names") else (io, s)
        second = first if "s2-io-flip" in corruption else again
        corrupted = say(again, first, second) if "s1-io-flip" in corruption else say(first, again, second)
        return Row(clean, corrupted.text, (io,), (s,), flips=second == io, spans=spans)

    return draw


def _prepare(words: SingleTokens, choice: Choice) -> Draw:
    names = words.need(FEMALE_NAMES + MALE_NAMES, _LEAST_NAMES, NAME, "names")
    places = words.need(PLACES, _LEAST_PLACES, NAME, "places")
    objects = words.need(OBJECTS, _LEAST_OBJECTS, NAME, "objects")
    return drawer(names, places, objects, choice.corruption, choice.templates)


BEHAVIOUR = Behaviour(
    name=NAME,
    summary="of two names, the one not said twice: When Mary and John went ..., John gave a drink to -> Mary",
    source="Wang et al. 2022, Interpretability in the Wild (arXiv:2211.00593)",
    metric="logit_diff",
    corruptions=CORRUPTIONS,
    prepare=_prepare,
    templates=PATTERNS,
)
