"""Multiple choice: the letter of the option that repeats a color from the question.

Wiegreffe et al. 2024, "Answer, Assemble, Ace"; MIB has their data as `copycolors_mcqa`. One of four options is the
color that the question names, so the model need only know how to answer with a letter. The wrong answer is the letter
that is right after the corrupted prompt. Spans: `color`, in the question; `option`, the same color among the options;
`symbol`, that option's letter. Corruptions, with MIB's names: `answer-position`, the right option changes places with
another; `random-letter`, the options have four other letters.
"""

from __future__ import annotations

import random
from string import ascii_uppercase

from circuitfind.tasks import lexicon
from circuitfind.tasks.builder import Choice, Draw, Pair, SingleTokens, TaskBuilder, numbered

OPTIONS = 4
_LETTERS = ascii_uppercase
_OPTIONS = "".join(f"\n{{symbol{at}}}. {{choice{at}}}" for at in range(OPTIONS))
_ASKED = "A {object} is {color}. What color is a {object}?" + _OPTIONS + "\nAnswer:"


def _prepare(words: SingleTokens, choice: Choice) -> Draw:
    colors = words.need(lexicon.COLORS, OPTIONS + 1, "mcqa", "colors")
    objects = words.need(lexicon.OBJECTS, 2, "mcqa", "objects")
    letters = words.need(_LETTERS, 2 * OPTIONS, "mcqa", "letters")
    symbols, others = letters[:OPTIONS], letters[OPTIONS:]

    def draw(rng: random.Random, number: int) -> Pair:
        pattern, colored = rng.choice(choice.patterns), rng.sample(colors, OPTIONS)
        at, elsewhere = rng.sample(range(OPTIONS), 2)
        shown = {f"symbol{i}": symbol for i, symbol in enumerate(symbols)}
        shown |= {f"choice{i}": color for i, color in enumerate(colored)}
        said = {"object": rng.choice(objects), "color": colored[at], **shown}
        spans = {"color": ["color"], f"symbol{at}": ["symbol"], f"choice{at}": ["option"]}
        if choice.corruption == "random-letter":
            drawn = rng.sample(others, OPTIONS)
            corrupted, wrong = {f"symbol{i}": symbol for i, symbol in enumerate(drawn)}, drawn[at]
        else:
            corrupted = {f"choice{at}": colored[elsewhere], f"choice{elsewhere}": colored[at]}
            wrong = symbols[elsewhere]
        return Pair.filled(pattern, said, corrupted, [symbols[at]], [wrong], flips=True, spans=spans)

    return draw


TASK = TaskBuilder(
    "mcqa",
    _prepare,
    ("answer-position", "random-letter"),
    templates=numbered(_ASKED),
    summary="multiple choice: A box is red. What color is a box? A. gray B. black C. red D. pink Answer: -> C",
    source="Wiegreffe et al. 2024, Answer, Assemble, Ace (arXiv:2407.15018); Mueller et al. 2025, MIB",
)
