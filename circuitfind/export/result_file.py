"""Results as JSON files that say what they are: `{"format": "circuitfind.paths", "version": 1, ...}`, UTF-8.

Numbers are finite: what is NaN or infinite in memory is null in the file, and NaN when it is read again. Unknown keys
are passed over. Nothing here needs a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from circuitfind.errors import FileError, ScoreError
from circuitfind.export.files import write_text
from circuitfind.export.json_file import plain
from circuitfind.export.json_text import parsed

VERSION = 1


def write(path: str | PathLike[str], format: str, content: Mapping[str, Any]) -> Path:
    """Writes a result under its format's name, whole or not at all.

    Raises:
        FileError: a name that does not end in .json, or a place that cannot be written to.
    """
    if Path(path).suffix.lower() != ".json":
        raise FileError(f"{path}: this result is saved as .json: give a name that ends so")
    whole = plain({"format": format, "version": VERSION, **content})
    return write_text(path, json.dumps(whole, ensure_ascii=False, allow_nan=False) + "\n")


def json_object(path: str | PathLike[str]) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        FileError: there is no such file, or it holds something else.
    """
    content = parsed(path)
    if not isinstance(content, dict):
        raise FileError(f"{path}: a JSON {type(content).__name__}, no result of circuitfind")
    return content


def read(path: str | PathLike[str], format: str) -> dict[str, Any]:
    """What `write` wrote under this format.

    Raises:
        FileError: there is no such file, or it holds another format or version.
    """
    content = json_object(path)
    if content.get("format") != format:
        raise FileError(f"{path}: expected {format}, this file holds {content.get('format') or 'no format by name'}")
    if content.get("version") != VERSION:
        found = content.get("version")
        raise FileError(f"{path}: version {found} of {format}, this circuitfind reads {VERSION}: write it again")
    return content


@contextmanager
def reading(path: str | PathLike[str]) -> Iterator[None]:
    """Makes of whatever is missing or wrong in a file's content an error that names the file."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, ScoreError) as error:
        raise FileError(f"{path}: cannot be read ({type(error).__name__}: {error}): write it again") from None


def numbers(values: Any) -> np.ndarray:
    """Nested lists of numbers as float64; null is NaN."""
    return np.array(values, dtype=np.float64)
