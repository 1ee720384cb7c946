"""Named spans of a prompt, located in tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from bpe import reader
from toys import id_task, wrapped

import circuitfind as cf
from circuitfind.errors import TaskError
from circuitfind.tasks.builtin import TASKS
from circuitfind.tasks.spans import locatable
from circuitfind.tasks.tokens import PromptTokenizer

MARY = "When Mary and John went to the store, John gave a drink to"
JOHN = MARY.replace("John gave", "Mary gave")


@pytest.fixture(scope="module")
def model() -> cf.Model:
    return reader()


def spanned(spans: Any, **more: Any) -> cf.Task:
    return cf.Task([MARY], [JOHN], ["Mary"], ["John"], spans=[spans], **more)


@pytest.mark.parametrize("bos", [None, True])
def test_text_is_found_in_tokens(model: cf.Model, bos: bool | None) -> None:
    """The span's own tokens spell its text, wherever the tokenizer cuts."""
    given = {"IO": "Mary", "first clause": "When Mary and John went to the store,", "end": " a drink to", "S2": (9, 10)}
    bound = spanned(given, bos=bos).on(model)
    (found,) = bound.spans
    spelled = {name: "".join(bound.tokens[0][start:stop]).strip() for name, (start, stop) in found.items()}
    texts = {name: text.strip() for name, text in given.items() if isinstance(text, str)}
    assert spelled == {**texts, "S2": spelled["S2"]}
    assert found["S2"] == (9 + bool(bos), 10 + bool(bos)) and found["first clause"][0] == bool(bos)
    assert bound.subset([0]).spans == bound.spans and cf.Task([MARY], [JOHN], metric="kl").on(model).spans == ()


def test_one_of_several_occurrences(model: cf.Model, tmp_path: Path) -> None:
    task = spanned({"S1": ("John", 1), "S2": ["John", 2], "last": (" to", 2)})
    bound = task.on(model)
    (found,) = bound.spans
    tokens = [token.strip() for token in bound.tokens[0]]
    at = {name: tokens[start:stop] for name, (start, stop) in found.items()}
    assert at == {"S1": ["John"], "S2": ["John"], "last": ["to"]}
    assert found["S1"][0] == tokens.index("John") < tokens.index("John", found["S1"][1]) == found["S2"][0]
    assert found["last"][1] == len(tokens)
    opened = cf.Task.from_file(task.save(tmp_path / "pairs.jsonl")).on(model)
    assert opened.spans == bound.spans
    prompts = ["The man met an old dog"], ["The dog met an old man"]
    bound = cf.Task(*prompts, metric="kl", spans=[{"a": " an"}]).on(model)
    start, stop = bound.spans[0]["a"]
    assert bound.tokens[0][start:stop] == (" ", "an"), 'not the an of "man"'


# the words that each behaviour names, as regular expressions on the clean prompt; a group is the span
NAMED = {
    "ioi": {"IO": None, "S1": None, "S2": None},
    "greater-than": {"noun": r"^The (\w+)", "XX": r"year (\d\d)", "YY": r"year \d\d(\d\d)"},
    "gendered-pronoun": {"name": r"\b((?!(?:So|Everyone|Yesterday|When|The|I)\b)[A-Z]\w*)"},
    "subject-verb-agreement": {"subject": r"[Tt]he (\w+)", "attractor": r"[Tt]he \w+ .*the (\w+)"},
    "induction": {"A1": None, "B1": None},
    "docstring": {
        "A_def": r"self, \w+, \w+, (\w+)",
        "B_def": r"self(?:, \w+){3}, (\w+)",
        "C_def": r"self(?:, \w+){4}, (\w+)",
        "A_doc": r":param (\w+)",
        "B_doc": r":param \w+:.*\n.*:param (\w+)",
    },
    "country-capital": {"subject": r"\b((?!(?:The|Everyone|When)\b)[A-Z]\w+)"},
    "copy": {"name1": None},
    "arithmetic-addition": {"operand1": r"(\d+) \+ \d+ = ?\d?$", "operand2": r"(\d+) = ?\d?$"},
    "mcqa": {"color": r"is (\w+)\.", "symbol": None, "option": None},
}


@pytest.mark.parametrize("name", TASKS)
def test_built_in_behaviours_name_their_words(name: str, model: cf.Model) -> None:
    from_text = name in ("docstring", "country-capital", "mcqa")
    speaker = model if from_text else cf.load("tiny", check=False)
    for corruption in TASKS[name].corruptions:
        bound = cf.task(name, speaker, n=24, corruption=corruption).on(speaker)
        for row, (prompt, spans) in enumerate(zip(bound.prompts, bound.spans, strict=True)):
            spoken = {key: "".join(bound.tokens[row][start:stop]).strip() for key, (start, stop) in spans.items()}
            assert set(NAMED[name]) <= set(spans)
            for key, pattern in NAMED[name].items():
                if pattern is not None:
                    assert spoken[key] == re.search(pattern, prompt).group(1), (key, prompt)
            right, wrong = (side.strip() for side in bound.answer_texts[row].split(" / "))
            tokens = [token.strip() for token in bound.tokens[row]]
            if name == "ioi":
                assert (spoken["IO"], spoken["S1"], spoken["S2"]) == (right, wrong, wrong)
                assert spans["S1"][0] == tokens.index(wrong) < spans["S2"][0]
            elif name == "induction":
                assert (spoken["A1"], spoken["B1"]) == (tokens[-1], right)
                assert (spans["A1"][0], spans["B1"][0]) == (tokens.index(tokens[-1]), tokens.index(right))
                assert spans["B1"][0] == spans["A1"][1]
            elif name == "mcqa":
                assert spoken["symbol"] == right and spoken["option"] == spoken["color"]
                assert spans["option"][0] == spans["symbol"][1] + 1
            elif name == "copy":
                places = [spans[f"name{at}"][0] for at in (1, 2, 3) if f"name{at}" in spans]
                assert places == [at for at, token in enumerate(tokens) if token == right]


def test_the_table_of_behaviours_names_them() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z-]+)` \|.*\| ([^|]*) \|$", text, re.MULTILINE))
    listed = {name: re.findall(r"`(\w+)`", cell) for name, cell in rows.items()}
    assert listed == {**{name: list(spans) for name, spans in NAMED.items()}, "copy": ["name1", "name2", "name3"]}


def test_what_a_tokenizer_cuts_is_no_span() -> None:
    """A behaviour's spans that are no whole tokens are left out, and its task is not refused for them."""

    class Joining(PromptTokenizer):
        def __init__(self) -> None:
            self.ids: dict[str, int] = {}

        def __call__(self, texts: Any) -> list[list[int]]:
            words = [text.replace("met Mary", "met-Mary").split() for text in texts]
            return [[self.ids.setdefault(word, len(self.ids)) for word in row] for row in words]

    prompts, rows = ["John met Mary", "Mary saw John"], [{"a": ("John", 1), "b": ("Mary", 1)}] * 2
    assert locatable(rows, prompts, Joining()) == [{"a": ("John", 1)}, rows[1]]
    assert locatable([{"b": ("Mary", 1)}], prompts[:1], Joining()) is None


@pytest.mark.shared
def test_text_is_found_by_sentencepiece(shared: Any) -> None:
    model = cf.load(str(shared / "models/stories260K"), check=False)
    task = cf.Task(
        ["So Lily was happy."], ["So Tim was happy."], ["She"], ["He"], spans=[{"who": "Lily", "all": (0, 2)}]
    )
    bound = task.on(model)
    start, stop = bound.spans[0]["who"]
    assert model.tokenizer.convert_ids_to_tokens(bound.batch.clean.ids[0, start:stop].tolist()) == ["▁Lily"]
    assert bound.tokens[0][0] == "<s>" and bound.spans[0]["all"] == (1, 3)


def test_positions_of_ids() -> None:
    task = id_task((7, 4), spans=[{"a": (0, 2)}, {"a": (2, 4)}])
    bound = task.on(wrapped("gpt2"))
    assert bound.spans == ({"a": (0, 2)}, {"a": (2, 4)}) and bound.subset([1]).spans == ({"a": (2, 4)},)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (
            {"S": "John"},
            r"row 0: span 'S': 'John' occurs 2 times in the clean prompt: give the n-th as \(text, n\), or \(start,",
        ),
        ({"S": ("John", 3)}, "'John' occurs 2 times in the clean prompt, so there is no number 3"),
        ({"S": ("John", 0)}, "no number 0"),
        ({"S": ("Kate", 1)}, "'Kate' occurs 0 times in the clean prompt, so there is no number 1"),
        ({"S": ("John", "second")}, r"no number 'second'.*task.exchanged"),
        ({"S": "Kate"}, "'Kate' occurs 0 times"),
        ({"S": " "}, "occurs 0 times"),
        ({"S": "tore"}, "'tore' begins or ends inside a token"),
        ({"S": (3, 3)}, r"\(3, 3\) is not a \(start, stop\) within the \d+ tokens of the prompt"),
        ({"S": (0, 99)}, r"is not a \(start, stop\)"),
        ({"S": 4}, r"4 is not a \(start, stop\)"),
        (["Mary"], r"row 0: spans are a mapping, name -> text, \(text, n\) or \(start, stop\), not \['Mary'\]"),
    ],
)
def test_spans_that_are_none(model: cf.Model, spans: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        spanned(spans).on(model)


def test_spans_that_do_not_fit_the_task() -> None:
    with pytest.raises(TaskError, match=r"the lists differ in length: clean 1, corrupted 1, .*spans 2"):
        cf.Task([MARY], [JOHN], ["Mary"], ["John"], spans=[{}, {}])
    with pytest.raises(TaskError, match="spans is a dict: give a list or tensor with one entry per pair"):
        cf.Task([MARY], [JOHN], ["Mary"], ["John"], spans={"IO": "Mary"})
    with pytest.raises(TaskError, match="row 0: span 'a': prompts as ids have no text"):
        id_task((5,), spans=[{"a": "Mary"}]).on(wrapped("gpt2"))
