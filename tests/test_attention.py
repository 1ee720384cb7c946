"""Attention patterns against what transformers itself hands out under eager attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import build
from toys import id_task, wrapped

import circuitfind as cf
from circuitfind.calls import ready


def _theirs(model: cf.Model, ids: torch.Tensor) -> np.ndarray:
    """`[layer, head, query, key]`."""
    with torch.no_grad():
        found = build(model.name, attention="eager")(ids[None], output_attentions=True).attentions
    return torch.stack(found)[:, 0].numpy()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "gemma2", "gptj", "bloom", "mistral", "deepseek_v3"])
def test_patterns_are_the_models(name: str) -> None:
    model, task = wrapped(name), id_task((7, 5))
    before = model.hf.config._attn_implementation
    for example, length in enumerate((7, 5)):
        expected = _theirs(model, task.clean[example, :length])
        for layer, head in ((0, 3), (1, 1)):
            found = cf.attention(model, task, f"a{layer}.h{head}", example=example)
            np.testing.assert_allclose(found.pattern, expected[layer, head], atol=1e-5)
            assert found.tokens == tuple(str(token) for token in task.clean[example, :length].tolist())
    other = cf.attention(model, task, "a1.h0", example=1, corrupted=True)
    np.testing.assert_allclose(other.pattern, _theirs(model, task.corrupted[1, :5])[1, 0], atol=1e-5)
    assert model.hf.config._attn_implementation == before
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.hf.modules())


def test_prompts_as_text() -> None:
    model = cf.load("tiny", check=False)
    task = cf.task("ioi", model, n=3).on(model)
    of_task = cf.attention(model, task, "a2.h1", example=2)
    of_text = cf.attention(model, list(task.prompts), "a2.h1", example=2)
    np.testing.assert_array_equal(of_task.pattern, of_text.pattern)
    assert of_text.tokens == task.tokens[2] == of_task.tokens
    np.testing.assert_allclose(of_text.pattern.sum(1), 1, atol=1e-5)
    assert cf.attention(model, task.prompts[0], "a0.h0").tokens == task.tokens[0]
    assert not np.triu(of_text.pattern, 1).any(), "nothing attends to what comes later"
    assert cf.plot(of_text).layout.title.text


def test_several_heads_cost_what_one_costs() -> None:
    model, task = wrapped("llama"), id_task((7, 5))
    heads = ["a1.h3", "a0.h0", "a1.h1"]
    singly = [cf.attention(model, task, head, example=1, corrupted=True) for head in heads]
    passes: list[int] = []
    hook = model.hf.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    try:
        with ready(model):
            passes.clear()  # a new hook: the identities were proved
        found = cf.attention(model, task, iter(heads), example=1, corrupted=True)
        of_several = len(passes)
        cf.attention(model, task, "a0.h0")
    finally:
        hook.remove()
    assert len(passes) == 2 * of_several and [one.head for one in found] == heads
    for one, alone in zip(found, singly, strict=True):
        np.testing.assert_array_equal(one.pattern, alone.pattern)
        assert one.record == alone.record and one.record.settings["side"] == "corrupted"
        assert one.record.n_examples == 1 and not one.record.is_effect and one.record.model == "llama"


@pytest.mark.parametrize(
    ("prompts", "head", "options", "error", "message"),
    [
        (None, [], {}, cf.ScoreError, "no head is named"),
        (None, ["a0.h0", "a0.h9"], {}, cf.ScoreError, "has no head 'a0.h9'"),
        (None, "m0", {}, cf.ScoreError, "has no head 'm0'"),
        (None, "a2.h0", {}, cf.ScoreError, "Heads are a0.h0 to a1.h3"),
        (None, "a0.h0", {"example": 2}, cf.ScoreError, "there are 2 prompts"),
        ("text", "a0.h0", {}, cf.TaskError, "no tokenizer"),
        ("text", "a0.h0", {"corrupted": True}, cf.ScoreError, "corrupted=True"),
        (None, 3, {}, cf.ScoreError, "has no head 3. Heads are a0.h0"),
        (None, [None], {}, cf.ScoreError, "has no head None"),
        (None, "a0.h0", {"example": "0"}, cf.ScoreError, "example='0': there are 2 prompts"),
        (None, "a0.h0", {"example": True}, cf.ScoreError, "example=True: there are 2 prompts"),
    ],
)
def test_what_is_refused(
    prompts: Any, head: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cf.attention(wrapped("gpt2"), prompts or id_task((4, 4)), head, **options)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "prompt '' has no tokens"),
        (["a", ""], "prompt '' has no tokens"),
        (5, "prompts: 5 is not text: give a task"),
        ([1, 2], "prompts: 1 is not text: give a task"),
    ],
)
def test_prompts_that_are_none(prompts: Any, message: str) -> None:
    with pytest.raises(cf.TaskError, match=message):
        cf.attention(cf.load("tiny", check=False), prompts, "a0.h0", example=int(isinstance(prompts, list)))


def test_what_is_no_model_is_said_first() -> None:
    for prompts in ("text", id_task((4, 4))):
        with pytest.raises(cf.ModelError, match=r"bare GPT2LMHeadModel: wrap it: cf\.wrap"):
            cf.attention(build("gpt2"), prompts, "a0.h0")


def test_a_model_that_keeps_its_patterns_to_itself() -> None:
    with pytest.raises(cf.ModelError, match="does not return its attention patterns"):
        cf.attention(wrapped("falcon-new"), id_task((4, 4)), "a0.h0")
