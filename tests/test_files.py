"""Pairs from jsonl and csv files; every error names the file and the line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import circuitfind as cf
from circuitfind.errors import FileError, TaskError
from circuitfind.tasks.files import read_pairs

Write = Callable[..., Path]
ROWS = [
    {"clean": "A b", "corrupted": "C b", "answer": "x", "wrong": ["y", "z"]},
    {"clean": "A d", "corrupted": "C d", "answer": "u, v", "wrong": ["w"]},
]
EXPECTED = {
    "name": "pairs",
    "clean": ["A b", "A d"],
    "corrupted": ["C b", "C d"],
    "answers": ["x", "u, v"],
    "wrong_answers": [["y", "z"], ["w"]],
}


@pytest.fixture()
def write(tmp_path: Path) -> Write:
    """Writes text (or bytes) to a file of the test's own folder."""

    def make(content: str | bytes, name: str = "pairs.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def as_jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


CSV = 'clean,corrupted,answer,wrong\nA b,C b,x,"[""y"", ""z""]"\nA d,C d,"u, v","[""w""]"\n'


# -------------------------------------------------------------------- reading
def test_jsonl(write: Write) -> None:
    assert read_pairs(write(as_jsonl(ROWS))) == EXPECTED
    assert read_pairs(str(write(as_jsonl(ROWS).replace("\n", "\n\n  \n")))) == EXPECTED
    assert read_pairs(write(as_jsonl(ROWS).rstrip())) == EXPECTED
    assert read_pairs(write(as_jsonl(ROWS), "PAIRS.JSONL"))["clean"] == EXPECTED["clean"]


def test_csv(write: Write) -> None:
    assert read_pairs(write(CSV, "pairs.csv")) == EXPECTED
    assert read_pairs(write(CSV.replace("\n", "\r\n"), "pairs.csv")) == EXPECTED
    inside = read_pairs(write('clean,corrupted\r\n"two\r\nlines",b\r\n', "pairs.csv"))
    assert inside["clean"] == ["two\r\nlines"], "line ends inside a cell are the prompt's own"
    assert read_pairs(write(CSV.replace("\nA d", "\n\n\nA d"), "pairs.csv")) == EXPECTED


@pytest.mark.parametrize(("name", "text"), [("pairs.jsonl", as_jsonl(ROWS)), ("pairs.csv", CSV)])
def test_a_byte_order_mark_is_no_content(write: Write, name: str, text: str) -> None:
    assert read_pairs(write(b"\xef\xbb\xbf" + text.encode(), name)) == EXPECTED


def test_the_content_tells_the_kind_of_file(write: Write) -> None:
    for name in ("pairs.txt", "pairs.jsonl", "pairs"):
        assert read_pairs(write(as_jsonl(ROWS), name)) == EXPECTED
        assert read_pairs(write("\n " + json.dumps(ROWS, indent=1), name)) == EXPECTED  # one document: a list of rows
    for name in ("pairs.txt", "pairs"):
        assert read_pairs(write(CSV, name)) == EXPECTED
    assert read_pairs(write(json.dumps(ROWS[0]), "pairs.json"))["clean"] == ["A b"]  # one object is one line


def test_letters_beyond_ascii(write: Write) -> None:
    rows = [{"clean": "Žofie je", "corrupted": "Émile je", "answer": "文"}]
    assert read_pairs(write(json.dumps(rows[0], ensure_ascii=False)))["clean"] == ["Žofie je"]
    assert read_pairs(write("clean,corrupted,answer\nŽofie je,Émile je,文\n", "pairs.csv"))["answers"] == ["文"]


@pytest.mark.parametrize("names", [("answer", "wrong"), ("answers", "wrong_answers"), ("answers", "wrong_answer")])
def test_column_names(write: Write, names: tuple[str, str]) -> None:
    row = {"clean": "a", "corrupted": "b", names[0]: ["x", "y"], names[1]: "z", "comment": 7}
    expected = {"name": "pairs", "clean": ["a"], "corrupted": ["b"], "answers": [["x", "y"]], "wrong_answers": ["z"]}
    assert read_pairs(write(as_jsonl([row]))) == expected
    text = f'clean,corrupted,{names[0]},{names[1]},comment\na,b,"[""x"", ""y""]",z,7\n'
    assert read_pairs(write(text, "pairs.csv")) == expected


def test_answers_are_optional_and_cells_may_be_empty(write: Write) -> None:
    bare = {"name": "pairs", "clean": ["a"], "corrupted": ["b"]}
    assert read_pairs(write('{"clean": "a", "corrupted": "b", "answer": null}\n')) == bare
    assert read_pairs(write("clean,corrupted,answer,wrong\na,b,,\n", "pairs.csv")) == bare


def test_a_csv_cell_that_only_looks_like_a_list_is_text(write: Write) -> None:
    rows = read_pairs(write('clean,corrupted,answer\n[a,[b,[c\n"two\nlines",b,"[""x"""\n', "pairs.csv"))
    assert rows["answers"] == ["[c", '["x"'] and rows["clean"] == ["[a", "two\nlines"]


# -------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'clean': 'a'}", "not JSON"),
        ('{"clean": "a",', "not JSON"),
        ('["a", "b"]', r'each line is one object, not \["a", "b"\]'),
        ('{"corrupted": "b", "answer": "x"}', "no 'clean'; columns are clean, corrupted, answer"),
        ('{"clean": "a", "answer": "x"}', "no 'corrupted'; columns are"),
        ('{"clean": "", "corrupted": "b", "answer": "x"}', "'clean' is empty: give its text"),
        ('{"clean": 5, "corrupted": "b", "answer": "x"}', "'clean' must be text, not 5"),
        ('{"clean": ["a"], "corrupted": "b", "answer": "x"}', r"'clean': message 0 is 'a': a message is"),
        ('{"clean": "a", "corrupted": "b", "answer": 3}', "'answer' must be text, not 3"),
        ('{"clean": "a", "corrupted": "b", "answer": []}', r"'answer' must be text, not \[\]"),
        ('{"clean": "a", "corrupted": "b", "answer": ["x", null]}', r"'answer' must be text, not \['x', None\]"),
        ('{"clean": "a", "corrupted": "b", "answer": "x", "answers": ["y"]}', "'answers' is given twice"),
        ('{"clean": "a", "corrupted": "b"}', "column 'answer' is in some rows only"),
        (
            '{"clean": "a", "corrupted": "b", "answer": "x", "wrong": "y"}',
            "column 'wrong' is in some rows only",
        ),
    ],
)
def test_bad_lines_of_jsonl(write: Write, line: str, message: str) -> None:
    path = write('{"clean": "a", "corrupted": "b", "answer": "x"}\n\n' + line + "\n")
    with pytest.raises(FileError, match=rf"pairs\.jsonl, line 3: {message}") as error:
        read_pairs(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a,b,x,extra", "more cells than the header has columns"),
        ("a", "no 'corrupted'"),
        (",b,x", "'clean' is empty: give its text"),
        ("a,b,", "column 'answer' is in some rows only"),
        ('a,b,"[1, 2]"', r"'answer' must be text, not \[1, 2\]"),
        ("a,b,[]", r"'answer' must be text, not \[\]"),
    ],
)
def test_bad_lines_of_csv(write: Write, line: str, message: str) -> None:
    path = write(f"clean,corrupted,answer\na,b,x\n\n{line}\n", "pairs.csv")
    with pytest.raises(FileError, match=rf"pairs\.csv, line 4: {message}") as error:
        read_pairs(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.jsonl", "\n \n", "holds no pairs"),
        ("pairs.csv", "clean,corrupted\n", "holds no pairs"),
        ("pairs.csv", "", "holds no pairs"),
        ("pairs.jsonl", b"\xff\xfe\x00", "not a text file in UTF-8"),
        ("pairs.csv", b"clean,corrupted\n\xe9,b\n", "not a text file in UTF-8"),
        ("pairs.csv", "prompt,twin\na,b\n", "line 2: no 'clean'"),
        ("pairs.csv", "clean,corrupted\n" + "a" * 200_000 + ",b\n", "line 2: not csv"),
        ("pairs.json", "[]", "holds no pairs"),
        ("pairs.json", "clean,corrupted\na,b\n", "line 1: not JSON"),
        ("pairs", "", "holds no pairs"),
        ("pairs.parquet", b"PAR1\x15\x04", r"a parquet file: open it with datasets or pandas.*Task\.from_rows"),
        ("pairs.txt", "When Mary and John went\nWhen John and Mary went\n", "line 2: no 'clean'; columns are clean,"),
    ],
)
def test_bad_files(write: Write, name: str, content: str | bytes, message: str) -> None:
    path = write(content, name)
    with pytest.raises(FileError, match=message) as error:
        read_pairs(path)
    assert str(error.value).startswith(str(path))


def test_missing_files(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "none.jsonl", "no such file"), (tmp_path, "a folder, not a file of pairs")):
        with pytest.raises(FileError, match=said):
            cf.Task.from_file(path)


# -------------------------------------------------------------------- into a task
def test_a_task_from_a_file(write: Write) -> None:
    model = cf.load("tiny", check=False)
    rows = [
        {
            "clean": "Mary saw John and John saw",
            "corrupted": "Mary saw John and Mary saw",
            "answer": "Mary",
            "wrong": "John",
        },
        {
            "clean": "Mary saw John and John told",
            "corrupted": "Mary saw John and Mary told",
            "answer": "Mary",
            "wrong": "John",
        },
    ]
    path = write(as_jsonl(rows), "names.jsonl")
    task = cf.Task.from_file(path, model, metric="logprob", bos=True)
    assert (task.name, task.metric, task.bos, task.answers) == ("names", "logprob", True, ["Mary", "Mary"])
    assert len(task.on(model)) == 2 and cf.Task.from_file(path, name="other").name == "other"
    rows[1]["corrupted"] = rows[1]["clean"]
    with pytest.raises(TaskError, match="row 1: the clean and the corrupted prompt are identical"):
        cf.Task.from_file(write(as_jsonl(rows), "same.jsonl"), model)
