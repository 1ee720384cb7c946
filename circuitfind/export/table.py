"""A result's columns as a file: `.csv`, or `.parquet` if pyarrow is installed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

from circuitfind.errors import FileError, installing
from circuitfind.export.files import write_bytes, write_text

ENDINGS = (".csv", ".parquet")


def fits(path: str | PathLike[str]) -> bool:
    """Whether the path ends in .csv or .parquet."""
    return Path(path).suffix.lower() in ENDINGS


def write(path: str | PathLike[str], columns: Mapping[str, list[Any]]) -> Path:
    """Write columns, lists of equal length by name, and return the path; None becomes an empty cell."""
    if Path(path).suffix.lower() == ".csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *zip(*columns.values(), strict=True)])
        return write_text(path, text.getvalue())
    try:
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise FileError(f"{path}: Parquet needs pyarrow: {installing('pyarrow')}; or save as .csv") from None
    buffer = io.BytesIO()
    parquet.write_table(arrow.table(dict(columns)), buffer)
    return write_bytes(path, buffer.getvalue())
