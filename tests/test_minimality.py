"""Each edge's part in its circuit against literal runs; edges that are superfluous alone and not together."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from oracles import by_hand, run_circuit
from toys import FOUR, Twin, contrast, id_task, linear, wrapped

import circuitfind as cf
from circuitfind.errors import ScoreError
from circuitfind.evaluation import faithfulness

MANY = (7, 5, 6, 7) * 4  # the intervals of fewer pairs of a random model hold 0


@pytest.fixture(scope="module")
def llama() -> cf.Model:
    return wrapped("llama")


def small_circuit(graph: cf.Graph, n: int = 12) -> cf.Circuit:
    """Random edges, a shared key/value head's among them where there is one, and one that leads nowhere."""
    names = graph.names(graph.real)
    chosen = np.random.default_rng(1).permutation(names)[:n].tolist()
    return cf.Circuit.of(
        graph, [*chosen, "input->logits", "input->m0", "m0->logits", next(n for n in names if "<k>" in n)]
    )


@pytest.mark.parametrize("name", FOUR)
def test_effects_equal_the_literal_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faithfulness, "AT_ONCE", 5)
    model, task = wrapped(name), contrast(2, MANY, name=name)
    circuit = small_circuit(model.graph)
    found = cf.minimality(model, task, circuit)
    twin = Twin(model, task.on(model))

    def literally(edges: list[str]) -> np.ndarray:
        kept = {tuple(edge.split("->")) for edge in edges}
        return twin.metric(run_circuit(twin.literal, twin.batch.clean, kept, twin.carried)).double().numpy()

    whole = literally(circuit.edges)
    size = np.abs(whole).max() + abs(found.evaluation.metric_full - found.evaluation.metric_empty)
    assert {edge.name for edge in found.edges} == set(circuit.edges)
    assert [edge.effect for edge in found.edges] == sorted((edge.effect for edge in found.edges), reverse=True)
    for edge, examples in zip(found.edges, found.per_example, strict=True):
        expected = whole - literally([other for other in circuit.edges if other != edge.name])
        np.testing.assert_allclose(examples, expected, atol=1e-5 * size)
        assert edge.effect == pytest.approx(examples.mean())
        ((low, high),) = by_hand([edge.effect], [[np.delete(examples, one).mean()] for one in range(len(examples))])
        assert edge.interval == pytest.approx((low, high), abs=1e-9)
        assert edge.superfluous == (low <= 0 <= high)
    left = [edge for edge in circuit.edges if edge not in found.superfluous]
    assert found.reduced.edges == left and 0 < len(left) < len(circuit)
    assert found.joint_effect == pytest.approx((whole - literally(left)).mean(), abs=1e-5 * size)
    alone = sum(edge.effect for edge in found.edges if edge.superfluous)
    assert found.summed_effect == pytest.approx(alone, abs=1e-9)


def test_an_edge_that_leads_nowhere_is_superfluous(llama: cf.Model) -> None:
    circuit = cf.Circuit.of(llama.graph, ["input->logits", "input->a1.h0<q>", "m0->a1.kv1<v>"])
    found = cf.minimality(llama, contrast(2, MANY), circuit)
    dead = {edge.name: edge for edge in found.edges}
    for name in ("input->a1.h0<q>", "m0->a1.kv1<v>"):
        assert dead[name].effect == 0 and dead[name].interval == (0, 0) and dead[name].superfluous
    tied = [edge.name for edge in found.edges if edge.effect == 0]
    assert tied == [name for name in circuit.edges if name in tied] and len(tied) == 2, "ties keep the circuit's order"
    assert found.reduced.edges == ["input->logits"]
    assert found.evaluation.faithfulness == found.reduced_evaluation.faithfulness and found.joint_effect == 0


@pytest.mark.parametrize("name", ("gpt2", "llama"))
def test_rounding_is_no_need(name: str) -> None:
    """In a large circuit an edge that leads nowhere changes the arithmetic, and so the last digits, of every run."""
    model = wrapped(name)
    edges = [edge for edge in cf.Circuit.full(model.graph).edges if not edge.startswith("a1.h1->")]
    found = {one.name: one for one in cf.minimality(model, id_task(), edges, metric="kl").edges}
    dead = [one for edge, one in found.items() if edge.endswith("->a1.h1<q>")]
    assert len(dead) > 3 and all(abs(one.effect) < 1e-6 and one.superfluous for one in dead)
    assert not all(one.superfluous for one in found.values())


def test_on_a_linear_model_effects_of_parallel_edges_add_up() -> None:
    model, task = linear(), id_task((7,) * 4, seed=1)
    with torch.no_grad():
        change = model.hf(task.clean).logits[:, -1] - model.hf(task.corrupted).logits[:, -1]
    task = dataclasses.replace(task, answers=change.argmax(-1), wrong_answers=change.argmin(-1))
    heads = [f"a0.h{head}" for head in range(4)]
    circuit = ["input->logits", *(f"input->{head}<v>" for head in heads), *(f"{head}->logits" for head in heads)]
    found = cf.minimality(model, task, circuit, threshold=1e9)
    assert len(found.superfluous) == len(circuit) == len(found.edges)
    # an edge in and an edge out of a head lie in series: the sum counts each path through a head twice
    effects = {edge.name: edge.effect for edge in found.edges}
    for head in heads:
        assert effects[f"input->{head}<v>"] == pytest.approx(effects[f"{head}->logits"], abs=1e-4)
    paths = effects["input->logits"] + sum(effects[f"{head}->logits"] for head in heads)
    assert found.joint_effect == pytest.approx(paths, rel=1e-4)
    assert found.summed_effect == pytest.approx(2 * paths - effects["input->logits"], rel=1e-4)


def test_the_threshold_is_on_magnitudes(llama: cf.Model) -> None:
    circuit = small_circuit(llama.graph)
    plain = cf.minimality(llama, contrast(2, MANY), circuit)
    threshold = 1.01 * min(abs(edge.effect) for edge in plain.edges if not edge.superfluous)
    strict = cf.minimality(llama, contrast(2, MANY), circuit, threshold=threshold)
    for before, after in zip(plain.edges, strict.edges, strict=True):
        assert before[:3] == after[:3]
        assert after.superfluous == (before.superfluous or abs(after.effect) < threshold)
    assert len(plain.superfluous) < len(strict.superfluous) and min(edge.effect for edge in plain.edges) < 0
    assert strict.record.settings["threshold"] == threshold
    needed = next(edge for edge in plain.edges[::-1] if edge.effect > 0 and not edge.superfluous)
    at = cf.minimality(llama, contrast(2, MANY), circuit, threshold=needed.effect)
    assert needed.name not in at.superfluous, "superfluous is an effect below the threshold, not one equal to it"


def test_results_as_json_edge_cases_and_refusals(llama: cf.Model) -> None:
    found = cf.minimality(llama, contrast(2), ["input->logits", "input->m1", "m1->logits"], ablation="zero")
    content = json.loads(json.dumps(found.to_dict()))
    assert content["superfluous"] == list(found.superfluous) and len(content["per_example"]) == 3
    assert content["circuit"]["faithfulness"] == found.evaluation.faithfulness
    assert found.record.ablation == "zero" and content["seen_pairs"] is None
    nothing = cf.minimality(llama, contrast(2), [])
    assert nothing.edges == () == nothing.superfluous and nothing.joint_effect == 0 == nothing.summed_effect
    with pytest.raises(ScoreError, match=r"threshold=-1 is compared with magnitudes"):
        cf.minimality(llama, contrast(2), [], threshold=-1)
    one = cf.minimality(llama, contrast(2).on(llama).subset([0]), ["input->logits"])
    assert np.isnan(one.edges[0].interval).all() and not one.edges[0].superfluous  # unknown is not superfluous
