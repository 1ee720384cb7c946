"""The result of a comparison: an entry for each method, the overlap of their circuits, and tables of both.

`save` writes JSON (everything), CSV (a row for each method and size), Markdown (the report) or HTML (the page), or all
four into a folder. `difference` compares a repetition with the original.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from circuitfind.costs import Costs
from circuitfind.errors import FileError, warn
from circuitfind.evaluation.agreement import area_under
from circuitfind.evaluation.curve import CurvePoint
from circuitfind.export import files, html
from circuitfind.record import Record
from circuitfind.result import Result
from circuitfind.statistics import UNKNOWN, Interval, of_few

PAGE = "circuitfind.comparison.page"
SOME_EFFECT = 0.05  # of faithfulness
SHOWN_OVERLAP = 0.05  # the overlap is shown at the size nearest to this fraction of all edges


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        cpr, cmd: as `circuitfind.mib`: CPR of the signed selection, CMD of the absolute one, with 95% intervals.
        signed, absolute: the two curves.
        auroc, auroc_heads: of edges and of heads, against the reference circuit; None without one.
        rank_correlation: Spearman's rho of |score| with |exact effect| over all edges; None unless `exact` is compared.
        costs: of making the ranking. Passes are counted in passes of all search pairs.
        idle: selections whose small circuits all do nothing, with the reason; usually empty.
        refused: why the method gave no ranking; all other fields are then empty.
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
    idle: tuple[str, ...] = ()
    refused: str = ""

    @property
    def accuracy(self) -> float:
        """Area under the accuracy of circuits selected by magnitude, over the fraction of edges.

        CPR and CMD can rank two methods in opposite order, and neither shows whether a circuit gives right answers.
        """
        fractions, shares = ([getattr(point, name) for point in self.absolute] for name in ("fraction", "accuracy"))
        return float(area_under(fractions, shares)) if self.absolute else math.nan


class SizeRow(NamedTuple):
    """A method's circuit of one size, by one selection; see `CurvePoint`."""

    method: str
    by: str
    asked: int
    n_edges: int
    fraction: float
    faithfulness: float
    metric: float
    accuracy: float
    top1: float
    kl: float
    interval: Interval


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Result):
    """Methods on one model and task.

    Attributes:
        entries: by method, in the order asked for.
        overlap: by number of edges, `[method][method]` Jaccard similarities of the absolute selections' circuits.
        n_search, n_judge: number of pairs for the rankings, and of held-out pairs for running the circuits.
        record: of the exact runs, with the settings of the comparison.
        arguments: command-line arguments that repeat the comparison; empty if it was made from Python.
    """

    FORMAT, ROWS = "circuitfind.comparison", "entries"

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
        """Entries of methods that gave a ranking."""
        return [entry for entry in self.entries if not entry.refused]

    @property
    def idle(self) -> list[tuple[str, str]]:
        """Methods with a selection that does nothing, with the reason."""
        return [(entry.method, said) for entry in self.ranked for said in entry.idle]

    def closest(self) -> list[tuple[CurvePoint, str]]:
        """For each size, the point and method with faithfulness nearest to 1, selected by magnitude."""
        points = zip(*([(point, entry.method) for point in entry.absolute] for entry in self.ranked), strict=True)
        return [min(at_size, key=lambda found: abs(1 - found[0].faithfulness)) for at_size in points]

    def with_arguments(self, **arguments: Any) -> Comparison:
        """A copy with the arguments that repeat it."""
        return replace(self, arguments=arguments)

    def rows(self) -> Sequence[SizeRow]:
        """A row for each method, selection and size."""
        curves = [(entry.method, by, getattr(entry, by)) for entry in self.ranked for by in ("signed", "absolute")]
        return [SizeRow(method, by, **point._asdict()) for method, by, points in curves for point in points]

    def numbers(self) -> Iterator[tuple[str, float]]:
        """Every number that a repetition should reproduce, by name. Costs depend on the machine and are left out."""
        for entry in self.ranked:
            for name in ("cpr", "cmd", "accuracy", "auroc", "auroc_heads", "rank_correlation"):
                value = getattr(entry, name)
                if value is not None and not math.isnan(value):  # a file stores neither
                    yield f"{entry.method} {name}", value
            for by in ("signed", "absolute"):
                for point in getattr(entry, by):
                    yield f"{entry.method} faithfulness of {point.asked} edges ({by})", point.faithfulness
        for size, matrix in self.overlap.items():
            for row, values in enumerate(matrix):
                for column, value in enumerate(values[:row]):
                    yield f"overlap of {self.ranked[row].method} and {self.ranked[column].method} at {size}", value

    def save(self, path: str | PathLike[str], **more: Any) -> Path:
        """Write `.json`, `.csv`, `.md` or `.html` (needs plotly), or compare.json, .csv, .md and .html into a folder.

        Raises:
            FileError: another extension, or the file cannot be written.
        """
        path = Path(path)
        ending = path.suffix.lower()
        if ending == ".md":
            return files.write_text(path, "\n".join(_markdown(self)))
        if ending in (".html", ".htm"):
            page: Path = import_module(PAGE).write_page(self, path)
            return page
        if ending in (".json", ".csv"):
            return super().save(path, **more)
        if ending:
            raise FileError(f"{path}: a comparison is saved as .json, .csv, .md or .html, not as '{ending}'")
        self.write(path)
        return path

    def write(self, folder: str | PathLike[str]) -> list[Path]:
        """Write compare.json, .csv, .md and, if plotly is installed, .html; return the files written."""
        written = [self.save(Path(folder) / f"compare.{ending}") for ending in ("json", "csv", "md")]
        try:
            return [*written, self.save(Path(folder) / "compare.html")]
        except FileError as error:
            warn(str(error))
            return written

    def _repr_html_(self) -> str:
        table = summary(self)
        return html.block(type(self).__name__, html.facts(self.shown()), html.table(table.headings, table.rows))


def difference(a: Comparison, b: Comparison) -> tuple[float, str]:
    """The largest difference between the numbers of two comparisons, and its name; infinite if one lacks a number."""
    ours, theirs = dict(a.numbers()), dict(b.numbers())
    lacking = sorted(ours.keys() ^ theirs.keys())
    if lacking:
        return math.inf, lacking[0]
    apart = {name: abs(value - theirs[name]) for name, value in ours.items()}
    worst = max(apart, key=lambda name: apart[name], default="")
    return apart.get(worst, 0.0), worst


# -------------------------------------------------------------------- tables
class TextTable(NamedTuple):
    """A table for the terminal and for Markdown; the first column is text, the others are numbers."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def summary(found: Comparison, intervals: bool = True) -> TextTable:
    """A row for each method with a ranking, best CPR first: CPR, CMD, accuracy (with answers), agreement, costs."""
    headings = ["method", "CPR", "95%", "CMD", "95%"] if intervals else ["method", "CPR", "CMD"]
    with_answers = any(not math.isnan(entry.accuracy) for entry in found.ranked)
    headings += ["accuracy"] * with_answers
    if found.reference:
        headings += ["AUROC edges", "AUROC heads"]
    with_exact = any(entry.rank_correlation is not None for entry in found.ranked)
    headings += ["rho"] * with_exact + ["fwd", "bwd", "CPU s", "MB"]
    rows = []
    for entry in sorted(found.ranked, key=lambda entry: -entry.cpr):
        row = [entry.method]
        for value, ends in ((entry.cpr, entry.cpr_interval), (entry.cmd, entry.cmd_interval)):
            row += [_number(value), _range(ends)] if intervals else [_number(value)]
        row += [_number(entry.accuracy)] * with_answers
        if found.reference:
            row += [_number(entry.auroc), _number(entry.auroc_heads)]
        row += [_number(entry.rank_correlation)] * with_exact
        rows.append([*row, *_costs(entry.costs)])
    return TextTable("Methods", headings, rows)


def faithfulness(found: Comparison, by: str = "absolute") -> TextTable:
    """A row for each method: exact faithfulness at each size."""
    return _by_size("faithfulness", sorted(found.ranked, key=lambda entry: entry.cmd), by)


def accuracy(found: Comparison) -> TextTable:
    """A row for each method: accuracy of the edges of highest magnitude at each size; empty without answers."""
    ranked = [entry for entry in found.ranked if not math.isnan(entry.accuracy)]
    return _by_size("accuracy", sorted(ranked, key=lambda entry: -entry.accuracy), "absolute")


def _by_size(name: str, entries: Sequence[Entry], by: str) -> TextTable:
    sizes = [f"{point.asked:,}" for point in entries[0].absolute] if entries else []
    rows = [[entry.method, *(_number(getattr(one, name), 2) for one in getattr(entry, by))] for entry in entries]
    how = "highest magnitude" if by == "absolute" else "highest score"
    return TextTable(f"{name.capitalize()} of the edges of {how}, by number of edges", ["method", *sizes], rows)


def closest(found: Comparison) -> TextTable:
    """A row for each size: the method with the circuit nearest to the whole model."""
    rows = []
    for point, method in found.closest():
        who = method if point.faithfulness >= SOME_EFFECT else "no method has an effect"
        rows.append([f"{point.asked:,}", f"{point.fraction:.1%}", who, _number(point.faithfulness, 2)])
    return TextTable("Circuit with faithfulness nearest to 1", ["edges", "of all", "method", "faithfulness"], rows)


def overlap(found: Comparison) -> TextTable:
    """Jaccard similarities of the circuits of all methods at one size."""
    if not found.overlap:
        return TextTable("Overlap", [], [])
    size, names = shown_overlap(found), [entry.method for entry in found.ranked]
    rows = [[name, *(_number(value, 2) for value in row)] for name, row in zip(names, found.overlap[size], strict=True)]
    return TextTable(f"Overlap (Jaccard) of the circuits of {size:,} edges", ["", *names], rows)


def shown_overlap(found: Comparison) -> int:
    """The number of edges at which the overlap is shown."""
    return min(found.overlap, key=lambda n: abs(math.log(max(n, 1) / (SHOWN_OVERLAP * found.n_edges))))


def _costs(costs: Costs) -> list[str]:
    memory = "" if costs.memory is None else f"{costs.memory / 2**20:.0f}"
    passes = [f"{n:,.0f}" if n >= 10 or n == int(n) else f"{n:.1f}" for n in (costs.forwards, costs.backwards)]
    return [*passes, f"{costs.cpu_seconds:.1f}", memory]


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None or math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"  # no -0.00


def _range(ends: tuple[float, float]) -> str:
    return "" if math.isnan(ends[0]) else f"{ends[0]:.2f} to {ends[1]:.2f}"


# -------------------------------------------------------------------- Markdown
def remarks(found: Comparison) -> dict[str, list[tuple[str, str]]]:
    """Methods without a useful result here and the reason, by heading; only headings with a method."""
    refused = [(entry.method, entry.refused) for entry in found.entries if entry.refused]
    both = {"Rankings without an effect": found.idle, "Not compared": refused}
    return {title: methods for title, methods in both.items() if methods}


def said_of(found: Comparison) -> str:
    """Describe the comparison in a sentence."""
    record = found.record
    made = (
        f"Rankings come from {found.n_search} pairs; circuits were run on {found.n_judge} held-out pairs. Metric"
        f" {record.metric}, ablation {record.ablation}, seed {record.seed}; the graph has {found.n_edges:,} edges."
    )
    return f"{made} {of_few(record.n_distinct)}".rstrip()


def _markdown(found: Comparison) -> Iterator[str]:
    """The report: description, tables, and how to repeat the comparison."""
    record = found.record
    yield f"# {len(found.ranked)} methods on {record.task} in {record.model}\n"
    yield f"{said_of(found)}\n"
    if command := found.arguments.get("command"):
        yield f"```sh\n{shlex.join(command)}\n```\n"
    yield from _in_markdown(summary(found))
    yield (
        "CPR: area under the faithfulness of the edges of highest score, over the fraction of edges; CMD: area between"
        " the faithfulness of the edges of highest magnitude and 1, lower is better."
        " rho: Spearman's rank correlation of |score| with |exact effect|."
        " fwd, bwd: forward and backward passes of all search pairs; MB: memory beside the model.\n"
    )
    for table in (faithfulness(found), accuracy(found), closest(found), overlap(found)):
        yield from _in_markdown(table)
    for title, methods in remarks(found).items():
        yield from (f"## {title}\n", *(f"* {method}: {said}" for method, said in methods), "")
    yield "## The methods\n"
    yield from (f"* {entry.method}: {entry.summary}" for entry in found.ranked)
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    yield f"\nMade with {versions}."
    if found.arguments:
        yield "`circuitfind compare --again compare.json` repeats the comparison and checks every number."
    yield ""


def _in_markdown(table: TextTable) -> Iterator[str]:
    if table.rows:
        yield f"## {table.title}\n"
        yield f"| {' | '.join(table.headings)} |"
        yield f"|{'|'.join([' --- ', *[' ---: '] * (len(table.headings) - 1)])}|"
        yield from (*(f"| {' | '.join(row)} |" for row in table.rows), "")
