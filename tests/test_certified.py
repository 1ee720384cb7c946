"""Certified edges: shares and verdicts against all deletions there are, the radius against tasks of fewer pairs."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

import circuitfind as cf
from circuitfind.evaluation.certified import Certified, radius

DELETION, DRAWS, EDGES, PAIRS = 0.6, 800, 40, 8


@pytest.fixture(scope="module")
def model() -> cf.Model:
    return cf.load("tiny")


@pytest.fixture(scope="module")
def task(model: cf.Model) -> cf.BoundTask:
    return cf.task("ioi", model, n=PAIRS).on(model)


@pytest.fixture(scope="module")
def found(model: cf.Model, task: cf.BoundTask) -> Certified:
    return cf.certified(model, task, method="eap", n_edges=EDGES, deletion=DELETION, draws=DRAWS)


@pytest.fixture(scope="module")
def alone(model: cf.Model, task: cf.BoundTask) -> list[np.ndarray]:
    return [cf.attribute(model, task.subset([row]), "eap").values for row in range(PAIRS)]


def literal(graph: cf.Graph, scores: list[np.ndarray]) -> np.ndarray:
    """Each edge's probability to be in, over every way to delete some of the pairs."""
    total = np.zeros(graph.real.shape)
    for kept in product((False, True), repeat=len(scores)):
        if any(kept):
            mean = np.mean([one for one, keep in zip(scores, kept, strict=True) if keep], axis=0, dtype=np.float32)
            weight = DELETION ** (len(kept) - sum(kept)) * (1 - DELETION) ** sum(kept)
            total += weight * cf.Scores(graph, mean).top(EDGES).mask
    return total


def test_the_intervals_hold_the_probabilities(model: cf.Model, found: Certified, alone: list[np.ndarray]) -> None:
    expected, (low, high) = literal(model.graph, alone), found.bounds
    real = model.graph.real
    assert (low <= expected + 1e-9)[real].all() and (expected <= high + 1e-9)[real].all()
    assert np.abs(found.counts / DRAWS - expected)[real].max() < 0.12  # five standard errors
    verdicts = {row.edge: row.verdict for row in found.edges}
    assert set(verdicts.values()) == {"in", "out", "unsure"} and found.n_in == list(verdicts.values()).count("in") > 5
    for name, verdict in verdicts.items():
        assert verdict == "unsure" or (verdict == "in") == (expected[model.graph.edge(name)] > 0.5)


def test_verdicts_hold_for_tasks_of_fewer_pairs(model: cf.Model, found: Certified, alone: list[np.ndarray]) -> None:
    sure = [row for row in found.edges if row.radius]
    whole = literal(model.graph, alone)
    moved = [literal(model.graph, alone[:row] + alone[row + 1 :]) for row in range(PAIRS)]
    assert all(np.abs(one - whole).max() <= 1 - DELETION + 1e-9 for one in moved)
    assert len(sure) > 2
    for row in sure:
        assert all((one[model.graph.edge(row.edge)] > 0.5) == (row.verdict == "in") for one in moved), row


def test_the_radius() -> None:
    """The largest r by which a probability cannot move as far as the margin."""
    for margin, deletion in product((0.05, 0.2, 0.35, 0.49), (0.5, 0.8, 0.9, 0.99)):
        r = radius(margin, deletion)
        assert (r == 0 or 1 - deletion**r < margin) and 1 - deletion ** (r + 1) >= margin - 1e-12
    assert radius(0.0, 0.9) == radius(-0.3, 0.9) == 0


def test_the_bounds_are_clopper_and_pearsons(model: cf.Model, found: Certified) -> None:
    sample = np.unique(found.counts[model.graph.real])[::7]
    low, high = found.bounds
    for count in [0, *sample.tolist()]:
        where = tuple(np.argwhere((found.counts == count) & model.graph.real)[0])
        expected = binomtest(int(count), DRAWS).proportion_ci(1 - found.level / model.graph.n_edges, method="exact")
        np.testing.assert_allclose([low[where], high[where]], expected, rtol=1e-6, atol=1e-12)


def test_the_seed_decides_and_a_file_keeps_all(model: cf.Model, task: cf.BoundTask, found: Certified, tmp_path: Path):
    again = cf.certified(model, task, method="eap", n_edges=EDGES, deletion=DELETION, draws=DRAWS)
    other = cf.certified(model, task, method="eap", n_edges=EDGES, deletion=DELETION, draws=DRAWS, seed=1)
    assert np.array_equal(again.counts, found.counts) and not np.array_equal(other.counts, found.counts)
    opened = cf.open(found.save(tmp_path / "certified.json"))
    assert opened.edges == found.edges and opened.circuit().edges == found.circuit().edges
    assert "n_in=" in repr(found)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"deletion": 1.0}, r"deletion=1\.0 is not between 0 and 1"),
        ({"deletion": 0.9}, r"8 different pairs, of which 10% stay: give more pairs, or deletion= of at most 0\.75"),
        ({"draws": 3}, "draws=3"),
        ({"method": "ifr", "deletion": 0.5}, "does not score edges example by example"),
    ],
)
def test_refusals(asked: dict, said: str, model: cf.Model, task: cf.BoundTask) -> None:
    with pytest.raises((cf.ScoreError, cf.TaskError), match=said):
        cf.certified(model, task, **asked)
