"""Indirect object identification: "When Mary and John went to the store, John gave a drink to" -> Mary.

Wang et al. 2022, "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small". Of two
names, the subject (S) is repeated, and the other one, the indirect object (IO), is the answer. Pairs alternate between
the two orders of the first clause, IO first (ABBA) and S first (BABA). Spans, with the paper's names: IO, S1 and S2
(the subject's second mention). The paper's END is the last token, where the metric is read.

Corruptions:
* `s2-io-flip`: the second mention is IO instead of S. Now S is right, and the metric's sign flips.
* `s1-io-flip`: the names of the first clause change places (ABBA becomes BABA). The answer stays the same; only
  information about order and position changes.
* `abc`: three different names that are not in the clean prompt (the paper's p_ABC), so that no name is repeated.
* `random-names`: two other names take the places of IO and S.
* `s1-io-flip-s2-io-flip`: both flips. S comes first and IO is repeated, so the metric's sign flips.
* `random-names-` and one of these three flips: the flip, with two other names.

The flips and their combinations are MIB's counterfactuals (Mueller et al. 2025).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from circuitfind.tasks.builder import Choice, Draw, Pair, SingleTokens, TaskBuilder, numbered
from circuitfind.tasks.lexicon import FEMALE_NAMES, MALE_NAMES, OBJECTS, PLACES

_FLIPS = ("s1-io-flip", "s2-io-flip", "s1-io-flip-s2-io-flip")
CORRUPTIONS = ("s2-io-flip", "s1-io-flip", "abc", "random-names", _FLIPS[2], *(f"random-names-{one}" for one in _FLIPS))

SENTENCES: tuple[str, ...] = (
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
TEMPLATES: dict[str, str] = {
    name: pattern
    for order, letters in ORDERS.items()
    for name, pattern in numbered(*(text.format(**letters, **_KEPT) for text in SENTENCES), prefix=f"{order}-").items()
}


Words = Sequence[str]


def drawer(
    names: Words, places: Words, objects: Words, corruption: str, templates: Mapping[str, str] = TEMPLATES
) -> Draw:
    """Return a function that draws pairs with these words (at least five names), alternating between the two orders.

    If the templates have only one order, all pairs have that order.
    """
    by_order = [[text for name, text in templates.items() if name.startswith(order)] for order in ORDERS]
    by_order = [patterns for patterns in by_order if patterns]

    def draw(rng: random.Random, number: int) -> Pair:
        pattern = rng.choice(by_order[number % len(by_order)])
        io, s, x, y, z = rng.sample(names, 5)
        said = {"io": io, "s": s, "second": s, "place": rng.choice(places), "object": rng.choice(objects)}
        if corruption == "abc":
            corrupted = {"io": x, "s": y, "second": z}
        else:
            first, again = (x, y) if corruption.startswith("random-names") else (io, s)
            second = first if "s2-io-flip" in corruption else again
            if "s1-io-flip" in corruption:
                first, again = again, first
            corrupted = {"io": first, "s": again, "second": second}
        return Pair.filled(pattern, said, corrupted, [io], [s], flips=corrupted["second"] == io, spans=SPANS)

    return draw


def _prepare(words: SingleTokens, choice: Choice) -> Draw:
    names = words.need(FEMALE_NAMES + MALE_NAMES, 8, "ioi", "names")
    places, objects = words.need(PLACES, 2, "ioi", "places"), words.need(OBJECTS, 2, "ioi", "objects")
    return drawer(names, places, objects, choice.corruption, choice.templates)


TASK = TaskBuilder(
    "ioi",
    _prepare,
    CORRUPTIONS,
    templates=TEMPLATES,
    summary="of two names, the one that is not repeated: When Mary and John went ..., John gave a drink to -> Mary",
    source="Wang et al. 2022, Interpretability in the Wild (arXiv:2211.00593)",
)
