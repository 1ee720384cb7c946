"""Subject-verb agreement across a noun of the other number: "The keys to the cabinet" -> are.

Linzen et al. 2016, "Assessing the Ability of LSTMs to Learn Syntax-Sensitive Dependencies"; as circuits in
language models: Finlayson et al. 2021. The verb agrees with the subject, not with the nearer noun (the
attractor), which has the other number in every clean prompt. Spans: subject and attractor.

Corruptions:
* `other-number`: the subject in the other number (the attractor stays): the other verb is right.
* `attractor-number`: the attractor in the subject's number: the answer stays and becomes easier.
"""

from __future__ import annotations

import random

from circuitfind.errors import TaskError
from circuitfind.tasks.behaviour import Behaviour, Choice, Draw, numbered
from circuitfind.tasks.filled import filled
from circuitfind.tasks.lexicon import NOUNS
from circuitfind.tasks.rows import Row
from circuitfind.tasks.words import SingleTokens

NAME = "subject-verb-agreement"
CORRUPTIONS = ("other-number", "attractor-number")

_PRESENT, _PAST = ("is", "are"), ("was", "were")

TEMPLATES: tuple[tuple[str, tuple[str, str]], ...] = (
    ("The {subject} near the {attractor}", _PRESENT),
    ("The {subject} next to the {attractor}", _PRESENT),
    ("Today the {subject} behind the {attractor}", _PRESENT),
    ("I know that the {subject} with the {attractor}", _PRESENT),
    ("Yesterday the {subject} near the {attractor}", _PAST),
    ("Last week the {subject} behind the {attractor}", _PAST),
    ("Long ago the {subject} that the {attractor} had", _PAST),
)

SPANS = {"subject": ["subject"], "attractor": ["attractor"]}

_LEAST_NOUNS = 6


def _prepare(words: SingleTokens, choice: Choice) -> Draw:
    nouns = words.need_pairs(NOUNS, _LEAST_NOUNS, NAME, "nouns (singular and plural)")
    tenses = words.need_pairs((_PRESENT, _PAST), 1, NAME, "verbs (is and are, was and were)")
    patterns = choice.patterns
    templates = [template for template in TEMPLATES if template[1] in tenses and template[0] in patterns]
    if not templates:
        raise TaskError(
            f"{NAME}: the verbs of template {', '.join(choice.templates)} are not one token each with this tokenizer;"
            " choose another template"
        )

    def draw(rng: random.Random, number: int) -> Row:
        template, verbs = rng.choice(templates)
        subject, attractor = rng.sample(nouns, 2)
        plural = number % 2
        clean, spans = filled(template, SPANS, subject=subject[plural], attractor=attractor[1 - plural])
        answer, wrong = (verbs[plural],), (verbs[1 - plural],)
        if choice.corruption == "other-number":
            corrupted = template.format(subject=subject[1 - plural], attractor=attractor[1 - plural])
        else:
            corrupted = template.format(subject=subject[plural], attractor=attractor[plural])
        return Row(clean, corrupted, answer, wrong, flips=choice.corruption == "other-number", spans=spans)

    return draw


BEHAVIOUR = Behaviour(
    name=NAME,
    summary="the verb agrees with its subject, not with the nearer noun: The keys near the cabinet -> are",
    source="Linzen et al. 2016, Assessing the Ability of LSTMs ... (arXiv:1611.01368); Finlayson et al. 2021",
    metric="logit_diff",
    corruptions=CORRUPTIONS,
    prepare=_prepare,
    templates=numbered(text for text, _ in TEMPLATES),
)
