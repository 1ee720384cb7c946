'''Docstrings: an argument of a Python method that its docstring has yet to describe.

    def port(self, load, size, files, last, name, test):
        """oil column piece

        :param files: crime population
        :param last: unit dark
        :param                                  -> name

Heimersheim & Janiak 2023, "A circuit for Python docstrings in a 4-layer attention-only transformer". Of the six
arguments the docstring describes the third and the fourth, so the fifth comes next; all others are wrong answers.
Spans, with the paper's names: A_def, B_def and C_def, these three in the definition, A_doc and B_doc in the docstring.

Corruptions, in the names of ACDC (Conmy et al. 2023):
* `random-random`: other arguments in the definition (in place of the three that matter) and others in the docstring.
* `random-def`: the two arguments before the answer are others in the definition: nothing links it to the docstring.
* `random-doc`: the docstring describes two arguments that the definition does not have.
* `random-answer`: another argument stands in the answer's place: it is the wrong answer, and the metric flips.
'''

from __future__ import annotations

import random

from circuitfind.errors import TaskError
from circuitfind.tasks.behaviour import Behaviour, Choice, Draw, numbered
from circuitfind.tasks.filled import Filled, filled
from circuitfind.tasks.lexicon import DESCRIPTIONS, IDENTIFIERS
from circuitfind.tasks.rows import Row
from circuitfind.tasks.words import SingleTokens

NAME = "docstring"
CORRUPTIONS = ("random-random", "random-def", "random-doc", "random-answer")

TEMPLATE = '''def {method}(self, {before}, {a}, {b}, {c}, {after}):
    """{about}

    :param {a_doc}: {of_a}
    :param {b_doc}: {of_b}
    :param'''
SPANS = {"a": ["A_def"], "b": ["B_def"], "c": ["C_def"], "a_doc": ["A_doc"], "b_doc": ["B_doc"]}

_LEAST_IDENTIFIERS, _LEAST_DESCRIPTIONS = 16, 8


def _prepare(words: SingleTokens, choice: Choice) -> Draw:
    identifiers = words.need(IDENTIFIERS, _LEAST_IDENTIFIERS, NAME, "names of arguments")
    nouns = words.need(DESCRIPTIONS, _LEAST_DESCRIPTIONS, NAME, "nouns")
    if not words.keeps(TEMPLATE):
        raise TaskError(
            f"{NAME}: this tokenizer loses line breaks, spaces or punctuation of code; choose another behaviour or"
            " model, or bring your own pairs in a file"
        )

    def draw(rng: random.Random, number: int) -> Row:
        method, *names = rng.sample(identifiers, 14)
        before, (first, second, answer), after, others = names[:2], names[2:5], names[5:6], names[6:]
        said = [" ".join(rng.sample(nouns, size)) for size in (3, 2, 2)]

        def say(matching: list[str], described: list[str]) -> Filled:
            a, b, c = matching
            a_doc, b_doc = described
            arguments = {"before": ", ".join(before), "a": a, "b": b, "c": c, "after": ", ".join(after)}
            texts = {"about": said[0], "a_doc": a_doc, "of_a": said[1], "b_doc": b_doc, "of_b": said[2]}
            return filled(TEMPLATE, SPANS, method=method, **arguments, **texts)

        clean, spans = say([first, second, answer], [first, second])
        wrong = (*before, first, second, *after)
        if choice.corruption == "random-def":
            corrupted = say([*others[:2], answer], [first, second])
        elif choice.corruption == "random-doc":
            corrupted = say([first, second, answer], others[:2])
        elif choice.corruption == "random-answer":
            corrupted, wrong = say([first, second, others[0]], [first, second]), (others[0],)
        else:
            corrupted = say(others[:3], others[3:5])
        return Row(clean, corrupted.text, (answer,), wrong, flips=choice.corruption == "random-answer", spans=spans)

    return draw


BEHAVIOUR = Behaviour(
    name=NAME,
    summary="the next argument to describe: def f(self, size, files, last): ... :param size: ... :param -> files",
    source="Heimersheim & Janiak 2023, A circuit for Python docstrings in a 4-layer attention-only transformer",
    metric="logit_diff",
    corruptions=CORRUPTIONS,
    prepare=_prepare,
    templates=numbered([TEMPLATE]),
)
