"""What a comparison found: one entry a method, and how far the methods' circuits overlap. Plain numbers, no models.

`save` writes JSON (everything), CSV (one line a method and size) or Markdown (the report); `Comparison.open` reads the
JSON. `difference` says how far two comparisons are apart: the test of a reproduction.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from circuitfind.costs import Costs
from circuitfind.errors import FileError
from circuitfind.evaluation.curve import CurvePoint
from circuitfind.export.files import json_object as parsed
from circuitfind.export.files import plain, write_text
from circuitfind.record import Record
from circuitfind.statistics import UNKNOWN, Interval

FORMAT, VERSION = "circuitfind.comparison", "1"


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        cpr, cmd: as `circuitfind.mib`: CPR of the signed selection, CMD of the absolute one, with 95% intervals.
        signed, absolute: the two curves.
        auroc, auroc_heads: against the reference circuit, where there is one.
        rank_correlation: Spearman's rho of |score| with |exact effect| over all edges, where `exact` is compared, too.
        costs: of making the ranking; passes are counted in passes of all pairs that it was made on.
        refused: why the method gave no ranking here; everything else is then empty.
    """

    method: str
    summary: str
    cpr: float = math.nan
    cpr_interval: Interval = UNKNOWN
    cmd: float = math.nan
    cmd_interval: Interval = UNKNOWN
    signed: tuple[CurvePoint, ...] = ()
    absolute: tuple[CurvePoint, ...] = ()
    auroc: float | None = None
    auroc_heads: float | None = None
    rank_correlation: float | None = None
    costs: Costs = field(default_factory=Costs)
    refused: str = ""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods on one model and task.

    Attributes:
        entries: by method, in the order asked for.
        overlap: by number of edges, `[method][method]` Jaccard similarities of the absolute selections' circuits.
        n_search, n_judge: pairs that the rankings were made on, and others that the circuits were run on.
        record: of the exact runs; its settings hold the comparison's.
        arguments: how to make it again, where the command line made it.
    """

    entries: tuple[Entry, ...]
    overlap: dict[int, list[list[float]]]
    n_edges: int
    n_search: int
    n_judge: int
    reference: str | None
    record: Record
    arguments: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, method: str) -> Entry:
        for entry in self.entries:
            if entry.method == method:
                return entry
        raise KeyError(method)

    @property
    def ranked(self) -> list[Entry]:
        """The methods that gave a ranking."""
        return [entry for entry in self.entries if not entry.refused]

    def closest(self) -> list[tuple[CurvePoint, str]]:
        """At each size the method whose circuit's faithfulness is nearest to 1, by the absolute selection."""
        points = zip(*([(point, entry.method) for point in entry.absolute] for entry in self.ranked), strict=True)
        return [min(at_size, key=lambda found: abs(1 - found[0].faithfulness)) for at_size in points]

    def with_arguments(self, **arguments: Any) -> Comparison:
        """A copy that says how it was asked for."""
        return replace(self, arguments=arguments)

    # ---------------------------------------------------------------- numbers and files
    def numbers(self) -> Iterator[tuple[str, float]]:
        """Every number that a repetition should give again, by name; costs are left out, they are the machine's."""
        for entry in self.ranked:
            for name in ("cpr", "cmd", "auroc", "auroc_heads", "rank_correlation"):
                value = getattr(entry, name)
                if value is not None and not math.isnan(value):  # a file holds nothing for either
                    yield f"{entry.method} {name}", value
            for by in ("signed", "absolute"):
                for point in getattr(entry, by):
                    yield f"{entry.method} faithfulness of {point.asked} edges ({by})", point.faithfulness
        for size, matrix in self.overlap.items():
            for row, values in enumerate(matrix):
                for column, value in enumerate(values[:row]):
                    yield f"overlap of {self.ranked[row].method} and {self.ranked[column].method} at {size}", value

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes `.json`, `.csv` or `.md`.

        Raises:
            FileError: another ending, or the place cannot be written to.
        """
        from circuitfind.comparison.markdown import report

        forms = {".json": self._json, ".csv": self._csv, ".md": lambda: report(self)}
        ending = Path(path).suffix
        if ending not in forms:
            raise FileError(f"{path}: a comparison is saved as {', '.join(forms)}, not as '{ending}'")
        return write_text(path, forms[ending]())

    def _json(self) -> str:
        entries = [{**entry, **_points(entry)} for entry in asdict(self)["entries"]]
        return json.dumps(plain({**self.to_dict(), "entries": entries}), ensure_ascii=False, indent=1) + "\n"

    def _csv(self) -> str:
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        names = [name for name in CurvePoint._fields if name != "interval"]
        table.writerow(["method", "by", *names, "low", "high"])
        for entry in self.ranked:
            for by in ("signed", "absolute"):
                for point in getattr(entry, by):
                    table.writerow([entry.method, by, *(getattr(point, name) for name in names), *point.interval])
        return text.getvalue()

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Comparison:
        """Reads what `save` wrote as JSON.

        Raises:
            FileError: no such file, or no comparison.
        """
        content = parsed(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise FileError(f"{path} is no comparison: give the compare.json that 'circuitfind compare' wrote")
        if content.get("version") != VERSION:
            raise FileError(f"{path}: version {content.get('version')} of the format, this circuitfind reads {VERSION}")
        try:
            known = {f.name: content[f.name] for f in fields(cls)}
            known["entries"] = tuple(_entry(entry) for entry in known["entries"])
            known["overlap"] = {int(size): matrix for size, matrix in known["overlap"].items()}
            known["record"] = Record(**known["record"])
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{path}: its comparison cannot be read ({type(error).__name__}: {error})") from None
        return cls(**known)


def difference(a: Comparison, b: Comparison) -> tuple[float, str]:
    """The largest difference between two comparisons' numbers, and where it is; infinite where one lacks a number."""
    ours, theirs = dict(a.numbers()), dict(b.numbers())
    lacking = sorted(ours.keys() ^ theirs.keys())
    if lacking:
        return math.inf, lacking[0]
    apart = {name: abs(value - theirs[name]) for name, value in ours.items()}
    worst = max(apart, key=lambda name: apart[name], default="")
    return apart.get(worst, 0.0), worst


def _points(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        by: [dict(zip(CurvePoint._fields, point, strict=True)) for point in entry[by]] for by in ("signed", "absolute")
    }


def _entry(content: dict[str, Any]) -> Entry:
    curves = {
        by: tuple(CurvePoint(**{**point, "interval": _interval(point["interval"])}) for point in content[by])
        for by in ("signed", "absolute")
    }
    intervals = {name: _interval(content[name]) for name in ("cpr_interval", "cmd_interval")}
    numbers = {name: math.nan if content[name] is None else content[name] for name in ("cpr", "cmd")}
    return Entry(**{**content, **curves, **intervals, **numbers, "costs": Costs(**content["costs"])})


def _interval(ends: list[float | None]) -> Interval:
    return Interval(*(math.nan if end is None else end for end in ends))
