"""Complement and knock-outs against literal runs of named edges; the greedy search against a literal one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from oracles import by_hand, run_circuit
from toys import FOUR, Twin, contrast, some_circuits, wrapped

import circuitfind as cf
from circuitfind.errors import ScoreError
from circuitfind.evaluation import completeness


@pytest.fixture(scope="module")
def llama() -> cf.Model:
    return wrapped("llama")


class Literally:
    """The metric `[examples]` of a set of edge names."""

    def __init__(self, model: cf.Model, task: cf.Task) -> None:
        self.twin = Twin(model, task.on(model))

    def __call__(self, edges: list[str]) -> np.ndarray:
        kept = {tuple(edge.split("->")) for edge in edges}
        logits = run_circuit(self.twin.literal, self.twin.batch.clean, kept, self.twin.carried)
        return self.twin.metric(logits).double().numpy()


def without(edges: list[str], removed: tuple[str, ...], level: str) -> list[str]:
    if level == "edge":
        return [edge for edge in edges if edge not in removed]
    return [edge for edge in edges if edge.split("->")[0] not in removed]


@pytest.mark.parametrize("level", ["node", "edge"])
@pytest.mark.parametrize("name", FOUR)
def test_complement_and_knockouts_equal_the_literal_runs(name: str, level: str) -> None:
    model, task = wrapped(name), contrast(2, name=name)
    literally = Literally(model, task)
    circuit, every = some_circuits(model.graph)[1], cf.Circuit.full(model.graph).edges
    found = cf.completeness(model, task, circuit, knockouts=4, level=level)
    size = np.ptp(found.complement.per_example.full - found.complement.per_example.empty) + abs(found.contrast)
    rest = literally([edge for edge in every if edge not in circuit.edges])
    np.testing.assert_allclose(found.complement.per_example.circuit, rest, atol=1e-5 * size)
    assert 2 <= len(found.knockouts) <= 4
    gaps = []
    for one in (found.whole, *found.knockouts):
        inside = literally(without(circuit.edges, one.removed, level))
        outside = literally(without(every, one.removed, level))
        assert (one.circuit, one.model) == pytest.approx((inside.mean(), outside.mean()), abs=1e-5 * size)
        assert one.difference == pytest.approx((inside - outside).mean(), abs=1e-5 * size)
        (ends,) = by_hand([one.difference], leaving_out(inside - outside)[:, None])
        assert one.interval == pytest.approx(tuple(ends), abs=1e-4 * size)
        gaps.append(inside - outside)
    assert found.whole.removed == () and found.whole.how == "none"
    assert found.mean_gap == pytest.approx(np.mean([abs(gap.mean()) for gap in gaps[1:]]), abs=1e-5 * size)
    means = np.mean([np.abs(leaving_out(gap)) for gap in gaps[1:]], axis=0)
    (ends,) = by_hand([found.mean_gap], means[:, None])
    assert found.mean_gap_interval == pytest.approx(tuple(np.maximum(ends, 0)), abs=1e-4 * size)
    assert found.worst.gap == max(one.gap for one in found.knockouts)
    assert found.contrast == pytest.approx((literally(every) - literally([])).mean(), abs=1e-5 * size)


def leaving_out(values: np.ndarray) -> np.ndarray:
    return np.array([np.delete(values, example).mean() for example in range(len(values))])


def test_the_whole_model_is_complete_and_nothing_is_not(llama: cf.Model) -> None:
    for level in ("node", "edge"):
        full = cf.completeness(llama, contrast(2), cf.Circuit.full(llama.graph), knockouts=5, level=level)
        assert full.complement.faithfulness == 0 == full.mean_gap == full.worst.gap and len(full.knockouts) == 5
    empty = cf.completeness(llama, contrast(2), [], greedy=1)
    assert empty.complement.faithfulness == 1 and empty.knockouts == () and np.isnan(empty.mean_gap)
    assert empty.worst == empty.whole and empty.whole.difference == pytest.approx(-empty.contrast)


def test_sets_are_drawn_from_the_circuit_by_seed(llama: cf.Model) -> None:
    circuit = some_circuits(llama.graph)[0]
    nodes, edges = {edge.split("->")[0] for edge in circuit.edges} - {"input"}, set(circuit.edges)
    assert "input->logits" in edges or any(edge.startswith("input->") for edge in edges)
    for level, members in (("node", nodes), ("edge", edges)):
        one, again, other = (
            cf.completeness(llama, contrast(2), circuit, knockouts=12, level=level, seed=seed) for seed in (1, 1, 2)
        )
        assert one.knockouts == again.knockouts
        assert {k.removed for k in one.knockouts} != {k.removed for k in other.knockouts}
        assert all(k.removed and set(k.removed) <= members for k in one.knockouts)
        sizes = {len(k.removed) for k in one.knockouts}
        assert len({k.removed for k in one.knockouts}) == len(one.knockouts)
        assert len(sizes) > 3 and max(sizes) > len(members) / 2 > min(sizes)


def test_the_greedy_search_takes_the_worst_next_node(llama: cf.Model) -> None:
    full = cf.Circuit.full(llama.graph).edges
    circuit = [edge for edge in full if edge.split("->")[0] in ("input", "a0.h1", "a0.h3", "m0", "a1.h2")]
    found = cf.completeness(llama, contrast(2), circuit, knockouts=0, greedy=1)
    literally, inside, path = Literally(llama, contrast(2)), (), []

    def gap(removed: tuple[str, ...]) -> float:
        return abs((literally(without(circuit, removed, "node")) - literally(without(full, removed, "node"))).mean())

    left = ["a0.h1", "a0.h3", "m0", "a1.h2"]
    while left:
        best = max(left, key=lambda node: gap((*inside, node)))
        left.remove(best)
        inside = (*inside, best)
        path.append((gap(inside), inside))
    largest, worst = max(path)
    (searched,) = found.knockouts
    assert searched.how == "greedy" and set(searched.removed) == set(worst)
    assert searched.gap == pytest.approx(largest, rel=1e-4) and found.worst == searched


def test_greedy_searches_draw_candidates_of_their_own(llama: cf.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completeness, "CANDIDATES", 1)
    found = cf.completeness(llama, contrast(2), some_circuits(llama.graph)[2], knockouts=0, greedy=3)
    assert len({one.removed for one in found.knockouts}) > 1


def test_results_as_json_and_refusals(llama: cf.Model) -> None:
    circuit = some_circuits(llama.graph)[0]
    found = cf.completeness(llama, contrast(2), circuit.edges, knockouts=2, metric="logprob")
    content = json.loads(json.dumps(found.to_dict()))
    assert content["worst"]["gap"] == found.worst.gap and len(content["knockouts"]) == len(found.knockouts)
    assert content["record"]["metric"] == "logprob" and content["seen_pairs"] is None
    for options, named in (
        ({"level": "layer"}, "level 'layer' is unknown"),
        ({"knockouts": -1}, "knockouts=-1"),
        ({"greedy": 1.5}, "greedy=1.5"),
    ):
        with pytest.raises(ScoreError, match=named):
            cf.completeness(llama, contrast(2), circuit, **options)
