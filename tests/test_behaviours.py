"""The built-in behaviours as text, and the embedded model's figures on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from circuitfind.errors import TaskError
from circuitfind.models import tiny
from circuitfind.tasks import greater_than, ioi, lexicon
from circuitfind.tasks.builtin import BEHAVIOURS, behaviour
from circuitfind.tasks.rows import Row
from circuitfind.tasks.words import SingleTokens

TRAINING = Path(__file__).resolve().parents[1] / "training"
EVERY = [(name, corruption) for name, b in BEHAVIOURS.items() for corruption in b.corruptions]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny.PATH)


@pytest.fixture(scope="module")
def words(tokenizer: Any) -> SingleTokens:
    return SingleTokens(tokenizer)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny.PATH, dtype=torch.float32).eval()


@pytest.fixture()
def training_modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.syspath_prepend(str(TRAINING))
    import corpus
    import measure

    return corpus, measure


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def word_level(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *vocabulary])}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")


# --- rows ---


def test_the_five_behaviours_are_there() -> None:
    names = ["ioi", "greater-than", "gendered-pronoun", "subject-verb-agreement", "induction"]
    assert list(BEHAVIOURS) == names
    assert all(b.name == name and b.summary and b.source for name, b in BEHAVIOURS.items())


@pytest.mark.parametrize(("name", "corruption"), EVERY)
def test_same_seed_same_rows(name: str, corruption: str, tokenizer: Any) -> None:
    first = BEHAVIOURS[name].make(SingleTokens(tokenizer), 40, seed=3, corruption=corruption)
    again = BEHAVIOURS[name].make(SingleTokens(tokenizer), 40, seed=3, corruption=corruption)
    other = BEHAVIOURS[name].make(SingleTokens(tokenizer), 40, seed=4, corruption=corruption)
    assert first == again
    assert first != other


def test_rows_do_not_change_between_versions(words: SingleTokens) -> None:
    row = BEHAVIOURS["ioi"].make(words, 1, seed=0)[0]
    assert row == Row(
        clean="Friends Luke and Aaron found a message at the gallery. Aaron gave it to",
        corrupted="Friends Luke and Aaron found a message at the gallery. Luke gave it to",
        answers=("Luke",),
        wrong=("Aaron",),
        flips=True,
    )


@pytest.mark.parametrize(("name", "corruption"), EVERY)
def test_rows_are_distinct_and_minimal_pairs(name: str, corruption: str, words: SingleTokens, tokenizer: Any) -> None:
    rows = BEHAVIOURS[name].make(words, 300, seed=0, corruption=corruption)
    assert len({row.clean for row in rows}) == 300
    for row in rows:
        clean, corrupted = encode(tokenizer, row.clean), encode(tokenizer, row.corrupted)
        assert clean != corrupted
        assert len(clean) == len(corrupted), row
        assert row.clean == row.clean.strip()
        assert row.answers and row.wrong and not set(row.answers) & set(row.wrong)
        assert not any(answer.startswith(" ") for answer in row.answers + row.wrong)


@pytest.mark.parametrize("name", list(BEHAVIOURS))
def test_answers_are_one_token_after_the_prompt(name: str, words: SingleTokens, tokenizer: Any) -> None:
    for row in BEHAVIOURS[name].make(words, 100, seed=0):
        prompt = encode(tokenizer, row.clean)
        for answer in row.answers + row.wrong:
            either = [encode(tokenizer, row.clean + space + answer) for space in (" ", "")]
            assert any(ids[:-1] == prompt for ids in either), (row.clean, answer)


def names(text: str) -> list[str]:
    """The names of an IOI prompt, in order."""
    known = set(lexicon.FEMALE_NAMES + lexicon.MALE_NAMES)
    return [word for word in text.replace(",", "").replace(".", "").split() if word in known]


def test_ioi_has_both_orders_half_and_half(words: SingleTokens) -> None:
    rows = BEHAVIOURS["ioi"].make(words, 200, seed=0)
    assert sum(names(row.clean)[0] == row.answers[0] for row in rows) == 100  # ABBA
    assert sum(names(row.clean)[1] == row.answers[0] for row in rows) == 100  # BABA
    assert len(ioi.TEMPLATES) >= 6


def test_ioi_corruptions_do_what_they_are_called(words: SingleTokens) -> None:
    for row in BEHAVIOURS["ioi"].make(words, 50, corruption="s2-io-flip"):
        assert row.flips and names(row.clean)[:2] == names(row.corrupted)[:2]
        assert names(row.clean)[2] == row.wrong[0] and names(row.corrupted)[2] == row.answers[0]
    for row in BEHAVIOURS["ioi"].make(words, 50, corruption="s1-io-flip"):
        assert not row.flips and names(row.clean)[:2] == names(row.corrupted)[1::-1]
    for row in BEHAVIOURS["ioi"].make(words, 50, corruption="abc"):
        assert len(set(names(row.corrupted) + names(row.clean))) == 5
    for row in BEHAVIOURS["ioi"].make(words, 50, corruption="random-names"):
        assert len(set(names(row.corrupted))) == 2 and not set(names(row.corrupted)) & set(names(row.clean))


def test_greater_than_splits_all_endings_at_the_start_year(words: SingleTokens) -> None:
    for row in BEHAVIOURS["greater-than"].make(words, 50, seed=1):
        start = row.clean.split(" to the")[0][-2:]
        assert sorted(row.answers + row.wrong) == [f"{i:02d}" for i in range(100)]
        assert min(row.answers) > start == max(row.wrong)
        assert row.corrupted.split(" to the")[0].endswith("01")


def test_induction_is_determined_by_the_first_half(words: SingleTokens) -> None:
    for row in BEHAVIOURS["induction"].make(words, 50, seed=1):
        for text, answer in ((row.clean, row.answers[0]), (row.corrupted, row.wrong[0])):
            said = text.split()
            assert said.count(said[-1]) == 2
            assert said[said.index(said[-1]) + 1] == answer


# --- words and tokenizers ---


def test_every_word_is_one_token_for_the_embedded_tokenizer(words: SingleTokens) -> None:
    nouns = [word for pair in lexicon.NOUNS for word in pair]
    lists = (lexicon.FEMALE_NAMES, lexicon.MALE_NAMES, lexicon.PLACES, lexicon.OBJECTS, lexicon.ADJECTIVES)
    for listed in (*lists, lexicon.PEOPLE, lexicon.EVENTS, nouns, ["she", "he", "is", "are", "was", "were"]):
        assert words.keep(listed) == list(listed)
        assert len(set(listed)) == len(listed)
    assert all(len(words.century_endings(century)) == 100 for century in greater_than.CENTURIES)
    assert words.century_endings("25") == ()


def test_the_embedded_tokenizer_round_trips_any_text(tokenizer: Any) -> None:
    for text in ("  Two  spaces\n\tand a tab ", "Ünïcödé — 漢字 🎉 \x00", "in 1999, n't <|x|> 42%"):
        assert tokenizer.decode(encode(tokenizer, text)) == text
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "year 1732"))[-2:] == ["Ġ17", "32"]


def test_words_are_judged_in_running_text() -> None:
    few = SingleTokens(word_level(["x", "Mary", "John"]))
    assert few.keep(["Mary", "Anna", "John", "Mary Anna"]) == ["Mary", "John"]
    assert few.century_endings("17") == ()


@pytest.mark.parametrize("name", list(BEHAVIOURS))
def test_a_tokenizer_without_the_words_is_refused(name: str) -> None:
    few = SingleTokens(word_level(["x", "Mary", "John", "she", "he", "war", "siege"]))
    with pytest.raises(TaskError) as refusal:
        BEHAVIOURS[name].make(few, 4)
    line = str(refusal.value)
    assert line.startswith(name + ": ") and "\n" not in line
    assert " of " in line and "your own pairs" in line


def test_refusals_name_what_is_missing() -> None:
    few = SingleTokens(word_level(["Mary", "John"]))
    with pytest.raises(TaskError, match=r"ioi: 2 of 120 names are one token each with this tokenizer, 8 are needed"):
        BEHAVIOURS["ioi"].make(few, 4)
    years = SingleTokens(word_level(list(lexicon.EVENTS)))
    with pytest.raises(TaskError, match=r"greater-than: 0 of 9 centuries"):
        BEHAVIOURS["greater-than"].make(years, 4)


def test_unknown_names_get_a_hint(words: SingleTokens) -> None:
    assert behaviour("Greater_Than").name == "greater-than"
    with pytest.raises(TaskError, match=r"did you mean 'induction'\?"):
        behaviour("inducton")
    with pytest.raises(TaskError, match=r"did you mean 's2-io-flip'\?"):
        behaviour("ioi").make(words, 4, corruption="s2_io_flp")
    with pytest.raises(TaskError, match="at least 1"):
        behaviour("ioi").make(words, 0)


# --- the embedded model ---


def test_the_embedded_model_is_real_and_small(model: Any) -> None:
    config = model.config
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert config.n_layer >= 4 and config.n_head >= 4 and config.activation_function == "gelu_new"
    assert sum(path.stat().st_size for path in tiny.PATH.iterdir() if path.is_file()) < 8e6


@pytest.mark.parametrize("name", list(BEHAVIOURS))
def test_published_figures_meet_the_bar(name: str) -> None:
    found = tiny.figures()["behaviours"][name]
    assert set(BEHAVIOURS[name].corruptions) <= set(found)
    default = found[BEHAVIOURS[name].corruptions[0]]
    assert default["n"] >= 1000
    assert default["accuracy"] >= 0.97 and default["lowered"] >= 0.97
    if default["flips"]:
        assert default["flipped"] >= 0.97


@pytest.mark.parametrize("name", list(BEHAVIOURS))
def test_the_shipped_model_still_does_it(
    name: str, model: Any, tokenizer: Any, words: SingleTokens, training_modules: tuple[Any, Any]
) -> None:
    corpus, measure = training_modules
    b = BEHAVIOURS[name]
    rows = corpus.evaluation_rows(name, words, 200, 7, b.corruptions[0])
    live = measure.measure(model, tokenizer, rows, b.metric)
    told = tiny.figures()["behaviours"][name][b.corruptions[0]]
    assert live["accuracy"] >= 0.95 and live["lowered"] >= 0.95
    assert not told["flips"] or live["flipped"] >= 0.95
    assert live["metric_clean"] == pytest.approx(told["metric_clean"], rel=0.2)


def test_no_held_out_combination_is_trained(words: SingleTokens, training_modules: tuple[Any, Any]) -> None:
    corpus, _ = training_modules
    for name in BEHAVIOURS:
        stream = corpus.behaviour_samples(name, words, 0)
        texts = [next(stream).text for _ in range(500)]
        assert not any(corpus.held_out(text) for text in texts)
        assert not any(unseen in text.split() for unseen in corpus.UNSEEN_IN_IOI for text in texts)


def test_the_folder_holds_no_local_path() -> None:
    for file in ("config.json", "tokenizer_config.json", "figures.json"):
        text = (tiny.PATH / file).read_text(encoding="utf-8")
        json.loads(text)
        assert '"/' not in text
