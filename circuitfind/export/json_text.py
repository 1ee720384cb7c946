"""Opens files that should hold JSON, and says of others what they are, where that can be known."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from circuitfind.errors import FileError
from circuitfind.export.files import check_file

TENSORS = {  # by the format and level that a safetensors file names: what takes it
    ("circuitfind.scores", "edge"): (
        "edge scores: 'circuitfind find --scores' searches them, 'circuitfind export --top N --to json' or"
        " Scores.open(path).top(n) cuts a circuit from them"
    ),
    ("circuitfind.scores", "node"): (
        "node scores: 'circuitfind show' draws them, NodeScores.open(path).circuit(n) makes a circuit of them"
    ),
    ("circuitfind.sweep", None): "a sweep: 'circuitfind show' draws it, Sweep.open(path) reads it",
}


def parsed(path: str | PathLike[str]) -> Any:
    """A file's JSON; NaN and Infinity, which are no JSON, are refused.

    Raises:
        FileError: there is no such file, or it holds something else.
    """
    check_file(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 are both ValueErrors
        said = "this is no text file" if isinstance(error, UnicodeDecodeError) else str(error)
        found = _tensors(path)
        raise FileError(f"{path}: holds {found}" if found else f"{path}: not JSON: {said}") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number that JSON knows")


def _tensors(path: str | PathLike[str]) -> str:
    """What a safetensors file holds; nothing of another file."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError):
        return ""
    named = header.get("format", ""), header.get("level")
    return TENSORS.get(named, "tensors (safetensors), no result of circuitfind")
