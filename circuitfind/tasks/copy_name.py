"""Copying a name: "There was a little child named Lily. One day," -> Lily.

The simplest use of what stands earlier in the text: a name was said, and a name comes again (Olsson et al. 2022,
"In-context Learning and Induction Heads", calls such heads copying heads). Three names that are one token each are
enough, so it can be said with the small vocabularies of story models too. Spans: name1, and where the name was said
more than once name2 and name3.

Corruption `other-name`: another name was said, so that one is right and the metric flips.
"""

from __future__ import annotations

import random

from circuitfind.tasks.behaviour import Behaviour, Choice, Draw, numbered
from circuitfind.tasks.filled import filled
from circuitfind.tasks.lexicon import FEMALE_NAMES, MALE_NAMES, STORY_NAMES
from circuitfind.tasks.rows import Row
from circuitfind.tasks.words import SingleTokens

NAME = "copy"
CORRUPTIONS = ("other-name",)

TEMPLATES: tuple[str, ...] = (
    "There was a little child named {name}. One day,",
    "Once upon a time, there was a child named {name}. {name} was happy. One day,",
    "His friend was named {name}. His friend was named",
    "The friends said: {name}, {name}, {name},",
    "The child was named {name}. Everyone said: {name}, {name},",
    "One day, {name} saw a cat. The cat saw {name}. Then,",
    "So {name} was happy. {name} was big. {name} was little.",
    "Once upon a time, there was a child named {name}.",
)

SPANS = {"name": ["name1", "name2", "name3"]}

_LEAST_NAMES = 3


def _prepare(words: SingleTokens, choice: Choice) -> Draw:
    names = words.need(FEMALE_NAMES + MALE_NAMES + STORY_NAMES, _LEAST_NAMES, NAME, "names")

    def draw(rng: random.Random, number: int) -> Row:
        template = rng.choice(choice.patterns)
        name, other = rng.sample(names, 2)
        clean, spans = filled(template, SPANS, name=name)
        return Row(clean, template.format(name=other), (name,), (other,), flips=True, spans=spans)

    return draw


BEHAVIOUR = Behaviour(
    name=NAME,
    summary="a name that was said comes again: There was a little child named Lily. One day, -> Lily",
    source="Olsson et al. 2022, In-context Learning and Induction Heads (arXiv:2209.11895)",
    metric="logit_diff",
    corruptions=CORRUPTIONS,
    prepare=_prepare,
    templates=numbered(TEMPLATES),
)
