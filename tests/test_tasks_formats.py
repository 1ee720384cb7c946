"""Data of other tools: each format as its tool writes it, read into the same fields, and every row that is none."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bpe import reader
from toys import id_task, wrapped

import circuitfind as cf
from circuitfind.cli.app import main
from circuitfind.errors import CircuitfindError, FileError, TaskError
from circuitfind.tasks.files import pairs_from_rows, read_pairs

Write = Callable[..., Path]
MARY = "When Mary and John went to the store, John gave a drink to"
JOHN = "When Mary and John went to the store, Mary gave a drink to"
LUCY = "When Lucy and Paul went to the park, Paul gave a ring to"
PAUL = "When Lucy and Paul went to the park, Lucy gave a ring to"


@pytest.fixture()
def write(tmp_path: Path) -> Write:
    """Writes rows (or text) to a file of the test's own folder."""

    def make(content: Any, name: str = "data.json") -> Path:
        path = tmp_path / name
        lines = name.endswith(".jsonl") and not isinstance(content, str)
        text = "\n".join(map(json.dumps, content)) if lines else content
        path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
        return path

    return make


@pytest.fixture(scope="module")
def model() -> cf.Model:
    return reader()


def fields(clean: list[str], corrupted: list[str], **more: Any) -> dict[str, Any]:
    return {"name": "data", "clean": clean, "corrupted": corrupted, **more}


def refused(make: Callable[[], Any], kind: type[CircuitfindError], message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        make()
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------- auto-circuit
AUTO = [
    {"clean": MARY, "corrupt": JOHN, "answers": [" Mary"], "wrong_answers": [" John"]},
    {"clean": LUCY, "corrupt": PAUL, "answers": [" Lucy"], "wrong_answers": [" Paul", " Mary"]},
]


def test_auto_circuit(write: Write, model: cf.Model) -> None:
    sets = {"answers": [[" Mary"], [" Lucy"]], "wrong_answers": [[" John"], [" Paul", " Mary"]]}
    assert read_pairs(write({"prompts": AUTO})) == fields([MARY, LUCY], [JOHN, PAUL], **sets)
    named = {"word_idxs": {"IO": 1, "S1": 3}, "seq_labels": ["When", "IO", "and", "S1", "and"], "prompts": AUTO}
    for bos in (None, True):  # positions in the file do not count a BOS token
        bound = cf.Task.from_file(write(named), model, bos=bos).on(model)
        assert bound.spans[1] == {
            name: (at + bool(bos), at + 1 + bool(bos))
            for name, at in {"IO": 1, "S1": 3, "When": 0, "and": 2, "and (2)": 4}.items()
        }
        start, stop = bound.spans[0]["S1"]
        assert "".join(bound.tokens[0][start:stop]) == " John"
    message = "data.json: 'word_idxs' must be an object, name -> position"
    refused(lambda: read_pairs(write({**named, "word_idxs": [1]})), FileError, message)
    broken = [AUTO[0], {**AUTO[1], "corrupt": None}]
    refused(lambda: read_pairs(write({"prompts": broken})), FileError, "data.json, prompt 1: no 'corrupted'")
    refused(lambda: read_pairs(write({"prompts": [MARY]})), FileError, "prompt 0: a row is a mapping")
    refused(lambda: read_pairs(write({"prompts": []})), FileError, "holds no pairs")


def test_auto_circuit_pads_left_and_scores_do_not_mind(write: Write, model: cf.Model) -> None:
    """The same prompts as ids padded on the left, as auto-circuit feeds them."""
    short = {**AUTO[1], "clean": LUCY.replace(" to the park", ""), "corrupt": PAUL.replace(" to the park", "")}
    task = cf.Task.from_file(write({"prompts": [AUTO[0], short]}))
    bound = task.on(model)
    length = bound.batch.clean.ids.shape[1]
    lengths = bound.batch.clean.mask.sum(1).tolist()
    assert lengths[1] < lengths[0] == length
    turned = [
        torch.stack([row.roll(length - size) for row, size in zip(value, lengths, strict=True)])
        for value in (bound.batch.clean.ids, bound.batch.corrupted.ids, bound.batch.clean.mask)
    ]
    answers = [[i for i in row if i >= 0] for row in bound.batch.answers[:, 0].tolist()]
    wrong = [[i for i in row if i >= 0] for row in bound.batch.wrong[:, 0].tolist()]
    left = cf.Task(turned[0], turned[1], answers, wrong, attention_mask=turned[2])
    assert not bool(turned[2][1, 0]), "the test needs padding on the left"
    assert cf.attribute(model, left, "eap").to_dict() == cf.attribute(model, task, "eap").to_dict()


# -------------------------------------------------------------------- EAP-IG
def test_eap_ig(write: Write, model: cf.Model) -> None:
    ids = [model.tokenizer.encode(f" {name}")[0] for name in ("Mary", "John", "Lucy", "Paul")]
    text = f'clean,corrupted,correct_idx,incorrect_idx\n"{MARY}","{JOHN}",{ids[0]},{ids[1]}\n'
    text += f'"{LUCY}","{PAUL}",{ids[2]},"[{ids[3]}, {ids[1]}]"\n'
    path = write(text, "data.csv")
    sets = {"answers": [[ids[0]], [ids[2]]], "wrong_answers": [[ids[1]], [ids[3], ids[1]]]}
    assert read_pairs(path) == fields([MARY, LUCY], [JOHN, PAUL], **sets)
    bound = cf.Task.from_file(path, model).on(model)
    assert bound.answer_texts == ("Mary / John", "Lucy / Paul, John") and bound.notes[0] == "answers spelled as ids"
    spelled = cf.Task([MARY], [JOHN], ["Mary"], ["John"]).on(model)
    assert torch.equal(spelled.batch.clean.ids[0], bound.batch.clean.ids[0])
    bare = write(f'clean,corrupted,correct_idx\n"{MARY}","{JOHN}",{ids[0]}\n', "data.csv")
    assert "wrong_answers" not in read_pairs(bare)
    assert cf.Task.from_file(bare, metric="logprob").on(model).batch.wrong.numel() == 0
    for cell in ("Mary", "[]", "1.5", "true"):
        bad = write(f'clean,corrupted,correct_idx\n"{MARY}","{JOHN}",{cell}\n', "data.csv")
        refused(
            lambda bad=bad: read_pairs(bad), FileError, "line 2: 'correct_idx' must be a token id or a list of them"
        )
    empty = write(f'clean,corrupted,correct_idx\n"{MARY}","{JOHN}",\n', "data.csv")
    refused(lambda: read_pairs(empty), FileError, "line 2: no 'correct_idx'")
    empty = write(f'clean,corrupted,correct_idx\n,"{JOHN}",5\n', "data.csv")
    refused(lambda: read_pairs(empty), FileError, "line 2: 'clean' is empty")
    some = write(
        f'clean,corrupted,correct_idx,incorrect_idx\n"{MARY}","{JOHN}",5,6\n"{MARY}","{JOHN}",5,\n', "data.csv"
    )
    refused(lambda: read_pairs(some), FileError, "line 3: column 'incorrect_idx' is in some rows only")
    mixed = cf.Task([MARY], [JOHN], [ids[0]], ["John"])
    refused(lambda: mixed.on(model), TaskError, r"row 0: answers must be a non-empty string or a list of them, not \[")
    beyond = cf.Task([MARY], [JOHN], [10**6], [ids[0]])
    refused(lambda: beyond.on(model), TaskError, "row 0: token id 1000000 is outside the model's vocabulary")


# -------------------------------------------------------------------- Edge-Pruning
def test_edge_pruning(write: Write) -> None:
    rows = [
        {"clean": "1 + 2 = <predict>3</predict>", "corrupted": "4 + 1 = <predict>5</predict>", "split": "train"},
        {"clean": f"{MARY}<predict> Mary</predict>.", "corrupted": f"{JOHN} <predict>John</predict>", "split": "test"},
    ]
    path = write(rows, "data.jsonl")
    sets = {"answers": [" 3", " Mary"], "wrong_answers": [" 5", " John"]}
    assert read_pairs(path) == fields(["1 + 2 =", MARY], ["4 + 1 =", JOHN], **sets)
    assert read_pairs(path, split="test") == fields([MARY], [JOHN], answers=[" Mary"], wrong_answers=[" John"])
    refused(lambda: read_pairs(path, split="dev"), FileError, "line 1: split 'dev' is unknown. Known: train, test")
    plain = [{"clean": "a <predict>b</predict>", "corrupted": "c "}]
    assert read_pairs(write(plain, "data.jsonl")) == fields(["a"], ["c"], answers=[" b"])
    for row, message in (
        ({"clean": "a b", "corrupted": "c"}, r"line 2: 'clean' has no <predict>...</predict> around the answer"),
        ({"clean": "a <predict> </predict>", "corrupted": "c"}, "line 2: <predict></predict> holds no answer"),
        ({"clean": "a <predict>b</predict>"}, "line 2: no 'corrupted'"),
        ({"clean": "a <predict>b</predict>", "corrupted": 5}, "line 2: 'corrupted' must be text, not 5"),
        (rows[0], "line 2: column '<predict> in corrupted' is in some rows only"),
    ):
        bad = write([*plain, row], "data.jsonl")
        refused(lambda bad=bad: read_pairs(bad), FileError, message)


# -------------------------------------------------------------------- MIB
def ioi_row(io: str, s: str, other: str = "Lucy") -> dict[str, Any]:
    text = "When {} and {} went to the store, {} gave a drink to"
    return {
        "prompt": text.format(io, s, s),
        "template": text,
        "choices": [io, s],
        "answerKey": 0,
        "metadata": {"subject": s, "indirect_object": io, "random_c": other, "object": "drink"},
        "abc_counterfactual": {"prompt": text.format("Kate", "Emma", "Anna"), "choices": ["Kate", "Emma"]},
        "s2_io_flip_counterfactual": {"prompt": text.format(io, s, io), "choices": [io, s], "answerKey": 1},
        "s1_ioi_flip_s2_ioi_flip_counterfactual": {"prompt": text.format(s, io, io), "choices": [s, io]},
    }


def test_mib_ioi(write: Write, model: cf.Model) -> None:
    rows = [ioi_row("Mary", "John"), ioi_row("Lucy", "Paul")]
    path = write(rows, "data.jsonl")
    told = {"answers": [["Mary"], ["Lucy"]], "wrong_answers": [["John"], ["Paul"]], "unusable": "drop"}
    found = read_pairs(path)
    assert found.items() >= told.items() and found["corrupted"] == [
        r["s2_io_flip_counterfactual"]["prompt"] for r in rows
    ]
    for name in ("abc", "ABC_counterfactual", "s1-io-flip-s2-io-flip", "s1_ioi_flip_s2_ioi_flip"):
        column = "abc_counterfactual" if "abc" in name.lower() else "s1_ioi_flip_s2_ioi_flip_counterfactual"
        assert read_pairs(path, counterfactual=name)["corrupted"] == [row[column]["prompt"] for row in rows]
    bound = cf.Task.from_file(path, model, counterfactual="abc").on(model)
    assert bound.answer_texts == ("Mary / John", "Lucy / Paul") and len(bound) == 2
    without = [{**row, "metadata": {"random_c": "Emma"}, "answerKey": 1} for row in rows]
    assert read_pairs(write(without, "data.jsonl"))["answers"] == [["John"], ["Paul"]]  # then the choices tell
    message = r"line 1: counterfactual 's2-io-flop' is unknown: did you mean 's2_io_flip'\? Known: abc, s2_io_flip, s1"
    refused(lambda: read_pairs(path, counterfactual="s2-io-flop"), FileError, message)
    ours = write([{"clean": MARY, "corrupted": JOHN}], "data.jsonl")
    message = "line 1: counterfactual='abc' is for rows of MIB, these are of circuitfind"
    refused(lambda: read_pairs(ours, counterfactual="abc"), FileError, message)


def test_mib_rows_of_unequal_length_are_left_out_and_counted(model: cf.Model) -> None:
    rows = [ioi_row("Mary", "John"), ioi_row("Xerxes", "John"), ioi_row("Lucy", "Paul"), ioi_row("Kate", "Kate")]
    task = cf.Task.from_rows(rows, counterfactual="abc", name="ioi")
    with pytest.warns(UserWarning, match=r"^'ioi': 2 of 4 pairs left out, such as row 1: ' Xerxes' is \d tokens"):
        bound = task.on(model)
    assert bound.prompts == (rows[0]["prompt"], rows[2]["prompt"]) and bound.notes[-1].startswith(
        "2 of 4 pairs left out"
    )
    assert bound.answer_texts == ("Mary / John", "Lucy / Paul")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cf.Task.from_rows(rows[::2], model)
    refused(
        lambda: cf.Task.from_rows(rows[1:2], model), TaskError, "none of the 1 pairs can be used on this model; row 0"
    )


def sum_row(a: int, b: int, x: int | None, y: int = 0) -> dict[str, Any]:
    """A row of `mib-bench/arithmetic_addition`: the columns, and the types in them, as `datasets` yields them."""
    text = "The sum of {} and {} is"
    none = {"label": None, "operand1": None, "operand2": None, "prompt": None}
    twin = none if x is None else {"label": x + y, "operand1": x, "operand2": y, "prompt": text.format(x, y)}
    return {
        "idx": 0,
        "template": text,
        "prompt": text.format(a, b),
        "label": str(a + b),
        "operator": "+",
        "num_digit": 1,
        "random_counterfactual": twin,
        "ones_carry_counterfactual": none,
        "ones_op1_counterfactual": {"label": 4 + b, "operand1": 4, "operand2": b, "prompt": text.format(4, b)},
        "operand1": a,
        "operand2": b,
    }


def test_mib_arithmetic(model: cf.Model) -> None:
    rows = [sum_row(1, 2, 3, 5), sum_row(2, 5, None), sum_row(2, 6, 3, 4)]
    with pytest.warns(UserWarning, match="^1 of 3 rows lack this counterfactual and are left out"):
        found = pairs_from_rows(rows)
    assert found["clean"] == [rows[0]["prompt"], rows[2]["prompt"]]
    assert found["corrupted"] == ["The sum of 3 and 5 is", "The sum of 3 and 4 is"]
    assert (found["answers"], found["wrong_answers"]) == ([["3"], ["8"]], [["8"], ["7"]])
    assert pairs_from_rows(rows, counterfactual="ones_op1")["wrong_answers"] == [["6"], ["9"], ["10"]]
    refused(
        lambda: pairs_from_rows(rows, counterfactual="ones_carry"),
        TaskError,
        "row 0: this counterfactual is empty in every row: choose another with counterfactual=",
    )
    for row, message in (
        ({**rows[0], "label": None}, "row 0: no 'label' in the row or in its 'random_counterfactual'"),
        ({**rows[0], "prompt": ""}, "row 0: 'prompt' is empty"),
        (
            {"prompt": "a", "b_counterfactual": {}, "c_counterfactual": {}},
            "row 0: several counterfactuals: choose with counterfactual=; there are b, c",
        ),
    ):
        refused(lambda row=row: pairs_from_rows([row]), TaskError, message)
    assert len(cf.Task.from_rows(rows[::2], model).on(model)) == 2
    several = cf.Task.from_rows([sum_row(12, 23, 41, 14)], model, answer="first", spelling="space").on(model)
    assert several.answer_texts == ("3 / 5",), "of 35 and 55, read after the space that both begin with"


def choice_row(key: int, elsewhere: int, symbols: str = "ABCD") -> dict[str, Any]:
    """A row of `mib-bench/copycolors_mcqa`; the labels of its symbol counterfactual are numbers there, too."""
    colors = ["red", "blue", "green", "black"]

    def asked(labels: Any, texts: list[str], key: int) -> dict[str, Any]:
        options = "".join(f"\n{label}. {text}" for label, text in zip(labels, texts, strict=True))
        prompt = f"A box is {colors[own]}. What color is a box?{options}\nAnswer:"
        return {"prompt": prompt, "choices": {"label": list(labels), "text": texts}, "answerKey": key}

    own = key
    moved = list(colors)
    moved[key], moved[elsewhere] = moved[elsewhere], moved[key]
    return {
        "dataset": "copycolors",
        "dataset_specific_id": "box",
        "question": f"A box is {colors[own]}. What color is a box?",
        **asked(symbols, colors, key),
        "symbol_counterfactual": asked([1, 2, 3, 4], colors, key),
        "answerPosition_counterfactual": asked(symbols, moved, elsewhere),
        "noun_counterfactual": asked(symbols, colors, key),
        "idx": 0,
    }


def test_mib_multiple_choice(write: Write, model: cf.Model) -> None:
    rows = [choice_row(1, 3), choice_row(2, 0)]
    found = pairs_from_rows(rows)
    assert found["corrupted"][0] == rows[0]["symbol_counterfactual"]["prompt"]
    # as in MIB: the wrong answer is what is right after the corrupted prompt
    assert (found["answers"], found["wrong_answers"]) == ([["B"], ["C"]], [["2"], ["3"]])
    for name in ("answerPosition", "answer-position", "answerPosition_counterfactual"):
        found = pairs_from_rows(rows, counterfactual=name)
        assert found["corrupted"][1] == rows[1]["answerPosition_counterfactual"]["prompt"]
        assert found["wrong_answers"] == [["D"], ["A"]]
    # where that is the right one, too: all other letters
    assert pairs_from_rows(rows, counterfactual="noun")["wrong_answers"] == [["A", "C", "D"], ["A", "B", "D"]]
    bound = cf.Task.from_file(write(rows, "data.jsonl"), model, counterfactual="answerPosition").on(model)
    assert bound.answer_texts == ("B / D", "C / A")
    arc = {  # of `mib-bench/arc_easy`
        "arc_id": "Mercury_1",
        "question": "Which is hot?",
        "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]},
        "prompt": "Question: Which is hot?\nA. ice\nB. fire\nC. snow\nAnswer:",
        "label": "B",
        "answerKey": 1,
        "idx": 3,
        "symbol_counterfactual": {
            "question": "Which is hot?",
            "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]},
            "prompt": "Question: Which is hot?\n1. ice\n2. fire\n3. snow\nAnswer:",
            "label": "2",
            "answerKey": 1,
        },
    }
    found = pairs_from_rows([arc])
    assert (found["answers"], found["wrong_answers"]) == ([["B"]], [["2"]])
    choice, twin = rows[0], rows[0]["symbol_counterfactual"]
    for row, message in (
        ({**choice, "answerKey": 4}, "row 0: 'answerKey' must be an index into the 4 choices, counted from 0, not 4"),
        ({**choice, "answerKey": "B"}, "row 0: 'answerKey' must be an index"),
        ({**choice, "choices": {"label": ["A"]}}, "row 0: 'choices' must hold at least two labels"),
        ({**choice, "symbol_counterfactual": "1"}, "row 0: 'symbol_counterfactual' must be an object with a 'prompt'"),
        (
            {**choice, "symbol_counterfactual": {**twin, "answerKey": None}},
            "row 0: 'answerKey' of 'symbol_counterfactual' must be an index into the 4 choices",
        ),
    ):
        refused(lambda row=row: pairs_from_rows([row]), TaskError, message)


# -------------------------------------------------------------------- rows in memory
class Dataset:
    """What a `datasets.Dataset` is for a reader: it has a length and yields dictionaries."""

    column_names = ("clean", "corrupted", "answer", "wrong")

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)


OWN = [
    {"clean": MARY, "corrupted": JOHN, "answer": "Mary", "wrong": "John"},
    {"clean": LUCY, "corrupted": PAUL, "answer": "Lucy", "wrong": "Paul"},
]


def test_rows_of_any_iterable(model: cf.Model) -> None:
    expected = cf.Task([MARY, LUCY], [JOHN, PAUL], ["Mary", "Lucy"], ["John", "Paul"]).on(model)
    for rows in (OWN, Dataset(OWN), (row for row in OWN), tuple(OWN)):
        bound = cf.Task.from_rows(rows, model, name="mine", metric="prob_diff").on(model)
        assert torch.equal(bound.batch.answers, expected.batch.answers) and bound.prompts == expected.prompts
        assert (bound.name, bound.metric.name) == ("mine", "prob_diff")


class Table:
    """What a pandas DataFrame is for a reader: it yields the names of its columns."""

    iloc = None

    def __iter__(self) -> Iterator[str]:
        return iter(["clean", "corrupted"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"train": OWN, "test": OWN}, r"rows are a dict: .* or one split of several \(train, test\)"),
        (Table(), r"rows are a table by columns: .* to_dict\('records'\) of a DataFrame"),
        ("pairs.jsonl", "rows are a str: give a list of mappings"),
        (None, "rows are a NoneType"),
        ([], "rows: there are none"),
        ([OWN[0], MARY], "row 1: a row is a mapping from column to value"),
        ([OWN[0], {"clean": MARY, "corrupted": JOHN}], "row 1: column 'answer, wrong' is in some rows only"),
        ([{**OWN[0], "spans": "Mary"}], "row 0: 'spans' must be an object, name -> text, not 'Mary'"),
    ],
)
def test_rows_that_are_none(rows: Any, message: str) -> None:
    refused(lambda: cf.Task.from_rows(rows), TaskError, message)


def test_keywords_are_checked() -> None:
    refused(
        lambda: cf.Task.from_rows(OWN, metrik="kl"),
        TaskError,
        "keyword 'metrik' is unknown: did you mean 'metric'",
    )


# -------------------------------------------------------------------- dropping
def test_what_cannot_be_used_is_dropped_on_request(model: cf.Model) -> None:
    clean = [MARY, LUCY, MARY, LUCY, MARY]
    corrupted = [JOHN, PAUL + " Mary", MARY, PAUL, JOHN]
    answers, wrong = ["Mary", "Lucy", "Mary", "Xerxes", ["Mary", "Lucy"]], ["John", "Paul", "John", "Paul", "Lucy"]
    spans = [{"place": "store" if "store" in text else "park"} for text in clean]
    given = dict(positions=[-1, -2, -1, -1, -1], spans=spans)
    whole = cf.Task(clean, corrupted, answers, wrong, **given)
    refused(
        lambda: whole.on(model), TaskError, "answers must be one token each. with a leading space: row 3, ' Xerxes'"
    )
    short = whole.subset([0, 1])
    refused(lambda: short.on(model), TaskError, "row 1: .*equal length: .* leave such pairs out with unusable='drop'")
    with pytest.warns(
        UserWarning,
        match="4 of 5 pairs left out, such as row 1: the clean prompt has 1[0-9] tokens, the corrupted one 1[0-9]$",
    ):
        bound = cf.Task(clean, corrupted, answers, wrong, **given, unusable="drop").on(model)
    one = whole.subset([0]).on(model)
    assert bound.prompts == one.prompts == (MARY,) and bound.spans == one.spans and bound.spans[0]["place"] == (7, 8)
    for part in ("clean", "corrupted"):
        sides = zip(getattr(bound.batch, part), getattr(one.batch, part), strict=True)
        assert all(a is b is None or torch.equal(a, b) for a, b in sides)
    refused(lambda: cf.Task(clean, corrupted, unusable="skip"), TaskError, "unusable is 'skip': use 'error' or 'drop'")


def test_ids_that_cannot_be_used_are_dropped_too() -> None:
    plain = wrapped("gpt2")
    task = id_task((7, 4, 5, 6))
    task.corrupted_attention_mask = task.attention_mask.clone()
    task.corrupted_attention_mask[1, 3] = False
    task.unusable = "drop"
    with pytest.warns(UserWarning, match="'ids': 1 of 4 pairs left out, such as row 1: the clean prompt has 4 tokens"):
        bound = task.on(plain)
    same = id_task((7, 4, 5, 6)).on(plain).subset([0, 2, 3])
    assert torch.equal(bound.batch.clean.ids, same.batch.clean.ids)
    assert torch.equal(bound.batch.answers, same.batch.answers)


def test_the_spelling_that_serves_the_most_rows_is_taken(model: cf.Model) -> None:
    """With a space three rows can be said, without one only the second."""
    prompts, twins = [MARY, LUCY, MARY, LUCY], [JOHN, PAUL, JOHN, PAUL]
    task = cf.Task(prompts, twins, ["Mary", "qq", "Lucy", "Emma"], ["John", "ww", "Paul", "Anna"], unusable="drop")
    with pytest.warns(UserWarning, match="1 of 4 pairs left out, such as row 1: ' qq' is 2 tokens"):
        bound = task.on(model)
    assert bound.notes[0] == "answers spelled with a leading space" and len(bound) == 3


# -------------------------------------------------------------------- saving
def test_what_is_saved_opens_again(tmp_path: Path, model: cf.Model) -> None:
    spans = [{"place": "store", "end": (1, 2)}, {"place": "park", "end": (2, 3)}]
    task = cf.Task([MARY, LUCY], [JOHN, PAUL], ["Mary", ["Lucy"]], ["John", ["Paul", "Mary"]], spans=spans)
    path = task.save(tmp_path / "pairs.jsonl")
    bound, again = task.on(model), cf.Task.from_file(path).on(model)
    assert bound.prompts == again.prompts and bound.answer_texts == again.answer_texts and bound.spans == again.spans
    assert torch.equal(bound.batch.wrong, again.batch.wrong)
    ids = [model.tokenizer.encode(f" {name}")[0] for name in ("Mary", "John")]
    numbers = cf.Task([MARY], [JOHN], [ids[0]], [[ids[1]]])
    again = cf.Task.from_file(numbers.save(tmp_path / "ids.jsonl"), model)
    assert torch.equal(again.on(model).batch.wrong, numbers.on(model).batch.wrong)
    assert cf.Task.from_file(cf.Task([MARY], [JOHN], metric="kl").save(tmp_path / "bare.jsonl")).answers is None
    refused(lambda: id_task().save(tmp_path / "no.jsonl"), TaskError, "prompts as token ids have no text to write")
    refused(lambda: task.save(tmp_path / "none" / "pairs.jsonl"), FileError, "cannot be written: No such file")


# -------------------------------------------------------------------- on the command line
def test_the_command_line_chooses_templates_and_counterfactuals(
    write: Write, model: cf.Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cf, "load", lambda *_, **__: model)

    def said(*words: str) -> str:
        capsys.readouterr()
        main(("attribute", "reader", *words, "--method", "eap", "--show", "1"))
        return " ".join("".join(capsys.readouterr()).split())

    path = str(write([ioi_row("Mary", "John"), ioi_row("Xerxes", "John"), ioi_row("Lucy", "Paul")], "data.jsonl"))
    read = said("--data", path, "--counterfactual", "abc")
    assert "data, logit_diff: 2 pairs" in read and "1 of 3 pairs left out, such as row 1: ' Xerxes' is" in read
    built_in = said("--template", "abba", "--corruption", "s1_io_flip", "--n", "4")
    assert "ioi:s1-io-flip [abba], logit_diff: 4 pairs" in built_in
    assert "--counterfactual abc belongs to pairs of a file (--data)" in said("--counterfactual", "abc")
    assert "--template abba belongs to built-in tasks" in said("--data", path, "--template", "abba")
