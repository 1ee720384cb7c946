"""Learned masks: the gates' distributions, one training step by step, resuming, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_conformance import induction
from torch import Tensor
from toys import contrast, id_task, wrapped

import circuitfind as cf
from circuitfind.cli.app import main
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.masked_run import run_masked
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.search import training as trained
from circuitfind.search.learn import LEARNERS, LearnedMasks
from circuitfind.search.matryoshka import OBJECTIVES, soft_top
from circuitfind.search.training import (
    EVERY,
    HARD_CONCRETE,
    UNIFORM,
    WARM_UP,
    MiniBatches,
    NoPressure,
    Price,
    State,
    Target,
    Training,
)

DRAWS = 200_000
LOGITS = (-4.0, -1.0, 0.0, 2.0)


def noise(n: int = DRAWS, seed: int = 0) -> Tensor:
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def within(found: float, expected: float, n: int = DRAWS) -> bool:
    """A frequency within five standard errors of a probability."""
    return abs(found - expected) < 5 * math.sqrt(max(expected * (1 - expected), 1e-12) / n)


# -------------------------------------------------------------------- gates
@pytest.mark.parametrize("logit", LOGITS)
def test_hard_concrete_gates_have_the_distribution_of_their_definition(logit: float) -> None:
    masks = HARD_CONCRETE.sample(torch.full((DRAWS,), logit, dtype=torch.float64), noise())
    literal = []
    for u in noise()[:50].tolist():
        s = 1 / (1 + math.exp(-(math.log(u / (1 - u)) + logit) / (2 / 3)))
        literal.append(min(1.0, max(0.0, s * 1.2 - 0.1)))
    assert masks[:50].tolist() == pytest.approx(literal, abs=1e-9)
    probability = float(HARD_CONCRETE.open_probability(torch.tensor(logit, dtype=torch.float64)))
    assert within(float((masks > 0).double().mean()), probability)
    assert 0 < float((masks == 1).double().mean()) < 1 and 0 < float((masks == 0).double().mean()) < 1


@pytest.mark.parametrize("logit", LOGITS)
def test_uniform_gates_have_the_distribution_and_the_gradient_of_their_definition(logit: float) -> None:
    logits = torch.full((DRAWS,), logit, dtype=torch.float64, requires_grad=True)
    masks = UNIFORM.sample(logits, noise())
    p = 1 / (1 + math.exp(-logit))
    w = p * (1 - p)
    assert float(UNIFORM.open_probability(torch.tensor(logit, dtype=torch.float64))) == pytest.approx(p)
    assert within(float((masks == 1).double().mean()), p - w / 2)
    assert within(float((masks == 0).double().mean()), 1 - p - w / 2)
    inside = masks[(masks > 0) & (masks < 1)].detach()
    assert float(inside.mean()) == pytest.approx(0.5, abs=0.03) and float(inside.var()) == pytest.approx(
        1 / 12, rel=0.1
    )
    # a loss of a gate, m^3: its gradient reaches p with w times the mean slope 1 between 0 and 1
    (gradient,) = torch.autograd.grad((masks**3).sum(), logits)
    assert float(gradient.mean()) == pytest.approx(w * p * (1 - p), rel=0.1)
    assert not gradient[(masks == 0) | (masks == 1)].any()


# -------------------------------------------------------------------- pressure
def test_the_target_shrinks_and_its_multipliers_follow_the_gap() -> None:
    target, expected = Target(20, 100, steps=50, ascent=0.4), torch.tensor(70.0, requires_grad=True)
    warm_up = round(WARM_UP * 50)
    assert [target.wanted(step) for step in (0, warm_up // 2, warm_up, 49)] == [100, 60, 20, 20]
    assert not target.settled(warm_up - 1) and target.settled(warm_up)
    multipliers = torch.tensor([3.0, 5.0], dtype=torch.float64)
    (slope,) = torch.autograd.grad(target.loss(expected, 49, multipliers), expected)
    assert float(slope) == pytest.approx(3 / 100 + 5 * 2 * 0.5 / 100)
    assert target.ascended(multipliers, 70.0, 49).tolist() == pytest.approx([3 + 0.4 * 0.5, 5 + 0.4 * 0.25])


# -------------------------------------------------------------------- training
def training_of(model: cf.Model, bound, pressure, batch_size: int | None = None, seed: int = 3) -> Training:
    batches = MiniBatches(Experiment.of(model, bound, {"batch_size": batch_size, "seed": seed}), 2)
    shape = model.graph.n_writers, model.graph.n_readers
    return Training(batches, (HARD_CONCRETE,), lambda gates: gates.view(shape), pressure, 0.1)


def test_training_is_adam_on_the_loss_of_masked_runs() -> None:
    """Three steps against torch's Adam on a loss that autograd takes from the logits to the metric in one piece."""
    model = wrapped("llama")
    bound, count = id_task((7, 6, 7, 7)).on(model), model.graph.n_writers * model.graph.n_readers
    pressure = Target(count // 4, count, 4, ascent=2.0)
    training = training_of(model, bound, pressure)
    logits = torch.randn(count, generator=torch.Generator().manual_seed(5))
    state, start = State.start(logits), logits.clone()
    weights = logits.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([weights], lr=0.1)
    multipliers = torch.zeros(2, dtype=torch.float64)
    for step in range(3):
        (rows,) = training.batches.at(step).each(lambda runs: runs, "runs")
        u = torch.from_numpy(np.random.default_rng((3, step)).random(count))
        mask = HARD_CONCRETE.sample(weights, u).view(model.graph.real.shape)
        metric = bound.metric(run_masked(rows, mask), rows.batch).mean()
        expected = HARD_CONCRETE.open_probability(weights).sum()
        gap = (expected - pressure.wanted(step)) / count
        loss = -metric + multipliers[0].item() * gap + multipliers[1].item() * gap**2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        multipliers += 2.0 * torch.tensor([gap.item(), gap.item() ** 2], dtype=torch.float64)
        state = training.advance(state)
        assert state.trace[step].tolist() == pytest.approx([loss.item(), metric.item(), expected.item()], rel=1e-4)
        # Adam divides by the gradient's size: where that is rounding, so is the step's sign
        close = (state.logits - weights.detach()).abs() < 1e-3
        assert close.double().mean() > 0.99 and (state.logits - start).abs().max() > 0.05
        assert state.multipliers.tolist() == pytest.approx(multipliers.tolist(), rel=1e-4)


def test_mini_batches_hold_every_pair_once_an_epoch_whatever_the_batch_size() -> None:
    model = wrapped("gpt2")
    bound = id_task((7,) * 5, seed=2).on(model)
    orders = []
    for size in (None, 1):
        batches, seen = MiniBatches(Experiment.of(model, bound, {"batch_size": size}), 2), []
        for step in range(6):
            parts = batches.at(step).each(lambda runs: runs.batch.clean.ids.tolist(), "runs")
            seen.append(sorted(tuple(row) for part in parts for row in part))
        for epoch in (seen[:3], seen[3:]):
            assert sorted(row for rows in epoch for row in rows) == sorted(map(tuple, bound.batch.clean.ids.tolist()))
        orders.append(seen)
    assert orders[0] == orders[1] and {len(rows) for rows in orders[0]} == {1, 2}


def test_mini_batches_come_in_an_order_of_seed_and_epoch() -> None:
    model, task = wrapped("gpt2"), id_task((5,) * 8)
    prompts = task.on(model).batch.clean.ids.tolist()

    def orders(seed: int) -> list[tuple[int, ...]]:
        """By epoch, the places of the mini-batches in the partition."""
        batches = MiniBatches(Experiment.of(model, task, {"seed": seed}), 1)
        rows = [prompts.index(runs.batch.clean.ids[0].tolist()) for runs in batches.batches]
        seen = [prompts.index(batches.at(step).batch.clean.ids[0].tolist()) for step in range(16)]
        return [tuple(rows.index(row) for row in epoch) for epoch in (seen[:8], seen[8:])]

    assert len({*orders(0), *orders(10)}) == 4 and orders(0) == orders(0)


def test_it_stops_when_the_loss_finds_no_new_low_after_the_pressure_has_settled() -> None:
    training = training_of(wrapped("gpt2"), id_task().on(wrapped("gpt2")), Target(10, 100, steps=50, ascent=1.0))

    def stops(losses: list[float]) -> bool:
        trace = torch.tensor([[loss, 0, 0] for loss in losses for _ in range(EVERY)], dtype=torch.float64)
        start = State.start(torch.zeros(3))
        return training.finished(State(start.logits, start.first, start.second, start.multipliers, trace), 2)

    rising_while_warming_up = [1.0, 2.0, 3.0]  # 30 of 50 steps
    assert not stops(rising_while_warming_up)
    assert not stops([*rising_while_warming_up, 4.0, 4.0])
    assert stops([*rising_while_warming_up, 4.0, 4.0, 3.999])
    assert not stops([*rising_while_warming_up, 4.0, 4.0, 3.9])
    assert stops([*rising_while_warming_up, -4.0, -4.0, -4.001])


# -------------------------------------------------------------------- sizes that are given
def threshold(scores: Tensor, k: float) -> Tensor:
    """tau with sum(sigmoid((s - tau) / T)) = k by halving, then one step of Newton's, which autograd differentiates."""
    low, high = float(scores.detach().min()) - 50, float(scores.detach().max()) + 50
    for _ in range(60):
        middle = (low + high) / 2
        more = float(torch.sigmoid((scores.detach() - middle) / 0.5).sum()) > k
        low, high = (middle, high) if more else (low, middle)
    gates = torch.sigmoid((scores - low) / 0.5)
    return low + (gates.sum() - k) / (gates * (1 - gates) / 0.5).sum().detach()


@pytest.mark.parametrize("k", [1.0, 7.3, 29.5])
def test_soft_masks_have_k_expected_edges_and_the_gradient_of_their_definition(k: float) -> None:
    generator = torch.Generator().manual_seed(1)
    scores, weight = (torch.randn(30, dtype=torch.float64, generator=generator) for _ in range(2))
    scores = (3 * scores).requires_grad_(True)
    gates = soft_top(scores, k)
    assert float(gates.detach().sum()) == pytest.approx(k, rel=1e-9)
    assert torch.allclose(gates, torch.sigmoid((scores - threshold(scores, k)) / 0.5), atol=1e-12)
    (gradient,) = torch.autograd.grad((gates**2 * weight).sum(), scores)

    def literal(moved: Tensor) -> float:
        return float((torch.sigmoid((moved - threshold(moved, k)) / 0.5) ** 2 * weight).sum())

    moves = 1e-5 * torch.eye(30, dtype=torch.float64)[::6]
    slopes = [(literal(scores.detach() + move) - literal(scores.detach() - move)) / 2e-5 for move in moves]
    assert gradient[::6].tolist() == pytest.approx(slopes, abs=1e-7)


def test_matryoshka_takes_turns_between_the_metric_by_sign_and_faithfulness_by_magnitude() -> None:
    """Four steps against torch's Adam, with masks from their definition."""
    model = wrapped("llama")
    bound, edges = id_task((7, 6, 7, 7)).on(model), model.graph.n_edges
    batches = MiniBatches(Experiment.of(model, bound, {"seed": 3}), 2)

    cells = tuple(torch.from_numpy(index) for index in np.nonzero(model.graph.real))

    def spread(gates: Tensor) -> Tensor:
        return gates.new_zeros(model.graph.real.shape).index_put(cells, gates)

    training = Training(batches, OBJECTIVES["both"], spread, NoPressure(), 0.1)
    scores = 2 * torch.randn(edges, generator=torch.Generator().manual_seed(5))
    state, weights = State.start(scores), scores.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([weights], lr=0.1)
    for step in range(4):
        (rows,) = batches.at(step).each(lambda runs: runs, "runs")
        u = np.random.default_rng((3, step)).random(edges)[0]
        raised = step % 2 == 0
        ordered, k = (weights, 1 + u * (edges - 1)) if raised else (weights.abs(), edges**u)
        mask = spread(torch.sigmoid((ordered - threshold(ordered, k)) / 0.5))
        values = bound.metric(run_masked(rows, mask), rows.batch)
        whole, metric = bound.metric(rows.clean.logits, rows.batch), values.mean()
        loss = -metric if raised else (values - whole).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        state = training.advance(state)
        assert state.trace[step].tolist() == pytest.approx([loss.item(), metric.item(), k], rel=1e-3)
        close = (state.logits - weights.detach()).abs() < 2e-3
        assert close.double().mean() > 0.98 and (state.logits - scores).abs().max() > 0.05
    assert not training.finished(state, patience=1)


# -------------------------------------------------------------------- starts
@pytest.mark.parametrize("method", LEARNERS)
def test_training_starts_from_scores_in_their_order(method: str) -> None:
    model, task = wrapped("llama"), id_task((7, 6, 7, 7))
    given = cf.attribute(model, task, "eap-ig-inputs", metric="kl")
    found = learn(model, method, start=given, steps=1, lr=1e-6, prune=False, n_edges=20)
    assert found.circuit == given.top(20, prune=False) and found.record.settings["start"] == "eap-ig-inputs"
    by_name = learn(model, method, start="eap-ig-inputs", steps=1, lr=1e-6)
    if method == "matryoshka":
        assert np.array_equal(by_name.scores.ranked("signed"), given.ranked("signed"))
        by_default = learn(model, method, steps=1, lr=1e-6)
        assert np.array_equal(by_name.scores.values, by_default.scores.values)
    alike = learn(model, method, start="alike", steps=1, lr=1e-6)
    assert np.ptp(alike.scores.values[model.graph.real]) < 1e-5 and "start" not in alike.record.settings
    nodes = cf.attribute(model, task, "eap-ig-inputs", level="node", metric="kl")
    assert set(learn(model, method, start=nodes, level="node", n_nodes=4, steps=1, lr=1e-6).scores.top(4)) == set(
        nodes.top(4)
    )


@pytest.mark.parametrize("method", LEARNERS)
def test_of_a_circuit_only_its_edges_are_learned(method: str) -> None:
    model = wrapped("gpt2")
    given = cf.attribute(model, id_task((7, 6, 7, 7)), "eap-ig-inputs").top(40, prune=False)
    found = learn(model, method, start=given, n_edges=10, steps=4, prune=False)
    assert not found.scores.values[~given.mask].any() and found.scores.values[given.mask].all()
    assert len(found.circuit) == 10 and not (found.circuit - given).edges
    assert max(row.expected for row in found.history) < 40
    bare = dataclasses.replace(given, estimates=None)  # as of a file of names
    assert learn(model, method, start=bare, n_edges=10, steps=1).scores.values.any()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"start": "magic"}, "'magic'"),
        ({"start": 3}, "start=int does not fit: at level 'edge' give Scores or Circuit"),
        ({"start": "circuit", "level": "node", "n_edges": None}, "at level 'node' give NodeScores"),
        ({"start": "other"}, "start=Circuit belongs to another graph"),
        ({"start": "empty"}, "start=Circuit has no edges, so there is no gate to learn: give a circuit with edges"),
        ({"start": "empty", "n_edges": None}, "start=Circuit has no edges"),
        (
            {"objective": "both"},
            "'edge-pruning' has no objective 'both': matryoshka has 'both', 'faithfulness'",
        ),
        ({"objective": "speed", "method": "matryoshka"}, "has no objective 'speed'"),
        ({"regularisation": 0.1, "method": "matryoshka"}, "so it has no fixed price"),
    ],
)
def test_starts_and_objectives_that_cannot_be(options: dict, says: str) -> None:
    model, other = wrapped("gpt2"), wrapped("llama")
    circuits = {"circuit": cf.Circuit.full(model.graph), "other": cf.Circuit.full(other.graph)}
    circuits["empty"] = cf.Circuit.empty(model.graph)
    start = {"start": circuits.get(options["start"], options["start"])} if "start" in options else {}
    with pytest.raises(cf.ScoreError, match=says):
        cf.learn_masks(model, id_task(), **{"n_edges": 3, **options, **start})


def test_objectives_rank_by_sign_or_by_magnitude() -> None:
    model, task = wrapped("llama"), contrast(0)
    same = {"steps": 20, "lr": 0.1, "pairs_per_step": 4}
    found = {name: cf.learn_masks(model, task, "matryoshka", objective=name, **same) for name in OBJECTIVES}
    assert found["metric"].scores.values[model.graph.real].min() >= 0 > found["both"].scores.values.min()
    areas = {name: cf.mib(model, task, one.scores) for name, one in found.items()}
    start = cf.mib(model, task, cf.attribute(model, task, "eap-ig-inputs"))
    assert min(areas["metric"].cpr, areas["both"].cpr) > start.cpr
    assert max(areas["faithfulness"].cmd, areas["both"].cmd) < areas["metric"].cmd


# -------------------------------------------------------------------- the whole
def learn(model: cf.Model, method: str = "edge-pruning", **options) -> LearnedMasks:
    settings = {"steps": 10, "lr": 0.3, "pairs_per_step": 2, "seed": 1, "metric": "kl", **options}
    if method == "edge-pruning" and not {"n_edges", "n_nodes", "sparsity"} & set(options):
        settings["n_edges"] = 40
    return cf.learn_masks(model, id_task((7, 6, 7, 7)), method, **settings)


@pytest.mark.parametrize("method", LEARNERS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_method_learns_a_circuit_closer_to_the_model_than_random_ones(name: str, method: str) -> None:
    model = wrapped(name)
    found = learn(model, method, n_edges=60, steps=30, prune=False, patience=None)
    assert len(found.circuit) == 60 and found.scores.top(60, prune=False) == found.circuit
    values = found.scores.values[model.graph.real]
    low, high = (-9, 9) if method == "matryoshka" else (0, 1)
    assert low <= values.min() < 0.5 < values.max() <= high and not found.scores.values[~model.graph.real].any()
    assert [row.step for row in found.history] == list(range(EVERY, 31, EVERY))
    assert found.circuit.record.method == method and "ranking" in found.record.sign
    evaluator = Evaluator.of(model, id_task((7, 6, 7, 7)), metric="kl")
    draw = np.random.default_rng(0).random((20, *model.graph.real.shape))
    draw[:, ~model.graph.real] = 2
    cuts = np.sort(draw.reshape(20, -1))[:, 60]
    random = evaluator.run(draw < cuts[:, None, None]).metric.mean(-1)
    assert evaluator.run(found.circuit.mask[None]).metric.mean() > random.max()


@pytest.mark.parametrize("method", LEARNERS)
def test_nodes_have_one_gate_for_all_their_edges(method: str) -> None:
    model = wrapped("llama")
    found = learn(model, method, level="node", n_nodes=5, prune=False)
    assert isinstance(found.scores, cf.NodeScores) and found.scores.values.shape == (model.graph.n_writers,)
    rows = found.circuit.mask.any(axis=1)
    assert rows.sum() == 5 and np.array_equal(found.circuit.mask, model.graph.real & rows[:, None])
    assert {model.graph.writer_names[u] for u in np.flatnonzero(rows)} == set(found.scores.top(5))
    assert len(learn(model, method, level="node", n_nodes=5).circuit.connected()) <= len(found.circuit)


def test_a_seed_decides_everything_and_batches_nothing() -> None:
    model = wrapped("gpt_neox")
    one, same, other = learn(model), learn(model), learn(model, seed=2)
    assert np.array_equal(one.scores.values, same.scores.values) and one.history == same.history
    assert not np.array_equal(one.scores.values, other.scores.values)
    parts = learn(model, batch_size=1, lr=0.01)  # Adam's first steps turn rounding into signs: keep them small
    assert np.abs(parts.scores.values - learn(model, lr=0.01).scores.values).max() < 0.02


@pytest.mark.parametrize("method", LEARNERS)
def test_a_stopped_training_goes_on_to_the_same_end(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = wrapped("gpt2"), tmp_path / "deep" / "learned.ckpt"
    whole = learn(model, method)
    advance, calls = Training.advance, []

    def stopping(self: Training, state: State) -> State:
        calls.append(state.step)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return advance(self, state)

    monkeypatch.setattr(Training, "advance", stopping)
    with pytest.raises(KeyboardInterrupt):
        learn(model, method, checkpoint=path)
    assert path.exists() and calls == [0, 1, 2, 3, 4, 5]
    for other in ({"seed": 8}, {"start": "eap-ig-activations"}):
        with pytest.raises(cf.FileError, match="checkpoint of another run"):
            learn(model, method, checkpoint=path, **other)
    found = learn(model, method, checkpoint=path)
    assert calls[6:] == list(range(5, 10)) and not path.exists()
    assert np.array_equal(found.scores.values, whole.scores.values) and found.history == whole.history
    path.write_text("nothing of the kind")
    with pytest.raises(cf.FileError, match="no checkpoint of circuitfind"):
        learn(model, method, checkpoint=path)


def test_it_writes_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only when it is stopped in an orderly way: a killed run goes on from what was last written."""
    model, path, written = wrapped("gpt2"), tmp_path / "learned.ckpt", []
    monkeypatch.setattr(trained, "SECONDS_BETWEEN_WRITES", -1.0)
    write = trained.CheckpointFile.write

    def noting(self: trained.CheckpointFile, arrays: dict) -> None:
        written.append(len(arrays["trace"]))
        write(self, arrays)

    monkeypatch.setattr(trained.CheckpointFile, "write", noting)
    learn(model, steps=3, checkpoint=path)
    assert written == [1, 2, 3] and not path.exists()


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_other_ablations_and_metrics(ablation: str) -> None:
    """The same gates with another value on the closed edges: equal to the bit if the ablation were not passed on."""
    model, options = wrapped("gpt2"), {"steps": 3, "method": "ugs", "regularisation": 0.01, "metric": None}
    found = cf.learn_masks(model, id_task(), ablation=ablation, **options)
    assert found.record.ablation == ablation and found.record.metric == "logit_diff"
    other = cf.learn_masks(model, id_task(), **options)
    assert found.history[0].metric != other.history[0].metric


def test_the_default_price_and_steering_know_the_metrics_scale() -> None:
    model = wrapped("llama")
    evaluator = Evaluator.of(model, id_task((7, 6, 7, 7)), metric="kl")
    contrast = float((evaluator.full - evaluator.empty).mean())
    found = learn(model, "subnetwork-probing", n_edges=20, steps=2)
    assert found.record.settings["regularisation"] == pytest.approx(0.1 * contrast / 20, rel=1e-4)
    found = learn(model, "ugs", level="node", steps=2)
    assert found.record.settings["regularisation"] == pytest.approx(contrast / model.graph.n_writers, rel=1e-4)
    kl = cf.METRICS["kl"]
    hundredfold = dataclasses.replace(kl, function=lambda logits, batch: 100 * kl(logits, batch))
    one, hundred = (learn(model, metric=metric) for metric in (kl, hundredfold))
    assert np.abs(one.scores.values - hundred.scores.values).max() < 0.05


def test_gates_above_one_half_where_no_size_is_wanted() -> None:
    model = wrapped("gpt2")
    found = learn(model, "subnetwork-probing", regularisation=1e-4, steps=20, lr=0.5, prune=False)
    assert np.array_equal(found.circuit.mask, (found.scores.values > 0.5) & model.graph.real)
    assert 0 < len(found.circuit) < model.graph.n_edges
    dear = learn(model, "subnetwork-probing", regularisation=1e-3, steps=20, lr=0.5, prune=False)
    assert len(dear.circuit) < len(found.circuit)
    nodes = learn(model, "ugs", level="node", regularisation=1e-4, prune=False)
    assert nodes.circuit.mask.any(axis=1).tolist() == (nodes.scores.values > 0.5).tolist()


def test_half_precision_models_learn_in_single_precision() -> None:
    found = learn(wrapped("gpt2", torch.bfloat16), steps=4)
    assert found.scores.values.dtype == np.float32 and np.isfinite(found.scores.values).all()


# -------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "magic"}, "'magic' does not learn masks"),
        ({"level": "neuron"}, "level 'neuron' is unknown"),
        ({"n_edges": 3, "sparsity": 0.9}, "n_edges and sparsity are given"),
        ({"n_nodes": 3}, "n_nodes is for level='node'"),
        ({"n_edges": 3, "level": "node"}, "n_edges is for level='edge'"),
        ({"n_edges": 10**6}, "n_edges=1000000: give a whole number, 1 to"),
        ({"n_edges": 2.5}, "n_edges=2.5: give a whole number"),
        ({"sparsity": 90}, "sparsity=90: give the fraction"),
        ({"n_edges": 3, "regularisation": 0.1}, "so it has no fixed price"),
        ({"method": "ugs", "regularisation": -1.0}, "price of an open gate"),
        ({"n_edges": 3, "steps": 0}, "steps=0: give a whole number, 1 or more"),
        ({"n_edges": 3, "patience": 0}, "patience=0: give a whole number, 1 or more"),
        ({"n_edges": 3, "pairs_per_step": 2.5}, "pairs_per_step=2.5: give a whole number"),
        ({"n_edges": 3, "lr": 0.0}, "lr=0.0: give a number above 0"),
    ],
)
def test_what_cannot_be_asked_for(options: dict, says: str) -> None:
    with pytest.raises(cf.ScoreError, match=says):
        cf.learn_masks(wrapped("gpt2"), id_task(), **options)
    with pytest.raises(cf.TaskError, match="batch_size must be at least 1, not 0"):
        cf.learn_masks(wrapped("gpt2"), id_task(), n_edges=3, batch_size=0)


@pytest.mark.parametrize("method", LEARNERS)
def test_only_a_method_that_steers_has_a_default_size(method: str) -> None:
    model = wrapped("gpt2")
    made = cf.learn_masks(model, id_task(), method, steps=1, metric="kl").record
    assert made.settings["target"] == (round(0.05 * model.graph.n_edges) if LEARNERS[method].steers else None)


def test_losses_that_are_nan_or_have_no_gradient() -> None:
    model = wrapped("gpt2")

    def learn_by(metric: Callable, **options) -> LearnedMasks:
        return cf.learn_masks(model, id_task(), n_edges=30, steps=3, metric=metric, **options)

    bad = cf.Metric("bad", lambda logits, batch: logits.sum((1, 2)) * math.nan)
    flat = cf.Metric("flat", lambda logits, batch: 0 * logits.sum((1, 2)))
    priced = {"method": "ugs", "regularisation": 0.1}
    with pytest.raises(cf.ScoreError, match="metric 'bad' is NaN on these pairs"):
        learn_by(bad)
    with pytest.raises(cf.ScoreError, match="'bad' or its gradient is NaN or infinite under the mask of step 0"):
        learn_by(bad, **priced)
    with pytest.raises(cf.ScoreError, match="'flat' is not higher on the whole model"):
        learn_by(flat)
    with pytest.raises(cf.ScoreError, match="gradient of metric 'flat' at the first mask is zero"):
        learn_by(flat, **priced)


def test_a_price_is_constant() -> None:
    expected, price, multipliers = torch.tensor(7.0), Price(0.5), torch.zeros(2)
    assert float(price.loss(expected, 3, multipliers)) == 3.5 and price.settled(0)
    assert price.ascended(multipliers, 7.0, 3) is multipliers


def test_the_verb_writes_a_circuit_and_its_ranking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("learn", "tiny", "--task", "greater-than", "--n", "8", "--edges", "60", "--steps", "4", "--json")
    assert main([*words, "--backend", "hooks"]) == 0
    said = json.loads(capsys.readouterr().out)
    circuit = cf.Circuit.open("circuitfind-out/learned.json")
    assert circuit.edges == said["circuit"]["edges"] and circuit.record.method == "edge-pruning"
    scores = cf.Scores.open("circuitfind-out/learned.safetensors")
    assert scores.top(60) == circuit and not scores.record.is_effect
    assert [row["step"] for row in said["history"]] == [4] and "faithfulness" in said["circuit"]["unseen"]
    assert Path("circuitfind-out/learned.dot").read_text().startswith("digraph")
    own = ("--method", "matryoshka", "--objective", "faithfulness", "--start", "circuitfind-out/learned.json")
    assert main([*words, "--backend", "hooks", *own, "--edges", "2"]) == 0
    capsys.readouterr()
    again = cf.Scores.open("circuitfind-out/learned.safetensors")
    assert again.values.any() and not again.values[~circuit.mask].any() and "by magnitude" in again.record.sign
    assert main([*words, "--sparsity", "0.5"]) == 2
    assert "n_edges and sparsity are given" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.shared
def test_the_textbook_induction_circuit_is_learned(shared: Path) -> None:
    model = cf.load(str(shared / "models/induction_2x1"), backend="hooks")
    found = cf.learn_masks(model, induction(16), n_edges=3, steps=120)
    assert found.circuit.edges == ["input->a0.h0<v>", "a0.h0->a1.h0<k>", "a1.h0->logits"]
    values = np.sort(found.scores.values[model.graph.real])
    assert values[-3] > 0.5 > values[-4], "three gates are open, all others closed"


@pytest.mark.parametrize("level", ["edge", "node"])
def test_what_was_learned_is_a_folder(level: str, tmp_path: Path) -> None:
    found = learn(wrapped("gpt2"), "ugs", level=level, steps=2)
    found.save(tmp_path)
    back = LearnedMasks.open(tmp_path)
    assert back.circuit == found.circuit and back.history == found.history and type(back.scores) is type(found.scores)
    assert np.array_equal(back.scores.values, found.scores.values) and repr(back) == repr(found)
