"""Pairs of prompts from files.

jsonl: one object a line; csv: a header row. Columns: `clean`, `corrupted`, and `answer` or `answers`, `wrong` or
`wrong_answers` (optional for metrics that need none). Several answers are a JSON list, in csv too (`["he", "they"]`);
any other csv cell is one answer as it stands.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from circuitfind.errors import FileError

NAMES = {"clean": "clean", "corrupted": "corrupted", "answer": "answers", "answers": "answers"}
NAMES |= {"wrong": "wrong_answers", "wrong_answers": "wrong_answers", "wrong_answer": "wrong_answers"}
Line = tuple[int, dict[str, Any]]


def read_pairs(path: str | PathLike[str]) -> dict[str, Any]:
    """Fields of a `Task`: clean, corrupted, answers, wrong_answers, name.

    Raises:
        FileError: naming the file, the line and what is wrong with it.
    """
    if not isinstance(path, (str, PathLike)):
        raise FileError(f"pairs are read from a path, not from {path!r}: give the name of a jsonl or csv file")
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise FileError(f"{path}: unknown kind of file '{path.suffix}': use one of {', '.join(READERS)}")
    try:
        lines = list(reader(path))
    except UnicodeDecodeError:
        raise FileError(f"{path}: not a text file in UTF-8") from None
    if not lines:
        raise FileError(f"{path}: holds no pairs")
    rows = [_row(path, number, fields) for number, fields in lines]
    columns = set(rows[0])
    for (number, _), row in zip(lines, rows, strict=True):
        if set(row) != columns:
            odd = ", ".join(sorted(set(row) ^ columns))
            raise FileError(f"{path}, line {number}: column '{odd}' is in some rows only")
    return {"name": path.stem, **{column: [row[column] for row in rows] for column in sorted(columns)}}


def _row(path: Path, number: int, fields: dict[str, Any]) -> dict[str, Any]:
    row = {}
    for key, value in fields.items():
        if key not in NAMES or value is None or value == "":
            continue
        name = NAMES[key]
        if name in row:
            raise FileError(f"{path}, line {number}: '{name}' is given twice")
        strings = value if isinstance(value, list) and name.endswith("answers") else [value]
        if not strings or not all(isinstance(text, str) for text in strings):
            raise FileError(f"{path}, line {number}: '{key}' must be text, not {value!r}")
        row[name] = value
    for needed in ("clean", "corrupted"):
        if needed not in row:
            raise FileError(
                f"{path}, line {number}: no '{needed}'; columns are clean, corrupted, answer(s), wrong or wrong_answers"
            )
    return row


def _jsonl(path: Path) -> Iterator[Line]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise FileError(f"{path}, line {number}: not JSON ({error.msg})") from None
            if not isinstance(fields, dict):
                raise FileError(f"{path}, line {number}: each line is one object, not {line.strip()[:40]}")
            yield number, fields


def _csv(path: Path) -> Iterator[Line]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for fields in reader:
                if None in fields:
                    raise FileError(f"{path}, line {reader.line_num}: more cells than the header has columns")
                yield reader.line_num, {key: _cell(key, value) for key, value in fields.items()}
        except csv.Error as error:
            raise FileError(f"{path}, line {reader.line_num + 1}: not csv ({error})") from None


def _cell(key: str, value: str | None) -> Any:
    if value and key in NAMES and NAMES[key].endswith("answers") and value.startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


READERS: dict[str, Callable[[Path], Iterator[Line]]] = {".jsonl": _jsonl, ".csv": _csv}
