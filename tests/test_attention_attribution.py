"""Attention scores by pairs of nodes: sums against the model's own scores, parts against a literal twin."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from oracles import Literal
from torch import Tensor
from toys import id_task, wrapped

import circuitfind as cf
from circuitfind.batch import Inputs
from circuitfind.engine.sites import eager_attention

HEAD, QUERY, KEY = 3, 4, 2


def _scores(model: cf.Model, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """By layer, `[batch, head, query, key]`: what enters the softmax of the model's own eager attention."""
    entered: list[Tensor] = []
    own = torch.nn.functional.softmax

    def softmax(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        entered.append(scores.detach()) if scores.ndim == 4 else None
        return own(scores, *args, **kwargs)

    with torch.no_grad(), eager_attention(model.adapter), mock.patch("torch.nn.functional.softmax", softmax):
        model.hf(ids, attention_mask=mask.long())
    return entered


@pytest.mark.parametrize(
    "name", ["gpt2", "llama-biased", "gemma2", "gemma3", "qwen3", "olmo2", "granite-biased", "bloom"]
)
def test_parts_add_up_to_the_models_own_scores(name: str) -> None:
    model, task = wrapped(name), id_task((7, 5))
    theirs = _scores(model, task.clean, task.attention_mask)[1][1, HEAD, QUERY].double()  # of the padded prompt
    found = cf.attention_attribution(model, task, f"a1.h{HEAD}", KEY, example=1)
    theirs = theirs if found.cap is None else found.cap * torch.atanh(theirs / found.cap)
    seen = [key for key in range(QUERY + 1) if theirs[key] > -1e4]
    largest = float(theirs[seen].abs().max())
    assert abs(found.score - float(theirs[KEY])) < 2e-6 * largest
    others = theirs[[key for key in seen if key != KEY]]
    assert abs(found.relative - float(theirs[KEY] - others.mean())) < 5e-6 * largest
    beside = cf.attention_attribution(model, task, f"a1.h{HEAD}", KEY, against=3, example=1)
    assert abs(beside.relative - float(theirs[KEY] - theirs[3])) < 5e-6 * largest
    assert (abs(found.position).max() > 0) == (name == "bloom") and found.nodes[-1] == "constant"
    pattern = cf.attention(model, task, found.head, example=1).pattern
    np.testing.assert_allclose(found.weight, pattern[QUERY, KEY], atol=1e-6)


def _literal(model: cf.Model, ids: Tensor) -> Tensor:
    """`[query side, key side]` parts of the last layer's head, by hand: norms at their scales, and rotated."""
    literal, given, layer = Literal(model.hf), {}, len(model.adapter.layers) - 1
    block = literal.blocks[layer]
    attention = block.attn if model.name == "gpt2" else block.self_attn
    handle = attention.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    with torch.no_grad(), eager_attention(model.adapter):
        run = literal.run(Inputs(ids, torch.ones_like(ids).bool(), torch.zeros_like(ids[:, :1])))
    handle.remove()
    names, stream = literal.writers(f"a{layer}.h{HEAD}<q>"), run.streams[f"a{layer}"]
    constants = sum(
        run.biases[name] for name in (f"{kind}{i}" for i in range(layer) for kind in "am") if name in run.biases
    )
    parts = torch.stack([*(run.writers[name] for name in names), torch.zeros_like(stream) + constants])[:, 0]
    if model.name == "gpt2":
        norm, width = block.ln_1, model.hf.config.n_embd
        scale = (stream[0].var(-1, unbiased=False, keepdim=True) + norm.eps).rsqrt()
        read = (parts - parts.mean(-1, keepdim=True)) * scale * norm.weight
        read[-1] += norm.bias
        made = read @ attention.c_attn.weight
        made[-1] += attention.c_attn.bias
        q, k = (made[..., at * width :][..., HEAD * 8 : HEAD * 8 + 8] for at in (0, 1))
        return q[:, QUERY] @ k[:, KEY].T / 8**0.5
    gemma, home = "gemma" in model.name, importlib.import_module(type(attention).__module__)

    def normed(norm: Any, x: Tensor, whole: Tensor) -> Tensor:
        eps = norm.eps if gemma else norm.variance_epsilon
        return x * (whole.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * (norm.weight + gemma)

    read = normed(block.input_layernorm, parts, stream[0])
    q, k = attention.q_proj(read)[..., HEAD * 8 : HEAD * 8 + 8], attention.k_proj(read)[..., HEAD // 2 * 8 :][..., :8]
    if hasattr(attention, "q_norm"):
        q, k = normed(attention.q_norm, q, q.sum(0)), normed(attention.k_norm, k, k.sum(0))
    q, k = home.apply_rotary_pos_emb(q[:, None], k[:, None], *given["position_embeddings"])
    return q[:, 0, QUERY] @ k[:, 0, KEY].T * attention.scaling


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma3"])
def test_parts_equal_the_literal_ones(name: str) -> None:
    model, task = wrapped(name), id_task((5, 5))
    found = cf.attention_attribution(model, task, f"a1.h{HEAD}", KEY, example=0)
    with torch.no_grad():
        expected = _literal(model, task.clean[:1]).numpy()
    np.testing.assert_allclose(found.parts, expected, atol=1e-5 * abs(expected).max())


def test_rows_ranks_and_files(tmp_path: Path) -> None:
    model = cf.load("tiny", check=False)
    task = cf.task("ioi", model, n=3).on(model)
    found = cf.attention_attribution(model, task, "a3.h2", "IO", "end", against="S1", example=1)
    at = task.spans[1]["IO"][0]
    assert found.key == f"{at} {task.tokens[1][at].strip()}" and found.query.startswith(f"{len(task.tokens[1]) - 1} ")
    for key in (at - len(task.tokens[1]), found.key, found.key.split()[1]):
        other = cf.attention_attribution(model, task, "a3.h2", key, against="S1", example=1)
        np.testing.assert_array_equal(other.parts, found.parts)
    rows = found.rows()
    assert len(rows) == found.parts.size == len(found.nodes) ** 2
    assert sum(row.score for row in rows) == pytest.approx(found.score, abs=1e-9)
    assert sum(row.relative for row in rows) == pytest.approx(found.relative, abs=1e-9)
    sizes = [abs(row.relative) for row in found.top(5)]
    assert sizes == sorted((abs(row.relative) for row in rows), reverse=True)[:5]
    for side, chosen in (("query_side", found.query_side(4)), ("key_side", found.key_side(4))):
        for part in chosen:
            mine = [row.relative for row in rows if getattr(row, side) == part.node]
            assert part.relative == pytest.approx(sum(mine), abs=1e-9)
    again = cf.open(found.save(tmp_path / "why.json"))
    assert type(again) is type(found) and again.top(3) == found.top(3) and again.record == found.record
    assert found._repr_html_() and "constant" in found.nodes


def test_half_precision_is_near_single_precision() -> None:
    single, half = (
        cf.attention_attribution(wrapped("gemma3", kind), id_task((6, 6)), "a1.h3", 2, example=0)
        for kind in (torch.float32, torch.bfloat16)
    )
    assert abs(half.parts - single.parts).max() < 0.05 * abs(single.parts).max()


def test_several_prompts_are_averaged() -> None:
    model = cf.load("tiny", check=False)
    task = cf.task("ioi", model, n=3).on(model)
    whole = cf.attention_attribution(model, task, "a3.h2", "IO", against="S1")
    each = [cf.attention_attribution(model, task, "a3.h2", "IO", against="S1", example=row) for row in range(3)]
    np.testing.assert_allclose(whole.parts, np.mean([one.parts for one in each], axis=0), atol=1e-12)
    assert whole.relative == pytest.approx(np.mean([one.relative for one in each]), abs=1e-9)
    assert (whole.query, whole.key, whole.against, whole.record.n_examples) == ("end", "IO", "S1", 3)
    texts = cf.attention_attribution(model, list(task.prompts), "a3.h2", 1, 4)
    assert (texts.query, texts.key, texts.record.n_examples) == ("4", "1", 3)
    assert cf.attention_attribution(model, task.prompts[0], "a3.h2", 1).record.n_examples == 1


@pytest.mark.parametrize(
    ("name", "head", "key", "options", "error", "message"),
    [
        ("gpt2", "a1.h9", 0, {}, cf.ScoreError, "has no head 'a1.h9'"),
        ("gpt2", "a1.h0", 9, {}, cf.ScoreError, "key=9 is no token of the prompt: '0 "),
        ("gpt2", "a1.h0", 3, {"query": 1}, cf.ScoreError, "key '3 .*' comes after query '1 "),
        ("gpt2", "a1.h0", 0, {"query": 0}, cf.ScoreError, "has no other key: "),
        ("gpt2", "a1.h0", 0, {"against": 0}, cf.ScoreError, "has no other key at '0 "),
        ("gpt2", "a1.h0", "name", {}, cf.ScoreError, "key='name' is no token"),
        ("gpt2", "a1.h0", True, {}, cf.ScoreError, "key=True is no token"),
        ("mistral", "a1.h0", 0, {}, cf.ScoreError, "lies outside the window"),
        ("olmo-clipped", "a1.h0", 0, {}, cf.ModelError, "clipped"),
        ("deepseek_v3", "a1.h0", 0, {}, cf.ModelError, r"'deepseek_v3'\) cannot be divided by nodes"),
        ("lfm2", "a0.h0", 0, {}, cf.ScoreError, "has no head 'a0.h0'"),
        ("falcon", "a1.h0", 0, {}, cf.ModelError, "does not show its attention scores"),
    ],
)
def test_what_is_refused(
    name: str, head: str, key: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cf.attention_attribution(wrapped(name), id_task((6, 6)), head, key, **options)
