"""What is wrong with a task, said in words: literal twins of the two numbers, and one task for every line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from bpe import reader
from toys import id_task, wrapped

import circuitfind as cf
from circuitfind.cli.app import main
from circuitfind.errors import ModelError
from circuitfind.evaluation.diagnosis import chances
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.statistics import at_least
from circuitfind.tasks.tokens import piece

PROMPT = "If a company's revenue {} and expenses stay flat, profit will likely"
OTHERS = ("When sales {} and costs do not, the profit will", "If prices {} while wages stay, revenue will likely")
UP, DOWN = ("grow", "rise", "increase"), ("shrink", "fall", "decrease")


def finance(right: str = "increase", wrong: str = "decrease", **changes: Any) -> cf.Task:
    """Free-form pairs both ways: what goes up makes profit increase, what goes down makes it decrease."""
    clean, corrupted, answers, wrongs = [], [], [], []
    for prompt, (up, down) in itertools.product((PROMPT, *OTHERS), zip(UP, DOWN, strict=True)):
        clean += [prompt.format(up), prompt.format(down)]
        corrupted += [prompt.format(down), prompt.format(up)]
        answers += [right, wrong]
        wrongs += [wrong, right]
    return cf.Task(**{**dict(clean=clean, corrupted=corrupted, answers=answers, wrong_answers=wrongs), **changes})


@pytest.fixture(scope="module")
def model() -> cf.Model:
    return reader()


@cache
def tiny() -> cf.Model:
    return cf.load("tiny", check=False)


# -------------------------------------------------------------------- literal twins
def test_binomial_tails_by_counting() -> None:
    for size, chance in itertools.product((1, 2, 5), (0.25, 0.5, 0.9)):
        for count in range(size + 1):
            outcomes = [row for row in itertools.product((0, 1), repeat=size) if sum(row) >= count]
            expected = sum(np.prod([chance if hit else 1 - chance for hit in row]) for row in outcomes)
            assert at_least(count, size, chance) == pytest.approx(expected)
    assert (at_least(3, 5, 1.0), at_least(0, 5, 0.0), at_least(1, 5, 0.0)) == (1, 1, 0)
    assert at_least(6000, 10000, 0.5) < 1e-80 and at_least(5000, 10000, 0.5) == pytest.approx(0.504, abs=1e-3)


def test_chances_by_counting() -> None:
    """One answer is above w wrong ones in one of the 1 + w orders that start with it; of sets the larger one wins."""
    plain = wrapped("gpt2")
    task = id_task((5, 5, 5, 5))
    task.answers, task.wrong_answers = [[3], [4], [5, 6, 7], [8]], [[9], [9, 10, 11], [9, 10], [3, 4, 5, 6, 7, 9]]
    expected = []
    for right, wrong in zip(task.answers, task.wrong_answers, strict=True):
        if len(right) == 1:
            orders = list(itertools.permutations([*right, *wrong]))
            expected.append(np.mean([order[0] == right[0] for order in orders]))
        else:
            expected.append(float(len(right) > len(wrong)))
    np.testing.assert_allclose(chances(task.on(plain)), expected)
    two = id_task((5, 5), reads=None, positions=[[1, 2], [3, 4]], metric="logit_diff")
    two.answers, two.wrong_answers = [[3, 4], [5, 6]], [[7, 8], [9, 10]]
    np.testing.assert_allclose(chances(two.on(plain)), [0.25, 0.25])  # right at both positions


# -------------------------------------------------------------------- before a run
@pytest.mark.parametrize(
    ("task", "words"),
    [
        (
            lambda: finance("skyrocket"),
            r"answers must be one token each. with a leading space: row 0, ' skyrocket' is \d",
        ),
        (lambda: finance(corrupted=[text + " also" for text in finance().corrupted]), "row 0: the clean prompt has"),
        (lambda: finance("increase", "increase"), "row 0: token .* is among both the answers and the wrong answers"),
        (lambda: finance(answers=None), "metric 'logit_diff' needs answers"),
    ],
)
def test_what_the_model_cannot_be_given_is_the_one_error(
    model: cf.Model, task: Callable[[], cf.Task], words: str
) -> None:
    found = cf.diagnose(model, replace(task(), name="finance"))
    assert [finding.severity for finding in found.findings] == ["error"] and found.summary is None and not found.ok
    assert found.name == "finance" and re.search(words, found.findings[0].text)
    assert str(found).startswith("finance: check this first\nerror: ") and found.to_dict()["summary"] is None


def test_what_is_no_model_is_raised() -> None:
    with pytest.raises(ModelError, match=r"load it: cf\.load\('tiny'\)"):
        cf.diagnose("tiny", finance())  # type: ignore[arg-type]


# -------------------------------------------------------------------- the behaviour
def test_a_model_without_the_behaviour(model: cf.Model) -> None:
    found = cf.diagnose(model, finance())
    summary = cf.summarise(model, finance(), warn=False)
    assert summary.n == 18 and 0.3 < summary.accuracy < 0.7, "the test needs a model that guesses"
    expected = (
        f"). An accuracy of {summary.accuracy:.0%} is no better than guessing (50%): the model may not do this task."
    )
    assert summary.chance == 0.5 and summary.warning().endswith(expected)
    assert summary.warning() in found.warnings and found.summary == summary and not found.ok
    metric = cf.diagnose(model, finance(), metric="prob_diff", batch_size=5)
    assert metric.summary.metric == "prob_diff" and summary.warning() in metric.warnings


def test_a_model_with_the_behaviour() -> None:
    found = cf.diagnose(tiny(), cf.task("ioi", tiny(), n=16))
    assert found.ok and found.findings == () and found.summary.accuracy == 1
    assert (
        str(found).startswith("ioi: no warnings\npair 0: the model answers '") and found.to_dict()["summary"]["n"] == 16
    )
    assert cf.diagnose(tiny(), cf.task("greater-than", tiny(), n=8)).ok
    few = cf.diagnose(tiny(), cf.task("ioi", tiny(), n=3))
    assert few.ok and few.findings[0] == ("note", "100% accuracy on only 3 pairs could be guessing (50%)")
    bare = cf.diagnose(tiny(), cf.task("ioi", tiny(), n=8, metric="kl"))
    assert bare.summary.metric == "kl" and bare.ok


def test_some_rows_that_fail() -> None:
    task = cf.task("ioi", tiny(), n=16)
    task.answers[3], task.wrong_answers[3] = task.wrong_answers[3], task.answers[3]
    found = cf.diagnose(tiny(), task)
    assert found.warnings == ("the model does not prefer the answer on 1 of 16 clean prompts (rows 3).",)
    first = cf.Task(task.clean, task.corrupted, task.answers, metric="logprob")
    assert found.warnings == cf.diagnose(tiny(), first).warnings


# -------------------------------------------------------------------- the contrast
def test_sides_that_are_exchanged() -> None:
    task = cf.task("ioi", tiny(), n=12, corruption="abc")
    found = cf.diagnose(tiny(), replace(task, clean=task.corrupted, corrupted=task.clean, spans=None))
    assert any(
        "do not lower the metric (mean metric" in line and "): are the sides exchanged?" in line
        for line in found.warnings
    )


def test_answers_that_are_exchanged() -> None:
    """Every row is wrong: that is no guessing, and the sides of a flip may be what is exchanged."""
    task = cf.task("ioi", tiny(), n=12)
    found = cf.diagnose(tiny(), replace(task, answers=task.wrong_answers, wrong_answers=task.answers))
    expected = "). An accuracy of 0% is worse than guessing (50%): are answers and wrong answers, or the two sides,"
    assert expected in found.warnings[0] and found.warnings[0] == found.summary.warning()
    assert "no better" not in found.warnings[0]


def test_no_wrong_answers_are_no_guess() -> None:
    """Then the answer has to be the most likely of all tokens: one row that is right is more than chance."""
    task = cf.task("ioi", tiny(), n=8)
    assert np.isnan(cf.summarise(tiny(), replace(task, answers=None, wrong_answers=None, metric="kl")).chance)
    swapped = [task.wrong_answers[0], *task.answers[1:]]
    one = cf.summarise(tiny(), cf.Task(task.clean, task.corrupted, swapped, metric="logprob"), warn=False)
    assert one.chance == 0 and one.failing == (0,) and "guessing" not in one.warning()
    none = cf.Task(task.clean, task.corrupted, task.wrong_answers, metric="logprob")
    assert "0% is no better than guessing (0%)" in cf.summarise(tiny(), none, warn=False).warning()


def test_a_corruption_that_keeps_the_answer() -> None:
    found = cf.diagnose(tiny(), cf.task("ioi", tiny(), n=32, corruption="s1-io-flip"))
    assert "does the corruption leave the answer as it is, or are the sides exchanged?" in found.warnings[0]


def test_corrupted_prompts_that_change_nothing() -> None:
    """Another place: the names, and so the answer, stay."""
    task = cf.task("ioi", tiny(), n=12, template=1)
    places = [text.split(" the ")[1].split(",")[0] for text in task.clean]
    twins = [text.replace(a, b) for text, a, b in zip(task.clean, places, [*places[1:], "castle"], strict=True)]
    kept = [n for n in range(12) if task.clean[n] != twins[n]]
    task = replace(task, corrupted=twins).subset(kept)
    difference = np.subtract(*(lambda e: (e.full, e.empty))(Evaluator.of(tiny(), task)))
    error = difference.std(ddof=1) / len(difference) ** 0.5
    assert 0 < difference.mean() <= 2 * error or difference.mean() <= 0, "the test needs a corruption without effect"
    (line,) = cf.diagnose(tiny(), task).warnings
    assert line.startswith("the corrupted prompts do not lower the metric")


def test_a_pair_whose_two_sides_measure_the_same_is_not_lowered() -> None:
    task = id_task((5, 5, 5, 5), metric=lambda logits, batch: torch.zeros(len(batch)))
    assert cf.summarise(wrapped("gpt2"), task, warn=False).lowered == 0


def test_a_few_pairs_that_make_the_mean(monkeypatch: pytest.MonkeyPatch, model: cf.Model) -> None:
    values = {"full": np.array([9.0, 9, 9, 9, 9, 1, 1, 1, 1, 1]), "empty": np.array([0.0, 0, 0, 0, 0, 2, 2, 2, 2, 2])}
    right = np.ones(10, dtype=bool)
    fake = type("Fake", (), {**values, "full_accurate": right, "full_top1": right, "rounding_of_contrast": 0.0})()
    fake.runs = type("Runs", (), {"each": lambda *_: iter(())})()
    fake.bound = finance().on(model).subset(range(10))
    monkeypatch.setattr("circuitfind.evaluation.diagnosis.Evaluator", lambda *_, **__: fake)
    found = cf.diagnose(model, finance())
    expected = "the corrupted prompt lowers the metric in only 5 of 10 pairs: the mean comes from a few pairs (mean"
    assert any(line.startswith(expected) for line in found.warnings)
    fake.full, fake.empty, fake.bound = fake.full + 9, np.arange(10.0) / 9, replace(fake.bound, flips=True)
    notes = [finding.text for finding in cf.diagnose(model, finance()).findings if finding.severity == "note"]
    assert any(text.startswith("the corrupted prompts should reverse the answer, but not for this") for text in notes)


# -------------------------------------------------------------------- the answers
def test_an_answer_without_a_space(model: cf.Model) -> None:
    tokens = [model.tokenizer.tokenize(text) for text in ("Z", " Z", "Q", " Q")]
    assert [len(row) for row in tokens] == [1, 2, 1, 2], (
        "the test needs answers that are one token without a space only"
    )
    found = cf.diagnose(model, finance("Z", "Q"))
    expected = (
        "row 0: the answer 'Z' has no space before it and continues the word 'likely': choose answers that are one"
        " token after a space, or end the prompt before the word"
    )
    assert expected in found.warnings
    assert not any("has no space" in line for line in cf.diagnose(model, finance()).warnings)
    years = cf.diagnose(tiny(), cf.task("greater-than", tiny(), n=4))  # digits go on after digits
    assert not any("has no space" in line for line in years.warnings)


def test_two_spaces_before_an_answer(model: cf.Model) -> None:
    """GPT-2's tokens: after a prompt that ends in a space only an answer with another space is one token."""
    spaced = [text + " " for text in finance().clean], [text + " " for text in finance().corrupted]
    for right in ("increase", " increase"):
        task = replace(finance(right, right.replace("in", "de", 1)), clean=spaced[0], corrupted=spaced[1])
        assert task.on(model).notes[0].endswith("a prompt that ends in a space")
        expected = "row 0: the prompt ends in a space and the answer ' increase' begins with one: end the prompt before"
        assert any(line.startswith(expected) for line in cf.diagnose(model, task).warnings)
    assert not any("ends in a space" in line for line in cf.diagnose(model, finance()).warnings)


def test_pieces_of_characters_are_shown_as_bytes(model: cf.Model) -> None:
    tokenizer = model.tokenizer
    ids = tokenizer("the “profit” of ☃ and é")["input_ids"]
    assert any("\ufffd" in tokenizer.decode([token]) for token in ids), "the test needs characters of several tokens"
    shown = [piece(tokenizer, token) for token in ids]
    assert not any("\ufffd" in text for text in shown)
    whole = "".join(shown)
    assert "<0xE2><0x98><0x83>" in whole and "<0xC3><0xA9>" in whole and "profit" in whole
    pieces = tokenizer.convert_tokens_to_ids(["â", "ĺ"])
    task = cf.Task(["of ☃ and é"] * 2, ["as ☃ and é"] * 2, answers=pieces[:1] * 2, wrong_answers=pieces[1:] * 2)
    bound = task.on(model)
    assert "\ufffd" not in repr(bound.tokens) and bound.answer_texts[0] == "<0xE2> / <0x98>"
    found = cf.diagnose(model, task).warnings
    assert any(line.startswith("row 0: the answer <0xE2> is only some bytes of a character") for line in found)
    ids_only = cf.Task(torch.tensor([ids]), torch.tensor([ids[1:] + ids[:1]]), pieces[:1], pieces[1:])
    assert any("is only some bytes of a character" in line for line in cf.diagnose(model, ids_only).warnings)
    assert "\ufffd" not in repr(cf.attention(model, bound, "a0.h0").tokens)


def test_a_byte_of_sentencepiece_keeps_its_name() -> None:
    class Bytes:
        def __init__(self, name: str | bytes) -> None:
            self.name = name

        def decode(self, ids: list[int]) -> str:
            return "\ufffd"

        def convert_ids_to_tokens(self, token: int) -> str | bytes:
            return self.name

    for name, shown in (("<0xE2>", "<0xE2>"), (b" \xe2\x80", " <0xE2><0x80>"), ("ï¿½", "<0xEF><0xBF><0xBD>")):
        assert piece(Bytes(name), 7) == shown
    assert piece(Bytes("▁?"), 7) == "<0xEF><0xBF><0xBD>"  # no byte is known


def test_one_answer_for_all_pairs(model: cf.Model) -> None:
    half = finance().subset(range(0, 18, 2))
    notes = [finding.text for finding in cf.diagnose(model, half).findings if finding.severity == "note"]
    assert any(
        text.startswith("all pairs have the same answers (increase / decrease), so a constant") for text in notes
    )
    assert not any("constant" in finding.text for finding in cf.diagnose(model, finance()).findings)


# -------------------------------------------------------------------- on the command line
def test_the_command_line_warns_before_it_scores(
    model: cf.Model, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cf, "load", lambda *_, **__: model)
    path = finance().save("finance.jsonl")
    for verb in ("attribute", "find"):
        size = ("--method", "eap") if verb == "attribute" else ("--method", "eap", "--max-checks", "2", "--random", "0")
        main((verb, "reader", "--data", str(path), "--out", verb, *size))
        said = " ".join(capsys.readouterr().err.split())
        assert "no better than guessing (50%): the model may not do" in said, verb


def test_ids_are_diagnosed_without_a_tokenizer() -> None:
    found = cf.diagnose(wrapped("llama"), id_task((6, 6, 6)))
    assert found.summary is not None and found.summary.n == 3 and torch.is_grad_enabled()
