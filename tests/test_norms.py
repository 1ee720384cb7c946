"""Norms as formulas, against the model's own modules and autograd through them."""

from __future__ import annotations

import copy
from functools import cache
from itertools import product

import pytest
import torch
from families import EVERY_FAMILY, build, swept
from helpers import off
from torch import Tensor, nn

from circuitfind.errors import ModelError
from circuitfind.models.families import family_of
from circuitfind.models.norms import Norm

WIDTH = 32


@cache
def norms_of(name: str) -> dict[str, nn.Module]:
    """A model's norms by their path, all that the name table knows."""
    model = build(name)
    family = family_of(model.config)
    family = family.of_block(model.get_submodule(f"{family.layers}.1"))
    paths = [family.final_norm]
    for part in (family.attn_norm, family.mlp_norm, family.post_attn_norm, family.post_mlp_norm):
        paths += [f"{family.layers}.1.{part}"] if part else []
    return {path: model.get_submodule(path) for path in paths}


def formula(module: nn.Module) -> Norm:
    return Norm.of(module, WIDTH, "norm", torch.device("cpu"))


def streams(scale: float = 3.0) -> Tensor:
    """`[2, 5, d_model]` with a mean far from zero, which only some norms take off."""
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)) * scale + 2 * scale


@pytest.mark.parametrize("name", swept(EVERY_FAMILY))
def test_the_formula_is_the_module(name: str) -> None:
    """At the small scale eps decides the result."""
    for (path, module), scale in product(norms_of(name).items(), (3.0, 1e-3)):
        x = streams(scale)
        assert off(formula(module)(x), module(x)) < 1e-5, (path, scale)


@pytest.mark.parametrize("name", swept(EVERY_FAMILY))
def test_the_vector_jacobian_product_is_autograds(name: str) -> None:
    for (path, module), scale in product(norms_of(name).items(), (3.0, 1e-2)):
        x, gradient = streams(scale).requires_grad_(), torch.randn(2, 5, WIDTH)
        expected = torch.autograd.grad(module(x), x, gradient)[0]
        assert off(formula(module).pull_back(x.detach(), gradient), expected) < 2e-5, (path, scale)


@pytest.mark.parametrize("name", swept(EVERY_FAMILY))
def test_folding_into_a_projection(name: str) -> None:
    for path, module in norms_of(name).items():
        norm, x, projection = formula(module), streams(), torch.randn(WIDTH, 3, 4)
        expected = torch.tensordot(module(x), projection, 1)
        value = norm.scale(x)[..., None] * torch.tensordot(x, norm.fold(projection), 1)
        if norm.bias is not None:
            value = value + torch.tensordot(norm.bias, projection, 1)
        assert off(value, expected) < 1e-5, path


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "glm4"])
def test_parts_share_a_post_norms_scale(name: str) -> None:
    """What lets a head's share of a normed attention output be written down exactly."""
    for path, module in norms_of(name).items():
        norm, parts = formula(module), torch.randn(3, 2, 5, WIDTH)
        shares = norm.centre(parts) * norm.scale(parts.sum(0)) * norm.weight
        assert off(shares.sum(0), module(parts.sum(0))) < 1e-5, path


def test_kinds_are_told_apart() -> None:
    kinds = {name: next(iter(norms_of(name).values())) for name in ("gpt2", "olmo", "cohere", "llama", "gemma")}
    assert [formula(module).centred for module in kinds.values()] == [True, True, True, False, False]
    assert formula(kinds["gpt2"]).bias is not None and formula(kinds["llama"]).bias is None
    assert off(formula(kinds["gemma"]).weight, 1 + kinds["gemma"].weight) < 1e-6
    assert off(formula(kinds["olmo"]).weight, torch.ones(WIDTH)) < 1e-6
    assert abs(formula(kinds["olmo"]).eps / 1e-5 - 1) < 1e-2  # hidden inside its forward: measured


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_of_the_formula(dtype: torch.dtype) -> None:
    module = copy.deepcopy(norms_of("gpt2")["transformer.ln_f"]).to(dtype)
    norm = formula(module)
    assert norm.weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert off(norm.weight, module.weight) < (1e-12 if dtype == torch.float64 else 1e-6)
    assert next(module.parameters()).dtype == dtype


class Squash(nn.Module):
    eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class MeanAbsolute(nn.Module):
    eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + self.eps)


@pytest.mark.parametrize("module", [Squash(), MeanAbsolute()], ids=["tanh", "mean absolute"])
def test_other_forms_are_refused(module: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"norm 'layers.0.norm' \(\w+\) is neither a LayerNorm nor an RMSNorm"):
        Norm.of(module, WIDTH, "layers.0.norm", torch.device("cpu"))
