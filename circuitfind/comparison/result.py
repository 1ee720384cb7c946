"""What a comparison found: one entry a method, and how far the methods' circuits overlap; as tables of text, too.

`save` writes JSON (everything), CSV (one line a method and size), Markdown (the report) or HTML (the page), or all four
into a folder. `difference` tests a reproduction.
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
SHOWN_OVERLAP = 0.05  # of all edges: the overlap at the size nearest to this part is shown


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes:
        cpr, cmd: as `circuitfind.mib`: CPR of the signed selection, CMD of the absolute one, with 95% intervals.
        signed, absolute: the two curves.
        auroc, auroc_heads: against the reference circuit, where there is one.
        rank_correlation: Spearman's rho of |score| with |exact effect| over all edges, where `exact` is compared, too.
        costs: of making the ranking; passes are counted in passes of all pairs that it was made on.
        idle: which of the two selections do nothing at any small size, and why; usually none.
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
    idle: tuple[str, ...] = ()
    refused: str = ""

    @property
    def accuracy(self) -> float:
        """Area under the accuracy of the selection by magnitude, over the fractions of all edges: CPR and CMD can order
        two methods oppositely, and neither says whether a circuit gives the right answers."""
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
        n_search, n_judge: pairs that the rankings were made on, and held-out pairs that the circuits were run on.
        record: of the exact runs; its settings hold the comparison's.
        arguments: how to make it again, where the command line made it.
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
        """The methods that gave a ranking."""
        return [entry for entry in self.entries if not entry.refused]

    @property
    def idle(self) -> list[tuple[str, str]]:
        """Methods with a selection that does nothing, and why."""
        return [(entry.method, said) for entry in self.ranked for said in entry.idle]

    def closest(self) -> list[tuple[CurvePoint, str]]:
        """At each size the method whose circuit's faithfulness is nearest to 1, by the absolute selection."""
        points = zip(*([(point, entry.method) for point in entry.absolute] for entry in self.ranked), strict=True)
        return [min(at_size, key=lambda found: abs(1 - found[0].faithfulness)) for at_size in points]

    def with_arguments(self, **arguments: Any) -> Comparison:
        """A copy that says how it was asked for."""
        return replace(self, arguments=arguments)

    def rows(self) -> Sequence[SizeRow]:
        """One row a method, selection and size."""
        curves = [(entry.method, by, getattr(entry, by)) for entry in self.ranked for by in ("signed", "absolute")]
        return [SizeRow(method, by, **point._asdict()) for method, by, points in curves for point in points]

    def numbers(self) -> Iterator[tuple[str, float]]:
        """Every number that a repetition should give again, by name; costs are left out, they are the machine's."""
        for entry in self.ranked:
            for name in ("cpr", "cmd", "accuracy", "auroc", "auroc_heads", "rank_correlation"):
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

    def save(self, path: str | PathLike[str], **more: Any) -> Path:
        """Writes `.json`, `.csv`, `.md`, `.html` (needs plotly), or compare.json and so on into a folder.

        Raises:
            FileError: another ending, or the place cannot be written to.
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
        """Writes compare.json, .csv, .md and, with plotly installed, .html; returns the files that were written."""
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
    """The largest difference between two comparisons' numbers, and where it is; infinite where one lacks a number."""
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
    """One line a method: areas (of accuracy too, where there are answers), agreement, costs; best CPR first, refused
    methods left out."""
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
    """One line a method: exact faithfulness at each size."""
    return _by_size("faithfulness", sorted(found.ranked, key=lambda entry: entry.cmd), by)


def accuracy(found: Comparison) -> TextTable:
    """One line a method: accuracy of the edges of highest magnitude at each size; no line without answers."""
    ranked = [entry for entry in found.ranked if not math.isnan(entry.accuracy)]
    return _by_size("accuracy", sorted(ranked, key=lambda entry: -entry.accuracy), "absolute")


def _by_size(name: str, entries: Sequence[Entry], by: str) -> TextTable:
    sizes = [f"{point.asked:,}" for point in entries[0].absolute] if entries else []
    rows = [[entry.method, *(_number(getattr(one, name), 2) for one in getattr(entry, by))] for entry in entries]
    how = "highest magnitude" if by == "absolute" else "highest score"
    return TextTable(f"{name.capitalize()} of the edges of {how}, by number of edges", ["method", *sizes], rows)


def closest(found: Comparison) -> TextTable:
    """One line a size: the method whose circuit is nearest to the whole model."""
    rows = []
    for point, method in found.closest():
        who = method if point.faithfulness >= SOME_EFFECT else "none does anything"
        rows.append([f"{point.asked:,}", f"{point.fraction:.1%}", who, _number(point.faithfulness, 2)])
    return TextTable("Nearest to faithfulness 1", ["edges", "of all", "method", "faithfulness"], rows)


def overlap(found: Comparison) -> TextTable:
    """Jaccard similarities of the methods' circuits at one size."""
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
    """By heading, the methods that are of no use here, and why; no heading without a method."""
    refused = [(entry.method, entry.refused) for entry in found.entries if entry.refused]
    both = {"Rankings that do nothing": found.idle, "Not compared": refused}
    return {title: methods for title, methods in both.items() if methods}


def said_of(found: Comparison) -> str:
    """What was compared, in a sentence."""
    record = found.record
    made = (
        f"Rankings were made on {found.n_search} pairs and judged on {found.n_judge} held-out pairs. Metric"
        f" {record.metric}, ablation {record.ablation}, seed {record.seed}; the graph has {found.n_edges:,} edges."
    )
    return f"{made} {of_few(record.n_distinct)}".rstrip()


def _markdown(found: Comparison) -> Iterator[str]:
    """The report: what was compared, the tables, and how to make them again."""
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
        " fwd, bwd: forward and backward passes, counted in passes of all pairs that a ranking was made on;"
        " MB is memory beyond the model.\n"
    )
    for table in (faithfulness(found), accuracy(found), closest(found), overlap(found)):
        yield from _in_markdown(table)
    for title, methods in remarks(found).items():
        yield from (f"## {title}\n", *(f"* {method}: {said}" for method, said in methods), "")
    yield "## What they are\n"
    yield from (f"* {entry.method}: {entry.summary}" for entry in found.ranked)
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    yield f"\nMade with {versions}."
    if found.arguments:
        yield "`circuitfind compare --again compare.json` makes it again and compares every number."
    yield ""


def _in_markdown(table: TextTable) -> Iterator[str]:
    if table.rows:
        yield f"## {table.title}\n"
        yield f"| {' | '.join(table.headings)} |"
        yield f"|{'|'.join([' --- ', *[' ---: '] * (len(table.headings) - 1)])}|"
        yield from (*(f"| {' | '.join(row)} |" for row in table.rows), "")
