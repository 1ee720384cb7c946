"""The search: on the embedded model from end to end, and on scripted curves for what real ones seldom show."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from toys import either

import circuitfind as cf
from circuitfind.attribution.methods import METHODS
from circuitfind.cli.app import main
from circuitfind.errors import CircuitfindWarning, ScoreError, TaskError
from circuitfind.evaluation.completeness import second_way
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.graph import Graph
from circuitfind.remote.server import Pickler
from circuitfind.search import find as search
from circuitfind.search.acdc import GRID
from circuitfind.search.find import SizeSearch
from circuitfind.search.methods import SEARCHES

QUICK = {"top": 5, "random": 2}


@pytest.fixture(scope="module")
def tiny() -> cf.Model:
    return cf.load("tiny", check=False, backend="hooks")


@pytest.fixture(scope="module")
def ioi(tiny: cf.Model) -> cf.Task:
    return cf.task("ioi", tiny, n=16)


@pytest.fixture(scope="module")
def found(tiny: cf.Model, ioi: cf.Task) -> cf.FindResult:
    return cf.find(tiny, ioi, top=20, random=5)


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


def test_every_point_of_the_curve_reproduces(tiny: cf.Model, ioi: cf.Task, found: cf.FindResult) -> None:
    seen, _ = ioi.on(tiny).split(0.5, seed=0)
    sizes = [point for point in found.curve if point.stage != "pruning"]
    assert [point.asked for point in sizes[:4]] == [1, 2, 4, 8]
    assert {point.stage for point in found.curve} == {"grid", "bisection", "pruning"}
    for point in sizes:
        circuit = found.scores.top(point.asked)
        assert point.n_edges == len(circuit)
        assert point.faithfulness == pytest.approx(cf.evaluate(tiny, seen, circuit).faithfulness, abs=1e-6)
    pruning = [point for point in found.curve if point.stage == "pruning"]
    kept = [point.n_edges for point in pruning]
    assert kept == sorted(set(kept), reverse=True) and kept[-1] == len(found.circuit)
    assert pruning[-1].faithfulness == pytest.approx(found.circuit.facts["faithfulness_on_search_pairs"], abs=1e-6)
    smallest = min(point.n_edges for point in sizes if abs(1 - point.faithfulness) <= 0.15)
    assert found.circuit.mask.sum() <= smallest and kept[0] < smallest


def test_pruning_never_leaves_its_limit(tiny: cf.Model, ioi: cf.Task) -> None:
    for growth in (0.0, 0.02, 10.0):
        result = cf.find(tiny, ioi, prune_tolerance=growth, **QUICK)
        before = [point for point in result.curve if point.stage != "pruning"]
        start = next(point.faithfulness for point in before if point.asked == start_size(before))
        after = [point.faithfulness for point in result.curve if point.stage == "pruning"]
        limit = min(abs(1 - start) + growth, 0.15)
        assert all(abs(1 - value) <= limit + 1e-9 for value in after), growth
        assert set(result.circuit.edges) <= set(result.scores.top(start_size(before)).edges)
    assert len(after) > 3


def start_size(points: list[Any]) -> int:
    return min(point.asked for point in points if abs(1 - point.faithfulness) <= 0.15)


def test_a_circuit_that_leaves_out_a_second_way() -> None:
    """One head of an OR is a circuit of faithfulness 1, and the model does not miss it."""
    model, task = either()
    with pytest.warns(CircuitfindWarning, match="There is a second way, which the circuit leaves out"):
        result = cf.find(model, task, random=1)
    head = result.circuit.nodes[1]
    assert len(result.circuit) == 3 and result.checks.faithfulness == pytest.approx(1) and head.startswith("a0.h")
    known = result.circuit.facts["knocked_out"]
    assert known == {"removed": [head], "circuit": 0, "model": pytest.approx(1), "second_way": True}
    last = result.steps[-1]
    assert last.stage == "knock-outs" and f"without {head} the model keeps 100% of the total effect" in last.text
    with warnings.catch_warnings():
        warnings.simplefilter("error", CircuitfindWarning)
        left_out = cf.find(model, task, random=1, knockouts=0)
    assert "knocked_out" not in left_out.circuit.facts and left_out.steps[-1].stage == "pruning"
    with pytest.raises(ScoreError, match="knockouts=-1"):
        cf.find(model, task, knockouts=-1)


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
    assert sum(count) <= 2 * 3 + 1


def test_without_pruning(tiny: cf.Model, ioi: cf.Task, found: cf.FindResult) -> None:
    result = cf.find(tiny, ioi, prune=False, scores=found.scores, **QUICK)
    points = list(result.curve)
    assert all(point.stage in ("grid", "bisection") for point in points)
    assert result.circuit == found.scores.top(start_size(points))
    assert not any(step.stage == "pruning" for step in result.steps)
    assert result.circuit.record.settings["prune_tolerance"] is None


def test_ranked_by_signed_effects(tiny: cf.Model, ioi: cf.Task, found: cf.FindResult) -> None:
    result = cf.find(tiny, ioi, by="signed", prune=False, scores=found.scores, **QUICK)
    values = found.scores.values[result.circuit.mask]
    assert values.min() > 0, "edges that oppose the behaviour come last"
    assert result.circuit == found.scores.top(start_size(list(result.curve)), by="signed")
    assert result.circuit.record.settings["by"] == "signed"
    with pytest.raises(ScoreError, match="by='size' is unknown: use 'absolute'"):
        cf.find(tiny, ioi, by="size", scores=found.scores, **QUICK)  # type: ignore[arg-type]


def test_the_tolerance_is_kept(tiny: cf.Model, ioi: cf.Task, found: cf.FindResult) -> None:
    sizes = []
    for tolerance in (0.4, 0.15, 0.05):
        result = cf.find(tiny, ioi, tolerance=tolerance, scores=found.scores, prune=False, **QUICK)
        assert abs(1 - result.circuit.facts["faithfulness_on_search_pairs"]) <= tolerance
        sizes.append(len(result.circuit))
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def plain(result: cf.FindResult) -> str:
    return json.dumps(result.to_dict(), sort_keys=True)


def test_the_same_seed_gives_the_same_bits(tiny: cf.Model, ioi: cf.Task, found: cf.FindResult) -> None:
    again = cf.find(tiny, ioi, top=20, random=5)
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
    assert plain(cf.find(tiny, ioi, top=20, random=5, scores=scores)) == plain(found)
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
    assert (back.record.task, back.record.method, back.record.settings["search"]) == ("ioi", "eap-ig-inputs", "find")
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


def test_tasks_that_cannot_be_searched(tiny: cf.Model, ioi: cf.Task) -> None:
    with pytest.raises(TaskError, match="one pair is too few to search with and to judge with"):
        cf.find(tiny, ioi.on(tiny).subset([0]))
    for holdout in (0.0, 1.0):
        with pytest.raises(TaskError, match=r"holdout=.*a part of the pairs is needed, between 0 and 1"):
            cf.find(tiny, ioi, holdout=holdout)
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
class Outcome(NamedTuple):
    metric: np.ndarray


class Script:
    """An evaluator whose faithfulness is a function of the number of edges, or of the mask."""

    def __init__(self, value: Callable[[Any], float], of_mask: bool = False) -> None:
        self.value, self.of_mask, self.runs = value, of_mask, 0

    def run(self, masks: np.ndarray) -> Outcome:
        self.runs += len(masks)
        return Outcome(np.array([[self.value(mask if self.of_mask else int(mask.sum()))] for mask in masks]))

    def faithfulness(self, metric: np.ndarray) -> np.ndarray:
        return metric.mean(-1)


class Unpruned(cf.Scores):
    """Scores whose top n edges are n edges: the scripts speak of sizes, connected or not."""

    def top(self, n: int, by: Any = "absolute", prune: bool = True) -> cf.Circuit:
        return super().top(n, by, prune=False)


GRAPH = Graph(2, 4, 4, 32)  # 110 edges: the grid is 1, 2, 4, ..., 64, 110


@pytest.fixture()
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SizeSearch]:
    """A search on a script; edges rank in the graph's own order."""
    monkeypatch.setattr(search, "connected", lambda graph, mask: mask)
    values = np.zeros(GRAPH.real.shape, dtype=np.float32)
    values.T[GRAPH.real.T] = np.linspace(2, 1, GRAPH.n_edges)

    def make(value: Callable, one_sided: bool = False, of_mask: bool = False, tolerance: float = 0.15) -> SizeSearch:
        return SizeSearch(Script(value, of_mask), Unpruned(GRAPH, values), "absolute", tolerance, one_sided)

    return make


def asked(found: SizeSearch, stage: str) -> list[int]:
    return [point.asked for point in found.curve if point.stage == stage]


def test_a_rising_curve_ends_in_its_first_bracket(scripted: Callable[..., SizeSearch]) -> None:
    found = scripted(lambda n: n / 40)
    assert found.smallest().sum() == 34  # 0.85
    assert asked(found, "grid") == [1, 2, 4, 8, 16, 32, 64] and asked(found, "bisection") == [48, 40, 36, 34, 33]
    texts = [step.text for step in found.steps]
    assert texts[0] == "the top 64 edges (64 connected) overshoot: faithfulness 1.600"
    assert texts[1] == "the smallest size on target is the top 34 edges (34 connected)"


def test_a_size_on_target_is_bisected_downwards(scripted: Callable[..., SizeSearch]) -> None:
    found = scripted(lambda n: 0.9 if n >= 21 else 0.2)
    assert found.smallest().sum() == 21
    assert asked(found, "grid")[-1] == 32 and asked(found, "bisection") == [24, 20, 22, 21]
    assert found.steps[0].text == "the top 32 edges (32 connected) reach faithfulness 0.900: on target"


def test_the_first_bracket_wins_over_later_ones(scripted: Callable[..., SizeSearch]) -> None:
    """0.9 at 12 edges, worse again at 13 to 59: a search that trusts monotony would end at 60."""
    found = scripted(lambda n: 0.9 if 9 <= n <= 16 or n >= 60 else 0.3)
    assert found.smallest().sum() == 9


def test_an_overshoot_that_jumps_over_the_target(scripted: Callable[..., SizeSearch]) -> None:
    """0.5 up to 20 edges, 1.5 up to 49, on target from 50."""
    found = scripted(lambda n: 0.5 if n <= 20 else 1.5 if n < 50 else 1.0)
    assert found.smallest().sum() == 50
    assert asked(found, "grid") == [1, 2, 4, 8, 16, 32, 64]
    assert [step.text for step in found.steps] == [
        "the top 32 edges (32 connected) overshoot: faithfulness 1.500",
        "faithfulness jumps over the target between 20 and 21 edges: going on",
        "the top 64 edges (64 connected) reach faithfulness 1.000: on target",
        "the smallest size on target is the top 50 edges (50 connected)",
    ]


def test_a_target_that_is_crossed_from_above(scripted: Callable[..., SizeSearch]) -> None:
    """An overshoot at 32 edges, an undershoot at 64, and the target between them."""
    found = scripted(lambda n: 0.5 if n <= 20 else 1.5 if n < 40 else 1.0 if n < 50 else 0.4 if n < 100 else 1.0)
    assert found.smallest().sum() == 40
    assert asked(found, "grid")[-1] == 64


def test_only_the_whole_model_is_on_target(scripted: Callable[..., SizeSearch]) -> None:
    for elsewhere in (0.0, 3.0):
        found = scripted(lambda n, elsewhere=elsewhere: 1.0 if n == GRAPH.n_edges else elsewhere)
        assert found.smallest().sum() == GRAPH.n_edges
        assert asked(found, "grid")[-1] == GRAPH.n_edges


def test_an_undershoot_only_is_refused_one_sided(scripted: Callable[..., SizeSearch]) -> None:
    curve = lambda n: 1.4 if n >= 10 else 0.5  # noqa: E731
    assert scripted(curve, one_sided=True).smallest().sum() == 10
    two_sided = scripted(lambda n: curve(n) if n < 100 else 1.0)
    assert two_sided.smallest().sum() == 100
    assert two_sided.meets(0.85) and two_sided.meets(1.15) and not two_sided.meets(1.16) and not two_sided.meets(0.84)
    assert scripted(curve, one_sided=True).meets(7.0) and not scripted(curve, one_sided=True).meets(0.84)


def test_no_circuit_is_run_twice(scripted: Callable[..., SizeSearch]) -> None:
    found = scripted(lambda n: n / 40)
    mask = found.smallest()
    runs = found.evaluator.runs
    assert runs == len(found.curve)
    found.faithfulness_of(mask)
    assert found.evaluator.runs == runs


def top_mask(n: int) -> np.ndarray:
    flat = np.zeros(GRAPH.n_edges, dtype=bool)
    flat[:n] = True
    mask = np.zeros_like(GRAPH.real)
    mask.T[GRAPH.real.T] = flat
    return mask


def test_pruning_drops_what_does_not_matter(scripted: Callable[..., SizeSearch]) -> None:
    needed = top_mask(40) & ~top_mask(33)  # the weakest seven of forty
    found = scripted(lambda mask: 1.0 if (mask & needed).sum() == 7 else 0.0, of_mask=True)
    kept = found.pruned(top_mask(40), 0.05)
    np.testing.assert_array_equal(kept, needed)
    assert found.steps[-1].text == "33 of 40 edges removed; faithfulness 1.000 -> 1.000"
    assert found.evaluator.runs < 33, "edges that all go are taken together"


def test_pruning_takes_the_weakest_first(scripted: Callable[..., SizeSearch]) -> None:
    """Every edge costs 0.02: there is room for the five weakest, within 0.1 of where it started."""
    found = scripted(lambda mask: 1.0 - 0.02 * (20 - mask.sum()), of_mask=True)
    np.testing.assert_array_equal(found.pruned(top_mask(20), 0.1001), top_mask(15))
    strict = scripted(lambda mask: 1.0 - 0.02 * (20 - mask.sum()), of_mask=True, tolerance=0.0601)
    np.testing.assert_array_equal(strict.pruned(top_mask(20), 0.1001), top_mask(17))


def test_pruning_names_an_overshoot(scripted: Callable[..., SizeSearch]) -> None:
    found = scripted(lambda mask: 1.1 if mask.sum() < 20 else 1.0, of_mask=True)
    assert found.pruned(top_mask(20), 0.12).sum() == 0
    assert found.steps[-1].text == "overshoot of 0.100: edges that oppose the behaviour are left out"
    assert found.steps[-2].text == "20 of 20 edges removed; faithfulness 1.000 -> 1.100"


def test_one_sided_pruning_stays_on_its_side(scripted: Callable[..., SizeSearch]) -> None:
    """From 1.4 a loss of 0.8 leaves |1 - faithfulness| as it was, and the target."""
    found = scripted(lambda mask: 1.4 - 0.1 * (20 - mask.sum()), one_sided=True, of_mask=True)
    kept = found.pruned(top_mask(20), 0.05)
    assert kept.sum() == 15 and found.faithfulness_of(kept) == pytest.approx(0.9)
    rising = scripted(lambda mask: 1.0 + 0.02 * (20 - mask.sum()), one_sided=True, of_mask=True, tolerance=0.0601)
    assert rising.pruned(top_mask(20), 0.1001).sum() == 17, "upwards it never leaves the tolerance, either"


# -------------------------------------------------------------------- as a folder
@pytest.fixture(scope="module")
def small(tiny: cf.Model) -> cf.FindResult:
    return cf.find(tiny, cf.task("ioi", tiny, n=8), method="eap", prune=False, top=3, random=2)


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
    result = cf.find(tiny, task, method="ugs", steps=2, regularisation=0.01, prune=False, top=1, random=1)
    assert result.scores.record.method == "ugs" and result.scores.record.metric == "kl"
    assert result.circuit.record.settings["steps"] == 2
    assert result.summary.metric == result.circuit.record.metric == "logit_diff"
    with pytest.raises(ScoreError, match="steps=3 is an option of"):
        cf.find(tiny, task, method="eap", steps=3)
    with pytest.raises(ScoreError, match="these scores were made with steps=2, not 3"):
        cf.find(tiny, task, scores=result.scores, steps=3)
    with pytest.raises(ScoreError, match="these scores were made with method='ugs', not 'eap'"):
        cf.find(tiny, task, scores=result.scores, method="eap")
    again = cf.find(tiny, task, scores=result.scores, method="ugs", steps=2, prune=False, top=1, random=1)
    assert again.scores is result.scores
    with pytest.raises(ScoreError, match="run circuits on the clean prompts"):
        cf.find(tiny, task, method="acdc", direction="denoising")
    never = cf.find(tiny, task, method="ugs", steps=2, patience=None, learn_by=None, prune=False, top=1, random=1)
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
        ("find", "--method", "acdc", "--top", "1", "--random", "1"),
        ("find", "--method", "ugs", "--top", "1", "--random", "1", "--steps", "3"),
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
