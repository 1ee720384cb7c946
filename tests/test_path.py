"""Path patching against exact circuit runs that lack the sender's edges into the receivers, and against the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import build
from oracles import Literal, Pass
from toys import FOUR, Twin, id_task, wrapped

import circuitfind as cf
from circuitfind.engine import memory_plan
from circuitfind.engine.ablation import resampled
from circuitfind.engine.circuit_run import CircuitVisitor
from circuitfind.evaluation.faithfulness import Evaluator

RECEIVERS = ["a1.h1", "m1", "logits"]  # a1.h1: its query, key and value


def _fed(model: cf.Model, node: str) -> np.ndarray:
    """`[readers]` bool: the readers of a node."""
    return model.graph.serves[:, model.graph.node_names.index(node)]


def _lacking(model: cf.Model, senders: tuple[str, ...], receivers: list[str]) -> np.ndarray:
    """`[senders, writers, readers]`: all edges but each sender's into the receivers."""
    graph = model.graph
    readers = np.any([_fed(model, name) for name in receivers], axis=0)
    masks = np.repeat(graph.real[None], len(senders), axis=0)
    for mask, sender in zip(masks, senders, strict=True):
        mask[graph.writer(sender), readers] = False
    return masks


@pytest.mark.parametrize(
    ("name", "ablation"),
    [(name, "corrupted") for name in (*FOUR, "falcon", "olmo2", "opt")] + [("llama", "zero"), ("gemma2", "mean")],
)
def test_paths_are_their_edges_removed_together(name: str, ablation: str) -> None:
    model, task = wrapped(name), id_task((6, 4, 5))
    found = cf.path_patch(model, task, receivers=RECEIVERS, ablation=ablation, batch_size=2)
    assert found.senders == model.graph.writer_names and found.receivers == ("a1.h1 + m1 + logits",)
    evaluator = Evaluator.of(model, task, ablation=ablation)
    expected = evaluator.full - evaluator.run(_lacking(model, found.senders, RECEIVERS)).metric
    np.testing.assert_allclose(found.per_example[:, 0], expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose([found.full, found.empty], [evaluator.full, evaluator.empty], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "direction", "metric"),
    [*zip(FOUR, ("noising", "denoising") * 2, ("logit_diff",) * 4, strict=True), ("llama", "denoising", "kl")],
)
def test_one_receiver_at_a_time_is_one_edge_at_a_time(name: str, direction: str, metric: str) -> None:
    model, task = wrapped(name), id_task((5, 5), metric=metric).on(wrapped(name))
    found = cf.path_patch(model, task, None, None, separate=True, direction=direction)
    assert found.effects.shape == model.graph.real.shape and found.receivers == model.graph.reader_names
    np.testing.assert_array_equal(np.isfinite(found.effects), model.graph.real)
    expected = Twin(model, task).exact(direction).numpy()
    np.testing.assert_allclose(np.nan_to_num(found.effects), expected, atol=1e-4 * np.abs(expected).max())


def test_denoising_several_receivers_restores_their_edges_together() -> None:
    """By the oracle: the corrupted run, the receivers seeing the sender's clean value, nobody else."""
    model = wrapped("llama")
    bound = id_task((6, 4, 5)).on(model)
    literal, batch = Literal(model.hf), bound.batch
    with torch.no_grad():
        clean, corrupted = literal.run(batch.clean), literal.run(batch.corrupted)
    seeing = {"m0", "a1.h2<q>", "a1.kv1<v>"}
    change = clean.writers["a0.h1"] - corrupted.writers["a0.h1"]

    def see(reader: str, stream: torch.Tensor, so_far: Pass) -> torch.Tensor:
        return stream + change if reader in seeing else stream

    with torch.no_grad():
        patched = literal.run(batch.corrupted, see).logits
    expected = bound.metric(patched, batch) - bound.metric(corrupted.logits, batch)
    found = cf.path_patch(model, bound, "a0.h1", sorted(seeing), direction="denoising")
    np.testing.assert_allclose(found.per_example[0, 0], expected, atol=1e-5)


def test_metric_and_ablation_of_the_call() -> None:
    model, task = wrapped("gpt2"), id_task((5, 5, 5))
    found = cf.path_patch(model, task, ["input", "m0"], "m1", metric="kl", ablation="resample", seed=4)
    bound = task.on(model).with_metric("kl")
    evaluator = Evaluator.of(model, bound, ablation="resample", seed=4)
    expected = evaluator.full - evaluator.run(_lacking(model, found.senders, ["m1"])).metric
    np.testing.assert_allclose(found.per_example[:, 0], expected, atol=1e-6)
    assert found.record.metric == "kl" and found.record.seed == 4
    dealt = resampled(bound.batch, 4).corrupted.ids
    assert torch.equal(evaluator.experiment.batch.corrupted.ids, dealt) and dealt.ne(bound.batch.corrupted.ids).any()
    assert dealt.ne(resampled(bound.batch, 0).corrupted.ids).any()


def test_a_sender_with_edges_into_everything_is_the_whole_node() -> None:
    model, task = wrapped("gemma2"), id_task((5, 4, 5))
    nodes = cf.attribute(model, task, "exact", level="node")
    after = [name for name, limit in zip(model.graph.reader_names, model.graph.limits, strict=True) if limit > 3]
    found = cf.path_patch(model, task, model.graph.writer_names[3], after)
    np.testing.assert_allclose(found.effects[0, 0], nodes.values[3], atol=1e-5)


def test_earlier_blocks_are_not_run_again() -> None:
    model, called = cf.wrap(build("gpt2"), None), []
    for layer, block in enumerate(model.hf.transformer.h):
        block.mlp.register_forward_hook(lambda *_, layer=layer: called.append(layer))
    cf.path_patch(model, id_task((5, 5)), "m1", "logits")  # the identities are proved under new hooks
    called.clear()
    cf.path_patch(model, id_task((5, 5)), ["a0.h0", "m1"], "logits")
    assert called == [0, 1, 0, 1], "both sides once, and nothing for the direct effects on the logits"
    called.clear()
    cf.path_patch(model, id_task((5, 5)), "a0.h0", ["a1.h0<q>", "logits"])
    assert called == [0, 1, 0, 1, 1]


def test_runs_side_by_side_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held is senders x runs x tokens: it must not grow with the square of the runs."""
    model, task = wrapped("llama"), id_task((6, 4, 5))
    options: dict[str, Any] = {"senders": None, "receivers": ["m1", "logits"], "separate": True}
    expected, held = cf.path_patch(model, task, **options), []
    allocate = CircuitVisitor.__init__

    def noting(self: CircuitVisitor, *arguments: Any) -> None:
        allocate(self, *arguments)
        held.append(self.written.nbytes)

    monkeypatch.setattr(CircuitVisitor, "__init__", noting)
    for room in (5, 40, 400):
        held.clear()
        monkeypatch.setattr(memory_plan, "BUDGET", room * 18 * 32 * 4)
        found = cf.path_patch(model, task, batch_size=3, **options)
        np.testing.assert_allclose(found.per_example, expected.per_example, atol=1e-5)
        assert 0 < max(held) <= memory_plan.BUDGET
    assert len(held) < 5, "with room enough, many at a time"


def test_the_strongest_and_their_files() -> None:
    model = wrapped("llama")
    found = cf.path_patch(model, id_task((5, 5, 5)), None, ["a1.kv1<k>", "logits"], separate=True)
    best = found.top(3)
    sizes = np.abs(found.effects[np.isfinite(found.effects)])
    assert [abs(path.effect) for path in best] == sorted(sizes, reverse=True)[:3]
    row, column = found.senders.index(best[0].sender), found.receivers.index(best[0].receiver)
    assert best[0].effect == found.effects[row, column] and best[0].low <= best[0].effect <= best[0].high
    assert found.top(1, by="signed")[0].effect == np.nanmax(found.effects)
    assert len(found.top(999)) == sizes.size
    plain = found.to_dict()
    assert plain["effects"][found.senders.index("a1.h0")][0] is None and plain["receivers"] == ["a1.kv1<k>", "logits"]


@pytest.mark.parametrize(
    ("senders", "receivers", "options", "error", "message"),
    [
        ("a0.h9", "logits", {}, cf.ScoreError, "has no sender 'a0.h9'. Its writers are input, a0.h0 to m1"),
        ("a0.h1", "a7.h0<q>", {}, cf.ScoreError, "receiver 'a7.h0<q>'"),
        ("a0.h1", "input", {}, cf.ScoreError, "receiver 'input'"),
        ("m1", "a1.h0<q>", {}, cf.ScoreError, "sender 'm1' is computed after"),
        ([], "logits", {}, cf.ScoreError, "no senders"),
        (3, "logits", {}, cf.ScoreError, "senders=3: give names"),
        ("m0", ["logits", 7], {}, cf.ScoreError, "not a int"),
        (None, [], {}, cf.ScoreError, "no receivers"),
        (None, None, {}, cf.ScoreError, "separate=True"),
        (None, "logits", {"direction": "up"}, cf.ScoreError, "direction 'up'"),
        (None, "logits", {"direction": "denoising", "ablation": "zero"}, cf.ScoreError, "ablation='corrupted'"),
        (None, "logits", {"ablation": "half"}, cf.TaskError, "ablation 'half'"),
        ("a1.h0", "m1", {"metric": lambda logits, _: logits[:, 0] / 0}, cf.ScoreError, "path from a1.h0 is NaN"),
    ],
)
def test_what_is_refused(
    senders: Any, receivers: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cf.path_patch(wrapped("gpt2"), id_task((4, 4)), senders, receivers, **options)
