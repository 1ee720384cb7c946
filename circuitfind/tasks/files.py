"""Pairs of prompts read from files and rows, and written to a file.

1. A file that begins with `{` or `[`, or is named .json or .jsonl, is JSON: one document (a list of rows, or
   auto-circuit's `{"prompts": [...]}`) or one object per line. Any other file is csv with a header row.
2. `circuitfind.tasks.formats` describes the columns. In csv, a cell with several answers is a JSON list
   (`["he", "they"]`), and so is a prompt of messages (`[{"role": "user", "content": ...}]`). All other cells are text.
3. auto-circuit's `word_idxs` and `seq_labels` become spans of one token; positions do not count a BOS token.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from circuitfind.errors import FileError, TaskError
from circuitfind.export.files import read_bytes, write_text
from circuitfind.tasks.formats import NAMES, BadRow, Fields, pairs_of

_PARQUET = b"PAR1"


class _Read(NamedTuple):
    """Rows, the place of each row in its file (such as "line 3"), and spans that apply to all rows."""

    rows: list[Any]
    where: list[str]
    spans: dict[str, tuple[int, int]] = {}  # noqa: RUF012 (never changed)


def read_pairs(path: str | PathLike[str], *, counterfactual: str | None = None, split: str | None = None) -> Fields:
    """Return fields of a `Task`: name, clean, corrupted, and every further field that the file has.

    Raises:
        FileError: naming the file and the line.
    """
    if not isinstance(path, (str, PathLike)):
        raise FileError(f"pairs are read from a path, not from {path!r}: give the name of a jsonl, csv or json file")
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path}: a folder, not a file of pairs (give the rows of a saved dataset to Task.from_rows)")
    read = _rows(path)
    if not read.rows:
        raise FileError(f"{path}: holds no pairs; jsonl, json and csv with a header row are read")
    try:
        fields = pairs_of(read.rows, counterfactual, split)
    except BadRow as bad:
        raise FileError(f"{path}, {read.where[bad.at]}: {bad}") from None
    spans = {"spans": [read.spans] * len(fields["clean"])} if read.spans else {}
    name = path.stem if path.is_file() else "pairs"  # a pipe has no useful name
    return {"name": name, **fields, **spans}


def pairs_from_rows(rows: Iterable[Any], *, counterfactual: str | None = None, split: str | None = None) -> Fields:
    """Return fields of a `Task` from rows in memory, such as those of a `datasets.Dataset`.

    Raises:
        TaskError: naming the row, counted from 0.
    """
    if isinstance(rows, (str, Mapping)) or not hasattr(rows, "__iter__") or hasattr(rows, "iloc"):
        kind = "a table by columns" if hasattr(rows, "iloc") else f"a {type(rows).__name__}"
        splits = ", ".join(map(str, rows)) if isinstance(rows, Mapping) else ""
        remedy = "to_dict('records') of a DataFrame" if not splits else f"one split of several ({splits})"
        raise TaskError(f"rows are {kind}: give a list of mappings from column to value, or {remedy}")
    listed = list(rows)
    if not listed:
        raise TaskError("rows: there are none")
    try:
        return pairs_of(listed, counterfactual, split)
    except BadRow as bad:
        raise TaskError(f"row {bad.at}: {bad}") from None


def write_pairs(path: str | PathLike[str], columns: Mapping[str, Sequence[Any] | None]) -> Path:
    """Write columns as jsonl that `read_pairs` opens, and return the path. Columns that are None are left out."""
    given = {name: values for name, values in columns.items() if values is not None}
    rows = (dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not Path(path).parent.is_dir():  # do not create a misspelled folder
        raise FileError(f"{path}: cannot be written: No such file or directory")
    return write_text(path, text)


def _rows(path: Path) -> _Read:
    content = read_bytes(path)
    if content.startswith(_PARQUET):
        raise FileError(f"{path}: a parquet file: open it with datasets or pandas and give its rows to Task.from_rows")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FileError(f"{path}: not a text file in UTF-8") from None
    if not text.strip():
        return _Read([], [])
    if text.lstrip()[0] in "{[" or path.suffix.lower() in (".json", ".jsonl"):
        return _document(path, text) or _jsonl(path, text)
    return _csv(path, text)


def _document(path: Path, text: str) -> _Read | None:
    """Return the rows of one JSON document; None if the text is to be read as one object per line."""
    try:
        whole = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError:
        return None
    if isinstance(whole, dict) and isinstance(whole.get("prompts"), list):
        rows = whole["prompts"]
        return _Read(rows, [f"prompt {at}" for at in range(len(rows))], _spans(path, whole))
    if isinstance(whole, list) and not (whole and isinstance(whole[0], str)):
        return _Read(whole, [f"row {at}" for at in range(len(whole))])
    if isinstance(whole, dict) and "\n" in text.strip():
        remedy = "give one object a line (jsonl), a list of objects, or csv with a header row"
        raise FileError(f"{path}: one JSON object, not pairs: {remedy}")
    return None


def _spans(path: Path, whole: dict[str, Any]) -> dict[str, tuple[int, int]]:
    named = whole.get("word_idxs") or {}
    if not isinstance(named, dict) or not all(isinstance(at, int) for at in named.values()):
        raise FileError(f"{path}: 'word_idxs' must be an object, name -> position, not {str(named)[:40]!r}")
    spans = {str(name): (at, at + 1) for name, at in named.items()}
    for at, label in enumerate(whole.get("seq_labels") or []):
        name, times = str(label), 1
        while name in spans and spans[name] != (at, at + 1):  # the label occurs again
            times += 1
            name = f"{label} ({times})"
        spans[name] = (at, at + 1)
    return spans


def _jsonl(path: Path, text: str) -> _Read:
    lines = {f"line {number}": line for number, line in enumerate(text.split("\n"), start=1) if line.strip()}
    rows = []
    for where, line in lines.items():
        try:
            rows.append(json.loads(line, object_pairs_hook=_once))
        except json.JSONDecodeError as error:
            raise FileError(f"{path}, {where}: not JSON ({error.msg})") from None
        if not isinstance(rows[-1], dict):
            raise FileError(f"{path}, {where}: each line is one object, not {line.strip()[:40]}")
    return _Read(rows, list(lines))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dictionary; refuse one with the same key twice."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise json.JSONDecodeError(f"'{name}' is there twice", "", 0)
    return dict(pairs)


def _csv(path: Path, text: str) -> _Read:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows, where = [], []
    try:
        names = reader.fieldnames or []
        if twice := [name for name in names if name and names.count(name) > 1]:
            raise FileError(f"{path}: column '{twice[0]}' is there twice: leave one of them out")
        if len(names) == 1 and (other := next((mark for mark in ";\t" if mark in names[0]), "")):
            raise FileError(f"{path}: the columns are separated by {other!r}: save the file with commas between them")
        for fields in reader:
            if None in fields:
                raise FileError(f"{path}, line {reader.line_num}: more cells than the header has columns")
            rows.append({key: _cell(key, value) for key, value in fields.items()})
            where.append(f"line {reader.line_num}")
    except csv.Error as error:
        raise FileError(f"{path}, line {reader.line_num + 1}: not csv ({error})") from None
    return _Read(rows, where)


def _cell(key: str, value: str | None) -> Any:
    listed = "[{" if key in ("clean", "corrupted") else "[" if NAMES.get(key, "").endswith("answers") else None
    if value and listed and value.startswith(listed):
        with suppress(json.JSONDecodeError):
            return json.loads(value)
    return value
