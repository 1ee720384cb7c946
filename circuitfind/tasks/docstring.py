'''Docstrings: an argument of a Python method that its docstring has not described yet.

    def port(self, load, size, files, last, name, test):
        """oil column piece

        :param files: crime population
        :param last: unit dark
        :param                                  -> name

Heimersheim & Janiak 2023, "A circuit for Python docstrings in a 4-layer attention-only transformer". The docstring
describes the third and fourth of six arguments, so the fifth comes next; all others are wrong answers. Spans, with the
paper's names: A_def, B_def and C_def, these three arguments in the definition, A_doc and B_doc in the docstring.

Corruptions, with ACDC's names (Conmy et al. 2023):
* `random-random`: other arguments in the definition (in place of the three that matter) and in the docstring.
* `random-def`: the two arguments before the answer are others in the definition: nothing links it to the docstring.
* `random-doc`: the docstring describes two arguments that the definition does not have.
* `random-answer`: another argument takes the answer's place: it is the wrong answer, and the metric's sign flips.
'''

from __future__ import annotations

import random

from circuitfind.errors import TaskError
from circuitfind.tasks.builder import Choice, Draw, Pair, SingleTokens, TaskBuilder, numbered
from circuitfind.tasks.lexicon import DESCRIPTIONS, IDENTIFIERS

TEMPLATE = '''def {method}(self, {before}, {a}, {b}, {c}, {after}):
    """{about}

    :param {a_doc}: {of_a}
    :param {b_doc}: {of_b}
    :param'''
SPANS = {"a": ["A_def"], "b": ["B_def"], "c": ["C_def"], "a_doc": ["A_doc"], "b_doc": ["B_doc"]}


def _prepare(words: SingleTokens, choice: Choice) -> Draw:
    identifiers = words.need(IDENTIFIERS, 16, "docstring", "names of arguments")
    nouns = words.need(DESCRIPTIONS, 8, "docstring", "nouns")
    if not words.keeps(TEMPLATE):
        raise TaskError(
            "docstring: this tokenizer loses line breaks, spaces or punctuation of code; choose another task or model,"
            " or bring your own pairs in a file"
        )
    flips = choice.corruption == "random-answer"

    def draw(rng: random.Random, number: int) -> Pair:
        method, *names = rng.sample(identifiers, 14)
        before, (a, b, answer), after, others = names[:2], names[2:5], names[5], names[6:]
        about, of_a, of_b = (" ".join(rng.sample(nouns, size)) for size in (3, 2, 2))
        said = {"method": method, "before": ", ".join(before), "a": a, "b": b, "c": answer, "after": after}
        said |= {"about": about, "a_doc": a, "of_a": of_a, "b_doc": b, "of_b": of_b}
        corrupted = {
            "random-random": dict(zip(("a", "b", "c", "a_doc", "b_doc"), others, strict=False)),
            "random-def": {"a": others[0], "b": others[1]},
            "random-doc": {"a_doc": others[0], "b_doc": others[1]},
            "random-answer": {"c": others[0]},
        }[choice.corruption]
        wrong = others[:1] if flips else [*before, a, b, after]
        return Pair.filled(TEMPLATE, said, corrupted, [answer], wrong, flips=flips, spans=SPANS)

    return draw


TASK = TaskBuilder(
    "docstring",
    _prepare,
    ("random-random", "random-def", "random-doc", "random-answer"),
    templates=numbered(TEMPLATE),
    summary="the next argument to describe: def f(self, size, files, last): ... :param size: ... :param -> files",
    source="Heimersheim & Janiak 2023, A circuit for Python docstrings in a 4-layer attention-only transformer",
)
