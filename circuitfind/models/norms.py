"""Norms as formulas: `norm(x) = r(x) * C x * weight + bias` with one scale r per token.

`C` subtracts the mean (LayerNorm) or is the identity (RMSNorm), and `r = 1 / sqrt(mean((C x)^2) + eps)`. Weight and
bias are found by running the module on test inputs, so one class covers every variant (1 + weight, no weight,
Cohere's). A module that does not compute this formula is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from circuitfind.errors import ModelError
from circuitfind.models.placement import twin


@dataclass(frozen=True, eq=False)
class Norm:
    """A LayerNorm or RMSNorm. `weight`: `[d_model]` float32 (float64 for a float64 model); `bias`: the same, or None if
    it is zero; `centred`: whether C subtracts the mean; `fixed_scale`: gradients treat r as a constant."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool
    fixed_scale: bool = False

    @classmethod
    def of(cls, module: nn.Module, width: int, name: str, device: torch.device) -> Norm:
        """Return a norm module as a formula; ModelError if the module is neither a LayerNorm nor an RMSNorm."""
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        parameter = next(module.parameters(), None)
        dtype = torch.float64 if parameter is not None and parameter.dtype == torch.float64 else torch.float32
        probe = twin(module).to(device, dtype)
        pattern = torch.ones(width, dtype=dtype, device=device)  # mean 0, mean square 1: the same for both kinds
        pattern[1::2] = -1
        if width % 2:
            pattern[-3:] = torch.tensor([1.0, 1.0, -2.0], dtype=dtype, device=device) / 2**0.5
        with torch.no_grad():
            bias = probe(torch.zeros_like(pattern))
            if eps is None:  # OLMo's eps is not an attribute: compare a small input with a large one
                small, large = 1e-3, 1e3
                ratio = (probe(pattern * small) - bias)[0] ** 2 / (probe(pattern * large) - bias)[0] ** 2
                eps = float(small**2 * large**2 * (1 - ratio) / (ratio * large**2 - small**2))
                eps = eps if 0 <= eps < 1 else math.nan  # for the identity, the formula gives a huge eps
            weight = (probe(pattern) - bias) / pattern * (1 + eps) ** 0.5
            ramp = torch.linspace(-1, 2, width, dtype=dtype, device=device)
            for centred in (True, False):
                norm = cls(weight, bias if bias.any() else None, float(eps), centred)
                expected = probe(ramp)
                if torch.allclose(norm(ramp), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())):
                    return norm
        raise ModelError(f"norm '{name}' ({type(module).__name__}) is neither a LayerNorm nor an RMSNorm")

    def centre(self, x: Tensor) -> Tensor:
        """Return `C x`."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Tensor) -> Tensor:
        """Return `r(x) [..., 1]`."""
        return self._scale_of(self.centre(x))

    def _scale_of(self, centred: Tensor) -> Tensor:
        return torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + self.eps)

    def __call__(self, x: Tensor) -> Tensor:
        centred = self.centre(x)
        y = centred * (self._scale_of(centred) * self.weight)
        return y if self.bias is None else y + self.bias

    def pull_back(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient at the input x, given the one at the output: `C^T (g - y mean(g y))` with `y = r C x` and
        `g = r weight gradient`."""
        y, r = self.normed(x)
        return self.centre(self.less_scale(y, gradient * self.weight * r))

    def normed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `y = r C x` and the scale `r [..., 1]`."""
        centred = self.centre(x)
        r = self._scale_of(centred)
        return centred * r, r

    def less_scale(self, y: Tensor, gradient: Tensor) -> Tensor:
        """Subtract the part of a gradient along y, because the scale depends on x: `g - y mean(g y)`, in place.

        `gradient`: `[(readers,) ..., d_model]`, already times r and the weight; `y`: `[..., d_model]` from `normed`.
        With `fixed_scale` nothing is subtracted.
        """
        if self.fixed_scale:
            return gradient
        along = torch.linalg.vecdot(gradient, y) / y.shape[-1]
        return gradient.addcmul_(y, along.unsqueeze(-1), value=-1)

    def fold(self, projection: Tensor) -> Tensor:
        """Fold the norm into a projection `[d_model, ...]` of the normed stream: return `F = C^T diag(weight)
        projection`, so that `projection^T norm(x) = r(x) F^T x + projection^T bias`."""
        folded = projection * self.weight.view(-1, *[1] * (projection.ndim - 1))
        return folded - folded.mean(0, keepdim=True) if self.centred else folded
