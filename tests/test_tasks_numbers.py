"""Tasks of numbers on tokenizers that split them differently, and multiple choice."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from bpe import english, trained
from transformers import AutoTokenizer

from circuitfind.models import tiny
from circuitfind.tasks import lexicon
from circuitfind.tasks.builder import Pair, SingleTokens
from circuitfind.tasks.builtin import TASKS
from circuitfind.tasks.numbers import alike

WORDS = " ".join(lexicon.EVENTS)


@cache
def tokenizer(kind: str) -> Any:
    """One that keeps pairs of digits as GPT-2 does, one of digits, one of up to three digits as Llama 3's."""
    if kind == "pairs":
        return trained([WORDS, *(f" {number}" for number in range(10, 100))] * 20, 3000)
    if kind == "digits":
        return trained([WORDS, "12 + 25 = 37"] * 20, 3000, digits=1)
    return trained([WORDS, *(f" {number:03d}" for number in range(1000)), *(f" {n}" for n in range(100))] * 20, 4000, 3)


def made(name: str, kind: str, corruption: str, n: int = 60) -> list[Pair]:
    return TASKS[name].make(SingleTokens(tokenizer(kind)), n, seed=1, corruption=corruption)


def added(kind: str, prompt: str, more: str) -> list[str]:
    """The tokens that `more` adds to a prompt, whose own must stay."""
    one = tokenizer(kind)
    own, both = (one.encode(text, add_special_tokens=False) for text in (prompt, prompt + more))
    assert both[: len(own)] == own, (prompt, more)
    return one.convert_ids_to_tokens(both[len(own) :])


def test_how_numbers_are_split() -> None:
    embedded = SingleTokens(AutoTokenizer.from_pretrained(tiny.PATH))
    assert embedded.pieces(" 1732") == (" 17", "32") and embedded.pieces(" 17") == (" 17",)
    split = {kind: SingleTokens(tokenizer(kind)) for kind in ("pairs", "digits", "threes")}
    assert [one.pieces(" 68") for one in split.values()] == [(" 68",), (" ", "6", "8"), (" ", "68")]
    assert split["digits"].pieces(" 1732") == (" ", "1", "7", "3", "2")
    assert split["threes"].pieces(" 1732") == (" ", "173", "2")
    assert split["digits"].pieces(" é") == (), "a letter of two bytes has no text for either"
    # 10 to 19 are one token after a space, 20 to 99 a space and one token: the most common split counts
    assert list(alike(embedded, map(str, range(10, 100)))) == [str(number) for number in range(20, 100)]


@pytest.mark.parametrize("corruption", TASKS["greater-than"].corruptions)
@pytest.mark.parametrize("kind", ["digits", "threes"])
def test_decades_are_compared_where_the_decade_ends_a_token(kind: str, corruption: str) -> None:
    """By counting: a decade is right where all of its years are greater than the start, wrong where none is."""
    for row in made("greater-than", kind, corruption):
        (start,), (other,) = ([text.split()[6]] for text in (row.clean, row.corrupted))
        century = start[:2]
        assert row.clean.endswith(f"the year {century}" if kind == "digits" else "the year ")
        before = century if kind == "digits" else ""
        years = {answer: [int(before + answer + str(last)) for last in range(10)] for answer in row.answers + row.wrong}
        assert all(year > int(start) for answer in row.answers for year in years[answer])
        assert all(year <= int(start) for answer in row.wrong for year in years[answer])
        assert row.answers and row.wrong and len(years) == 9, "all decades but the start's own"
        assert start[:3].removeprefix(before) not in years and other[:3] != start[:3]
        assert (other[2:] == "01") == (corruption == "01")
        for answer in row.answers + row.wrong:
            assert len(added(kind, row.clean, answer)) == 1
            assert added(kind, row.clean.rpartition("year")[0] + "year", f" {before}{answer}5")[-1] == "5"


@pytest.mark.parametrize("corruption", TASKS["arithmetic-addition"].corruptions)
@pytest.mark.parametrize("kind", ["pairs", "digits", "threes"])
def test_sums_are_read_where_they_first_differ(kind: str, corruption: str) -> None:
    shown = set()
    for row in made("arithmetic-addition", kind, corruption):
        assert row.clean.startswith("12 + 25 = 37\n41 + 14 = 55\n") and row.flips
        sums = []
        for text, answers in ((row.clean, row.answers), (row.corrupted, row.wrong)):
            terms, _, head = text.splitlines()[-1].partition(" =")
            (a, b), (answer,) = map(int, terms.split(" + ")), answers
            assert str(a + b).startswith(head.strip() + answer), (text, answers)
            assert added(kind, text, answer if kind != "pairs" else f" {answer}")[0].lstrip("Ġ") == answer
            sums.append((a, b, head))
        (a, b, head), (x, y, twin) = sums
        assert head == twin and a + b != x + y and a + b < 100
        assert row.answers != row.wrong
        assert (b == y) == (corruption == "other-operand") or b == y
        shown.add(len(head))
    assert shown == {"pairs": {0}, "digits": {1, 2}, "threes": {1}}[kind]


def test_one_option_repeats_the_color() -> None:
    for corruption in TASKS["mcqa"].corruptions:
        for row in TASKS["mcqa"].make(SingleTokens(english()), 40, corruption=corruption):
            letters = []
            for text in (row.clean, row.corrupted):
                question, *options, end = text.split("\n")
                assert end == "Answer:" and len(options) == 4
                color = question.split(" is ")[1].partition(".")[0]
                letters += [option[0] for option in options if option[3:] == color]
            assert letters == [*row.answers, *row.wrong] and row.clean.split("\n")[0] == row.corrupted.split("\n")[0]
            assert ("\nA." in row.corrupted) == (corruption == "answer-position")
    spelled = TASKS["mcqa"].make(SingleTokens(english()), 4, corruption="answerPosition_counterfactual")  # MIB's
    assert spelled == TASKS["mcqa"].make(SingleTokens(english()), 4, corruption="answer-position")
