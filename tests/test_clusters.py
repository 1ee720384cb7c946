"""Clusters of pairs: a mixture is told apart, one behaviour is not split; indices against their definitions."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import id_task, wrapped

import circuitfind as cf
from circuitfind.evaluation.clusters import adjusted_rand, silhouette

N = 14


@cache
def tiny() -> cf.Model:
    return cf.load("tiny", check=False)


def mixed(*names: str, again: int = 0) -> cf.Task:
    """Pairs of several tasks in one, and some of them once more."""
    parts = [cf.task(name, tiny(), n=N) for name in names]

    def together(field: str, space: str = "") -> list[Any]:
        rows = [[space + one for one in row] if space else row for part in parts for row in getattr(part, field)]
        return rows + rows[:again]

    answers = together("answers", " "), together("wrong_answers", " ")
    return cf.Task(
        together("clean"), together("corrupted"), *answers, metric="logit_diff", spelling="given", name="mix"
    )


def test_two_behaviours_are_told_apart(tmp_path: Path) -> None:
    task, labels = mixed("ioi", "gendered-pronoun", again=3), ["a"] * N + ["b"] * N + ["a"] * 3
    found = cf.clusters(tiny(), task, method="eap", labels=labels, draws=40)
    assert len(found) == 2 and found.index == 1.0 and found.p_value < 0.05
    assert found.labels[-3:] == found.labels[:3], "copies of a pair are where it is, and count once"
    assert [row.pairs for row in found.clusters] == np.bincount(found.labels).tolist()
    bound = task.on(tiny())
    for k, scores in enumerate(found.scores):
        rows = [row for row in found.rows_of(k) if row < 2 * N]
        alone = cf.attribute(tiny(), bound.subset(rows), method="eap")
        np.testing.assert_allclose(scores.values, alone.values, atol=2e-5 * np.abs(alone.values).max())
        assert found.circuits[k].edges == scores.top(200).edges
    own = set(found.circuits[0].edges) - set(found.circuits[1].edges)
    assert found.clusters[0].own_edges == len(own) > 20
    assert found.joined == (0, 1)
    for k, (*served, by_all) in enumerate(found.served):
        part = bound.subset([row for row in found.rows_of(k) if row < 2 * N])
        circuits = (*found.circuits, cf.attribute(tiny(), bound.subset(range(2 * N)), method="eap").top(200))
        each = [cf.evaluate(tiny(), part, circuit).faithfulness for circuit in circuits]
        np.testing.assert_allclose([*served, by_all], each, atol=1e-4)
    again = cf.open(found.save(tmp_path / "clusters.json"))
    assert (
        again.labels == found.labels
        and again.served == found.served
        and again.clusters == found.clusters
        and not again.scores
    )


@pytest.mark.parametrize("name", ["ioi", "gendered-pronoun"])
def test_one_behaviour_is_not_split(name: str) -> None:
    found = cf.clusters(tiny(), cf.task(name, tiny(), n=2 * N), method="eap", draws=40)
    assert len(found) == 1 and found.p_value > 0.05 and set(found.labels) == {0} and found.index is None
    assert found.cuts and found.clusters[0].own_edges == len(found.circuits[0])
    assert found.joined == (0,) and found.served == (), "no circuit need run where scores are not divided"


def test_circuits_that_serve_each_others_pairs_are_one() -> None:
    """The scores of greater-than change by degrees with the year, and look divided."""
    found = cf.clusters(tiny(), cf.task("greater-than", tiny(), n=2 * N, seed=1), method="eap", draws=40)
    assert found.p_value < 0.05 and len(found) == 1 and set(found.labels) == {0}
    assert found.joined == (0, 0, 0) and np.array(found.served).shape == (3, 4)


def test_the_silhouette_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(0)
    points, labels = rng.normal(size=(12, 3)), np.array([0, 1, 2] * 4)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    each = []
    for i in range(12):
        within = [distances[i, j] for j in range(12) if labels[j] == labels[i] and j != i]
        others = [np.mean([distances[i, j] for j in range(12) if labels[j] == k]) for k in range(3) if k != labels[i]]
        a, b = np.mean(within), min(others)
        each.append((b - a) / max(a, b))
    assert silhouette(distances, labels) == pytest.approx(np.mean(each))


def test_the_rand_index_counts_pairs() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.integers(3, size=20).tolist(), rng.integers(4, size=20).tolist()
    same = np.array([(one[i] == one[j], other[i] == other[j]) for i, j in combinations(range(20), 2)])
    both, chance, largest = same.all(1).sum(), same[:, 0].sum() * same[:, 1].mean(), same.sum() / 2
    assert adjusted_rand(one, other) == pytest.approx((both - chance) / (largest - chance))
    assert adjusted_rand([0, 0, 1, 1], "bbaa") == 1.0 and adjusted_rand([0] * 4, [0, 0, 1, 1]) == 0.0


@pytest.mark.parametrize(
    ("lengths", "options", "error", "message"),
    [
        ((5, 5, 5), {}, cf.TaskError, "3 different pairs cannot be divided: give at least 8"),
        ((5,) * 8, {"labels": [1]}, cf.TaskError, "1 labels for 8 pairs"),
        ((5,) * 8, {"most": 1}, cf.ScoreError, "most=1"),
        ((5,) * 8, {"method": "ifr"}, cf.ScoreError, "does not score edges example by example"),
    ],
)
def test_what_is_refused(
    lengths: tuple[int, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cf.clusters(wrapped("gpt2"), replace(id_task(lengths), name="ids"), **options)


def test_a_pair_without_scores_is_named_by_its_row_in_the_task() -> None:
    task = id_task((5,) * 10)
    clean, corrupted = (torch.as_tensor(side).clone() for side in (task.clean, task.corrupted))
    clean[1], corrupted[1] = clean[0], corrupted[0]  # a copy, which is left out before pairs are scored
    clean[:, 1], clean[9, 1] = 3, 4

    def constant_on_row_9(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        return logits[:, 5] * (batch.clean.ids[:, 1] == 3)

    task = replace(task, clean=clean, corrupted=corrupted)
    with pytest.raises(cf.ScoreError, match="pair 9 has no score at any edge"):
        cf.clusters(wrapped("gpt2"), task, method="eap", metric=constant_on_row_9)
