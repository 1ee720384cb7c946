"""Norms as formulas: `norm(x) = r(x) * C x * weight + bias` with one scale r per token.

`C` subtracts the mean (LayerNorm) or is the identity (RMSNorm), and `r = 1 / sqrt(mean((C x)^2) + eps)`. Weight and
bias are found by running the module on probes, so that every variant (1 + weight, no weight, Cohere's) is one class
here; a module of another form is refused.
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
    """A LayerNorm or RMSNorm. `weight`: `[d_model]` float32 (float64 for a float64 model); `bias`: the same, or None
    where it is zero; `fixed_scale`: `pull_back` treats r as a constant."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool
    fixed_scale: bool = False

    @classmethod
    def of(cls, module: nn.Module, width: int, name: str, device: torch.device) -> Norm:
        """Reads a norm module's formula; ModelError if the module is neither a LayerNorm nor an RMSNorm."""
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
            if eps is None:  # OLMo's is not an attribute: compare a small input with a large one
                small, large = 1e-3, 1e3
                ratio = (probe(pattern * small) - bias)[0] ** 2 / (probe(pattern * large) - bias)[0] ** 2
                eps = float(small**2 * large**2 * (1 - ratio) / (ratio * large**2 - small**2))
                eps = eps if 0 <= eps < 1 else math.nan  # a module that only passes x on is like an endless one
            weight = (probe(pattern) - bias) / pattern * (1 + eps) ** 0.5
            ramp = torch.linspace(-1, 2, width, dtype=dtype, device=device)
            for centred in (True, False):
                norm = cls(weight, bias if bias.any() else None, float(eps), centred)
                expected = probe(ramp)
                if torch.allclose(norm(ramp), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())):
                    return norm
        raise ModelError(f"norm '{name}' ({type(module).__name__}) is neither a LayerNorm nor an RMSNorm")

    def centre(self, x: Tensor) -> Tensor:
        """`C x`."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Tensor) -> Tensor:
        """`r(x) [..., 1]`."""
        return self._scale_of(self.centre(x))

    def _scale_of(self, centred: Tensor) -> Tensor:
        return torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + self.eps)

    def __call__(self, x: Tensor) -> Tensor:
        centred = self.centre(x)
        y = centred * (self._scale_of(centred) * self.weight)
        return y if self.bias is None else y + self.bias

    def pull_back(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at the input x from that at the output: `C^T (g - y mean(g y))` with `g = r weight gradient`."""
        y, r = self.normed(x)
        return self.centre(self.less_scale(y, gradient * self.weight * r))

    def normed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`y = r C x` and the scale `r [..., 1]`."""
        centred = self.centre(x)
        r = self._scale_of(centred)
        return centred * r, r

    def less_scale(self, y: Tensor, gradient: Tensor) -> Tensor:
        """`g - y mean(g y)`: what a gradient loses because the scale depends on x. Changes `gradient [(readers,) ...,
        d_model]`, which has r and the weight in it, in place; `y [..., d_model]` is from `normed`."""
        if self.fixed_scale:
            return gradient
        along = torch.linalg.vecdot(gradient, y) / y.shape[-1]
        return gradient.addcmul_(y, along.unsqueeze(-1), value=-1)

    def fold(self, projection: Tensor) -> Tensor:
        """`C^T diag(weight) projection` for a projection `[d_model, ...]` that reads the normed stream: then
        `projection^T norm(x) = r(x) * fold^T x + projection^T bias`."""
        folded = projection * self.weight.view(-1, *[1] * (projection.ndim - 1))
        return folded - folded.mean(0, keepdim=True) if self.centred else folded
