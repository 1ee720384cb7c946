"""Direct logit attribution: contributions against the definition, and their sum against the model's own logits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from families import EVERY_FAMILY, build, swept
from oracles import Literal
from toys import FOUR, id_task, wrapped

import circuitfind as cf
from circuitfind.metrics import METRICS

CAPPED, BENT = (
    {"gemma2", "nanochat", "recurrent_gemma"},
    {"modernbert-decoder"},
)  # logits that are capped; a head that is not linear


@pytest.mark.parametrize("name", swept(sorted(set(EVERY_FAMILY) - CAPPED - BENT)))
def test_contributions_and_constants_are_the_logit_difference(name: str) -> None:
    found = cf.direct_effects(wrapped(name), id_task((7, 5, 6)), batch_size=2)
    total = found.per_example.sum(axis=0) + found.constant
    np.testing.assert_allclose(total, found.logit_diff, atol=1e-4 * np.abs(found.logit_diff).max())
    assert not found.capped


@pytest.mark.parametrize("cap", [30.0, 200.0])
def test_a_soft_cap_comes_after_the_sum(cap: float) -> None:
    model = _capped_at(cap)
    found = cf.direct_effects(model, id_task((7, 5, 6)))
    assert found.capped and "before the model's soft-cap" in found.record.sign
    bound = id_task((7, 5, 6)).on(model)
    with torch.no_grad():
        logits = Literal(model.hf)._plain_logits(bound.batch.clean)
    before = cap * torch.atanh((logits / cap).double())
    expected = METRICS["logit_diff"](before, bound.batch).numpy()
    np.testing.assert_allclose(found.per_example.sum(axis=0) + found.constant, expected, rtol=1e-3)


def test_a_post_norm_without_a_soft_cap() -> None:
    found = cf.direct_effects(_capped_at(None), id_task((7, 5, 6)))
    total = found.per_example.sum(axis=0) + found.constant
    np.testing.assert_allclose(total, found.logit_diff, atol=1e-4 * np.abs(found.logit_diff).max())
    assert not found.capped


def test_the_unembeddings_bias_is_scaled_with_the_logits() -> None:
    hf = build("cohere")
    hf.config.tie_word_embeddings = False
    hf.lm_head.bias = torch.nn.Parameter(torch.randn(hf.lm_head.weight.shape[0]) * 3)
    hf.logit_scale = 0.25
    found = cf.direct_effects(cf.wrap(hf, None), id_task((7, 5, 6)))
    total = found.per_example.sum(axis=0) + found.constant
    np.testing.assert_allclose(total, found.logit_diff, atol=1e-4 * np.abs(found.logit_diff).max())
    hf.lm_head.bias = None
    without = cf.direct_effects(cf.wrap(hf, None), id_task((7, 5, 6)))
    assert np.abs(found.constant - without.constant).max() > 0.1, "the bias takes part"


def _capped_at(cap: float | None) -> cf.Model:
    hf = build("gemma2")
    hf.config.final_logit_softcapping = cap
    return cf.wrap(hf, None)


@pytest.mark.parametrize("name", [*FOUR, "cohere", "phi", "olmo2"])
def test_each_node_goes_through_the_frozen_norm_alone(name: str) -> None:
    """What a writer adds to the norm's output, the scale held, times the unembedding: one writer at a time."""
    model = wrapped(name)
    bound = id_task((6, 4)).on(model)
    found, literal = cf.direct_effects(model, bound), Literal(model.hf)
    final = model.hf.get_submodule(literal.family.final_norm)
    seen: list[torch.Tensor] = []
    handle = final.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        run = literal.run(bound.batch.clean)
    handle.remove()
    rows, reads = torch.arange(2), bound.batch.clean.read[:, 0]
    weight = model.hf.get_output_embeddings().weight.detach().double()
    slope = getattr(model.hf.config, "logit_scale", 1.0)
    end = seen[-1].detach()[rows, reads].double()
    for row, writer in enumerate(model.graph.writer_names):
        part = run.writers[writer][rows, reads].double()
        normed = _frozen(final, end, part)
        logits = slope * normed @ weight.T
        expected = METRICS["logit_diff"](logits[:, None], bound.batch).numpy()
        np.testing.assert_allclose(found.per_example[row], expected, rtol=1e-3, atol=1e-5, err_msg=writer)


def _frozen(norm: torch.nn.Module, end: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A part of a norm's input under the scale of the whole: with the norm's bias taken off, `norm(end)` is a centred
    copy of `end` times scale and weight, feature by feature, and so is the part's share."""
    double = norm.double() if next(norm.parameters()).dtype == torch.float64 else _copy_in_double(norm)
    with torch.no_grad():
        bias = double(torch.zeros_like(end))
        centred = double(end + 1) - double(end)  # zero where the mean is taken off
        means = bool(centred.abs().max() < 1e-6)
        whole = double(end) - bias
    centre = lambda x: x - x.mean(-1, keepdim=True) if means else x  # noqa: E731
    return whole * centre(part) / centre(end)


def _copy_in_double(norm: torch.nn.Module) -> torch.nn.Module:
    import copy

    return copy.deepcopy(norm).double()


def test_several_read_positions_are_averaged() -> None:
    model = wrapped("llama")
    ids = torch.randint(3, 99, (2, 2, 6), generator=torch.Generator().manual_seed(0))
    answers, wrong = torch.tensor([[[5], [9]], [[6], [8]]]), torch.tensor([[[7], [4]], [[8], [3]]])
    task = cf.Task(ids[0], ids[1], answers, wrong, positions=torch.tensor([[2, 5], [3, 4]]))
    both = cf.direct_effects(model, task)
    parts = [
        cf.direct_effects(
            model, cf.Task(ids[0], ids[1], answers[:, at], wrong[:, at], positions=torch.tensor([[2, 3], [5, 4]])[at])
        )
        for at in (0, 1)
    ]
    np.testing.assert_allclose(both.per_example, (parts[0].per_example + parts[1].per_example) / 2, atol=1e-5)
    np.testing.assert_allclose(both.constant, (parts[0].constant + parts[1].constant) / 2, atol=1e-5)


def test_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        half, exact = (cf.direct_effects(wrapped("cohere", kind), id_task((6, 6))) for kind in (dtype, torch.float32))
        off = np.abs(half.per_example - exact.per_example).max() / np.abs(exact.per_example).max()
        assert off < 0.05 and not half.capped


def test_as_scores_and_as_a_method() -> None:
    model, task = wrapped("gpt2"), id_task((6, 6), metric="prob_diff")
    found = cf.direct_effects(model, task)
    assert found.record.metric == "logit_diff" and not found.record.is_effect
    scores = cf.attribute(model, task, "direct", level="node")
    np.testing.assert_array_equal(scores.values, found.scores.values)
    np.testing.assert_allclose(scores["m1"], found.per_example[model.graph.writer("m1")].mean(), rtol=1e-6)
    assert found.to_dict()["effects"] == found.scores.to_dict()


def test_a_task_without_wrong_answers_has_no_difference() -> None:
    task = dataclasses.replace(id_task((5, 5)), wrong_answers=None, metric="logprob")
    with pytest.raises(cf.TaskError, match="wrong_answers"):
        cf.direct_effects(wrapped("gpt2"), task)
