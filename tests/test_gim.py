"""GIM against autograd through a copy of the model whose norms, MLPs and attention are its formulas, written out."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from helpers import off
from test_components import GradientTwin, _estimate, _off
from test_relp import LinearLayerNorm, LinearRMSNorm
from torch import Tensor, nn
from toys import Twin, id_task, node_sums, off_scores, wrapped
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.pytorch_utils import Conv1D

import circuitfind as cf
from circuitfind.batch import Batch
from circuitfind.engine.backward_rules import GIM, backward_rules
from circuitfind.engine.reader_gradients import capture_gradients
from circuitfind.errors import ScoreError

CLOSE = 1e-5  # of the largest score
TWINS = ["gpt2", "gpt_neox", "llama", "gemma2", "gemma3"]  # fused, parallel, grouped, post-norms, norms of q and k


# -------------------------------------------------------------------- the rules, by their definition
class Less(torch.autograd.Function):
    """A value of whose gradient so much is handed on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.share, None


class SoftmaxAtTwo(torch.autograd.Function):
    """Softmax, with the Jacobian `diag(s) - s s^T` of a softmax of half the scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        ctx.save_for_backward(scores)
        return scores.softmax(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        s = (ctx.saved_tensors[0] / 2).softmax(-1)
        jacobian = torch.diag_embed(s) - s.unsqueeze(-1) * s.unsqueeze(-2)
        return (jacobian @ gradient.unsqueeze(-1)).squeeze(-1)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`[batch, heads, position, d_head]` each; keys and values of fewer heads serve several."""
    query, key, value = Less.apply(query, 0.25), Less.apply(key, 0.25), Less.apply(value, 0.5)
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scaling, cap = options.get("scaling"), options.get("softcap")
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if cap is None else cap * (scores / cap).tanh()
    scores = scores if attention_mask is None else scores + attention_mask
    pattern = SoftmaxAtTwo.apply(scores)
    return (pattern @ value).transpose(1, 2), pattern


AttentionInterface.register("written-out", attention)
AttentionMaskInterface.register("written-out", eager_mask)


class Gated(nn.Module):
    """A gated MLP of whose gate and up projection half the gradient is handed on."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(Less.apply(self.gate_proj(x), 0.5)) * Less.apply(self.up_proj(x), 0.5))


def by_the_rules(hf: Any) -> Any:
    hf = copy.deepcopy(hf)
    for module in list(hf.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, LinearLayerNorm(child))
            elif type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, LinearRMSNorm(child))
            elif hasattr(child, "gate_proj"):
                setattr(module, name, Gated(child))
    hf.set_attn_implementation("written-out")
    return hf


@cache
def ruled(name: str) -> cf.Model:
    """For the twins, which look at the module alone."""
    return dataclasses.replace(wrapped(name), hf=by_the_rules(build(name)))


# -------------------------------------------------------------------- against the twins
@pytest.mark.parametrize(("direction", "alpha"), [("noising", 1), ("denoising", 0)])
@pytest.mark.parametrize("name", TWINS)
def test_edges_equal_autograd_through_the_rules(name: str, direction: str, alpha: int) -> None:
    bound = id_task((7, 5, 6)).on(wrapped(name))
    scores = cf.attribute(wrapped(name), bound, "gim", direction=direction, batch_size=2)
    expected = Twin(ruled(name), bound).estimates([alpha])
    assert off_scores(scores, expected) < CLOSE
    ordinary = cf.attribute(wrapped(name), bound, "eap", direction=direction)
    assert off_scores(ordinary, expected) > 0.05  # the rules matter
    nodes = cf.attribute(wrapped(name), bound, "gim", level="node", direction=direction)
    np.testing.assert_allclose(nodes.values, node_sums(expected), atol=CLOSE * float(expected.abs().max()) * 10)


@pytest.mark.parametrize(("name", "what"), [("gpt2", "q"), ("llama", "k"), ("gemma3", "v"), ("gemma2", "heads")])
def test_places_equal_autograd_through_the_rules(name: str, what: str) -> None:
    """Queries, keys and values among them: of what arrives there, the rest of the model has kept its part."""
    bound = id_task((5, 5)).on(wrapped(name))
    sweep = _estimate(wrapped(name), bound, what, method="gim", by_position=True)
    assert _off(sweep, GradientTwin(ruled(name), bound).estimates(what, (0, 1), [(1, 1)])) < 1e-4


def test_the_embedded_model() -> None:
    """Trained weights."""
    model = cf.load("tiny", check=False)
    bound = cf.task("ioi", model, n=2).on(model)
    twin = Twin(dataclasses.replace(model, hf=by_the_rules(model.hf)), bound)
    assert off_scores(cf.attribute(model, bound, "gim"), twin.estimates([1])) < CLOSE


@pytest.mark.shared
def test_figures_of_the_prototype(shared: Path) -> None:
    """Trained weights, gated MLPs, grouped queries; `FIELD.md` 2.15."""
    model = cf.load(str(shared / "models/stories260K"), check=False)
    table = cf.compare(model, cf.Task.from_file(Path(__file__).parents[1] / "examples/pronouns.jsonl"), ["gim"])
    assert (table["gim"].cpr, table["gim"].cmd) == (pytest.approx(0.941, abs=1e-3), pytest.approx(0.142, abs=1e-3))


# -------------------------------------------------------------------- the model is as it was
def test_the_model_computes_the_same(pairs: Batch) -> None:
    """Up to rounding: attention is computed step by step."""
    for name in ("llama", "gemma2"):
        model = wrapped(name)
        before = model.hf.config._attn_implementation
        plain = capture_gradients(model.adapter, pairs.clean, lambda logits: logits[..., 5].sum(-1))
        found = []
        for backend in ("nnsight", "hooks"):
            with backward_rules(model.adapter, GIM) as under:
                model.adapter.backend = backend
                try:
                    found.append(
                        capture_gradients(
                            model.adapter, pairs.clean, lambda logits: logits[..., 5].sum(-1), hand_on=under.hand_on
                        )
                    )
                finally:
                    model.adapter.backend = "nnsight"
        assert off(found[0].run.logits, plain.run.logits) < 1e-5
        for one, other in zip(found[0].at.mlp, found[1].at.mlp, strict=True):
            assert torch.equal(one, other)
        assert model.hf.config._attn_implementation == before
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.hf.model.layers.modules())


@pytest.mark.parametrize("name", ["moshi", "codegen", "cohere", "bloom"])
def test_attention_of_other_forms_is_met(name: str) -> None:
    """An output projection inside a module, quarters of heads, norms of queries and keys by head, a residual inside."""
    found, plain = (cf.attribute(wrapped(name), id_task((5, 5)), method) for method in ("gim", "eap"))
    assert off_scores(found, torch.from_numpy(plain.values)) > 0.05


# -------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mixtral", "in 'mixtral' they lie inside mixtures of experts, out of reach"),
        ("youtu", r"'model\.layers\.0' of 'youtu' has latent attention in place of queries"),
        ("lfm2", r"'model\.layers\.0' of 'lfm2' has a mixer in place of queries"),
        ("falcon", r"one softmax of 'transformer\.h\.0\.self_attention', which calls 0: load the model with attn_imp"),
    ],
)
def test_what_the_rules_do_not_cover_is_refused(name: str, why: str) -> None:
    with pytest.raises(ScoreError, match=why):
        cf.attribute(wrapped(name), id_task((5, 5)), "gim")


@pytest.mark.parametrize("method", ["gim", "relp"])
def test_a_gated_mlp_of_another_form_is_refused(method: str) -> None:
    """Never half the rules: a third factor beside gate and up projection, or a gate of its own width."""
    hf = build("gpt2")
    mlp = hf.transformer.h[1].mlp
    mlp.gate = Conv1D(1, 32)
    mlp.forward = lambda x: mlp.c_proj(mlp.act(mlp.c_fc(x)) * mlp.gate(x).sigmoid())
    with pytest.raises(ScoreError, match=r"input of 'transformer\.h\.1\.mlp\.c_proj' is neither as wide"):
        cf.attribute(cf.wrap(hf, None, backend="hooks", check=False), id_task((5, 5)), method)


def test_attention_with_a_softmax_of_its_own_is_refused() -> None:
    hf = build("gpt2")
    attn = hf.transformer.h[1].attn
    whole = attn.forward
    attn.forward = lambda x, **options: whole(x + 0 * x.softmax(-1), **options)
    with pytest.raises(ScoreError, match=r"one softmax of 'transformer\.h\.1\.attn', which calls 2"):
        cf.attribute(cf.wrap(hf, None, backend="hooks", check=False), id_task((5, 5)), "gim")
