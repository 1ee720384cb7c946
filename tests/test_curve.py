"""Curves over sizes and their areas against literal runs, a literal jackknife and MIB's own two figures."""

from __future__ import annotations

import csv
import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import by_hand, run_circuit
from toys import FOUR, Twin, contrast, some_circuits, wrapped

import circuitfind as cf
from circuitfind.circuit import connected
from circuitfind.errors import FileError, ScoreError, TaskError
from circuitfind.evaluation.agreement import PERCENTAGES, area_under
from circuitfind.evaluation.curve import Mib, area_from_one, curve_of
from circuitfind.evaluation.faithfulness import Evaluator


@pytest.fixture(scope="module")
def llama() -> cf.Model:
    return wrapped("llama")


@pytest.fixture(scope="module")
def evaluator(llama: cf.Model) -> Evaluator:
    return Evaluator.of(llama, contrast(2), seed=3)


@pytest.fixture(scope="module")
def scores(llama: cf.Model) -> cf.Scores:
    found = cf.attribute(llama, contrast(2), "eap-ig-inputs")
    assert isinstance(found, cf.Scores)
    return found


# -------------------------------------------------------------------- areas
def test_areas_of_the_two_curves_that_mib_prints() -> None:
    perfect, at_the_end = np.ones(10), np.eye(10)[-1]
    assert area_under(PERCENTAGES, perfect) == pytest.approx(0.999, abs=1e-12)
    assert area_from_one(PERCENTAGES, perfect) == 0
    assert area_under(PERCENTAGES, at_the_end) == pytest.approx(0.25, abs=1e-12)
    assert area_from_one(PERCENTAGES, at_the_end) == pytest.approx(0.749, abs=1e-12)


def test_areas_are_sums_of_trapezoids() -> None:
    rng = np.random.default_rng(0)
    p, f = np.sort(rng.random(7)), rng.normal(1, 1, (3, 7))
    for row, under, from_one in zip(f, area_under(p, f), area_from_one(p, f), strict=True):
        areas = [0.0, 0.0]
        for i in range(6):
            areas[0] += (p[i + 1] - p[i]) * (row[i] + row[i + 1]) / 2
            areas[1] += (p[i + 1] - p[i]) * (abs(1 - row[i]) + abs(1 - row[i + 1])) / 2
        assert (under, from_one) == pytest.approx(areas, rel=1e-12)


# -------------------------------------------------------------------- points
@pytest.mark.parametrize("name", FOUR)
def test_points_equal_the_literal_runs(name: str) -> None:
    model, task = wrapped(name), contrast(2, name=name)
    bound = task.on(model)
    scores = cf.attribute(model, bound, "eap")
    sizes = [model.graph.n_edges, 12, 40, 12, 0]
    found = cf.curve(model, bound, scores, sizes=sizes, prune=False)
    assert [point.asked for point in found.points] == [0, 12, 40, model.graph.n_edges]
    twin = Twin(model, bound)
    rows, answers = torch.arange(len(bound)), bound.batch.answers[:, 0, 0]
    values, ranked = {}, sorted(scores.to_dict().items(), key=lambda item: -abs(item[1]))
    for point in found.points:
        kept = {tuple(edge.split("->")) for edge, _ in ranked[: point.asked]}
        logits = run_circuit(twin.literal, twin.batch.clean, kept, twin.carried)
        values[point.asked] = twin.metric(logits).double().numpy()
        p, q = (each[:, 0].double().log_softmax(-1) for each in (twin.clean.logits, logits))
        kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        right = logits[rows, 0, answers] > logits[rows, 0, bound.batch.wrong[:, 0, 0]]
        assert point.n_edges == len(kept) and point.fraction == point.asked / model.graph.n_edges
        assert point.metric == pytest.approx(values[point.asked].mean(), rel=1e-4, abs=1e-4)
        assert point.kl == pytest.approx(float(kl.mean()), rel=1e-4, abs=1e-6)
        assert point.accuracy == pytest.approx(float(right.double().mean()))
        assert point.top1 == pytest.approx(float((logits[:, 0].argmax(-1) == answers).double().mean()))
    empty, full = values[0].mean(), values[model.graph.n_edges].mean()
    for point in found.points:
        f = (values[point.asked].mean() - empty) / (full - empty)
        assert point.faithfulness == pytest.approx(f, abs=1e-4)
    assert found.points[1].kl > 1e-4 and 0 != found.points[1].faithfulness != 1


def test_mib_cuts_at_ten_fractions_and_prunes(evaluator: Evaluator, scores: cf.Scores) -> None:
    found = curve_of(evaluator, scores)
    n = evaluator.graph.n_edges
    assert [point.fraction for point in found.points] == list(PERCENTAGES)
    assert [point.asked for point in found.points] == [int(p * n) for p in PERCENTAGES]
    for point, circuit in zip(found.points, found.circuits, strict=True):
        assert circuit == scores.top(point.asked)
        assert point.n_edges == len(circuit) == connected(evaluator.graph, circuit.mask).sum()
        alone = evaluator.evaluate(circuit)
        assert point.faithfulness == pytest.approx(alone.faithfulness, abs=1e-5)
        assert point.interval == pytest.approx(alone.interval, abs=1e-5)
        assert (point.kl, point.accuracy) == pytest.approx((alone.kl, alone.accuracy), rel=1e-4, abs=1e-6)
    assert found.points[-1].faithfulness == 1 and found.points[-1].kl == 0


def test_pruning_may_leave_nothing(evaluator: Evaluator, llama: cf.Model) -> None:
    values = np.zeros(llama.graph.real.shape, dtype=np.float32)
    for edge in ("m0->a1.h0<q>", "m0->m1"):  # no path from input
        values[llama.graph.edge(edge)] = 1
    scores = cf.Scores(llama.graph, values)
    (pruned,) = curve_of(evaluator, scores, sizes=[2]).points
    (kept,) = curve_of(evaluator, scores, sizes=[2], prune=False).points
    assert (pruned.asked, pruned.n_edges, pruned.faithfulness) == (2, 0, 0)
    assert (kept.asked, kept.n_edges) == (2, 2)


def test_signed_selection_gives_cpr_and_magnitude_cmd(evaluator: Evaluator, scores: cf.Scores) -> None:
    both = Mib(*(curve_of(evaluator, scores, by=how) for how in ("signed", "absolute")))
    for how, one in (("signed", both.signed), ("absolute", both.absolute)):
        f = [evaluator.evaluate(scores.top(int(p * len(scores)), by=how)).faithfulness for p in PERCENTAGES]
        assert one.cpr == pytest.approx(area_under(PERCENTAGES, f), abs=1e-5)
        assert one.cmd == pytest.approx(area_from_one(PERCENTAGES, f), abs=1e-5)
        assert one.record.settings["by"] == how
    assert (both.cpr, both.cmd) == (both.signed.cpr, both.absolute.cmd)
    assert abs(both.signed.cpr - both.absolute.cpr) > 0.01 < abs(both.signed.cmd - both.absolute.cmd)


def test_given_circuits_are_taken_as_they_are(evaluator: Evaluator) -> None:
    circuits = some_circuits(evaluator.graph, 4)
    found = curve_of(evaluator, [circuits[2], circuits[0], circuits[3], circuits[1]])
    assert list(found.circuits) == circuits  # smallest first
    for point, circuit in zip(found.points, circuits, strict=True):
        assert point.n_edges == point.asked == len(circuit)
        assert point.faithfulness == pytest.approx(evaluator.evaluate(circuit).faithfulness, abs=1e-5)
    fractions = [len(circuit) / evaluator.graph.n_edges for circuit in circuits]
    assert found.cpr == pytest.approx(area_under(fractions, [point.faithfulness for point in found.points]))


def test_each_distinct_circuit_is_run_once(
    evaluator: Evaluator, scores: cf.Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    original = Evaluator.run

    def counted(self: Evaluator, masks: np.ndarray) -> object:
        ran.extend(masks.sum(axis=(1, 2)).tolist())
        return original(self, masks)

    monkeypatch.setattr(Evaluator, "run", counted)
    circuit, larger = scores.top(30), scores.top(60)
    ends = [cf.Circuit.full(evaluator.graph), cf.Circuit.empty(evaluator.graph)]
    curve_of(evaluator, [larger, circuit, *ends, circuit, scores.top(30)])
    assert ran == [len(circuit), len(larger)]


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_ends_of_the_scale_under_other_ablations(llama: cf.Model, scores: cf.Scores, ablation: str) -> None:
    with pytest.warns(
        UserWarning, match=f"the scores were made with ablation='corrupted' and judged with ablation='{ablation}'"
    ):
        found = cf.curve(llama, contrast(2), scores, sizes=[0, 50, len(scores)], ablation=ablation)
    with pytest.warns(
        UserWarning, match=f"the circuit was made with ablation='corrupted' and judged with ablation='{ablation}'"
    ):
        alone = cf.evaluate(llama, contrast(2), scores.top(50), ablation=ablation)
    assert [point.faithfulness for point in found.points] == pytest.approx([0, alone.faithfulness, 1], abs=1e-5)
    assert found.record.ablation == ablation


def test_without_answers_there_is_no_accuracy(llama: cf.Model, scores: cf.Scores) -> None:
    task = dataclasses.replace(contrast(2), answers=None, wrong_answers=None, metric="kl")
    with pytest.raises(TaskError, match=r"the scores were made with metric='logit_diff': .* needs answers"):
        cf.curve(llama, task, scores, sizes=[40])
    with pytest.warns(UserWarning, match="judged with metric='kl'"):
        (point,) = cf.curve(llama, task, scores, sizes=[40], metric="kl").points
        alone = cf.evaluate(llama, task, scores.top(40), metric="kl")
    for one in (point, alone):
        assert np.isnan([one.accuracy, one.top1]).all() and one.kl == pytest.approx(-one.metric) and one.kl > 1e-4
    assert np.isnan([alone.accuracy_full, alone.top1_full]).all()


# -------------------------------------------------------------------- intervals
def test_intervals_leave_out_the_same_example_everywhere(evaluator: Evaluator, scores: cf.Scores) -> None:
    found = curve_of(evaluator, scores, percentages=(0.05, 0.2, 0.5, 1))
    n = len(evaluator.full)
    f, areas = [], []
    for rows in (np.delete(np.arange(n), example) for example in range(n)):
        means = [values[rows].mean() for values in found.per_example.metric]
        full, empty = evaluator.full[rows].mean(), evaluator.empty[rows].mean()
        f.append([(mean - empty) / (full - empty) for mean in means])
        areas.append((area_under((0.05, 0.2, 0.5, 1), f[-1]), area_from_one((0.05, 0.2, 0.5, 1), f[-1])))
    ends = by_hand([point.faithfulness for point in found.points], f)
    np.testing.assert_allclose([point.interval for point in found.points], ends, atol=1e-9)
    ends = by_hand([found.cpr, found.cmd], areas)
    np.testing.assert_allclose([found.cpr_interval, found.cmd_interval], np.maximum(ends, [[-np.inf], [0]]), atol=1e-9)
    assert found.cpr_interval.low < found.cpr < found.cpr_interval.high


def test_one_example_has_no_intervals(llama: cf.Model, scores: cf.Scores) -> None:
    found = cf.curve(llama, contrast(2).on(llama).subset([0]), scores, sizes=[30, 60])
    assert np.isnan([*found.cpr_interval, *found.cmd_interval, *found.points[0].interval]).all()
    assert np.isfinite([found.cpr, found.cmd]).all()


# -------------------------------------------------------------------- files and refusals
def test_a_curve_is_saved(evaluator: Evaluator, scores: cf.Scores, tmp_path: Path) -> None:
    found = curve_of(evaluator, scores, sizes=[10, 60])
    with found.save(tmp_path / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["asked"]) for row in rows] == [10, 60]
    for row, point in zip(rows, found.points, strict=True):
        assert (float(row["low"]), float(row["high"])) == point.interval and float(row["kl"]) == point.kl
        assert float(row["faithfulness"]) == point.faithfulness and int(row["n_edges"]) == point.n_edges
    content = json.loads(found.save(tmp_path / "curve.json").read_text())
    assert content["cpr"] == found.cpr and content["points"][1]["metric"] == found.points[1].metric
    assert content["per_example"]["kl"] == found.per_example.kl.tolist()
    with pytest.raises(FileError, match=r"saved as \.json .* not as '\.txt'"):
        found.save(tmp_path / "curve.txt")


def test_what_makes_no_curve_is_named(evaluator: Evaluator, scores: cf.Scores, llama: cf.Model) -> None:
    nodes = cf.attribute(llama, contrast(2), level="node")
    for given, options, named in (
        (scores, {"sizes": [10, -1]}, "size -1 is not a number of edges"),
        (scores, {"sizes": [10, "all"]}, "size 'all' is not a number of edges"),
        (scores, {"percentages": [0.1, "all"]}, "between 0 and 1, not 'all'"),
        (scores, {"sizes": [len(scores) + 1]}, f"size {len(scores) + 1} is not a number"),
        (scores, {"sizes": []}, "at least one size"),
        (scores, {"percentages": (0.1, 20)}, "between 0 and 1, not 20"),
        (scores, {"percentages": 0.5}, r"percentages=0.5 is not a list: give a list, such as percentages=\[0.5\]"),
        (scores, {"sizes": 5}, "sizes=5 is not a list"),
        (scores, {"by": "size"}, "by='size' is unknown"),
        ([], {}, "the list is empty"),
        (scores.top(5), {}, "not from a Circuit"),
        ([scores.top(5)], {"sizes": [3]}, "applies to scores, not to circuits"),
        (nodes, {}, "not from a NodeScores"),
        (cf.Scores(wrapped("gpt2").graph, np.zeros(wrapped("gpt2").graph.real.shape)), {}, "another graph"),
        ([cf.Circuit.full(wrapped("gpt2").graph)], {}, "another model"),
    ):
        with pytest.raises((ScoreError, FileError), match=named):
            curve_of(evaluator, given, **options)  # type: ignore[arg-type]
    with pytest.raises(ScoreError, match="faithfulness is undefined"):
        cf.curve(llama, contrast(2), scores, metric=lambda logits, batch: logits.sum(-1) * 0)


def test_a_ranking_whose_circuits_do_nothing_is_told_with_its_reason_and_remedy() -> None:
    """As SmolLM2's IOI by signed EAP: everything passes through edges that get strongly negative effects."""
    model = cf.load("tiny")
    task = cf.task("ioi", model, n=8)
    scores = cf.attribute(model, task, "eap")
    values = np.abs(scores.values)
    values[0] *= -10  # out of `input`
    wrong = cf.Scores(model.graph, values, scores.record)
    sizes = [int(part * model.graph.n_edges) for part in (0.01, 0.03, 0.09)]
    with pytest.warns(UserWarning, match=r"by signed effect \('eap'\) do nothing: .*have negative effects"):
        cf.curve(model, task, wrong, sizes=sizes, by="signed")
    with pytest.warns(UserWarning, match=r"do nothing: .*Use method='eap-ig-inputs' or method='relp' or by='absolute'"):
        cf.find(model, task, scores=wrong, search="signed", max_checks=2, random=1, prune=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cf.curve(model, task, scores, sizes=sizes)
