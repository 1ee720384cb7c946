"""Results of scores, sweeps, paths, patterns and circuits: named rows, the strongest first, and a notebook's view."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import circuitfind as cf

Maker = Callable[[cf.Model, cf.Task], Any]
MAKERS: dict[str, Maker] = {
    "scores": lambda model, task: cf.attribute(model, task, "eap"),
    "nodes": lambda model, task: cf.attribute(model, task, level="node"),
    "nodes by position": lambda model, task: cf.attribute(model, task, level="node", by_position=True),
    "circuit": lambda model, task: cf.attribute(model, task, "eap").top(30),
    "heads": lambda model, task: cf.patch(model, task, layers=[1, 2]),
    "stream": lambda model, task: cf.patch(model, task, "resid", layers=[1]),
    "heads by position": lambda model, task: cf.patch(model, task, by_position=True, layers=1),
    "paths": lambda model, task: cf.path_patch(model, task, ["a0.h1", "m2"], ["m1", "logits"], separate=True),
    "direct": lambda model, task: cf.direct_effects(model, task),
    "attention": lambda model, task: cf.attention(model, task, "a1.h2"),
}
NAMES = {
    "scores": ["edge", "writer", "reader", "score"],
    "nodes": ["node", "position", "score"],
    "circuit": ["edge", "writer", "reader", "estimate", "exact"],
    "heads": ["place", "position", "effect", "low", "high"],
    "paths": ["sender", "receiver", "effect", "low", "high"],
    "direct": ["node", "effect", "low", "high"],
    "attention": ["query", "key", "weight"],
}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    model = cf.load("tiny")
    task = cf.task("greater-than", model, n=3)
    return {name: make(model, task) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_a_result_shows_itself(results: dict[str, Any], name: str) -> None:
    found = results[name]
    assert "\n" not in repr(found) and len(repr(found)) < 200
    page = found._repr_html_()
    assert page.startswith("<div>") and ("<table" in page or "<svg" in page) and len(page) < 60_000
    columns = found.columns()
    assert list(columns) == NAMES.get(name.partition(" ")[0], NAMES["heads"])
    assert len({len(column) for column in columns.values()}) == 1 and len(next(iter(columns.values()))) > 0
    assert list(found.to_frame()) == list(columns)
    assert type(found.plot()).__name__ == "Figure"


def test_rows_are_what_was_measured(results: dict[str, Any]) -> None:
    scores, sweep, paths = results["scores"], results["heads by position"], results["paths"]
    for row in scores.rows()[::97]:
        assert row.edge == f"{row.writer}->{row.reader}" and row.score == scores[row.edge]
    assert [row.effect for row in sweep.rows()] == sweep.effects.ravel().tolist()
    assert [row.place for row in sweep.rows()] == sweep.names()
    assert [(row.sender, row.receiver) for row in paths.rows()] == [
        ("a0.h1", "m1"),
        ("a0.h1", "logits"),
        ("m2", "logits"),
    ]
    nodes = results["nodes by position"]
    assert [row.score for row in nodes.rows()] == nodes.values.ravel().tolist()
    assert nodes.rows()[1].position == nodes.positions[1]
    pattern = results["attention"]
    assert pattern.rows()[2] == (
        "1 " + pattern.tokens[1].strip(),
        "1 " + pattern.tokens[1].strip(),
        pattern.pattern[1, 1],
    )


@pytest.mark.parametrize("name", ["heads", "heads by position", "paths", "direct"])
def test_the_top_rows_are_the_strongest(results: dict[str, Any], name: str) -> None:
    found = results[name]
    rows, best = found.rows(), found.top(3)
    assert [row.effect for row in best] == sorted((row.effect for row in rows), key=lambda value: -abs(value))[:3]
    assert set(best) <= set(rows)
    assert found.top(1, by="signed")[0].effect == max(row.effect for row in rows)
    with pytest.raises(cf.ScoreError, match="by='size' is unknown"):
        found.top(1, by="size")


def test_layers_sum_all_edges(results: dict[str, Any]) -> None:
    scores = results["scores"]
    layers = scores.layers()
    assert layers.shape == (5, 5) and np.isnan(layers[4, 0]) and np.isfinite(layers[0]).all()
    np.testing.assert_allclose(np.nansum(layers), scores.values[scores.graph.real].sum(), rtol=1e-4)


def test_a_circuit_inside_a_result_keeps_its_form(results: dict[str, Any]) -> None:
    circuit = results["circuit"]
    content = circuit.to_dict()
    assert set(content) == {"graph", "edges", "record"}
    assert cf.Circuit.from_dict(content) == circuit


def test_rows_as_a_table(results: dict[str, Any], tmp_path: Path) -> None:
    for name in ("paths", "direct"):
        assert len(results[name].columns()["effect"]) == len(results[name].rows())
    lines = results["attention"].rows()
    assert all(0 <= row.weight <= 1.0001 for row in lines)
