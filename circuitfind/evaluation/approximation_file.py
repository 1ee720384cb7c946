"""The file of an `Approximation`: what `to_dict` says, and under "sweeps" both sweeps of each kind, by example.

sweeps   {kind: {axes: [[name, [label, ...]], ...], sizes: {layer: number}, other_end: number | null,
                 estimated: {per_example, full, empty, record}, exact: {...}}}
graph    as in circuit.json
"""

from __future__ import annotations

from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitfind.export import files as result_file
from circuitfind.graph import Graph
from circuitfind.patching.sweep import Axis, Sweep
from circuitfind.record import Record

if TYPE_CHECKING:
    from circuitfind.evaluation.approximation import Approximation, Compared

FORMAT = "circuitfind.approximation"


def write(path: str | PathLike[str], found: Approximation, more: dict[str, Any]) -> Path:
    """Writes an approximation; `more` are further entries of the file."""
    sweeps = {what: _content(one) for what, one in found.compared.items()}
    graph = asdict(next(iter(found.compared.values())).exact.graph)
    return result_file.write(path, FORMAT, {**more, **found.to_dict(), "graph": graph, "sweeps": sweeps})


def read(path: str | PathLike[str]) -> dict[str, Any]:
    """The fields of an approximation; those of each kind as `{field: value}`.

    Raises:
        FileError: the file is missing, or holds no approximation.
    """
    content = result_file.read(path, FORMAT)
    with result_file.reading(path):
        graph = Graph(**content["graph"])
        kinds = {what: _fields(what, graph, one) for what, one in content["sweeps"].items()}
        return {"compared": kinds, "remarks": tuple(content["remarks"]), "record": Record(**content["record"])}


def _content(one: Compared) -> dict[str, Any]:
    sides = {
        name: {
            "per_example": sweep.per_example,
            "full": sweep.full,
            "empty": sweep.empty,
            "record": asdict(sweep.record),
        }
        for name, sweep in (("estimated", one.estimated), ("exact", one.exact))
    }
    return {"axes": one.exact.axes, "sizes": one.sizes, "other_end": one.other_end, **sides}


def _fields(what: str, graph: Graph, content: dict[str, Any]) -> dict[str, Any]:
    axes = tuple(Axis(name, tuple(labels)) for name, labels in content["axes"])

    def sweep(side: dict[str, Any]) -> Sweep:
        values, full, empty = (result_file.numbers(side[name]) for name in ("per_example", "full", "empty"))
        return Sweep(what, graph, axes, values, full, empty, Record(**side["record"]))

    sides = {name: sweep(content[name]) for name in ("estimated", "exact")}
    sizes = {int(layer): float("nan") if size is None else size for layer, size in content["sizes"].items()}
    return {**sides, "sizes": sizes, "other_end": content["other_end"]}
