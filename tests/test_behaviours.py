"""The built-in behaviours as text, and the embedded model's figures on them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bpe import english
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import circuitfind as cf
from circuitfind.errors import TaskError
from circuitfind.models import tiny
from circuitfind.tasks import ioi, lexicon
from circuitfind.tasks.builder import Pair, SingleTokens
from circuitfind.tasks.builtin import TASKS, builder_of
from circuitfind.tasks.numbers import CENTURIES, alike

TRAINING = Path(__file__).resolve().parents[1] / "training"
EVERY = [(name, corruption) for name, b in TASKS.items() for corruption in b.corruptions]
TRAINED = ["ioi", "greater-than", "gendered-pronoun", "subject-verb-agreement", "induction"]  # of the embedded model
WITHOUT_CODE = ("docstring", "country-capital", "mcqa")  # the embedded tokenizer has no words for these


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


def test_the_ten_behaviours_are_there() -> None:
    assert list(TASKS) == [*TRAINED, "docstring", "country-capital", "copy", "arithmetic-addition", "mcqa"]
    assert all(b.name == name and b.summary and b.source for name, b in TASKS.items())


@pytest.fixture(scope="module")
def able(words: SingleTokens) -> Callable[[str], SingleTokens]:
    """A tokenizer that can say a behaviour: the embedded one, or one with more words."""
    more = SingleTokens(english())
    return lambda name: more if name in WITHOUT_CODE else words


@pytest.mark.parametrize(("name", "corruption"), EVERY)
def test_same_seed_same_rows(name: str, corruption: str, able: Callable[[str], SingleTokens]) -> None:
    first, again, other = (TASKS[name].make(able(name), 40, seed=seed, corruption=corruption) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_rows_do_not_change_between_versions(words: SingleTokens) -> None:
    row = TASKS["ioi"].make(words, 1, seed=0)[0]
    assert row == Pair(
        clean="Friends Luke and Aaron found a message at the gallery. Aaron gave it to",
        corrupted="Friends Luke and Aaron found a message at the gallery. Luke gave it to",
        answers=("Luke",),
        wrong=("Aaron",),
        flips=True,
        spans={"IO": ("Luke", 1), "S1": ("Aaron", 1), "S2": ("Aaron", 2)},
    )


@pytest.mark.parametrize("which", ["embedded", "trained here"])
@pytest.mark.parametrize(("name", "corruption"), EVERY)
def test_rows_are_distinct_and_minimal_pairs(name: str, corruption: str, which: str, tokenizer: Any) -> None:
    tokenizer = tokenizer if which == "embedded" else english()
    words = SingleTokens(tokenizer)
    if which == "embedded" and name in WITHOUT_CODE:
        with pytest.raises(TaskError, match=rf"^{name}: \d+ of \d+ "):
            TASKS[name].make(words, 1, corruption=corruption)
        return
    n = 120 if name == "country-capital" else 300  # of 35 countries in four sentences
    rows = TASKS[name].make(words, n, seed=0, corruption=corruption)
    assert len({row.clean for row in rows}) == n
    for row in rows:
        clean, corrupted = encode(tokenizer, row.clean), encode(tokenizer, row.corrupted)
        assert clean != corrupted
        assert len(clean) == len(corrupted), row
        assert row.clean == row.clean.strip() or name == "arithmetic-addition"  # a space is a token before a number
        assert row.answers and row.wrong and not set(row.answers) & set(row.wrong)
        assert not any(answer.startswith(" ") for answer in row.answers + row.wrong)


@pytest.mark.parametrize("name", list(TASKS))
def test_answers_are_one_token_after_the_prompt(name: str, able: Callable[[str], SingleTokens], tokenizer: Any) -> None:
    tokenizer = english() if name in WITHOUT_CODE else tokenizer
    for row in TASKS[name].make(able(name), 100, seed=0):
        prompt = encode(tokenizer, row.clean)
        for answer in row.answers + row.wrong:
            either = [encode(tokenizer, row.clean + space + answer) for space in (" ", "")]
            assert any(ids[:-1] == prompt for ids in either), (row.clean, answer)


def names(text: str) -> list[str]:
    """The names of an IOI prompt, in order."""
    known = set(lexicon.FEMALE_NAMES + lexicon.MALE_NAMES)
    return [word for word in text.replace(",", "").replace(".", "").split() if word in known]


def test_ioi_has_both_orders_half_and_half(words: SingleTokens) -> None:
    rows = TASKS["ioi"].make(words, 200, seed=0)
    assert sum(names(row.clean)[0] == row.answers[0] for row in rows) == 100  # ABBA
    assert sum(names(row.clean)[1] == row.answers[0] for row in rows) == 100  # BABA
    assert len(ioi.SENTENCES) >= 6


def test_ioi_corruptions_do_what_they_are_called(words: SingleTokens) -> None:
    for row in TASKS["ioi"].make(words, 50, corruption="s2-io-flip"):
        assert row.flips and names(row.clean)[:2] == names(row.corrupted)[:2]
        assert names(row.clean)[2] == row.wrong[0] and names(row.corrupted)[2] == row.answers[0]
    for row in TASKS["ioi"].make(words, 50, corruption="s1-io-flip"):
        assert not row.flips and names(row.clean)[:2] == names(row.corrupted)[1::-1]
    for row in TASKS["ioi"].make(words, 50, corruption="abc"):
        assert len(set(names(row.corrupted) + names(row.clean))) == 5
    for row in TASKS["ioi"].make(words, 50, corruption="random-names"):
        assert len(set(names(row.corrupted))) == 2 and not set(names(row.corrupted)) & set(names(row.clean))


@pytest.mark.parametrize("corruption", ioi.CORRUPTIONS)
def test_ioi_corruptions_from_their_names(corruption: str, words: SingleTokens) -> None:
    """The literal twin: names are renamed, then exchanged in the first clause, then in the second mention."""
    if corruption == "abc":
        return
    for row in TASKS["ioi"].make(words, 40, corruption=corruption):
        first, second, again = names(row.clean)
        io, s = row.answers[0], row.wrong[0]
        assert {first, second} == {io, s} and again == s
        said = names(row.corrupted)
        if corruption.startswith("random-names"):
            assert not {io, s} & set(said)
            new = dict(zip((first, second), said[:2] if "s1" not in corruption else said[1::-1], strict=True))
        else:
            new = {first: first, second: second}
        expected = [new[first], new[second]]
        if "s1-io-flip" in corruption:
            expected.reverse()
        assert said == [*expected, new[io] if "s2-io-flip" in corruption else new[s]]
        assert row.flips == (said[2] == io)


def test_corruptions_and_templates_by_the_names_of_mib_and_parts(words: SingleTokens) -> None:
    make = TASKS["ioi"].make
    theirs, ours = "random_names_s1_ioi_flip_s2_ioi_flip_counterfactual", "random-names-s1-io-flip-s2-io-flip"
    assert make(words, 8, corruption=theirs) == make(words, 8, corruption=ours)
    assert len(TASKS["ioi"].templates) == 16
    for template, order in (("abba", 0), ("BABA", 1)):
        rows = make(words, 60, template=template)
        assert all(names(row.clean)[order] == row.answers[0] for row in rows)
        shape = {" ".join("_" if word[0].isupper() else word for word in row.clean.split()[-3:]) for row in rows}
        assert len(shape) > 1, "several templates of one order"
    one = make(words, 20, template="abba-3")
    assert all(row.clean.startswith("Then, ") and " went to the " in row.clean for row in one)
    assert all(names(row.clean)[0] == row.answers[0] for row in one)
    both = make(words, 20, template=3)
    assert [names(row.clean)[0] == row.answers[0] for row in both] == [True, False] * 10
    assert {row.clean.split()[0] for row in both} == {"Then,"}
    agreement = TASKS["subject-verb-agreement"].make(words, 20, template=5)
    assert all(row.clean.startswith("Yesterday the ") and row.answers[0] in ("was", "were") for row in agreement)
    for name, wanted, message in (
        ("ioi", "abab", r"ioi: template 'abab' is unknown: did you mean 'baba-\d'\? Known: abba-1, "),
        ("induction", 1, "induction: this task has no templates: leave template=1 out"),
    ):
        with pytest.raises(TaskError, match=message):
            TASKS[name].make(words, 4, template=wanted)


def test_a_task_is_named_by_what_was_chosen() -> None:
    model = cf.load("tiny", check=False)
    chosen = {"corruption": "s2_io_flip", "template": "abba"}
    assert cf.task("ioi", model, n=2, **chosen).name == "ioi:s2-io-flip [abba]"
    assert cf.task("ioi", model, n=2).name == "ioi" and cf.task("ioi", model, n=2, corruption="abc").name == "ioi:abc"
    assert len(cf.task("ioi", model, n=6, corruption="random-names-s2-io-flip", template="baba").on(model)) == 6
    with pytest.raises(TaskError, match="docstring: 3 of 73 names of arguments are one token each"):
        cf.task("docstring", model)


# --- docstring, capitals, copy ---
ARGUMENTS = re.compile(r"def \w+\(self, (.*)\):")
DESCRIBED = re.compile(r":param (\w+):")


@pytest.mark.parametrize("corruption", TASKS["docstring"].corruptions)
def test_docstrings_describe_the_third_and_fourth_of_six_arguments(corruption: str) -> None:
    for row in TASKS["docstring"].make(SingleTokens(english()), 30, corruption=corruption):
        said = [
            (ARGUMENTS.findall(text)[0].split(", "), DESCRIBED.findall(text)) for text in (row.clean, row.corrupted)
        ]
        (arguments, described), (theirs, theirs_described) = said
        assert len(arguments) == len(theirs) == len(set(arguments)) == 6
        assert described == arguments[2:4] and row.answers == (arguments[4],) and row.clean.endswith("    :param")
        kept = [at for at in range(6) if arguments[at] == theirs[at]]
        same_docstring = described == theirs_described
        assert (kept, same_docstring) == {
            "random-random": ([0, 1, 5], False),
            "random-def": ([0, 1, 4, 5], True),
            "random-doc": ([0, 1, 2, 3, 4, 5], False),
            "random-answer": ([0, 1, 2, 3, 5], True),
        }[corruption]
        if corruption == "random-answer":
            assert row.flips and row.wrong == (theirs[4],)
        else:
            assert not row.flips and set(row.wrong) == set(arguments) - set(row.answers)


def test_a_tokenizer_that_loses_code_is_refused() -> None:
    said = {*lexicon.IDENTIFIERS, *lexicon.DESCRIPTIONS, "x"}
    with pytest.raises(TaskError, match="docstring: this tokenizer loses line breaks, spaces or punctuation of code"):
        TASKS["docstring"].make(SingleTokens(word_level(sorted(said))), 2)


def test_capitals_are_those_of_the_countries() -> None:
    known = dict(lexicon.CAPITALS)
    assert len(known) == len(set(known.values())) == 35
    for row in TASKS["country-capital"].make(SingleTokens(english()), 60):
        for text, capital in ((row.clean, row.answers), (row.corrupted, row.wrong)):
            (country,) = [word for word in re.findall(r"\w+", text) if word in known]
            assert capital == (known[country],)


def test_copy_swaps_one_name_everywhere(words: SingleTokens) -> None:
    for row in TASKS["copy"].make(words, 60):
        assert row.answers[0] in row.clean and row.wrong[0] not in row.clean
        assert row.clean.replace(row.answers[0], row.wrong[0]) == row.corrupted and row.flips


@pytest.mark.shared
def test_a_story_model_copies_names(shared: Path) -> None:
    """Three names are one token there; the model prefers the one that was said in every pair."""
    model = cf.load(str(shared / "models/stories260K"), check=False)
    task = cf.task("copy", model, n=24)
    assert len(set(task.clean)) == 24 == 3 * len(TASKS["copy"].templates)
    summary = cf.summarise(model, task, warn=False)
    assert summary.accuracy == summary.lowered == 1
    with pytest.raises(TaskError, match="docstring: 1 of 73 names of arguments"):
        cf.task("docstring", model)


def test_greater_than_splits_all_endings_at_the_start_year(words: SingleTokens) -> None:
    for row in TASKS["greater-than"].make(words, 50, seed=1):
        start = row.clean.split(" to the")[0][-2:]
        assert sorted(row.answers + row.wrong) == [f"{i:02d}" for i in range(100)]
        assert min(row.answers) > start == max(row.wrong)
        assert row.corrupted.split(" to the")[0].endswith("01")


def test_induction_is_determined_by_the_first_half(words: SingleTokens) -> None:
    for row in TASKS["induction"].make(words, 50, seed=1):
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
    for century in CENTURIES:
        years = alike(words, [f"{century}{ending:02d}" for ending in range(100)])
        assert len(years) == 100 and years[f"{century}32"] == (f" {century}", "32")


def test_the_embedded_tokenizer_round_trips_any_text(tokenizer: Any) -> None:
    for text in ("  Two  spaces\n\tand a tab ", "Ünïcödé — 漢字 🎉 \x00", "in 1999, n't <|x|> 42%"):
        assert tokenizer.decode(encode(tokenizer, text)) == text
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "year 1732"))[-2:] == ["Ġ17", "32"]


def test_words_are_judged_in_running_text() -> None:
    few = SingleTokens(word_level(["x", "Mary", "John"]))
    assert few.keep(["Mary", "Anna", "John", "Mary Anna"]) == ["Mary", "John"]
    assert few.pieces(" 17") == few.pieces(" Mary Anna") == () and few.pieces(" Mary") == (" Mary",)


@pytest.mark.parametrize("name", list(TASKS))
def test_a_tokenizer_without_the_words_is_refused(name: str) -> None:
    few = SingleTokens(word_level(["x", "Mary", "John", "she", "he", "war", "siege"]))
    with pytest.raises(TaskError) as refusal:
        TASKS[name].make(few, 4)
    line = str(refusal.value)
    assert line.startswith(name + ": ") and "\n" not in line
    assert " of " in line and "your own pairs" in line


def test_refusals_name_what_is_missing() -> None:
    few = SingleTokens(word_level(["Mary", "John"]))
    with pytest.raises(TaskError, match=r"ioi: 2 of 120 names are one token each with this tokenizer, 8 are needed"):
        TASKS["ioi"].make(few, 4)
    years = SingleTokens(word_level(list(lexicon.EVENTS)))
    with pytest.raises(TaskError, match=r"greater-than: 0 of 9 centuries"):
        TASKS["greater-than"].make(years, 4)


def test_unknown_names_get_a_hint(words: SingleTokens) -> None:
    assert builder_of("Greater_Than").name == "greater-than"
    with pytest.raises(TaskError, match=r"did you mean 'induction'\?"):
        builder_of("inducton")
    with pytest.raises(TaskError, match=r"did you mean 's2-io-flip'\?"):
        builder_of("ioi").make(words, 4, corruption="s2_io_flp")
    with pytest.raises(TaskError, match="at least 1"):
        builder_of("ioi").make(words, 0)


@pytest.mark.parametrize(
    ("n", "seed", "said"),
    [
        (2.5, 0, "n must be a whole number, .*not 2.5"),
        ("8", 0, "n must be a whole number, .*not '8'"),
        (4, -1, "seed=-1 is no seed"),
        (4, None, "seed=None is no seed"),
    ],
)
def test_numbers_that_are_none_are_refused(words: SingleTokens, n: Any, seed: Any, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        builder_of("ioi").make(words, n, seed)


# --- the embedded model ---


def test_the_embedded_model_is_real_and_small(model: Any) -> None:
    config = model.config
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert config.n_layer >= 4 and config.n_head >= 4 and config.activation_function == "gelu_new"
    assert sum(path.stat().st_size for path in tiny.PATH.iterdir() if path.is_file()) < 8e6


@pytest.mark.parametrize("name", TRAINED)
def test_published_figures_meet_the_bar(name: str, training_modules: tuple[Any, Any]) -> None:
    corpus, _ = training_modules
    found = tiny.figures()["behaviours"][name]
    assert list(corpus.BEHAVIOURS) == TRAINED and set(corpus.TRAINED[name]) <= set(found)
    default = found[TASKS[name].corruptions[0]]
    assert default["n"] >= 1000
    assert default["accuracy"] >= 0.97 and default["lowered"] >= 0.97
    if default["flips"]:
        assert default["flipped"] >= 0.97


@pytest.mark.parametrize("name", TRAINED)
def test_the_shipped_model_still_does_it(
    name: str, model: Any, tokenizer: Any, words: SingleTokens, training_modules: tuple[Any, Any]
) -> None:
    corpus, measure = training_modules
    b = TASKS[name]
    rows = corpus.evaluation_rows(name, words, 200, 7, b.corruptions[0])
    live = measure.measure(model, tokenizer, rows, b.metric)
    told = tiny.figures()["behaviours"][name][b.corruptions[0]]
    assert live["accuracy"] >= 0.95 and live["lowered"] >= 0.95
    assert not told["flips"] or live["flipped"] >= 0.95
    assert live["metric_clean"] == pytest.approx(told["metric_clean"], rel=0.2)


def test_no_held_out_combination_is_trained(words: SingleTokens, training_modules: tuple[Any, Any]) -> None:
    corpus, _ = training_modules
    for name in TRAINED:
        stream = corpus.behaviour_samples(name, words, 0)
        texts = [next(stream).text for _ in range(500)]
        assert not any(corpus.held_out(text) for text in texts)
        assert not any(unseen in text.split() for unseen in corpus.UNSEEN_IN_IOI for text in texts)


def test_the_folder_holds_no_local_path() -> None:
    for file in ("config.json", "tokenizer_config.json", "figures.json"):
        text = (tiny.PATH / file).read_text(encoding="utf-8")
        json.loads(text)
        assert '"/' not in text
