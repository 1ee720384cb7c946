"""Every example of a file in docs/tasks.md opens, and its code runs, on the embedded model."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

import circuitfind as cf
from circuitfind.tasks.builtin import TASKS

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```(jsonl|json|csv)\n(.*?)```", TEXT, re.DOTALL)
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def tiny() -> cf.Model:
    return cf.load("tiny", check=False)


def test_all_formats_have_an_example() -> None:
    marks = ("answer", "corrupt", "<predict>", "correct_idx", "_counterfactual", "clean,corrupted,answer")
    assert len(EXAMPLES) == 6 and all(any(mark in text for _, text in EXAMPLES) for mark in marks)


@pytest.mark.parametrize(("kind", "text"), EXAMPLES)
def test_the_examples_of_files_open(kind: str, text: str, tmp_path: Path, tiny: cf.Model) -> None:
    path = tmp_path / f"pairs.{kind}"
    path.write_text(text, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no row is left out
        bound = cf.Task.from_file(path, tiny).on(tiny)
    lines = len(text.strip().splitlines())
    assert len(bound) == {"json": 1, "csv": lines - 1, "jsonl": lines}[kind] and bound.batch.wrong.shape[-1] >= 1
    assert cf.diagnose(tiny, bound).summary is not None
    if kind == "json":
        start, stop = bound.spans[0]["object"]
        assert "".join(bound.tokens[0][start:stop]) == " John"


def test_the_code_runs(tiny: cf.Model) -> None:
    built_in, builder, own, unequal = CODE
    names = {"cf": cf, "model": tiny}
    exec(built_in, names)
    assert names["task"].name == "ioi [abba]"
    exec(builder, names)
    assert names["task"].name == "echo" and len(names["task"].on(tiny)) == 8
    exec(
        own, {**names, "print": str}
    )  # the finance words are several tokens to the embedded model: one error, in words
    exec(unequal, names)
    assert names["bound"].batch.alignment is not None
    assert "spans=" in TEXT and "counterfactual=" in TEXT


def test_the_table_lists_what_is_built_in() -> None:
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (.*?) \|", TEXT, re.MULTILINE))
    assert list(rows) == list(TASKS)
    for name, cell in rows.items():
        known = TASKS[name].corruptions
        listed = re.findall(r"`([a-z0-9-]+)`", cell)
        assert tuple(listed) == (known[:4] if name == "ioi" else known)
