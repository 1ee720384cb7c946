"""`Result`: the base of everything that a call returns, with its files, tables, figures and text.

A result is a frozen dataclass. Its fields are its content:

1. `to_dict` returns the fields as JSON values, the properties that `DERIVED` names, and all properties of named tuples.
2. `save` writes this under the result's format; `open` rebuilds the fields from it by their type hints. Fields with
   `metadata=UNSAVED` are not saved; `metadata=saved_as(...)` gives a field another name in files.
3. `rows` are named tuples, one for each item that was measured (`ROWS` names the field that holds them). `to_frame`
   returns them as columns, `save("x.csv")` writes them as a table.
4. `repr` is one line and never lists prompts or arrays; `_repr_html_` is shown in notebooks.

Figures and pages are made by packages above this module. They are imported by name when they are asked for, as pandas
imports a plotting backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from importlib import import_module
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

import numpy as np

from circuitfind.errors import FileError, ScoreError
from circuitfind.export import files, html, table
from circuitfind.statistics import Interval

UNSAVED: Mapping[str, Any] = {"saved": False}  # metadata of a field that is not saved
DRAWING = "circuitfind.plots.plot"
LONGEST = 60  # characters of a text that a `repr` shows

By = Literal["absolute", "signed"]


def check_by(by: str) -> None:
    if by not in ("absolute", "signed"):
        ways = "'absolute' (ranked by |effect|) or 'signed' (positive effects first)"
        raise ScoreError(f"by='{by}' is unknown: use {ways}")


def strongest(effects: np.ndarray, n: int, by: str = "absolute") -> np.ndarray:
    """Return the indices of the n strongest effects of `[places]`, best first, ties in the given order; NaN is left
    out."""
    check_by(by)
    key = np.where(np.isnan(effects), -np.inf, np.abs(effects) if by == "absolute" else effects)
    return np.argsort(-key, kind="stable")[: min(n, int((~np.isnan(effects)).sum()))]


def saved_as(key: str) -> Mapping[str, Any]:
    """Return metadata that gives a field another name in `to_dict` and in files."""
    return {"key": key}


class Result:
    """Base of everything that a call returns. FORMAT: name of the format in files; ROWS: the field whose entries are
    the rows; DERIVED: properties that `to_dict` adds; OLD_KEYS: keys that identify files of versions that wrote no
    format name; SHOWN: fields and properties in `repr`, by default all numbers and short texts."""

    FORMAT: ClassVar[str] = ""
    ROWS: ClassVar[str] = ""
    DERIVED: ClassVar[tuple[str, ...]] = ()
    OLD_KEYS: ClassVar[tuple[str, ...]] = ()
    SHOWN: ClassVar[tuple[str, ...]] = ()

    # ---------------------------------------------------------------- as data
    def to_dict(self) -> dict[str, Any]:
        """Return fields and derived properties as JSON values, including values per example."""
        names = {_key(one): one.name for one in _saved(self)} | {name: name for name in self.DERIVED}
        return {key: as_json(getattr(self, name)) for key, name in names.items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Rebuild a result from what `to_dict` returned; unknown keys are ignored."""
        hints, given = _hints(cls), {}  # type: ignore[arg-type]  # a class is hashable
        for one in fields(cls):  # type: ignore[arg-type]  # subclasses are dataclasses
            if _key(one) in content:
                given[one.name] = build(hints[one.name], content[_key(one)])
            elif one.default is MISSING and one.default_factory is MISSING:
                raise KeyError(_key(one))
        return cls(**given)

    def rows(self) -> Sequence[Any]:
        """Return named tuples, one for each item that was measured."""
        return tuple(getattr(self, self.ROWS)) if self.ROWS else ()

    def columns(self) -> dict[str, list[Any]]:
        """Return the rows as columns by name; an interval is two columns, `low` and `high`."""
        rows = list(map(_flat, self.rows()))
        return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}

    def to_frame(self) -> Any:
        """Return the rows as a pandas `DataFrame` if pandas is installed, otherwise as columns by name (lists), which
        `pyarrow.table` and `polars.DataFrame` take."""
        try:
            return import_module("pandas").DataFrame(self.columns())
        except ImportError:
            return self.columns()

    # ---------------------------------------------------------------- as a file
    def save(self, path: str | PathLike[str], **more: Any) -> Path:
        """Write everything as `.json`, or the rows as `.csv` (or as `.parquet` if pyarrow is installed).

        Args:
            more: further entries of a `.json`, which `open` ignores.

        Raises:
            FileError: the ending is another one, or the file cannot be written.
        """
        ending = Path(path).suffix.lower()
        if table.fits(path) and self.ROWS:
            return table.write(path, self.columns())
        if ending != ".json":
            also = " or .csv (its rows)" if self.ROWS else ""
            raise FileError(f"{path}: a {type(self).__name__} is saved as .json (everything){also}, not as '{ending}'")
        return files.write(path, self.FORMAT, {**more, **self.to_dict()})

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Self:
        """Read a `.json` that `save` wrote; needs no model. Raises a `FileError` if the file is missing or holds
        something else."""
        content = files.read(path, cls.FORMAT, cls.OLD_KEYS)
        with files.reading(path):
            return cls.from_dict(content)

    # ---------------------------------------------------------------- as something to look at
    def plot(self, what: str | None = None, **options: Any) -> Any:
        """Return a plotly figure of the result; see `circuitfind.plot`."""
        return import_module(DRAWING).plot(self, what, **options)

    def shown(self) -> dict[str, Any]:
        """Return the names and values that `repr` shows."""
        names = self.SHOWN or (*(one.name for one in fields(self)), *self.DERIVED)  # type: ignore[arg-type]
        return {name: value for name in names if _is_short(value := getattr(self, name))}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={_said(value)}' for name, value in self.shown().items())})"

    def _repr_html_(self) -> str:
        columns = self.columns()
        table = html.table(list(columns), zip(*columns.values(), strict=True)) if columns else ""
        return html.block(type(self).__name__, html.facts(self.shown()), table)


def _saved(result: Any) -> list[Field[Any]]:
    return [one for one in fields(result) if one.metadata.get("saved", True)]


def _key(one: Field[Any]) -> str:
    """Return a field's name in `to_dict` and in files."""
    return str(one.metadata.get("key", one.name))


def _is_short(value: Any) -> bool:
    return isinstance(value, (int, float, Interval)) or (isinstance(value, str) and 0 < len(value) <= LONGEST)


def _said(value: Any) -> str:
    if isinstance(value, Interval):
        return f"({value.low:.3g}, {value.high:.3g})"
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def _flat(row: Any) -> dict[str, Any]:
    """Return a row as values by column."""
    flat: dict[str, Any] = {}
    for name, value in row._asdict().items():
        flat |= value._asdict() if isinstance(value, Interval) else {name: value}
    return flat


# -------------------------------------------------------------------- fields as JSON, and back
def as_json(value: Any) -> Any:
    """Convert a field to JSON values: arrays to lists, an interval to two numbers, named tuples to objects."""
    if isinstance(value, Result | np.ndarray):
        return value.to_dict() if isinstance(value, Result) else value.tolist()
    if isinstance(value, Interval):
        return list(value)
    if hasattr(value, "_asdict"):
        derived = (name for name, one in vars(type(value)).items() if isinstance(one, property))
        parts = value._asdict() | {name: getattr(value, name) for name in derived}
        return {name: as_json(part) for name, part in parts.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: as_json(getattr(value, one.name)) for one in _saved(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(part) for part in value]
    return value


def build(hint: Any, value: Any) -> Any:
    """Rebuild a field from its type hint and its JSON values."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in parts:
            return None
        return build(next(part for part in parts if part is not NoneType), value)
    if origin is list or (origin is tuple and parts[-1] is Ellipsis):
        return origin(build(parts[0], part) for part in value)
    if origin is tuple:
        return tuple(build(part, one) for part, one in zip(parts, value, strict=True))
    if origin in (dict, Mapping):
        return {parts[0](key): build(parts[1], part) for key, part in value.items()}
    if hint is float:
        return float("nan") if value is None else float(value)
    if hint is np.ndarray:
        array = np.array(value)
        return np.array(value, dtype=np.float64) if array.dtype == object else array  # null is NaN
    if not isinstance(hint, type):
        return value
    if issubclass(hint, Result):
        return hint.from_dict(value)
    kind: Any = hint
    named = issubclass(kind, tuple) and hasattr(kind, "_fields")
    if not named and not is_dataclass(kind):
        return value
    names, hints = kind._fields if named else [one.name for one in fields(kind)], _hints(kind)
    if named and not isinstance(value, Mapping):  # an interval is two numbers
        value = dict(zip(names, value, strict=True))
    return kind(**{name: build(hints[name], part) for name, part in value.items() if name in names})


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)
