"""The base of all results: what is saved opens as the same, whatever the fields are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import circuitfind as cf
from circuitfind.circuit import Circuit
from circuitfind.graph import Graph
from circuitfind.record import Record
from circuitfind.remote.call import RemoteModel
from circuitfind.result import UNSAVED, Result
from circuitfind.search.found import FolderResult
from circuitfind.statistics import Interval
from circuitfind.tasks.bound import BoundTask


class Row(NamedTuple):
    name: str
    value: float
    interval: Interval


@dataclass(frozen=True, eq=False, repr=False)
class Inner(Result):
    mean: float


@dataclass(frozen=True, eq=False, repr=False)
class Everything(Result):
    FORMAT, ROWS, DERIVED = "circuitfind.test", "points", ("total",)

    points: tuple[Row, ...]
    values: np.ndarray
    circuit: Circuit
    inner: Inner
    by_size: dict[int, list[float]]
    maybe: Inner | None
    text: str
    record: Record
    interval: Interval
    scratch: object = field(default=None, metadata=UNSAVED)

    @property
    def total(self) -> float:
        return float(self.values.sum())


def everything() -> Everything:
    graph = Graph(1, 2, 2, 8)
    rows = (Row("input->m0", 1.5, Interval(1, 2)), Row("m0->logits", math.nan, Interval(math.nan, math.nan)))
    circuit = Circuit.of(graph, ["input->m0", "m0->logits"])
    values = np.array([[1.0, 2.0], [3.0, 4.0]])
    return Everything(
        rows, values, circuit, Inner(0.5), {3: [0.1]}, None, "x", Record(model="tiny"), Interval(0, 1), object()
    )


def test_what_is_saved_opens_as_the_same(tmp_path: Path) -> None:
    first = everything()
    back = Everything.open(first.save(tmp_path / "x.json", note="passed over"))
    assert back.points[0] == first.points[0] and math.isnan(back.points[1].value)
    np.testing.assert_array_equal(back.values, first.values)
    assert back.circuit.edges == first.circuit.edges and back.circuit.graph == first.circuit.graph
    assert isinstance(back.inner, Inner) and back.inner.mean == 0.5 and back.maybe is None
    assert back.by_size == {3: [0.1]} and back.record == first.record and back.interval == Interval(0, 1)
    assert back.scratch is None and back.total == 10
    assert back.to_dict()["values"] == first.to_dict()["values"] and "scratch" not in first.to_dict()


def test_rows_become_columns(tmp_path: Path) -> None:
    columns = everything().columns()
    assert list(columns) == ["name", "value", "low", "high"] and columns["name"] == ["input->m0", "m0->logits"]
    text = everything().save(tmp_path / "x.csv").read_text(encoding="utf-8").splitlines()
    assert text[0] == "name,value,low,high" and text[1] == "input->m0,1.5,1,2"
    frame = everything().to_frame()
    assert list(frame["name"]) == columns["name"]


def test_the_repr_is_one_line_without_arrays() -> None:
    text = repr(everything())
    assert text == "Everything(text='x', interval=(0, 1), total=10)"
    assert "<table" in everything()._repr_html_() and "m0-&gt;logits" in everything()._repr_html_()


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(cf.FileError, match="a Inner is saved as"):
        Inner(1.0).save(tmp_path / "x.pdf")
    path = everything().save(tmp_path / "x.json")
    path.write_text('{"format": "circuitfind.test", "version": 1, "text": "x"}', encoding="utf-8")
    with pytest.raises(cf.FileError, match="cannot be read"):
        Everything.open(path)


def test_a_result_that_is_a_folder_says_how_it_is_written() -> None:
    with pytest.raises(TypeError, match="abstract"):
        FolderResult()


def test_nothing_public_has_the_save_that_nnsight_puts_on_every_object(tmp_path: Path) -> None:
    """Its error would be "save() was called outside a trace"."""
    import nnsight  # noqa: F401  # puts it there

    classes = [one for name in cf.__all__ if isinstance(one := getattr(cf, name), type)]
    for one in [*classes, BoundTask, RemoteModel]:
        if not issubclass(one, (BaseException, tuple)):  # rows are named tuples
            assert getattr(one, "save", None) is not vars(object).get("save"), one
    with pytest.raises(cf.FileError, match="a Graph has no file of its own: save the scores, circuit or other result"):
        Graph(1, 2, 2, 8).save(tmp_path / "x.json")
    with pytest.raises(cf.FileError, match=r"a Model has no file of its own: .*model.hf.save_pretrained"):
        cf.load("tiny").save("x")
