"""RelP against autograd through a copy of the model whose modules are the rules, written down one by one."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import EVERY_FAMILY, build, swept
from helpers import off
from test_components import GradientTwin, _estimate, _off
from torch import Tensor, nn
from toys import Twin, id_task, linear, node_sums, off_scores, wrapped

import circuitfind as cf
from circuitfind.attribution.by_example import example_effects
from circuitfind.attribution.method import Request
from circuitfind.attribution.methods import METHODS
from circuitfind.batch import Batch
from circuitfind.engine.backward_rules import RELP, backward_rules
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.reader_gradients import capture_gradients
from circuitfind.errors import ScoreError
from circuitfind.models.families import family_of

CLOSE = 1e-5  # of the largest score
MIXTURES = {"mixtral", "qwen3_moe", "gpt_oss", "dbrx", "granitemoe", "llama4_text"}
BENT = {"modernbert-decoder"}  # its head is not linear
MIXTURES |= {"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "axk1", "mistral4"}
MIXTURES |= {"jamba", "lfm2_moe", "qwen3_next", "qwen3_5_moe_text", "kimi_linear"}
INSIDE = {"lfm2", "granitemoehybrid"}  # no module of its own for the activation
TWINS = ["gpt2", "llama", "gemma2", "gpt_neox", "opt"]  # GELU, gated, gated with post-norms, parallel, ReLU
OTHERS = [name for name in EVERY_FAMILY if name not in {*TWINS, *MIXTURES, *BENT, *INSIDE}]
ACTIVATIONS = {"act", "act_fn", "activation_fn", "gelu_impl", "activation"}
GATED = {
    *("llama", "llama-biased", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo", "olmo-clipped"),
    *(
        "olmo2",
        "granite",
        "granite-biased",
        "glm4",
        "cohere",
        "phi3",
        "stablelm",
        "stablelm-parallel",
        "smollm3",
        "moshi",
    ),
    *("youtu", "youtu-direct", "minicpm3", "bamba", "olmo_hybrid", "recurrent_gemma", "qwen3_5_text"),
}
PLACES = {"gpt2": ("resid", "neurons"), "llama": ("heads", "k"), "gemma2": ("attn", "mlp", "pattern"), "opt": ("mlp",)}


# -------------------------------------------------------------------- the rules, by their definition
class LinearLayerNorm(nn.Module):
    """LayerNorm divided by a standard deviation that no gradient goes through."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        deviation = ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True) + self.norm.eps
        return (x - x.mean(-1, keepdim=True)) / deviation.sqrt().detach() * self.norm.weight + self.norm.bias


class LinearRMSNorm(nn.Module):
    """RMSNorm divided by a root mean square that no gradient goes through; Gemma's weight is around 0."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        gemma = "Gemma" in type(norm).__name__
        self.weight = norm.weight + 1 if gemma else norm.weight
        self.eps = norm.eps if gemma else norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt().detach() * self.weight


class IdentityRule(nn.Module):
    """An activation as its input times a constant, which is 0 where the input is."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.activation(x) / x).nan_to_num(0).detach()


class GatedMLP(nn.Module):
    """Half of the product is a constant."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = IdentityRule(mlp.act_fn)

    def forward(self, x: Tensor) -> Tensor:
        product = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(product / 2 + (product / 2).detach())


def by_the_rules(hf: nn.Module) -> nn.Module:
    """A copy of a model whose modules are those above."""
    hf = copy.deepcopy(hf)
    for module in list(hf.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, LinearLayerNorm(child))
            elif type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, LinearRMSNorm(child))
            elif hasattr(child, "gate_proj"):
                setattr(module, name, GatedMLP(child))
            elif name == "act":
                setattr(module, name, IdentityRule(child))
    return hf


# ------------------------------------- the same around modules of any family: what they compute is asked of themselves
class AnyLinearNorm(nn.Module):
    """A norm as a constant times its centred input."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.centred = norm, "RMS" not in type(norm).__name__

    def forward(self, x: Tensor) -> Tensor:
        bias = self.norm(torch.zeros_like(x)).detach()
        seen = x - x.mean(-1, keepdim=True) if self.centred else x
        return seen * ((self.norm(x) - bias) / seen).nan_to_num(0).detach() + bias


def by_the_rules_of(name: str) -> nn.Module:
    """A copy of a model of any family with the rules around its own modules."""
    hf = copy.deepcopy(build(name))
    family = family_of(hf.config)
    blocks, paths = hf.get_submodule(family.layers), [family.final_norm]
    mixers: list[str] = []  # what is inside them keeps its gradient, as attention does
    for index, row in enumerate(map(family.of_block, blocks)):
        norms = {row.attn_norm, row.mlp_norm, row.post_attn_norm, row.post_mlp_norm} - {None}
        paths += [f"{family.layers}.{index}.{norm}" for norm in norms]
        mixers += [f"{family.layers}.{index}.{row.mixer}."] if row.mixer else []
    rules = {path: AnyLinearNorm(hf.get_submodule(path)) for path in paths}
    for path, module in hf.named_modules():
        of_mixer = any(mixer in path for mixer in mixers)
        if path.split(".")[-1] in ACTIVATIONS and not list(module.parameters()) and not of_mixer:
            rules[path] = IdentityRule(module)
    for path, rule in rules.items():
        parent, _, last = path.rpartition(".")
        setattr(hf.get_submodule(parent), last, rule)
    for block in blocks if name in GATED else ():
        block.get_submodule(family.down).register_forward_pre_hook(lambda _, x: (x[0] / 2 + (x[0] / 2).detach(),))
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
    scores = cf.attribute(wrapped(name), bound, "relp", direction=direction, batch_size=2)
    expected = Twin(ruled(name), bound).estimates([alpha])
    assert off_scores(scores, expected) < CLOSE
    ordinary = cf.attribute(wrapped(name), bound, "eap", direction=direction)
    assert off_scores(ordinary, expected) > 0.05  # the rules matter
    nodes = cf.attribute(wrapped(name), bound, "relp", level="node", direction=direction)
    np.testing.assert_allclose(nodes.values, node_sums(expected), atol=CLOSE * float(expected.abs().max()) * 10)


@pytest.mark.parametrize("name", swept(OTHERS))
def test_edges_of_every_other_family(name: str) -> None:
    model = wrapped(name)
    bound = id_task((6, 4, 5)).on(model)
    scores = cf.attribute(model, bound, "relp", batch_size=2)
    expected = Twin(dataclasses.replace(model, hf=by_the_rules_of(name)), bound).estimates([1])
    assert off_scores(scores, expected) < 2 * CLOSE  # rounding: 1.1e-5 in the family where it is largest
    assert off_scores(cf.attribute(model, bound, "eap"), expected) > 0.05  # the rules matter


@pytest.mark.parametrize(("name", "what"), [(name, what) for name, kinds in PLACES.items() for what in kinds])
def test_places_equal_autograd_through_the_rules(name: str, what: str) -> None:
    model, layers = wrapped(name), (1,) if what == "neurons" else (0, 1)
    bound = id_task((5, 5)).on(model)
    for direction, alpha in (("noising", 1), ("denoising", 0)):
        sweep = _estimate(model, bound, what, method="relp", by_position=True, layers=layers, direction=direction)
        assert _off(sweep, GradientTwin(ruled(name), bound).estimates(what, layers, [(1, alpha)])) < 1e-4
        assert sweep.record.method == "relp"


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_ablations_equal_the_twin(ablation: str) -> None:
    bound = id_task((6, 4, 5)).on(wrapped("llama"))
    scores = cf.attribute(wrapped("llama"), bound, "relp", ablation=ablation)
    assert off_scores(scores, Twin(ruled("llama"), bound, ablation).estimates([1])) < CLOSE


# -------------------------------------------------------------------- what the rules are for
def conserving(name: str) -> cf.Model:
    """A model without biases whose attention patterns are constants, because its queries and keys are zero."""
    hf = build(name, dtype=torch.float64)
    with torch.no_grad():
        for key, parameter in hf.named_parameters():
            if key.endswith("bias") or any(part in key for part in ("q_proj", "k_proj")):
                parameter.zero_()
            elif key.endswith("c_attn.weight"):
                parameter[:, : 2 * parameter.shape[0]] = 0
    return cf.wrap(hf, None, name=name)


@pytest.mark.parametrize("name", ["gpt2", "llama", "olmo2", "phi"])
def test_relevance_is_conserved(name: str) -> None:
    """Values times coefficients add up to the logit at every cut, without biases and at constant patterns."""
    model = conserving(name)
    task = id_task((6, 6, 6), metric=lambda logits, _: logits[:, 9])
    options: dict[str, Any] = {"what": "resid", "ablation": "zero"}
    sweep = _estimate(model, task, method="relp", **options)
    total = sweep.per_example.reshape(2, 6, 3).sum(1)
    np.testing.assert_allclose(total, np.broadcast_to(sweep.full, total.shape), rtol=1e-6)
    ordinary = _estimate(model, task, method="atp", **options).per_example.reshape(2, 6, 3).sum(1)
    assert (np.abs(ordinary - sweep.full) > 0.05 * np.abs(sweep.full)).all()


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_a_linear_model_is_estimated_exactly(direction: str) -> None:
    found, exact = (cf.attribute(linear(), id_task((6, 6)), name, direction=direction) for name in ("relp", "exact"))
    assert off_scores(found, torch.from_numpy(exact.values)) < 1e-4


# -------------------------------------------------------------------- every family
def summed(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)[..., 5].sum(-1)


@pytest.mark.parametrize("name", swept(sorted(set(EVERY_FAMILY) - MIXTURES - BENT - INSIDE)))
def test_the_model_computes_the_same_to_the_bit(name: str, pairs: Batch) -> None:
    model = wrapped(name)
    plain = capture_gradients(model.adapter, pairs.clean, summed)
    hooked = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.hf.modules()]
    found = {}
    for backend in ("nnsight", "hooks"):
        with backward_rules(model.adapter, RELP):
            model.adapter.backend = backend
            try:
                found[backend] = capture_gradients(model.adapter, pairs.clean, summed)
            finally:
                model.adapter.backend = "nnsight"
        for kind in ("resid", "mlps", "heads"):
            expected, values = getattr(plain.run, kind), getattr(found[backend].run, kind)
            assert all(torch.equal(*both) for both in zip(expected, values, strict=True))
        assert torch.equal(found[backend].run.logits, plain.run.logits)
    for one, other, ordinary in zip(found["nnsight"].at.mlp, found["hooks"].at.mlp, plain.at.mlp, strict=True):
        assert torch.equal(one, other) and off(one, ordinary) > 1e-3
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules()] == hooked


def test_scores_in_half_precision() -> None:
    exact = cf.attribute(wrapped("gemma2"), id_task((5, 5, 5)), "relp")
    for dtype in (torch.bfloat16, torch.float16):
        half = cf.attribute(wrapped("gemma2", dtype), id_task((5, 5, 5)), "relp")
        assert off_scores(half, torch.from_numpy(exact.values)) < 0.1


# -------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_mixtures_of_experts_are_refused(name: str) -> None:
    with pytest.raises(ScoreError, match=f"in '{name}' they lie inside mixtures of experts, out of reach"):
        cf.attribute(wrapped(name), id_task((5, 5)), "relp")


def test_an_activation_that_is_no_module_is_refused() -> None:
    hf = build("gpt2")
    mlp = hf.transformer.h[1].mlp
    mlp.forward = lambda x: mlp.c_proj(nn.functional.gelu(mlp.c_fc(x)))
    model = cf.wrap(hf, None, backend="hooks")
    with pytest.raises(ScoreError, match=r"'transformer\.h\.1\.mlp\.act', but the model's forward pass does not call"):
        cf.attribute(model, id_task((5, 5)), "relp")
    mlp.act = nn.Dropout()
    with pytest.raises(ScoreError, match=r"no single module for it in 'transformer\.h\.1\.mlp' \(found: none\)"):
        cf.attribute(model, id_task((5, 5)), "relp")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hf.modules())


def test_a_flat_metric_is_refused() -> None:
    with pytest.raises(ScoreError, match="flat at the clean run"):
        cf.attribute(wrapped("gpt2"), id_task((5, 5), metric="kl"), "relp")
    cf.attribute(wrapped("gpt2"), id_task((5, 5), metric="kl"), "relp", direction="denoising")


# -------------------------------------------------------------------- beside other tools of the house
def test_examples_apart_add_up_to_the_scores() -> None:
    model = wrapped("llama")
    bound = id_task((5, 4, 5)).on(model)
    for direction in ("noising", "denoising"):
        apart = example_effects(Experiment.of(model, bound, {"direction": direction}), METHODS["relp"], Request("edge"))
        together = cf.attribute(model, bound, "relp", direction=direction).to_dict()
        np.testing.assert_allclose(apart.mean(0), list(together.values()), atol=1e-6)


def test_it_costs_what_attribution_patching_costs() -> None:
    found = cf.compare(cf.load("tiny"), cf.task("ioi", cf.load("tiny"), n=8), ["eap", "relp"])
    one, other = (found[name].costs for name in ("eap", "relp"))
    assert (one.forwards, one.backwards) == (other.forwards, other.backwards)
    assert one.forwards <= 2 and one.backwards <= 1  # less where prompts begin alike


def test_estimates_are_held_against_exact_effects() -> None:
    tiny = cf.load("tiny")
    task = cf.task("greater-than", tiny, n=12)
    r = {name: cf.approximation(tiny, task, "heads", method=name).by_kind["heads"].r for name in ("atp", "relp")}
    assert r["relp"] > 0.9 and r["atp"] < 0.8


@pytest.mark.shared
def test_a_story_model(shared: Path) -> None:
    """Trained weights, gated MLPs, grouped queries."""
    folder = str(shared / "models/stories260K")
    model = cf.load(folder, check=False)
    bound = cf.task("copy", model, n=2).on(model)
    twin = Twin(dataclasses.replace(model, hf=by_the_rules(cf.load(folder, check=False).hf)), bound)
    assert off_scores(cf.attribute(model, bound, "relp"), twin.estimates([1])) < CLOSE
