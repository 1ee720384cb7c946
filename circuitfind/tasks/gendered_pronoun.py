"""Gendered pronouns: "So Mary is a really great friend, isn't" -> she.

Mathwin, Corlouer et al. 2023, "Identifying a Preliminary Circuit for Predicting Gendered Pronouns in
GPT-2 Small" (the first template is theirs). The pronoun agrees with the gender the name usually has. Span: name.

Corruption `other-gender`: a name of the other gender, so the other pronoun is right and the metric flips.
"""

from __future__ import annotations

import random

from circuitfind.tasks.behaviour import Behaviour, Choice, Draw, numbered
from circuitfind.tasks.filled import filled
from circuitfind.tasks.lexicon import ADJECTIVES, FEMALE_NAMES, MALE_NAMES, PEOPLE, PLACES
from circuitfind.tasks.rows import Row
from circuitfind.tasks.words import SingleTokens

NAME = "gendered-pronoun"
CORRUPTIONS = ("other-gender",)

TEMPLATES: tuple[str, ...] = (
    "So {name} is a really {adjective} {person}, isn't",
    "Everyone knows that {name} is a very {adjective} {person}, because",
    "Yesterday {name} went to the {place} with a {adjective} {person} because",
    "When {name} came home from the {place},",
    "I think {name} was at the {place} when",
    "The {adjective} {person} said that {name} would come if",
)

SPANS = {"name": ["name"]}

_LEAST_NAMES, _LEAST_OTHERS = 3, 2


def _prepare(words: SingleTokens, choice: Choice) -> Draw:
    she, he = words.need(("she", "he"), 2, NAME, "pronouns (she, he)")
    female = words.need(FEMALE_NAMES, _LEAST_NAMES, NAME, "female names")
    male = words.need(MALE_NAMES, _LEAST_NAMES, NAME, "male names")
    adjectives = words.need(ADJECTIVES, _LEAST_OTHERS, NAME, "adjectives")
    people = words.need(PEOPLE, _LEAST_OTHERS, NAME, "nouns for people")
    places = words.need(PLACES, _LEAST_OTHERS, NAME, "places")

    def draw(rng: random.Random, number: int) -> Row:
        template = rng.choice(choice.patterns)
        woman, man = rng.choice(female), rng.choice(male)
        rest = {
            "adjective": rng.choice(adjectives),
            "person": rng.choice(people),
            "place": rng.choice(places),
        }
        hers, his = (filled(template, SPANS, name=name, **rest) for name in (woman, man))
        if number % 2 == 0:
            return Row(hers.text, his.text, (she,), (he,), flips=True, spans=hers.spans)
        return Row(his.text, hers.text, (he,), (she,), flips=True, spans=his.spans)

    return draw


BEHAVIOUR = Behaviour(
    name=NAME,
    summary="the pronoun agrees with the name: So Mary is a really great friend, isn't -> she",
    source="Mathwin, Corlouer et al. 2023, A Preliminary Circuit for Predicting Gendered Pronouns in GPT-2",
    metric="logit_diff",
    corruptions=CORRUPTIONS,
    prepare=_prepare,
    templates=numbered(TEMPLATES),
)
