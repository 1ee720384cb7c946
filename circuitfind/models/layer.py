"""One block of a model: its weights by head, its norms, and what it writes to the residual stream.

Given the scale s of the post-norm (1 without one), what attention adds to the stream is linear in the concatenated
heads `z`: head h writes `(s z_h) W_O^h`, with the post-norm's weight and the residual multiplier folded into `W_O`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from circuitfind.errors import ModelError
from circuitfind.models.families import Family
from circuitfind.models.layout import Heads, Layout
from circuitfind.models.norms import Norm


def module_at(root: Any, path: str) -> Any:
    """The module (or nnsight envoy) at a dotted path."""
    return functools.reduce(lambda at, key: at[int(key)] if key.isdigit() else getattr(at, key), path.split("."), root)


def _weight(module: Any) -> Tensor:
    """`[in, out]` view of a projection's weight."""
    weight: Tensor = module.weight if isinstance(module, Conv1D) else module.weight.T
    return weight


@dataclass(frozen=True, eq=False)
class LayerView:
    """One block: its paths, its projections and norms.

    Weights are read from the modules at each use, in `work` precision, so no copy stays in memory.
    """

    path: str
    family: Family
    layout: Layout
    block: Any
    attn_norm: Norm | None
    mlp_norm: Norm | None
    post_attn_norm: Norm | None
    post_mlp_norm: Norm | None
    multiplier: float
    work: torch.dtype

    def module(self, name: str) -> Any:
        return module_at(self.block, name)

    @property
    def device(self) -> torch.device:
        parameter: Tensor = next(self.block.parameters())
        return parameter.device

    def _projections(self) -> list[nn.Module]:
        names = (self.family.qkv,) if self.family.qkv else (self.family.q, self.family.k, self.family.v)
        return [self.module(name) for name in names]

    def _as_heads(self, parts: list[Tensor]) -> Heads:
        if len(parts) == 1:
            return self.layout.split(parts[0])
        return Heads(*(part.unflatten(-1, (-1, self.layout.d_head)) for part in parts))

    def qkv_weight(self) -> Heads:
        """`[d_model, heads, d_head]` each for q, k and v."""
        return self._as_heads([_weight(m).detach().to(self.work) for m in self._projections()])

    def qkv_bias(self) -> Heads | None:
        """`[heads, d_head]` each, or None where the projections have none."""
        biases: list[Any] = [m.bias for m in self._projections()]
        if all(bias is None for bias in biases):
            return None
        widths = [_weight(m).shape[1] for m in self._projections()]
        zero = functools.partial(torch.zeros, device=self.device, dtype=self.work)
        parts = [zero(n) if b is None else b.detach().to(self.work) for b, n in zip(biases, widths, strict=True)]
        return self._as_heads(parts)

    def output_weight(self) -> Tensor:
        """`[heads, d_head, d_model]`: W_O with the post-norm's weight and the residual multiplier folded in."""
        weight = self._written_by(self.module(self.family.o), self.post_attn_norm)
        by_head: Tensor = weight.unflatten(0, (self.layout.n_heads, self.layout.d_head))
        return by_head

    def mlp_weights(self) -> tuple[Tensor, Tensor]:
        """`[d_model, hidden]`, all projections of the MLP's input, and `[hidden, d_model]`, its output projection.

        The first without changes, the second with the post-norm's weight and the residual multiplier folded in.

        Raises:
            ModelError: the MLP has no single output projection (a mixture of experts).
        """
        if self.family.down is None:
            raise ModelError("its MLPs are mixtures of experts: which weights are used depends on the prompt")
        down = self.module(self.family.down)
        inside = self.module(self.family.mlp_in).modules()
        reading = [module for module in inside if isinstance(module, (nn.Linear, Conv1D)) and module is not down]
        read = torch.cat([_weight(module).detach().to(self.work) for module in reading], dim=1)
        return read, self._written_by(down, self.post_mlp_norm)

    def _written_by(self, module: Any, norm: Norm | None) -> Tensor:
        weight = _weight(module).detach().to(self.work)
        if norm is not None:
            weight = norm.centre(weight) * norm.weight
        return weight * self.multiplier if self.multiplier != 1 else weight

    def scaled_heads(self, z: Tensor, attn_out: Tensor) -> Tensor:
        """`[batch, pos, heads, d_head]` heads times the post-norm's scale at this run, ready for `output_weight`."""
        heads: Tensor = z.to(self.work).unflatten(-1, (self.layout.n_heads, self.layout.d_head))
        if self.post_attn_norm is None:
            return heads
        return heads * self.post_attn_norm.scale(attn_out.to(self.work)).unsqueeze(-1)

    def attn_written(self, attn_out: Tensor) -> Tensor:
        """`[batch, pos, d_model]`: what attention, with its bias, adds to the stream."""
        return self._written(attn_out.to(self.work), self.post_attn_norm)

    def mlp_written(self, mlp_out: Tensor) -> Tensor:
        """`[batch, pos, d_model]`: what the MLP adds to the stream, without its output projection's bias."""
        bias = self._bias(self.family.down)
        mlp_out = mlp_out.to(self.work)
        return self._written(mlp_out if bias is None else mlp_out - bias, self.post_mlp_norm)

    def constants(self) -> tuple[Tensor | None, Tensor | None]:
        """`[d_model]` each: biases of the attention's and the MLP's output projection as added to the stream."""
        attn, mlp = self._bias(self.family.o), self._bias(self.family.down)
        scaled = [None if bias is None else bias * self.multiplier for bias in (attn, mlp)]
        return scaled[0], scaled[1]

    def _bias(self, name: str | None) -> Tensor | None:
        bias = getattr(self.module(name), "bias", None) if name else None
        return None if bias is None else bias.detach().to(self.work)

    def _written(self, x: Tensor, norm: Norm | None) -> Tensor:
        x = x if norm is None else norm(x)
        return x if self.multiplier == 1 else x * self.multiplier
