"""Balanced re-scored pruning: the balance against all choices, the rounds on the embedded model."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

import circuitfind as cf
from circuitfind.engine.masked_run import mask_gradient
from circuitfind.evaluation.faithfulness import Evaluator, Outcome
from circuitfind.search.rescoring import MEMORY, Rescoring, balanced_mean, balanced_pairs
from circuitfind.search.trials import Deadline, Trials, distance


@pytest.fixture(scope="module")
def trials() -> Trials:
    model = cf.load("tiny", check=False, backend="hooks")
    return Trials(Evaluator.of(model, cf.task("ioi", model, n=10)), "mean", 0.15, Deadline(None))


@pytest.fixture(scope="module")
def scores(trials: Trials) -> cf.Scores:
    experiment = trials.evaluator.experiment
    return cf.attribute(experiment.model, experiment.bound, method="eap")


# -------------------------------------------------------------------- which edges
@pytest.mark.parametrize("seed", range(20))
def test_the_mean_is_balanced_as_well_as_it_can_be(seed: int) -> None:
    """Of the weakest that help and the weakest that oppose, n in all, no mixture comes nearer."""
    rng = np.random.default_rng(seed)
    gradients, residual = rng.normal(0.2, 1, (12, 3)), rng.normal(0, 2, 3)
    effect, n = gradients.mean(1), int(rng.integers(1, 12))
    helps, opposes = ([e for e in np.argsort(np.abs(effect)) if (effect[e] >= 0) == side] for side in (True, False))
    mixtures = [helps[:j] + opposes[: n - j] for j in range(n + 1) if j <= len(helps) and n - j <= len(opposes)]
    best = min(abs(residual.mean() - effect[list(some)].sum()) for some in mixtures)
    drop = balanced_mean(gradients, residual, n)
    assert drop.sum() == n
    assert abs(residual.mean() - effect[drop].sum()) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(20))
def test_swaps_balance_every_pair(seed: int) -> None:
    """Never worse than the weakest edges, and no single swap among the weak ones would be better by the same rule."""
    rng = np.random.default_rng(seed)
    gradients, residual = rng.normal(0.3, 1, (14, 4)), rng.normal(0, 1, 4)
    n = 6
    drop = balanced_pairs(gradients, residual, n)
    left = np.linalg.norm(residual - gradients[drop].sum(0))
    weakest = np.argsort(np.linalg.norm(gradients, axis=1))[:n]
    assert drop.sum() == n and left <= np.linalg.norm(residual - gradients[weakest].sum(0)) + 1e-9
    best = min(np.linalg.norm(residual - gradients[list(some)].sum(0)) for some in combinations(range(14), n))
    assert best <= left + 1e-9
    balanced = np.concatenate([gradients, -gradients])  # each edge with one that undoes it
    drop = balanced_pairs(balanced, np.zeros(4), 14)
    assert np.linalg.norm(balanced[drop].sum(0)) < 0.5 * np.linalg.norm(gradients, axis=1).mean()


# -------------------------------------------------------------------- rounds
def test_gradients_are_those_at_the_circuit(trials: Trials, scores: cf.Scores) -> None:
    """As of a masked run of each pair by itself."""
    rescoring, mask = Rescoring(trials, scores), scores.top(60).mask
    evaluator, (fold, runs) = trials.evaluator, Rescoring(trials, scores).halves[1]
    found = rescoring._gradients(runs, mask)
    for column, pair in enumerate(fold.tolist()):
        rows = torch.tensor([pair])
        prepared = evaluator.experiment.prepare(evaluator.experiment.batch.rows(rows))
        whole = mask_gradient(prepared, torch.from_numpy(mask).to(torch.float32), evaluator.experiment.metric)
        np.testing.assert_allclose(found[:, column], whole.gradient.numpy()[mask], atol=2e-4)
    elsewhere = cf.attribute(evaluator.experiment.model, evaluator.experiment.bound, method="eap").values[mask]
    assert np.abs(found.mean(1) - elsewhere).max() > 0.05, "not those at the whole model"


def test_the_halves_are_the_search_pairs(trials: Trials, scores: cf.Scores) -> None:
    folds = [fold.tolist() for fold, _ in Rescoring(trials, scores).halves]
    assert sorted(np.concatenate(folds)) == list(range(10)) and {len(fold) for fold in folds} == {5}


def test_errors_of_prediction_are_expected_again(trials: Trials, scores: cf.Scores) -> None:
    rescoring = Rescoring(trials, scores)
    start = trials.run(scores.top(120).mask, "start")
    fold, runs = rescoring.halves[0]
    gradients = rescoring._gradients(runs, start.mask) / rescoring.contrast
    surplus = ((start.outcome.metric - trials.evaluator.full) / rescoring.contrast)[fold]
    rescoring._expected = {"pairs": 0.0, "mean": 0.0}
    rescoring._best(start, gradients, surplus, fold, 40)
    for name, balanced in (("pairs", balanced_pairs), ("mean", balanced_mean)):
        drop = balanced(gradients, surplus, 40)
        mask = start.mask.copy()
        mask[tuple(np.argwhere(mask)[drop].T)] = False
        smaller = trials.run(cf.Circuit(trials.graph, mask).connected().mask, "re-scored")
        now = ((smaller.outcome.metric - trials.evaluator.full) / rescoring.contrast)[fold]
        error = now - (surplus - gradients[drop].sum(0))
        assert rescoring._expected[name] == pytest.approx(MEMORY * error.mean(), abs=1e-6) != 0


def test_a_start_that_does_not_do_the_task_grows(trials: Trials, scores: cf.Scores, monkeypatch) -> None:
    monkeypatch.setattr("circuitfind.search.rescoring.START", 4)
    start = Rescoring(trials, scores).start()
    asked = [tried.asked for tried in trials.curve if tried.stage == "start"][-9:]
    sizes = [n for n in asked if n in (4, 8, 16, 32, 64, 128, 256, 512, 1024)]
    assert trials.meets(start) and sizes[-1] > 4 and not trials.meets(trials.run(scores.top(sizes[-2]).mask, "start"))


def test_distances() -> None:
    """One pair too high, one as much too low: the mean does not see it."""
    full, empty = np.array([4.0, 4.0]), np.array([0.0, 0.0])
    ends = Outcome(*(np.stack([full, empty]) for _ in range(3)), kl=np.array([[0.0, 0.0], [2.0, 2.0]]))
    outcome = Outcome(np.array([6.0, 2.0]), full, full, np.array([0.5, 1.0]))
    assert distance("mean", outcome, ends) == distance("at-least", outcome, ends) == 0
    assert distance("pairs", outcome, ends) == 0.5 and distance("kl", outcome, ends) == 0.375
    first = np.array([0])
    assert distance("mean", outcome, ends, first) == 0.5 and distance("at-least", outcome, ends, first) == 0
