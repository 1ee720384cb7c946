"""How the output features of a fused q, k, v projection divide into heads.

The same two functions serve weights, biases, activations and gradients, since all of them have the features on their
last axis. `split` returns views where the layout allows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

PROJECTIONS = ("q", "k", "v", "qkv")  # sites: outputs of the separate projections, or of the fused one


class Heads(NamedTuple):
    """q `[..., heads, d_head]`, k and v `[..., kv_heads, d_head]`."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Layout:
    """Order of the features of a fused projection; see `Family.layout` for the three kinds."""

    kind: str
    n_heads: int
    n_kv_heads: int
    d_head: int

    def split(self, features: Tensor) -> Heads:
        """`[..., features]` by head."""
        h, g, e = self.n_heads, self.n_kv_heads, self.d_head
        if self.kind == "concat":
            q, k, v = features.split([h * e, g * e, g * e], dim=-1)
            return Heads(q.unflatten(-1, (h, e)), k.unflatten(-1, (g, e)), v.unflatten(-1, (g, e)))
        if self.kind == "per_head":
            return Heads(*rearrange(features, "... (h three e) -> three ... h e", three=3, e=e))
        groups = features.unflatten(-1, (g, h // g + 2, e))
        return Heads(groups[..., :-2, :].flatten(-3, -2), groups[..., -2, :], groups[..., -1, :])

    def parts(self, site: str, value: Tensor) -> dict[str, Tensor]:
        """By kind, the heads `[..., heads, d_head]` of what a projection puts out: all three of the fused one."""
        return self.split(value)._asdict() if site == "qkv" else {site: value.unflatten(-1, (-1, self.d_head))}

    def whole(self, site: str, parts: Mapping[str, Tensor]) -> Tensor:
        """What a projection puts out, from the heads by kind (more kinds than it has are passed over)."""
        return self.join(Heads(*(parts[kind] for kind in "qkv"))) if site == "qkv" else parts[site].flatten(-2)

    def join(self, heads: Heads) -> Tensor:
        """The inverse of `split`: `[..., features]`."""
        if self.kind == "concat":
            return torch.cat([part.flatten(-2) for part in heads], dim=-1)
        if self.kind == "per_head":
            return rearrange(torch.stack(heads), "three ... h e -> ... (h three e)")
        queries = heads.q.unflatten(-2, (self.n_kv_heads, -1))
        return torch.cat([queries, heads.k.unsqueeze(-2), heads.v.unsqueeze(-2)], dim=-2).flatten(-3)
