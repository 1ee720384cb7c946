"""Capitals: "The capital of France is the city of" -> Paris.

The plainest case of recalling a fact (Meng et al. 2022, "Locating and Editing Factual Associations in GPT"): the
subject is one token, and what it brings to mind must come out at the last one. Span: subject, the country.

Corruption `other-country`: another country, so its capital is right and the metric flips.
"""

from __future__ import annotations

import random

from circuitfind.tasks.behaviour import Behaviour, Choice, Draw, numbered
from circuitfind.tasks.filled import filled
from circuitfind.tasks.lexicon import CAPITALS
from circuitfind.tasks.rows import Row
from circuitfind.tasks.words import SingleTokens

NAME = "country-capital"
CORRUPTIONS = ("other-country",)

TEMPLATES: tuple[str, ...] = (
    "The capital of {country} is the city of",
    "Everyone knows that the capital of {country} is",
    "When you travel to {country}, you will visit its capital,",
    "The government of {country} sits in its capital city,",
)

SPANS = {"country": ["subject"]}

_LEAST_COUNTRIES = 5


def _prepare(words: SingleTokens, choice: Choice) -> Draw:
    pairs = words.need_pairs(CAPITALS, _LEAST_COUNTRIES, NAME, "countries and capitals")

    def draw(rng: random.Random, number: int) -> Row:
        template = rng.choice(choice.patterns)
        (country, capital), (other, elsewhere) = rng.sample(pairs, 2)
        clean, spans = filled(template, SPANS, country=country)
        return Row(clean, template.format(country=other), (capital,), (elsewhere,), flips=True, spans=spans)

    return draw


BEHAVIOUR = Behaviour(
    name=NAME,
    summary="recall a country's capital: The capital of France is the city of -> Paris",
    source="Meng et al. 2022, Locating and Editing Factual Associations in GPT (arXiv:2202.05262)",
    metric="logit_diff",
    corruptions=CORRUPTIONS,
    prepare=_prepare,
    templates=numbered(TEMPLATES),
)
