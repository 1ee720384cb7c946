"""Exact effects of whole nodes against the exact circuit run that lacks the node's edges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import off
from toys import FOUR, id_task, linear, node_sums, wrapped

import circuitfind as cf
from circuitfind.engine.circuit_run import run_circuits
from circuitfind.engine.prepare import prepare
from circuitfind.engine.restart import Restart
from circuitfind.evaluation.faithfulness import Evaluator


def lacking_one_node(model: cf.Model) -> np.ndarray:
    """`[writers, writers, readers]`: all edges but those out of one writer, for each writer."""
    graph = model.graph
    masks = np.repeat(graph.real[None], graph.n_writers, axis=0)
    masks[np.arange(graph.n_writers), np.arange(graph.n_writers)] = False
    return masks


def off_nodes(scores: cf.NodeScores, expected: np.ndarray) -> float:
    return off(torch.from_numpy(scores.values), torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("name", "ablation"),
    [(name, "corrupted") for name in (*FOUR, "olmo2", "bloom", "opt", "falcon", "granite")]
    + [("llama", "zero"), ("gemma2", "zero"), ("gpt2", "mean"), ("gpt_neox", "mean")],
)
def test_a_node_is_all_its_outgoing_edges(name: str, ablation: str) -> None:
    model, task = wrapped(name), id_task((6, 4, 5))
    scores = cf.attribute(model, task, "exact", level="node", ablation=ablation, batch_size=2)
    evaluator = Evaluator.of(model, task, ablation=ablation)
    expected = (evaluator.full - evaluator.run(lacking_one_node(model)).metric).mean(1)
    assert off_nodes(scores, expected) < 1e-4
    assert scores.record.method == "exact" and scores.record.is_effect


@pytest.mark.parametrize("name", FOUR)
def test_denoising_restores_a_node_in_the_corrupted_run(name: str) -> None:
    """The pairs turned round: the corrupted run is the base, the clean run provides the values."""
    model, task = wrapped(name), id_task((6, 4, 5))
    scores = cf.attribute(model, task, "exact", level="node", direction="denoising")
    bound = task.on(model)
    batch = bound.batch
    turned = prepare(model.adapter, type(batch)(batch.corrupted, batch.clean, batch.answers, batch.wrong))
    logits = run_circuits(turned, lacking_one_node(model))
    before = bound.metric(turned.clean.logits, batch)
    expected = torch.stack([bound.metric(one, batch) - before for one in logits]).mean(1)
    assert off_nodes(scores, expected.double().numpy()) < 1e-4


def test_a_linear_model_has_no_room_between_nodes_edges_and_positions() -> None:
    """Where nothing interacts, a node's effect is the sum of its edges' and of its positions'."""
    task = id_task((6, 6))
    exact = cf.attribute(linear(), task, "exact", level="node").values
    edges = cf.attribute(linear(), task, "exact").values
    np.testing.assert_allclose(exact, node_sums(edges), rtol=1e-3, atol=1e-4 * np.abs(exact).max())
    by_position = cf.attribute(linear(), task, "exact", level="node", by_position=True)
    assert by_position.values.shape == (*exact.shape, 6)
    np.testing.assert_allclose(by_position.values.sum(1), exact, rtol=1e-3, atol=1e-4 * np.abs(exact).max())


def test_heads_and_mlps_by_position_are_patched_sites() -> None:
    """Without post-norms a node's output is a site of its own: `patch` measures the same."""
    model, task = wrapped("llama"), id_task((5, 5, 5))
    scores = cf.attribute(model, task, "exact", level="node", by_position=True)
    heads = cf.patch(model, task, "heads", by_position=True).effects
    mlps = cf.patch(model, task, "mlp").effects
    resid = cf.patch(model, task, "resid", layers=0).effects
    np.testing.assert_allclose(scores.heads(), heads, atol=1e-5)
    np.testing.assert_allclose([scores["m0"], scores["m1"]], mlps, atol=1e-5)
    np.testing.assert_allclose(scores["input"], resid[0], atol=1e-5)


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task, path = wrapped("gpt2"), id_task((5, 5)), tmp_path / "nodes.part"
    options = {"method": "exact", "level": "node", "checkpoint": path}
    expected = cf.attribute(model, task, "exact", level="node").values
    real, calls = Restart.from_stream, []

    def stopping(self: Restart, layer: int, changes: torch.Tensor) -> torch.Tensor:
        calls.append(layer)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, layer, changes)

    monkeypatch.setattr(Restart, "from_stream", stopping)
    with pytest.raises(KeyboardInterrupt):
        cf.attribute(model, task, **options)
    assert path.exists()
    with pytest.raises(cf.FileError, match="another run"):
        cf.attribute(model, id_task((5, 5), seed=1), **options)
    calls.append(-1)
    resumed = cf.attribute(model, task, **options)
    np.testing.assert_array_equal(resumed.values, expected)
    assert calls == [0, 1, 2, -1, 2] and not path.exists()
