"""The search: on the embedded model from end to end, and on scripted curves for what real ones seldom show."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import either

import circuitfind as cf
from circuitfind.attribution.methods import METHODS
from circuitfind.cli.app import main
from circuitfind.errors import CircuitfindWarning, ScoreError, TaskError
from circuitfind.evaluation.completeness import Part, second_way
from circuitfind.evaluation.faithfulness import Evaluator, Outcome
from circuitfind.graph import Graph
from circuitfind.remote.server import Pickler
from circuitfind.report.write import report_data
from circuitfind.search import find as search, pruning
from circuitfind.search.acdc import GRID
from circuitfind.search.find import GROWTH
from circuitfind.search.methods import SEARCHES
from circuitfind.search.pruning import pruned
from circuitfind.search.ranked import SizeSearch
from circuitfind.search.trials import Deadline, Trials

QUICK = {"max_checks": 5, "random": 2}
RANKED = {"search": "absolute", **QUICK}


@pytest.fixture(scope="module")
def tiny() -> cf.Model:
    return cf.load("tiny", check=False, backend="hooks")


@pytest.fixture(scope="module")
def ioi(tiny: cf.Model) -> cf.Task:
    return cf.task("ioi", tiny, n=16)


@pytest.fixture(scope="module")
def found(tiny: cf.Model, ioi: cf.Task) -> cf.FindResult:
    return cf.find(tiny, ioi, max_checks=200, random=5)


# -------------------------------------------------------------------- on the embedded model
def test_the_circuit_is_on_target(tiny: cf.Model, ioi: cf.Task, found: cf.FindResult) -> None:
    circuit, facts = found.circuit, found.circuit.facts
    seen, held_out = ioi.on(tiny).split(0.5, seed=0)
    assert 0 < len(circuit) < 150 and circuit == circuit.connected()
    on_search_pairs = cf.evaluate(tiny, seen, circuit).faithfulness
    assert abs(1 - on_search_pairs) <= 0.15
    assert facts["faithfulness_on_search_pairs"] == pytest.approx(on_search_pairs, abs=1e-6)
    on_held_out_pairs = cf.evaluate(tiny, held_out, circuit)
    assert facts["faithfulness"] == found.checks.faithfulness == pytest.approx(on_held_out_pairs.faithfulness, abs=1e-6)
    assert facts["interval"] == list(found.checks.interval) == pytest.approx(list(on_held_out_pairs.interval), abs=1e-6)
    assert (facts["n_edges"], facts["search_pairs"], facts["unseen_pairs"]) == (len(circuit), 8, 8)
    assert found.checks.beaten == facts["random_circuits_beaten"] == 5


def test_the_search_and_its_judgement_share_no_pair(tiny: cf.Model, ioi: cf.Task, found: cf.FindResult) -> None:
    bound = ioi.on(tiny)
    seen, held_out = bound.split(0.5, seed=0)
    assert found.held_out.prompts == held_out.prompts and not set(seen.prompts) & set(held_out.prompts)
    assert found.summary.n == found.scores.record.n_examples == 8
    assert found.scores.record.seen(found.checks.record) == 0 and found.checks.record.n_examples == 8
    expected = cf.attribute(tiny, seen)
    np.testing.assert_array_equal(found.scores.values, expected.values)
    held = cf.find(tiny, ioi, holdout=0.25, prune=False, **QUICK)
    assert (held.circuit.facts["search_pairs"], held.circuit.facts["unseen_pairs"]) == (12, 4)


@pytest.fixture(scope="module")
def ranked(tiny: cf.Model, ioi: cf.Task, found: cf.FindResult) -> cf.FindResult:
    return cf.find(tiny, ioi, scores=found.scores, prune=True, **RANKED)


def test_every_round_reproduces(tiny: cf.Model, ioi: cf.Task, found: cf.FindResult) -> None:
    seen, held_out = ioi.on(tiny).split(0.5, seed=0)
    assert {point.stage for point in found.curve} <= {"start", "re-scored", "pruning"}
    sizes = [point.n_edges for point in found.curve if point.stage == "re-scored"]
    assert sizes[0] > 700 and min(sizes) <= 20, "from half of the graph down to a few edges"
    point = next(point for point in found.frontier if point.n_edges == len(found.circuit))
    value = cf.evaluate(tiny, held_out, found.circuit)
    assert point.held_out_faithfulness == pytest.approx(value.faithfulness, abs=1e-6)
    assert point.held_out_pair_error == pytest.approx(value.pair_error, abs=1e-6)
    assert point.held_out_kl == pytest.approx(value.kl, abs=1e-6) and point.held_out_accuracy == value.accuracy
    here = cf.evaluate(tiny, seen, found.circuit)
    assert (point.faithfulness, point.pair_error) == pytest.approx((here.faithfulness, here.pair_error), abs=1e-6)
    assert point.opposing == (found.scores.values[found.circuit.mask] < 0).sum()
    assert found.circuit.facts["pair_error"] == pytest.approx(value.pair_error, abs=1e-6)


def test_the_frontier_is_one(found: cf.FindResult) -> None:
    """Smaller circuits are further from the whole model; the one that was taken need not be on it."""
    others = [point for point in found.frontier if point.n_edges != len(found.circuit)]
    sizes = [point.n_edges for point in others]
    assert sizes == sorted(set(sizes)), "one of each size"
    for at, point in enumerate(others[1:], start=1):
        smaller = others[:at]
        assert any(
            getattr(point, name) < min(getattr(one, name) for one in smaller) for name in ("distance", "pair_error")
        )
    assert len(others) >= len(found.frontier) - 2 > 8


def test_every_point_of_a_ranking_reproduces(tiny: cf.Model, ioi: cf.Task, ranked: cf.FindResult) -> None:
    seen, _ = ioi.on(tiny).split(0.5, seed=0)
    sizes = [point for point in ranked.curve if point.stage != "pruning"]
    assert [point.asked for point in sizes[:4]] == [1, 2, 4, 8]
    assert {point.stage for point in ranked.curve} == {"grid", "bisection", "pruning"}
    for point in sizes:
        circuit = ranked.scores.top(point.asked)
        assert point.n_edges == len(circuit)
        assert point.faithfulness == pytest.approx(cf.evaluate(tiny, seen, circuit).faithfulness, abs=1e-6)
    assert len(ranked.circuit) < min(point.n_edges for point in sizes if abs(1 - point.faithfulness) <= 0.1)


def test_pruning_never_leaves_its_limit(tiny: cf.Model, ioi: cf.Task, ranked: cf.FindResult) -> None:
    plain = cf.find(tiny, ioi, scores=ranked.scores, prune=False, **RANKED)
    before, after = (one.circuit.facts["distance_on_search_pairs"] for one in (plain, ranked))
    assert set(ranked.circuit.edges) < set(plain.circuit.edges)
    assert before <= 0.15 and after <= min(before + GROWTH, 0.15)


@pytest.mark.parametrize("edges", [25, 60, 400])
def test_the_best_circuit_of_a_size(tiny: cf.Model, ioi: cf.Task, found: cf.FindResult, edges: int) -> None:
    result = cf.find(tiny, ioi, scores=found.scores, edges=edges, knockouts=0, **QUICK)
    assert 0.6 * edges <= len(result.circuit) <= edges, "a round ends at the size that was asked for"
    assert any(point.n_edges in (edges, edges - 1) for point in result.curve)
    smaller = [point.distance for point in result.frontier if point.n_edges <= edges]
    assert result.circuit.facts["distance_on_search_pairs"] == min(smaller)
    top = cf.find(tiny, ioi, scores=found.scores, edges=edges, knockouts=0, **RANKED)
    assert top.circuit == found.scores.top(edges)
    both = [one.circuit.facts["pair_error"] for one in (result, top)]
    assert both[0] < both[1], "nearer to the whole model on the held-out pairs than the strongest edges by score"


@pytest.mark.parametrize("edges", [1, 8])
def test_a_size_at_which_hardly_anything_is_left(tiny: cf.Model, found: cf.FindResult, edges: int) -> None:
    """The rounds go on to it; where nothing is as small, the smallest is said to be too large."""
    task, asked = cf.task("ioi", tiny, n=16), {"scores": found.scores, "knockouts": 0, **QUICK}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        result = cf.find(tiny, task, edges=edges, **asked)
    said = [str(one.message) for one in heard if "no circuit of at most" in str(one.message)]
    assert 0 < len(result.circuit) < 10 and bool(said) == (len(result.circuit) > edges) == (edges == 1)
    with pytest.warns(CircuitfindWarning, match="the strongest 8 edges hold no path from input to logits"):
        assert not cf.find(tiny, task, edges=8, search="absolute", **asked).circuit.edges


def test_scores_that_are_no_effects_name_no_opposing_edges(tiny: cf.Model, ioi: cf.Task, tmp_path: Path) -> None:
    result = cf.find(tiny, ioi, method="weights", edges=200, knockouts=0, **QUICK)
    assert {point.opposing for point in result.frontier} == {None}
    assert "opposing" not in {step.stage for step in result.steps}
    result.save(tmp_path / "found")
    assert cf.FindResult.open(tmp_path / "found").frontier == result.frontier


def test_criteria(tiny: cf.Model, ioi: cf.Task, found: cf.FindResult) -> None:
    """What is on target by a criterion is so on either half of the search pairs."""
    seen, _ = ioi.on(tiny).split(0.5, seed=0)
    halves = [np.sort(part) for part in np.array_split(np.random.default_rng(0).permutation(8), 2)]
    for criterion in ("pairs", "kl", "at-least"):
        result = cf.find(tiny, ioi, scores=found.scores, criterion=criterion, tolerance=0.1, knockouts=0, **QUICK)
        each = cf.evaluate(tiny, seen, result.circuit).per_example
        empty = cf.evaluate(tiny, seen, []).per_example
        far = {
            "pairs": np.abs(each.circuit - each.full) / np.abs(each.full - each.empty).mean(),
            "kl": each.kl / empty.kl.mean(),
            "at-least": (each.full - each.circuit) / (each.full - each.empty).mean(),
        }[criterion]
        worst = max(far[half].mean() for half in halves)
        assert report_data(result.circuit).tolerance is None, "no band of faithfulness is the target"
        assert result.circuit.facts["distance_on_search_pairs"] == pytest.approx(max(worst, 0), abs=1e-5)
        assert worst <= 0.1 and result.on_target == (result.circuit.facts["distance"] <= 0.1)
    with pytest.raises(ScoreError, match="criterion 'mena' is unknown: did you mean 'mean'"):
        cf.find(tiny, ioi, criterion="mena")  # type: ignore[arg-type]


def test_a_search_that_is_stopped_keeps_its_best_circuit(
    tiny: cf.Model, ioi: cf.Task, found: cf.FindResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, count = Evaluator.run, []

    def stopped(self: Evaluator, masks: np.ndarray) -> Any:
        count.append(1)
        if len(count) == 9:
            raise KeyboardInterrupt
        return run(self, masks)

    monkeypatch.setattr(Evaluator, "run", stopped)
    with pytest.warns(CircuitfindWarning, match="stopped: the search ends after 8 circuits"):
        result = cf.find(tiny, ioi, scores=found.scores, knockouts=0, **QUICK)
    assert len(found.circuit) < len(result.circuit) < 800 and result.circuit.facts["stopped"]
    assert result.circuit.facts["distance_on_search_pairs"] <= 0.15
    monkeypatch.undo()
    monkeypatch.setattr(Deadline, "left", lambda self, part=1.0: 1.0 if part == 1 else 10.0 - len(count))
    count.clear()
    monkeypatch.setattr(Evaluator, "run", lambda self, masks: count.append(1) or run(self, masks))
    with pytest.warns(CircuitfindWarning, match="the time limit has passed: the search ends after 10 circuits"):
        result = cf.find(tiny, ioi, scores=found.scores, time_limit=60, **QUICK)
    assert 0 < len(result.circuit) < 800
    monkeypatch.undo()
    with pytest.warns(CircuitfindWarning, match="the time limit has passed: the search ends after 0 circuits"):
        none = cf.find(tiny, ioi, scores=found.scores, time_limit=1e-6, **QUICK)
    assert len(none.circuit) == tiny.graph.n_edges and math.isnan(none.frontier[0].held_out_distance)
    assert not none.checks.edges and not none.checks.random, "the time before the search counts, too"
    with pytest.raises(ScoreError, match="time_limit=0: give a number of seconds"):
        cf.find(tiny, ioi, time_limit=0)


def test_former_keywords_name_the_new_ones(tiny: cf.Model, ioi: cf.Task) -> None:
    for name in ("top", "by", "one_sided", "prune_tolerance"):
        with pytest.raises(TypeError, match=f"find has no '{name}' any more: use "):
            cf.find(tiny, ioi, **{name: 1})  # type: ignore[arg-type]


def test_a_circuit_that_leaves_out_a_second_way() -> None:
    """One head of an OR is a circuit of faithfulness 1, and the model does not miss it."""
    model, task = either()
    with pytest.warns(
        CircuitfindWarning, match="second way to do (the task|part of the task), which the circuit leaves out"
    ):
        result = cf.find(model, task, random=1)
    head = result.circuit.nodes[1]
    assert len(result.circuit) == 3 and result.checks.faithfulness == pytest.approx(1) and head.startswith("a0.h")
    known = result.circuit.facts["knocked_out"]
    assert known == {"removed": [head], "circuit": 0, "model": pytest.approx(1), "second_way": True}
    last = result.steps[-1]
    assert last.stage == "knock-outs" and f"without {head}, the model keeps 100% of the total effect" in last.text
    with warnings.catch_warnings():
        warnings.simplefilter("error", CircuitfindWarning)
        left_out = cf.find(model, task, random=1, knockouts=0)
    assert "knocked_out" not in left_out.circuit.facts and left_out.steps[-1].stage == "opposing"
    with pytest.raises(ScoreError, match="knockouts=-1"):
        cf.find(model, task, knockouts=-1)


def test_a_second_way_of_which_the_circuit_holds_a_part() -> None:
    """Two heads of an OR of three: neither is missed alone, not even by the circuit. All three leave nothing out."""
    model, task = either(((0, 0), (1, 0), (2, 1)))

    def ways(*heads: str, count: int = 5) -> Part | None:
        names = [name for head in heads for name in (f"input->{head}<v>", f"{head}->m2")]
        circuit = cf.Circuit(model.graph, model.graph.mask([*names, "m2->logits"]))
        return second_way(Evaluator.of(model, task), circuit, np.zeros(model.graph.real.shape), count)

    two, three = ways("a0.h0", "a1.h0"), ways("a0.h0", "a1.h0", "a2.h1")
    assert two is not None and two.second_way and two.removed == ("a0.h0", "a1.h0")
    assert (two.circuit, two.model) == (pytest.approx(0), pytest.approx(1))
    assert "without a0.h0, a1.h0, the model keeps 100%" in two.reading and "second way" in two.reading
    assert three is not None and not three.second_way


def test_knocking_out_parts_costs_two_runs_each(
    tiny: cf.Model, ioi: cf.Task, found: cf.FindResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are a layer's heads, or an MLP: what a literal run of circuit and model without them keeps."""
    known, seen = found.circuit.facts["knocked_out"], ioi.on(tiny).split(0.5, seed=0)[0]
    assert not known["second_way"] and len({name.split(".")[0] for name in known["removed"]}) == 1
    graph, removed = tiny.graph, [tiny.graph.writer(name) for name in known["removed"]]
    for name, whole in (("circuit", found.circuit.mask), ("model", graph.real)):
        mask = whole.copy()
        mask[removed] = False
        kept = cf.evaluate(tiny, seen, cf.Circuit(graph, mask)).faithfulness
        assert known[name] == pytest.approx(kept, abs=1e-5)
    run, count = Evaluator.run, []
    monkeypatch.setattr(Evaluator, "run", lambda self, masks: count.append(len(masks)) or run(self, masks))
    second_way(Evaluator.of(tiny, seen), found.circuit, found.checks.exact, 3)
    assert sum(count) <= 2 * (3 + 3) + 1 + 1


def test_ranked_by_signed_effects(tiny: cf.Model, ioi: cf.Task, found: cf.FindResult) -> None:
    result = cf.find(tiny, ioi, search="signed", prune=False, scores=found.scores, **QUICK)
    assert found.scores.values[result.circuit.mask].min() > 0, "edges that oppose the behaviour come last"
    size = min(point.asked for point in result.curve if abs(1 - point.faithfulness) <= 0.12)
    assert len(result.circuit) <= len(found.scores.top(size, by="signed"))
    assert not any(step.stage == "pruning" for step in result.steps)
    assert result.circuit.record.settings["search"] == "signed"
    with pytest.raises(ScoreError, match="search 'sgined' is unknown: did you mean 'signed'"):
        cf.find(tiny, ioi, search="sgined", scores=found.scores, **QUICK)  # type: ignore[arg-type]


def test_where_nothing_balances_the_ranking_is_searched(tiny: cf.Model, ioi: cf.Task) -> None:
    """Under zero ablation half of the edges are too few, whichever they are."""
    result = cf.find(tiny, ioi, ablation="zero", method="eap", knockouts=0, prune=False, **QUICK)
    assert {point.stage for point in result.curve} >= {"re-scored", "grid", "bisection"}
    assert len(result.circuit) < tiny.graph.n_edges and result.circuit.facts["distance_on_search_pairs"] <= 0.15


def test_the_tolerance_is_kept(tiny: cf.Model, ioi: cf.Task, found: cf.FindResult) -> None:
    sizes = []
    for tolerance in (0.4, 0.15, 0.05):
        result = cf.find(tiny, ioi, tolerance=tolerance, scores=found.scores, prune=False, **RANKED)
        assert abs(1 - result.circuit.facts["faithfulness_on_search_pairs"]) <= tolerance
        sizes.append(len(result.circuit))
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def plain(result: cf.FindResult) -> str:
    return json.dumps(result.to_dict(), sort_keys=True)


def test_the_same_seed_gives_the_same_bits(tiny: cf.Model, ioi: cf.Task, found: cf.FindResult) -> None:
    again = cf.find(tiny, ioi, max_checks=200, random=5)
    np.testing.assert_array_equal(again.scores.values, found.scores.values)
    np.testing.assert_array_equal(again.circuit.mask, found.circuit.mask)
    np.testing.assert_array_equal(again.circuit.exact, found.circuit.exact)
    assert plain(again) == plain(found)
    other = cf.find(tiny, ioi, prune=False, seed=1, **QUICK)
    assert other.held_out.prompts != found.held_out.prompts
    assert not np.array_equal(other.scores.values, found.scores.values)


def test_saved_scores_resume_to_the_same_result(
    tiny: cf.Model, ioi: cf.Task, found: cf.FindResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = cf.Scores.open(found.scores.save(tmp_path / "scores.safetensors"))
    monkeypatch.setattr(search, "score", lambda *_, **__: pytest.fail("the scores were computed anew"))
    assert plain(cf.find(tiny, ioi, max_checks=200, random=5, scores=scores)) == plain(found)
    foreign = cf.Scores(Graph(1, 1, 1, 4), np.zeros((3, 5), dtype=np.float32))
    with pytest.raises(ScoreError, match="the scores belong to another graph"):
        cf.find(tiny, ioi, scores=foreign)


def test_the_result_is_plain_data_and_its_circuit_a_file(found: cf.FindResult, tmp_path: Path) -> None:
    content = json.loads(json.dumps(found.to_dict()))
    assert content["circuit"]["edges"] == found.circuit.edges
    assert len(content["curve"]) == len(found.curve) and content["task"]["name"] == "ioi"
    assert [step["text"] for step in content["steps"]] == [step.text for step in found.steps]
    back = cf.Circuit.open(found.circuit.save(tmp_path / "circuit.json"))  # no model takes part
    assert back == found.circuit and back.facts == json.loads(json.dumps(found.circuit.facts))
    assert back.record == found.circuit.record
    assert (back.record.task, back.record.method, back.record.settings["search"]) == (
        "ioi",
        "eap-ig-inputs",
        "balanced",
    )
    for edge in found.circuit.edges:
        place = found.circuit.graph.edge(edge)
        assert back.exact[place] == pytest.approx(found.circuit.exact[place], rel=1e-6)
        assert back.estimates[place] == pytest.approx(found.scores[edge], rel=1e-6)
    assert np.isfinite(found.circuit.exact[found.circuit.mask]).all(), "every edge of the circuit was patched"


def test_other_metrics_ablations_and_directions(tiny: cf.Model) -> None:
    task = cf.task("gendered-pronoun", tiny, n=16)
    kl = cf.find(tiny, task, metric="kl", **QUICK)
    assert kl.summary.metric == kl.checks.evaluation.record.metric == kl.circuit.record.metric == "kl"
    assert abs(1 - kl.circuit.facts["faithfulness_on_search_pairs"]) <= 0.15
    back = cf.find(tiny, task, method="eap", direction="denoising", prune=False, **QUICK)
    assert back.circuit.record.direction == "denoising"
    mean = cf.find(tiny, task, method="eap", ablation="mean", prune=False, tolerance=0.9, **QUICK)
    assert mean.checks.evaluation.record.ablation == mean.circuit.record.ablation == "mean"
    seen, held_out = task.on(tiny).split(0.5, seed=0)
    value = cf.evaluate(tiny, held_out, mean.circuit, ablation="mean").faithfulness
    assert mean.checks.faithfulness == pytest.approx(value, abs=1e-6)
    # the summary is of the task's own corrupted prompts, whatever is ablated
    assert mean.summary == cf.summarise(tiny, seen) and mean.summary.corrupted < 0


def test_verification_follows_the_search_not_the_scores(tiny: cf.Model, ioi: cf.Task, found: cf.FindResult) -> None:
    with pytest.warns(UserWarning, match="ablation='corrupted' and judged with ablation='mean'") as heard:
        result = cf.find(tiny, ioi, scores=found.scores, ablation="mean", tolerance=0.95, prune=False, **QUICK)
    assert sum("judged" in str(one.message) for one in heard) == 1, "said once"
    assert result.checks.evaluation.record.ablation == "mean"


@pytest.mark.parametrize("n", [2, 3])
def test_very_few_pairs(tiny: cf.Model, n: int, tmp_path: Path) -> None:
    result = cf.find(tiny, cf.task("gendered-pronoun", tiny, n=n), **QUICK)
    assert result.circuit.facts["search_pairs"] + result.circuit.facts["unseen_pairs"] == n
    back = cf.Circuit.open(result.circuit.save(tmp_path / "circuit.json"))
    assert back == result.circuit
    if n == 2:
        assert all(map(math.isnan, result.checks.interval)), "one pair has no interval"


def test_one_pair_is_searched_and_judged_on_itself(tiny: cf.Model, ioi: cf.Task, tmp_path: Path) -> None:
    with pytest.warns(CircuitfindWarning) as said:
        result = cf.find(tiny, ioi.on(tiny).subset([0]), **QUICK)
    assert [str(one.message).partition(",")[0] for one in said] == ["there is only one pair"]
    facts, report = result.circuit.facts, result.report(tmp_path / "report.html").read_text()
    assert (facts["search_pairs"], facts["unseen_pairs"], result.checks.evaluation.seen_pairs) == (1, 0, 1)
    assert facts["faithfulness"] == pytest.approx(facts["faithfulness_on_search_pairs"]) and result.on_target
    assert "One pair gives no interval" in report


def test_tasks_that_cannot_be_searched(tiny: cf.Model, ioi: cf.Task) -> None:
    for holdout in (0.0, 1.0):
        with pytest.raises(TaskError, match=r"holdout=.*give the fraction of the pairs to hold out, between 0 and 1"):
            cf.find(tiny, ioi, holdout=holdout)
    with pytest.raises(TaskError, match=r"holdout=0\.01: of 16 pairs that leaves none on one side"):
        cf.find(tiny, ioi, holdout=0.01)
    both_ways = dataclasses.replace(
        ioi,
        clean=[*ioi.clean, *ioi.corrupted],
        corrupted=[*ioi.corrupted, *ioi.clean],
        answers=[*ioi.answers, *ioi.answers],
        wrong_answers=[*ioi.wrong_answers, *ioi.wrong_answers],
        spans=None,
    )
    with warnings.catch_warnings(), pytest.raises(ScoreError, match="faithfulness is undefined"):
        warnings.simplefilter("ignore")  # the model does not do this task, and says so
        cf.find(tiny, both_ways)


# -------------------------------------------------------------------- on scripted curves
GRAPH = Graph(2, 4, 4, 32)  # 110 edges: the grid is 1, 2, 4, ..., 64, 110


class Script:
    """An evaluator of one pair, whose faithfulness is a function of the number of edges, or of the mask."""

    seed, full, graph = 0, np.ones(1), GRAPH
    ends = Outcome(*(np.array([[1.0], [0.0]]) for _ in Outcome._fields))

    def __init__(self, value: Callable[[Any], float], of_mask: bool = False) -> None:
        self.value, self.of_mask, self.runs = value, of_mask, 0

    def run(self, masks: np.ndarray) -> Outcome:
        self.runs += len(masks)
        metric = np.array([[self.value(mask if self.of_mask else int(mask.sum()))] for mask in masks])
        return Outcome(metric, metric, metric, metric)

    def faithfulness(self, metric: np.ndarray) -> np.ndarray:
        return metric.mean(-1)


class Unpruned(cf.Scores):
    """Scores whose top n edges are n edges: the scripts speak of sizes, connected or not."""

    def top(self, n: int, by: Any = "absolute", prune: bool = True) -> cf.Circuit:
        return super().top(n, by, prune=False)


@pytest.fixture()
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SizeSearch]:
    """A search on a script; edges rank in the graph's own order."""
    monkeypatch.setattr(pruning, "connected", lambda graph, mask: mask)
    values = np.zeros(GRAPH.real.shape, dtype=np.float32)
    values.T[GRAPH.real.T] = np.linspace(2, 1, GRAPH.n_edges)

    def make(value: Callable, one_sided: bool = False, of_mask: bool = False, tolerance: float = 0.15) -> SizeSearch:
        trials = Trials(Script(value, of_mask), "at-least" if one_sided else "mean", tolerance, Deadline(None))
        return SizeSearch(trials, Unpruned(GRAPH, values), "absolute")

    return make


def asked(found: SizeSearch, stage: str) -> list[int]:
    return [point.asked for point in found.trials.curve if point.stage == stage]


def test_a_rising_curve_ends_in_its_first_bracket(scripted: Callable[..., SizeSearch]) -> None:
    found = scripted(lambda n: n / 40)
    assert found.smallest().n_edges == 34  # 0.85
    assert asked(found, "grid") == [1, 2, 4, 8, 16, 32, 64] and asked(found, "bisection") == [48, 40, 36, 34, 33]
    texts = [step.text for step in found.trials.steps]
    assert texts[0] == "the top 64 edges (64 connected) overshoot: faithfulness 1.600"
    assert texts[1] == "the smallest size on target is the top 34 edges (34 connected)"


def test_a_size_on_target_is_bisected_downwards(scripted: Callable[..., SizeSearch]) -> None:
    found = scripted(lambda n: 0.9 if n >= 21 else 0.2)
    assert found.smallest().n_edges == 21
    assert asked(found, "grid")[-1] == 32 and asked(found, "bisection") == [24, 20, 22, 21]
    assert found.trials.steps[0].text == "the top 32 edges (32 connected) reach faithfulness 0.900: on target"


def test_the_first_bracket_wins_over_later_ones(scripted: Callable[..., SizeSearch]) -> None:
    """0.9 at 12 edges, worse again at 13 to 59: a search that trusts monotony would end at 60."""
    found = scripted(lambda n: 0.9 if 9 <= n <= 16 or n >= 60 else 0.3)
    assert found.smallest().n_edges == 9


def test_an_overshoot_that_jumps_over_the_target(scripted: Callable[..., SizeSearch]) -> None:
    """0.5 up to 20 edges, 1.5 up to 49, on target from 50."""
    found = scripted(lambda n: 0.5 if n <= 20 else 1.5 if n < 50 else 1.0)
    assert found.smallest().n_edges == 50
    assert asked(found, "grid") == [1, 2, 4, 8, 16, 32, 64]
    assert [step.text for step in found.trials.steps] == [
        "the top 32 edges (32 connected) overshoot: faithfulness 1.500",
        "faithfulness jumps over the target between 20 and 21 edges: the grid continues",
        "the top 64 edges (64 connected) reach faithfulness 1.000: on target",
        "the smallest size on target is the top 50 edges (50 connected)",
    ]


def test_a_target_that_is_crossed_from_above(scripted: Callable[..., SizeSearch]) -> None:
    """An overshoot at 32 edges, an undershoot at 64, and the target between them."""
    found = scripted(lambda n: 0.5 if n <= 20 else 1.5 if n < 40 else 1.0 if n < 50 else 0.4 if n < 100 else 1.0)
    assert found.smallest().n_edges == 40
    assert asked(found, "grid")[-1] == 64


def test_only_the_whole_model_is_on_target(scripted: Callable[..., SizeSearch]) -> None:
    for elsewhere in (0.0, 3.0):
        found = scripted(lambda n, elsewhere=elsewhere: 1.0 if n == GRAPH.n_edges else elsewhere)
        assert found.smallest().n_edges == GRAPH.n_edges
        assert asked(found, "grid")[-1] == GRAPH.n_edges


def test_an_undershoot_only_is_refused_one_sided(scripted: Callable[..., SizeSearch]) -> None:
    curve = lambda n: 1.4 if n >= 10 else 0.5  # noqa: E731
    assert scripted(curve, one_sided=True).smallest().n_edges == 10
    assert scripted(lambda n: curve(n) if n < 100 else 1.0).smallest().n_edges == 100
    for one_sided, values in (
        (False, {0.86: True, 1.14: True, 1.16: False, 0.84: False}),
        (True, {7: True, 0.84: False}),
    ):
        for value, on_target in values.items():
            trials = scripted(lambda n, value=value: value, one_sided=one_sided).trials
            assert trials.meets(trials.run(top_mask(5), "grid")) == on_target


def test_no_circuit_is_run_twice(scripted: Callable[..., SizeSearch]) -> None:
    found = scripted(lambda n: n / 40)
    mask = found.smallest().mask
    runs = found.trials.evaluator.runs
    assert runs == len(found.trials.curve)
    found.trials.run(mask, "grid")
    assert found.trials.evaluator.runs == runs


def top_mask(n: int) -> np.ndarray:
    flat = np.zeros(GRAPH.n_edges, dtype=bool)
    flat[:n] = True
    mask = np.zeros_like(GRAPH.real)
    mask.T[GRAPH.real.T] = flat
    return mask


def prune(found: SizeSearch, mask: np.ndarray, growth: float, most: float = math.inf) -> Any:
    return pruned(found.trials, found.trials.run(mask, "start"), found.scores.values, growth, most)


def test_pruning_drops_what_does_not_matter(scripted: Callable[..., SizeSearch]) -> None:
    needed = top_mask(40) & ~top_mask(33)  # the weakest seven of forty
    found = scripted(lambda mask: 1.0 if (mask & needed).sum() == 7 else 0.0, of_mask=True)
    np.testing.assert_array_equal(prune(found, top_mask(40), 0.05).mask, needed)
    assert found.trials.steps[-1].text == "33 of 40 edges removed; faithfulness 1.000 -> 1.000"
    assert found.trials.evaluator.runs < 33, "edges that all go are taken together"
    few = scripted(lambda mask: 1.0 if (mask & needed).sum() == 7 else 0.0, of_mask=True)
    assert prune(few, top_mask(40), 0.05, 3).n_edges == 40 and few.trials.evaluator.runs == 4


def test_pruning_takes_the_weakest_first(scripted: Callable[..., SizeSearch]) -> None:
    """Every edge costs 0.02: there is room for the five weakest, within 0.1 of where it started."""
    found = scripted(lambda mask: 1.0 - 0.02 * (20 - mask.sum()), of_mask=True)
    np.testing.assert_array_equal(prune(found, top_mask(20), 0.1001).mask, top_mask(15))
    strict = scripted(lambda mask: 1.0 - 0.02 * (20 - mask.sum()), of_mask=True, tolerance=0.0601)
    np.testing.assert_array_equal(prune(strict, top_mask(20), 0.1001).mask, top_mask(17))


def test_pruning_names_an_overshoot(scripted: Callable[..., SizeSearch]) -> None:
    found = scripted(lambda mask: 1.1 if mask.sum() < 20 else 1.0, of_mask=True)
    assert prune(found, top_mask(20), 0.12).n_edges == 0
    assert (
        found.trials.steps[-1].text
        == "faithfulness is 0.100 above 1: the circuit leaves out edges that oppose the task"
    )
    assert found.trials.steps[-2].text == "20 of 20 edges removed; faithfulness 1.000 -> 1.100"


def test_one_sided_pruning_stays_on_its_side(scripted: Callable[..., SizeSearch]) -> None:
    """From 1.4 down to 0.95: what is above 1 counts as 1."""
    found = scripted(lambda mask: 1.4 - 0.1 * (20 - mask.sum()), one_sided=True, of_mask=True)
    kept = prune(found, top_mask(20), 0.1001)
    assert kept.n_edges == 15 and kept.faithfulness == pytest.approx(0.9)


# -------------------------------------------------------------------- as a folder
@pytest.fixture(scope="module")
def small(tiny: cf.Model) -> cf.FindResult:
    return cf.find(tiny, cf.task("ioi", tiny, n=8), method="eap", prune=False, max_checks=3, random=2)


def test_a_result_is_a_folder_of_what_the_verb_leaves(small: cf.FindResult, tmp_path: Path) -> None:
    files = small.write(tmp_path / "found", command="circuitfind find tiny")
    names = {path.name for path in files}
    assert names == {path.name for path in (tmp_path / "found").iterdir()}
    assert names >= {"circuit.json", "circuit.dot", "scores.safetensors", "find.json", "report.html"}
    assert "circuitfind find tiny" in (tmp_path / "found" / "report.html").read_text(encoding="utf-8")
    back = cf.FindResult.open(tmp_path / "found")  # no model takes part
    assert plain(back) == plain(small) and back.circuit == small.circuit and back.summary == small.summary
    np.testing.assert_array_equal(back.checks.exact, small.checks.exact)
    np.testing.assert_array_equal(back.scores.values, small.scores.values)
    assert small._repr_html_().count("<table") > 1 and small.on_target == (abs(1 - small.checks.faithfulness) <= 0.15)
    assert back.held_out is back.model is None and repr(back) == repr(small) and "ioi" in repr(back)
    np.testing.assert_array_equal(back.circuit.exact, small.circuit.exact)
    assert back.report(tmp_path / "again.html").is_file()
    assert back.circuit.report(None, None, tmp_path / "circuit.html").is_file()
    table = small.save(tmp_path / "curve.csv").read_text(encoding="utf-8").splitlines()
    assert table[0] == "stage,asked,n_edges,faithfulness" and len(table) == 1 + len(small.curve)
    (tmp_path / "found" / "find.json").write_text('{"format": "circuitfind.find", "version": 1}', encoding="utf-8")
    with pytest.raises(cf.FileError, match=r"find\.json: cannot be read"):
        cf.FindResult.open(tmp_path / "found")


def test_the_former_name_of_the_held_out_pairs_is_readable(small: cf.FindResult) -> None:
    assert small.unseen is small.held_out and small.circuit.facts["unseen_pairs"] == len(small.held_out)


def test_the_scores_may_come_from_a_search_of_another_kind(tiny: cf.Model) -> None:
    task = cf.task("ioi", tiny, n=4)
    result = cf.find(tiny, task, method="ugs", steps=2, regularisation=0.01, prune=False, max_checks=1, random=1)
    assert result.scores.record.method == "ugs" and result.scores.record.metric == "kl"
    assert result.circuit.record.settings["steps"] == 2
    assert result.summary.metric == result.circuit.record.metric == "logit_diff"
    with pytest.raises(ScoreError, match="steps=3 is an option of"):
        cf.find(tiny, task, method="eap", steps=3)
    with pytest.raises(ScoreError, match="these scores were made with steps=2, not 3"):
        cf.find(tiny, task, scores=result.scores, steps=3)
    with pytest.raises(ScoreError, match="these scores were made with method='ugs', not 'eap'"):
        cf.find(tiny, task, scores=result.scores, method="eap")
    again = cf.find(tiny, task, scores=result.scores, method="ugs", steps=2, prune=False, max_checks=1, random=1)
    assert again.scores is result.scores
    with pytest.raises(ScoreError, match="run circuits on the clean prompts"):
        cf.find(tiny, task, method="acdc", direction="denoising")
    never = cf.find(
        tiny, task, method="ugs", steps=2, patience=None, learn_by=None, prune=False, max_checks=1, random=1
    )
    assert never.scores.record.settings["patience"] is None and never.scores.record.metric == "logit_diff"


def test_the_methods_are_listed_with_the_calls_that_take_them() -> None:
    rows = {row.name: row for row in cf.methods().methods}
    assert set(rows) == {*METHODS, *SEARCHES}
    assert rows["acdc"].calls == "find, compare, acdc" and rows["ugs"].calls == "find, compare, learn_masks"
    assert rows["eap"].calls == "attribute, find, compare, stability" and not rows["ugs"].effects
    assert rows["hisp"].calls == "attribute, compare" and rows["atp-qk"].calls == "attribute, approximation"
    assert "acdc" in cf.methods("edge").names and "acdc" not in cf.methods("node").names


@pytest.mark.parametrize(
    "words",
    [
        ("find", "--method", "acdc", "--max-checks", "1", "--random", "1"),
        ("find", "--method", "ugs", "--max-checks", "1", "--random", "1", "--steps", "3"),
        ("verify", "--method", "acdc", "--top", "2", "--random", "1"),
    ],
)
def test_searches_make_the_scores_of_the_command_line(
    words: tuple[str, ...], tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("circuitfind.search.acdc.GRID", GRID[::4])  # of the thresholds that give ACDC's scores
    assert main([words[0], "tiny", "--n", "4", "--backend", "hooks", "--no-check", *words[1:], "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert all(Path(name).is_file() for name in said["files"])
    if words[0] == "find":
        assert cf.Scores.open("circuitfind-out/scores.safetensors").record.method == words[2]


def test_searches_travel_to_a_server() -> None:
    for method in SEARCHES.values():
        Pickler(io.BytesIO(), "circuitfind", None).dump(method)
