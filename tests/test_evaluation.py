"""Faithfulness, verification, random circuits and statistics against literal evaluations and brute force."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from helpers import off
from oracles import by_hand, run_circuit
from toys import FOUR, Twin, contrast, id_task, linear, some_circuits, wrapped

import circuitfind as cf
from circuitfind.batch import Batch
from circuitfind.circuit import connected
from circuitfind.engine import prepare
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.memory_plan import SideBySide
from circuitfind.errors import CircuitfindWarning, FileError, ScoreError
from circuitfind.evaluation import faithfulness
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.evaluation.random_circuits import _Growth, random_circuit, random_path
from circuitfind.graph import Graph
from circuitfind.statistics import (
    correlation,
    left_out,
    mean_intervals,
    rank_correlation,
    ratio_interval,
    standard_error,
)

TASK = id_task((7, 5, 6), seed=1)


@pytest.fixture(scope="module")
def llama() -> cf.Model:
    return wrapped("llama")


# -------------------------------------------------------------------- one circuit
@pytest.mark.parametrize("ablation", ["corrupted", "zero", "mean"])
@pytest.mark.parametrize("name", FOUR)
def test_faithfulness_equals_the_literal_evaluation(name: str, ablation: str) -> None:
    model = wrapped(name)
    bound = TASK.on(model)
    twin = Twin(model, bound, ablation)
    evaluator = Evaluator.of(model, bound, ablation=ablation)

    def literally(circuit: cf.Circuit) -> np.ndarray:
        kept = {tuple(edge.split("->")) for edge in circuit.edges}
        return twin.metric(run_circuit(twin.literal, twin.batch.clean, kept, twin.carried)).double().numpy()

    full, empty = literally(cf.Circuit.full(model.graph)), literally(cf.Circuit.empty(model.graph))
    size = np.abs(full - empty).max()
    np.testing.assert_allclose(evaluator.full, full, atol=1e-5 * size)
    np.testing.assert_allclose(evaluator.empty, empty, atol=1e-5 * size)
    for circuit in some_circuits(model.graph, 3):
        values = literally(circuit)
        found = evaluator.run(circuit.mask[None])
        np.testing.assert_allclose(found.metric[0], values, atol=1e-5 * size)
        ratio = (values.mean() - empty.mean()) / (full.mean() - empty.mean())
        evaluator.check_contrast = lambda: None  # three random pairs are noise: the ratio is wanted all the same
        assert evaluator.faithfulness(found.metric)[0] == pytest.approx(ratio, abs=1e-4)


@pytest.mark.parametrize("ablation", ["corrupted", "zero", "mean"])
def test_the_ends_of_the_scale(llama: cf.Model, ablation: str) -> None:
    task = contrast(2)
    full = cf.evaluate(llama, task, cf.Circuit.full(llama.graph), ablation=ablation)
    empty = cf.evaluate(llama, task, [], ablation=ablation)
    assert (full.faithfulness, empty.faithfulness) == pytest.approx((1, 0), abs=1e-5)
    assert (full.n_edges, empty.n_edges) == (llama.graph.n_edges, 0)
    assert full.metric_full == empty.metric_full == pytest.approx(full.metric, rel=1e-5)
    assert full.metric_empty == empty.metric_empty == pytest.approx(empty.metric, rel=1e-5)
    np.testing.assert_allclose(full.per_example.circuit, full.per_example.full, rtol=1e-5)
    np.testing.assert_allclose(empty.per_example.circuit, empty.per_example.empty, rtol=1e-5)
    assert [*full.interval, *empty.interval] == pytest.approx([1, 1, 0, 0], abs=1e-5)
    assert (full.record.ablation, full.record.metric) == (ablation, "logit_diff")
    if ablation == "corrupted":  # the ends are the two runs themselves, to the bit
        assert (full.faithfulness, empty.faithfulness) == (1.0, 0.0)
        swapped = cf.evaluate(llama, dataclasses.replace(task, clean=task.corrupted, corrupted=task.clean), [])
        assert swapped.metric_full == pytest.approx(full.metric_empty, rel=1e-5)


def test_an_evaluation_is_its_examples(llama: cf.Model) -> None:
    task = contrast(3, (7, 6, 5, 7, 6))
    circuit = some_circuits(llama.graph)[2]
    found = cf.evaluate(llama, task, circuit)
    values, full, empty = found.per_example[:3]
    assert found.metric == pytest.approx(values.mean()) and found.metric_full == pytest.approx(full.mean())
    assert found.faithfulness == pytest.approx((values.mean() - empty.mean()) / (full.mean() - empty.mean()))
    assert found.interval.low < found.faithfulness < found.interval.high
    rows = [np.delete(np.arange(5), example) for example in range(5)]
    without = [(values[kept] - empty[kept]).mean() / (full[kept] - empty[kept]).mean() for kept in rows]
    assert [found.interval] == pytest.approx(by_hand([found.faithfulness], np.array(without)[:, None]))
    assert cf.evaluate(llama, task, circuit, seed=6).interval == found.interval  # nothing is drawn
    content = json.loads(json.dumps(found.to_dict()))
    assert content["per_example"] == {k: v.tolist() for k, v in found.per_example._asdict().items()}
    assert content["faithfulness"] == found.faithfulness and content["interval"] == list(found.interval)
    assert cf.evaluate(llama, task, circuit.edges).faithfulness == found.faithfulness  # by names


def test_accuracy_counts_answers_above_all_wrong_ones(llama: cf.Model) -> None:
    task = contrast(4, (6,) * 6)
    bound = task.on(llama)
    circuit = some_circuits(llama.graph)[1]
    twin = Twin(llama, bound)
    kept = {tuple(edge.split("->")) for edge in circuit.edges}
    for edges, logits in ((circuit, run_circuit(twin.literal, twin.batch.clean, kept, twin.carried)), ([], None)):
        logits = twin.corrupted.logits if logits is None else logits
        rows = torch.arange(6)
        right = logits[rows, 0, bound.batch.answers.flatten()] > logits[rows, 0, bound.batch.wrong.flatten()]
        evaluation = cf.evaluate(llama, bound, edges)
        assert evaluation.accuracy == pytest.approx(float(right.double().mean()))
    full = twin.clean.logits
    right = full[rows, 0, bound.batch.answers.flatten()] > full[rows, 0, bound.batch.wrong.flatten()]
    assert evaluation.accuracy_full == pytest.approx(float(right.double().mean()))
    likeliest = twin.clean.logits[:, 0].argmax(-1)
    evaluator = Evaluator.of(llama, dataclasses.replace(task, answers=likeliest, metric="logprob"))
    assert evaluator.full_top1.all() and evaluator.full_accurate.all()


def test_other_metrics_override_the_tasks(llama: cf.Model) -> None:
    task, circuit = contrast(2), some_circuits(llama.graph)[2]
    kl = cf.evaluate(llama, task, circuit, metric="kl")
    assert kl.record.metric == "kl" and kl.metric_full == pytest.approx(0, abs=1e-6)
    assert kl.metric_empty < kl.metric < 0 < kl.kl == pytest.approx(-kl.metric)
    np.testing.assert_allclose(kl.per_example.kl, -kl.per_example.circuit, rtol=1e-5)

    def mine(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return logits.log_softmax(-1).gather(-1, batch.answers[:, 0])[:, 0]

    own, built_in = (cf.evaluate(llama, task, circuit, metric=metric) for metric in (mine, "logprob"))
    assert (own.record.metric, built_in.record.metric) == ("mine", "logprob")
    np.testing.assert_allclose(own.per_example.circuit, built_in.per_example.circuit, rtol=1e-5)


# -------------------------------------------------------------------- many circuits
@pytest.mark.parametrize("ablation", ["corrupted", "mean"])
def test_side_by_side_equals_one_by_one(llama: cf.Model, ablation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = contrast(2)
    masks = np.stack([circuit.mask for circuit in some_circuits(llama.graph, 7)])
    together = Evaluator.of(llama, task, ablation=ablation).run(masks)
    assert together.metric.shape == together.accurate.shape == (7, 4)
    assert len(np.unique(together.metric.round(4))) > 20, "the circuits do not differ"
    for options in ({}, {"batch_size": 1}, {"batch_size": 3}):
        evaluator = Evaluator.of(llama, task, ablation=ablation, **options)
        alone = np.concatenate([evaluator.run(mask[None]).metric for mask in masks])
        assert off(torch.from_numpy(alone), torch.from_numpy(together.metric)) < 1e-5
    monkeypatch.setattr(prepare, "KEPT_RUNS", 0)  # nothing is kept between circuits
    assert (
        off(torch.from_numpy(Evaluator.of(llama, task, ablation=ablation).run(masks).metric), torch.from_numpy(alone))
        < 1e-5
    )
    monkeypatch.setattr(faithfulness, "CIRCUITS", SideBySide(60, 60))  # two circuits at a time
    assert (
        off(torch.from_numpy(Evaluator.of(llama, task, ablation=ablation).run(masks).metric), torch.from_numpy(alone))
        < 1e-5
    )


def test_prepared_runs_are_kept_only_where_they_fit(llama: cf.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[int] = []
    original = Experiment.prepare

    def counted(experiment: Experiment, batch: Any, **how: Any) -> Any:
        prepared.append(len(batch))
        return original(experiment, batch, **how)

    monkeypatch.setattr(Experiment, "prepare", counted)
    mask = llama.graph.real[None]
    evaluator = Evaluator.of(llama, TASK, batch_size=2)
    evaluator.run(mask), evaluator.run(mask)
    assert prepared == [2, 1]
    monkeypatch.setattr(prepare, "KEPT_RUNS", 0)
    evaluator = Evaluator.of(llama, TASK, batch_size=2)
    evaluator.run(mask)
    assert prepared == [2, 1] * 3


# -------------------------------------------------------------------- refusals
def test_without_contrast_there_is_no_faithfulness(llama: cf.Model) -> None:
    task = contrast(2)
    both_ways = cf.Task(
        torch.cat([task.clean, task.corrupted]),
        torch.cat([task.corrupted, task.clean]),
        torch.cat([task.answers, task.answers]),
        torch.cat([task.wrong_answers, task.wrong_answers]),
        attention_mask=torch.cat([task.attention_mask] * 2),
    )
    message = r"faithfulness is undefined: the metric is .* within noise \(standard error .*, 8 examples\)"
    with pytest.raises(ScoreError, match=message):
        cf.evaluate(llama, both_ways, [])
    with pytest.raises(ScoreError, match="faithfulness is undefined"):
        cf.evaluate(llama, task, [], metric=lambda logits, batch: logits.sum(-1) * 0)
    with pytest.raises(ScoreError, match="faithfulness is undefined"):
        cf.verify(llama, both_ways, cf.attribute(llama, both_ways, "eap"), top=30)


def test_one_example_has_no_interval(llama: cf.Model) -> None:
    found = cf.evaluate(llama, contrast(2).on(llama).subset([0]), cf.Circuit.full(llama.graph))
    assert found.faithfulness == 1 and all(map(math.isnan, found.interval))


def test_nan_and_foreign_circuits_are_named(llama: cf.Model) -> None:
    def spoiled(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        return torch.where(torch.arange(len(logits)) % 4 == 2, torch.nan, logits[:, 5])

    with pytest.raises(ScoreError, match="metric 'spoiled' is NaN on example 2: '"):
        cf.evaluate(llama, contrast(2), [], metric=spoiled)
    with pytest.raises(FileError, match="the circuit belongs to another model"):
        cf.evaluate(llama, contrast(2), cf.Circuit.full(wrapped("gpt2").graph))
    with pytest.raises(FileError, match=r"edge 'm1->m0' runs backwards"):
        cf.evaluate(llama, contrast(2), ["m1->m0"])


# -------------------------------------------------------------------- verification
@pytest.fixture(scope="module")
def scores(llama: cf.Model) -> cf.Scores:
    return cf.attribute(llama, contrast(2), "eap-ig-inputs")


def test_verification_measures_the_top_candidates(llama: cf.Model, scores: cf.Scores) -> None:
    task = contrast(2)
    checks = cf.verify(llama, task, scores, top=12, random=3)
    exact = cf.attribute(llama, task, "exact")
    assert len(checks.edges) == 12 == np.isfinite(checks.exact).sum()
    names = list(scores.to_dict())
    order = sorted(names, key=lambda name: -abs(scores[name]))[:12]
    assert [check.name for check in checks.edges] == order
    for check, (low, high) in zip(checks.edges, checks.intervals, strict=True):
        assert check.estimate == scores[check.name]
        assert check.exact == pytest.approx(exact[check.name], abs=1e-5)
        assert checks.exact[llama.graph.edge(check.name)] == pytest.approx(check.exact, rel=1e-6)
        assert low < check.exact < high
    x, y = (np.array([getattr(check, side) for check in checks.edges]) for side in ("estimate", "exact"))
    assert checks.correlation == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = [values.argsort().argsort() for values in (x, y)]
    assert checks.rank_correlation == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert checks.slope == pytest.approx(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0])
    assert checks.sign_errors == sum(a * b < 0 for a, b in zip(x, y, strict=True))
    circuit = scores.top(12)
    assert checks.evaluation.n_edges == len(circuit)
    assert checks.faithfulness == cf.evaluate(llama, task, circuit).faithfulness
    assert checks.interval == checks.evaluation.interval
    further = [value for value in checks.random if abs(1 - value) > abs(1 - checks.faithfulness)]
    assert len(checks.random) == 3 and checks.beaten == len(further)
    near = dataclasses.replace(checks.evaluation, faithfulness=0.9)
    assert dataclasses.replace(checks, evaluation=near, random=(0.5, 0.95, 1.05, 1.3)).beaten == 2, "1.3 is further off"
    assert json.loads(json.dumps(checks.to_dict()))["checked"] == 12


def test_signs_of_estimates(llama: cf.Model) -> None:
    task = contrast(2)
    exact = cf.attribute(llama, task, "exact")
    flipped = exact.values.copy()
    worst = np.unravel_index(np.abs(exact.values).argsort(axis=None)[::-1][:5], exact.values.shape)
    flipped[worst] *= -1
    checks = cf.verify(llama, task, dataclasses.replace(exact, values=2 * flipped), top=20, random=0)
    wrong = {check.name for check in checks.edges if check.wrong_sign}
    assert checks.sign_errors == 5 and wrong == {llama.graph.edge_name(u, r) for u, r in zip(*worst, strict=True)}
    right = cf.verify(llama, task, dataclasses.replace(exact, values=2 * exact.values), top=20, random=0)
    assert right.sign_errors == 0 and right.correlation == pytest.approx(1, abs=1e-6)
    assert right.slope == pytest.approx(0.5, abs=1e-5) and right.random == () and right.beaten == 0


def test_random_circuits_to_compare_with_follow_the_seed(llama: cf.Model, scores: cf.Scores) -> None:
    circuit = cf.Circuit.of(llama.graph, ["input->logits", "input->m1", "m1->logits"])
    first, again, other = (
        cf.verify(llama, contrast(2), scores, top=0, circuit=circuit, random=3, seed=seed).random for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_given_circuits_edges_are_patched_too(llama: cf.Model, scores: cf.Scores) -> None:
    circuit = cf.Circuit.of(llama.graph, ["input->logits", "input->m1", "m1->logits"])
    checks = cf.verify(llama, contrast(2), scores, top=4, circuit=circuit, random=2)
    names = {check.name for check in checks.edges}
    assert names == set(circuit.edges) | set(scores.top(4, prune=False).edges)
    assert checks.evaluation.n_edges == 3


def test_verification_repeats_how_the_scores_were_made(llama: cf.Model) -> None:
    task = contrast(2)
    for options in ({"ablation": "zero"}, {"direction": "denoising"}):
        scores = cf.attribute(llama, task, "eap", **options)
        exact = cf.attribute(llama, task, "exact", **options)
        other = cf.attribute(llama, task, "exact")
        checks = cf.verify(llama, task, scores, top=6, random=0)
        assert checks.evaluation.record.ablation == options.get("ablation", "corrupted")
        for check in checks.edges:
            assert check.exact == pytest.approx(exact[check.name], abs=1e-5)
        assert any(abs(check.exact - other[check.name]) > 1e-3 for check in checks.edges)
    changed = cf.verify(llama, task, cf.attribute(llama, task, "eap"), top=30, random=0, ablation="mean")
    assert changed.evaluation.record.ablation == "mean"


def test_an_estimate_is_exact_on_a_linear_model() -> None:
    model = linear()
    task = id_task((7,) * 4, seed=1)
    with torch.no_grad():
        change = model.hf(task.clean).logits[:, -1] - model.hf(task.corrupted).logits[:, -1]
    task = dataclasses.replace(task, answers=change.argmax(-1), wrong_answers=change.argmin(-1))
    checks = cf.verify(model, task, cf.attribute(model, task, "eap"), top=30, random=0)
    assert checks.correlation == pytest.approx(1, abs=1e-6) and checks.slope == pytest.approx(1, abs=1e-5)


def test_verification_measures_the_metric_that_was_estimated(llama: cf.Model) -> None:
    task = contrast(2)
    scores = cf.attribute(llama, task, "eap", metric="logprob")
    checks = cf.verify(llama, task, scores, top=20, random=0)
    exact = cf.attribute(llama, task, "exact", metric="logprob")
    assert checks.evaluation.record.metric == "logprob"
    assert checks.edges[0].exact == pytest.approx(exact[checks.edges[0].name], abs=1e-5)
    assert (
        cf.verify(llama, task, scores, top=20, random=0, metric="logit_diff").evaluation.record.metric == "logit_diff"
    )

    circuit = cf.attribute(llama, task, "eap").top(20)
    with pytest.warns(CircuitfindWarning, match="the circuit was made with metric='logit_diff' and judged with"):
        assert cf.verify(llama, task, scores, top=5, random=0, circuit=circuit).record.metric == "logprob"

    def mine(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return logits.gather(-1, batch.answers[:, 0])[:, 0]

    own = cf.attribute(llama, task, "eap", metric=mine)
    with pytest.raises(ScoreError, match=r"the scores were made with the metric 'mine', which is not known .*: pass"):
        cf.verify(llama, task, own, top=20)
    assert cf.verify(llama, task, own, top=20, random=0, metric=mine).evaluation.record.metric == "mine"


def test_candidates_without_a_path_are_an_empty_circuit(llama: cf.Model) -> None:
    values = np.zeros(llama.graph.real.shape, dtype=np.float32)
    values[llama.graph.edge("input->m0")] = 1
    with pytest.warns(UserWarning, match="the top 1 edges hold no path from input to logits: their circuit is empty"):
        checks = cf.verify(llama, contrast(2), cf.Scores(llama.graph, values), top=1, random=1)
    assert (checks.evaluation.n_edges, checks.faithfulness, checks.random) == (0, 0.0, (0.0,))


def test_what_cannot_be_verified_is_refused(llama: cf.Model, scores: cf.Scores) -> None:
    nodes = cf.attribute(llama, contrast(2), level="node")
    with pytest.raises(ScoreError, match="verify needs edge scores, not NodeScores"):
        cf.verify(llama, contrast(2), nodes)  # type: ignore[arg-type]
    for wrong in ({"top": -1}, {"random": -1}, {"random": 10**20}):
        with pytest.raises(ScoreError, match=f"^{next(iter(wrong))}=.*: give a whole number, 0 "):
            cf.verify(llama, contrast(2), scores, **wrong)


def test_scores_of_another_graph_are_refused(llama: cf.Model) -> None:
    scores = cf.attribute(wrapped("gpt2"), contrast(2), "eap")
    with pytest.raises(ScoreError, match=r"the scores belong to another graph .2 layers, 4 heads.; this model has"):
        cf.verify(llama, contrast(2), scores)


# -------------------------------------------------------------------- the task's summary
def test_the_summary_says_how_well_the_model_does_the_task(llama: cf.Model) -> None:
    task = contrast(2)
    turned = [1, 3]  # in these rows the wrong answer is called right
    answers, wrong = task.answers.clone(), task.wrong_answers.clone()
    answers[turned], wrong[turned] = task.wrong_answers[turned], task.answers[turned]
    task = dataclasses.replace(task, answers=answers, wrong_answers=wrong)
    bound = task.on(llama)
    twin = Twin(llama, bound)
    clean, corrupted = twin.metric(twin.clean.logits), twin.metric(twin.corrupted.logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = cf.summarise(llama, bound, warn=False)
    failing = (clean <= 0).nonzero().flatten().tolist()
    assert (summary.name, summary.n, summary.metric) == ("ids", 4, "logit_diff")
    assert summary.failing == tuple(failing) and len(failing) >= 2
    assert summary.accuracy == pytest.approx(1 - len(failing) / 4)
    assert summary.clean == pytest.approx(float(clean.mean()), abs=1e-5)
    assert summary.corrupted == pytest.approx(float(corrupted.mean()), abs=1e-5)
    assert summary.lowered == pytest.approx(float((corrupted < clean).double().mean())) == 0.5
    rows = ", ".join(map(str, failing))
    text = rf"does not prefer the answer on {len(failing)} of 4 clean prompts \(rows {rows}\)\. An accuracy of \d+% is"
    with pytest.warns(UserWarning, match=text):
        cf.summarise(llama, bound)


def test_the_warning_lists_a_few_rows() -> None:
    summary = cf.TaskSummary("t", 20, "logit_diff", 0.65, 0.6, 1.0, 0.0, 1.0, tuple(range(3, 10)), ())
    text = "the model does not prefer the answer on 7 of 20 clean prompts (rows 3, 4, 5, 6, 7, ...)."
    assert summary.warning() == text
    assert dataclasses.replace(summary, failing=()).warning() is None
    at_chance = dataclasses.replace(summary, chance=0.6).warning()
    expected = f"{text} An accuracy of 65% is no better than guessing (60%): the model may not do this task."
    assert at_chance == expected and dataclasses.replace(summary, chance=0.3).warning() == text


def test_a_task_without_answers_has_no_accuracy(llama: cf.Model) -> None:
    summary = cf.summarise(llama, dataclasses.replace(TASK, answers=None, wrong_answers=None, metric="kl"))
    assert math.isnan(summary.accuracy) and summary.failing == () and summary.warning() is None
    assert summary.clean == pytest.approx(0, abs=1e-6) and summary.lowered == 1


# -------------------------------------------------------------------- random circuits
GRAPHS = {
    "plain": Graph(2, 3, 3, 12),
    "grouped": Graph(2, 4, 2, 16),
    "one key/value head": Graph(3, 4, 1, 16),
    "parallel": Graph(3, 2, 2, 8, parallel=True),
    "smallest": Graph(1, 1, 1, 4),
}


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS.keys())
def test_random_circuits_are_connected_and_of_the_size(graph: Graph) -> None:
    for size in sorted({1, 2, 3, 4, 5, 8, 20, graph.n_edges // 2, graph.n_edges - 1, graph.n_edges}):
        for seed in range(12):
            circuit = random_circuit(graph, size, np.random.default_rng(seed))
            assert len(circuit) == min(size, graph.n_edges), (size, seed)
            np.testing.assert_array_equal(connected(graph, circuit.mask), circuit.mask)
    assert len(random_circuit(graph, 0, np.random.default_rng(0))) == 0
    assert random_circuit(graph, 10**6, np.random.default_rng(0)) == cf.Circuit.full(graph)


def test_random_circuits_of_a_large_graph() -> None:
    """From a few edges to a mask so full that random cells are never free."""
    graph = Graph(8, 16, 4, 64)
    for size in (1, 50, 2000, graph.n_edges - 300, graph.n_edges - 1):
        circuit = random_circuit(graph, size, np.random.default_rng(size))
        assert len(circuit) == size
        np.testing.assert_array_equal(connected(graph, circuit.mask), circuit.mask)


def test_random_circuits_are_seeded_and_reach_every_edge() -> None:
    graph = GRAPHS["grouped"]
    first, again, other = (random_circuit(graph, 12, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again != other
    rng = np.random.default_rng(0)
    seen = np.sum([random_circuit(graph, 12, rng).mask for _ in range(300)], axis=0)
    assert (seen[graph.real] > 0).all() and seen.sum() == 300 * 12


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS.keys())
def test_random_paths_lead_back_through_every_writer(graph: Graph) -> None:
    """A path into the last MLP may come from any writer that it reads, not from `input` alone."""
    rng, last = np.random.default_rng(0), graph.mlp(graph.n_layers - 1)
    reader = int(np.flatnonzero(graph.serves[:, last])[0])
    read = set(range(graph.limits[reader]))
    growing = _Growth(graph, rng)
    assert {growing._backwards(last)[0][0] for _ in range(20 * len(read))} == read
    paths = [random_path(graph, np.array([last, graph.n_readers - 1]), rng) for _ in range(20 * len(read))]
    assert {writer for path in paths for writer in np.flatnonzero(path[:, reader])} == read


# -------------------------------------------------------------------- statistics
def test_the_interval_of_a_mean_is_student_s() -> None:
    """The t quantiles are those of a printed table, at 95% and 90%."""
    for size, at_95, at_90 in ((2, 12.706, 6.314), (4, 3.182, 2.353), (10, 2.262, 1.833), (31, 2.042, 1.697)):
        values = np.random.default_rng(size).normal(5, 2, (2, 3, size))
        for level, quantile in ((0.95, at_95), (0.9, at_90)):
            found, error = mean_intervals(values, level=level), values.std(-1, ddof=1) / size**0.5
            np.testing.assert_allclose((found[..., 1] - values.mean(-1)) / error, quantile, atol=6e-4)
            np.testing.assert_allclose(found.mean(-1), values.mean(-1))
        assert standard_error(values[0, 0]) == pytest.approx(values[0, 0].std(ddof=1) / size**0.5)
    assert np.isnan(mean_intervals(values[..., :1])).all() and standard_error(values[0, 0, :1]) == 0


def test_the_interval_of_a_ratio_leaves_out_each_example() -> None:
    top, bottom = np.random.default_rng(1).normal(2, 1, (2, 9))
    without = [[np.delete(top, at).sum() / np.delete(bottom, at).sum()] for at in range(9)]
    assert [ratio_interval(top, bottom)] == pytest.approx(by_hand([top.sum() / bottom.sum()], np.array(without)))
    assert all(map(math.isnan, ratio_interval(top[:1], bottom[:1])))
    assert all(
        map(math.isnan, ratio_interval(np.array([0.0, 1.0]), np.array([0.0, 1.0])))
    )  # nothing is left to divide by


def test_copies_are_one_example() -> None:
    values = np.random.default_rng(2).normal(0, 1, (3, 8))
    many, numbers = np.tile(values, 16), np.tile(np.arange(8), 16)
    np.testing.assert_allclose(mean_intervals(many, numbers), mean_intervals(values))
    assert standard_error(many[0], numbers) == pytest.approx(standard_error(values[0]))
    assert ratio_interval(many[0], many[1] + 9, numbers) == pytest.approx(ratio_interval(values[0], values[1] + 9))
    # of unequal numbers of copies: all of one are left out
    some = np.array([0, 1, 1, 2, 1])
    expected = [values[0, :5][some != number].mean() for number in range(3)]
    np.testing.assert_allclose(left_out(values[0, :5], some), expected)
    assert np.isnan(mean_intervals(values, np.zeros(8))).all()


@pytest.mark.parametrize("size", [4, 8, 30])
def test_intervals_of_few_pairs_cover_the_truth_as_often_as_they_say(size: int) -> None:
    rng = np.random.default_rng(0)
    bottom = rng.normal(4, 1.5, (2000, size))
    top = 0.8 * bottom + rng.normal(0, 1, (2000, size))
    inside = [low < 0.8 < high for low, high in map(ratio_interval, top, bottom)]
    assert 0.93 < np.mean(inside) < 0.98
    means = mean_intervals(rng.normal(1, 1, (2000, size)))
    assert 0.93 < ((means[:, 0] < 1) & (means[:, 1] > 1)).mean() < 0.97


def test_the_standard_error_of_a_mean() -> None:
    """Squared deviations from 3 are 4, 1 and 9: their sum over n - 1, over n."""
    assert standard_error(np.array([1.0, 2, 6])) == pytest.approx(math.sqrt(14 / 2 / 3))
    assert standard_error(np.array([5.0])) == 0


def test_correlations() -> None:
    x, y = np.random.default_rng(3).normal(0, 1, (2, 40))
    assert correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert correlation(x, 3 * x + 1) == pytest.approx(1) and correlation(x, -x) == pytest.approx(-1)
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1)
    tied = np.array([2.0, 1.0, 2.0, 3.0, 2.0])
    ranks = [np.mean([1 + place for place, v in enumerate(sorted(tied)) if v == value]) for value in tied]
    assert ranks == [3, 1, 3, 5, 3]
    assert rank_correlation(tied, np.arange(5.0)) == pytest.approx(np.corrcoef(ranks, range(5))[0, 1])
    for constant in (correlation, rank_correlation):
        assert math.isnan(constant(np.ones(4), np.arange(4.0))) and math.isnan(constant(x[:1], y[:1]))
