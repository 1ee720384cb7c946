"""What the embedded model reads: prompts of the built-in behaviours, filler sentences, repeated word lists.

Three rules:
1. Words are never held out, combinations are. A prompt's combination is the set of its content words (names,
   places, nouns, years, ...); one combination in five, by hash, is held out: training never sees it in any
   prompt of a behaviour, and evaluation uses nothing else.
2. Both twins of a flipping pair are ordinary clean prompts: the corrupted ones are trained like the others.
3. Twelve names (`UNSEEN_IN_IOI`) never occur in an IOI prompt. They are trained in lists and in filler
   sentences, so that IOI on unseen names can be measured.

Every example is a `Sample`: a text and its right continuations, which are equally likely.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from circuitfind.tasks import ioi, lexicon
from circuitfind.tasks.builder import Pair, SingleTokens
from circuitfind.tasks.builtin import LIST_PREFIX, LIST_WORDS, TASKS

UNSEEN_FEMALE = ("Megan", "Alicia", "Sharon", "Patricia", "Donna", "Cynthia")
UNSEEN_MALE = ("Samuel", "Gabriel", "Louis", "Walter", "Victor", "Jerry")
UNSEEN_IN_IOI = UNSEEN_FEMALE + UNSEEN_MALE

TRAINED = {  # the embedded model learns these; what was added to the package later is not part of its training
    "ioi": ("s2-io-flip", "s1-io-flip", "abc", "random-names"),
    "greater-than": ("01", "random-year"),
    "gendered-pronoun": ("other-gender",),
    "subject-verb-agreement": ("other-number", "attractor-number"),
    "induction": ("next-swap", "no-repeat"),
}
BEHAVIOURS = {name: replace(TASKS[name], corruptions=known) for name, known in TRAINED.items()}

HELD_OUT_ONE_IN = 5
_ROWS_AT_A_TIME = 32


class Sample(NamedTuple):
    """A text and its right continuations (none for filler: then only the text itself is learnt)."""

    text: str
    answers: tuple[str, ...]


def _content_words() -> dict[str, str]:
    """Content word -> what it counts as (a plural counts as its singular)."""
    plain = lexicon.FEMALE_NAMES + lexicon.MALE_NAMES + UNSEEN_IN_IOI + lexicon.PLACES + lexicon.OBJECTS
    words = {word: word for word in plain + lexicon.ADJECTIVES + lexicon.PEOPLE + lexicon.EVENTS}
    for singular, plural in lexicon.NOUNS:
        words[singular] = words[plural] = singular
    return words


_CONTENT = _content_words()
_WORD = re.compile(r"[A-Za-z]+|\d{4}")


def held_out(text: str) -> bool:
    """Whether this prompt's combination of content words is kept away from training."""
    found = {_CONTENT.get(word, word) for word in _WORD.findall(text) if word in _CONTENT or word.isdigit()}
    digest = hashlib.sha256("|".join(sorted(found)).encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def behaviour_samples(name: str, words: SingleTokens, seed: int) -> Iterator[Sample]:
    """Endless training prompts of one behaviour, from all its corruptions that have a right answer."""
    behaviour = BEHAVIOURS[name]
    rng = random.Random(seed)
    while True:
        for corruption in behaviour.corruptions:
            for row in behaviour.make(words, _ROWS_AT_A_TIME, rng.getrandbits(48), corruption):
                yield from _samples(name, row, corruption)


def _samples(name: str, row: Pair, corruption: str) -> Iterator[Sample]:
    if not held_out(row.clean):
        yield Sample(row.clean, row.answers)
    if held_out(row.corrupted):
        return
    if row.flips:
        yield Sample(row.corrupted, row.wrong)
    elif corruption == "attractor-number":
        yield Sample(row.corrupted, row.answers)
    elif name == "greater-than":
        ending = row.corrupted[row.corrupted.index(" to the") - 2 : row.corrupted.index(" to the")]
        yield Sample(row.corrupted, tuple(e for e in sorted(row.answers + row.wrong) if e > ending))
    elif corruption == "abc":
        # The names of the first clause are equally likely when a third name acts.
        first, second = re.findall(r"(?<= )[A-Z][a-z]+", row.corrupted)[:2]
        yield Sample(row.corrupted, (first, second))


def list_samples(seed: int) -> Iterator[Sample]:
    """Word lists with names among them, repeated whole: names are seen twice in other places than IOI."""
    rng = random.Random(seed)
    names = lexicon.FEMALE_NAMES + lexicon.MALE_NAMES + UNSEEN_IN_IOI
    while True:
        length = rng.randint(3, 8)
        named = rng.randint(0, length)
        drawn = rng.sample(names, named) + rng.sample(LIST_WORDS, length - named)
        rng.shuffle(drawn)
        text = " ".join([LIST_PREFIX, *drawn, *drawn[: rng.randint(1, length - 1)]])
        at = text.split().index(text.split()[-1])
        if not held_out(text):
            yield Sample(text, (text.split()[at + 1],))


_FILLER = (
    "Yesterday {a} and {b} were at the {place}.",
    "I saw {a} with a {object} near the {place}.",
    "The {adjective} {person} went to the {place} because {a} was there.",
    "Today {a} gave the {object} to {b} at the {place}.",
    "So {a} said that the {adjective} {person} was at the {place}.",
    "The {event} near the {place} was not {adjective}.",
    "Everyone knows {a}, because {a} is a {adjective} {person}.",
    "A {person} came with {a}. The {person} said that {a} is {adjective}.",
    "I met {a}, {b} and {c}. Then {a} went home with {b}.",
    "It was in the year {year} that the {event} came to the {place}.",
)


def filler_samples(seed: int) -> Iterator[Sample]:
    """Plain sentences with the same words in other places, all names among them."""
    rng = random.Random(seed)
    names = lexicon.FEMALE_NAMES + lexicon.MALE_NAMES + UNSEEN_IN_IOI * 3
    while True:
        a, b, c = rng.sample(names, 3)
        yield Sample(
            rng.choice(_FILLER).format(
                a=a,
                b=b,
                c=c,
                place=rng.choice(lexicon.PLACES),
                object=rng.choice(lexicon.OBJECTS),
                adjective=rng.choice(lexicon.ADJECTIVES),
                person=rng.choice(lexicon.PEOPLE),
                event=rng.choice(lexicon.EVENTS),
                year=f"{rng.randint(10, 18)}{rng.randint(0, 99):02d}",
            ),
            (),
        )


def evaluation_rows(name: str, words: SingleTokens, n: int, seed: int, corruption: str) -> list[Pair]:
    """`n` distinct rows of held-out combinations only (of a flipping pair, both twins are held out)."""
    rng = random.Random(seed)
    found: dict[str, Pair] = {}
    while len(found) < n:
        for row in BEHAVIOURS[name].make(words, 4 * n, rng.getrandbits(48), corruption):
            if held_out(row.clean) and (held_out(row.corrupted) or not row.flips):
                found.setdefault(row.clean, row)
    return list(found.values())[:n]


def unseen_name_rows(n: int, seed: int, corruption: str = "s2-io-flip") -> list[Pair]:
    """IOI rows whose names training never put into an IOI prompt."""
    draw = ioi.drawer(UNSEEN_IN_IOI, lexicon.PLACES, lexicon.OBJECTS, corruption)
    rng = random.Random(seed)
    found: dict[str, Pair] = {}
    while len(found) < n:
        row = draw(rng, len(found))
        found.setdefault(row.clean, row)
    return list(found.values())
