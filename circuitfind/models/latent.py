"""Latent attention (DeepSeek): q, k and v come from low-rank projections with a norm in between.

    q_h = W_h norm(A x)         k = [W_k norm(c), p]   v = W_v norm(c)   where [c, p] = B x and x is the normed stream

1. Keys and values of all heads come from one latent c, and all heads share p, the rotary part of the keys. So the graph
   has one key/value head per layer: `a5.kv0<k>` is the keys of all heads (the features without position of every head,
   then p), and `a5.kv0<v>` is the values of all heads. Each query head is a reader of its own. In a model without A,
   queries are projected from the stream as in other families.
2. A reader's value ends where it stops being linear in the normed stream: it is A x for q and [c, p] for k and v. So
   folded weights and masked runs work as for every other family. `values_of` computes q, k or v from the readers'
   values, and `at_read` pulls gradients back to them.
3. Keys are split over two sites: the features without position are in the output of `kv`, p in that of `kv_latent`.

The norms of the latents are not on the residual stream, so RelP's rules leave their gradient unchanged, as they do for
norms of queries and keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from torch import Tensor

from circuitfind.models.layer import Heads, LayerView, Layout, shape_of
from circuitfind.models.norms import Norm


@dataclass(frozen=True)
class LatentLayout(Layout):
    """The order of features in latent projections. `d_head`: the width of a head's value; `rank`: the width of the
    key/value latent; `plain`, `rotary`: the number of a key's features without and with position."""

    rank: int
    plain: int
    rotary: int

    @property
    def features(self) -> tuple[int, int]:
        return self.n_heads * (self.plain + self.rotary), self.n_heads * max(self.plain + self.rotary, self.d_head)

    def parts(self, site: str, value: Tensor) -> dict[str, Tensor]:
        """Split a projection's output into its kinds of heads; for keys, the features that are at this site."""
        if site == "q":
            return {"q": value.unflatten(-1, (self.n_heads, -1))}
        if site == "kv_latent":
            return {"k": value[..., self.rank :].unsqueeze(-2)}
        value = value.squeeze(1) if value.ndim == 4 else value  # some models pass it with an axis for one head
        k, v = value.unflatten(-1, (self.n_heads, -1)).split([self.plain, self.d_head], dim=-1)
        return {"k": k.flatten(-2).unsqueeze(-2), "v": v.flatten(-2).unsqueeze(-2)}

    def gather(self, outputs: Mapping[str, Tensor]) -> Heads:
        up, rotary = self.parts("kv", outputs["kv"]), self.parts("kv_latent", outputs["kv_latent"])["k"]
        return Heads(self.parts("q", outputs["q"])["q"], torch.cat([up["k"], rotary], dim=-1), up["v"])

    def whole(self, site: str, parts: Mapping[str, Tensor], own: Tensor | None = None) -> Tensor:
        if site == "q":
            return super().whole(site, parts)
        if site == "kv_latent":
            rotary = parts["k"].squeeze(-2)
            latent = rotary.new_zeros(*rotary.shape[:-1], self.rank) if own is None else own[..., : self.rank]
            return torch.cat([latent, rotary], dim=-1)
        by_head = [parts[kind].squeeze(-2).unflatten(-1, (self.n_heads, -1)) for kind in "kv"]
        return torch.cat(by_head, dim=-1).flatten(-2)

    def here(self, site: str, kind: str, heads: Tensor) -> Tensor:
        if kind != "k":
            return heads
        cut = self.n_heads * self.plain
        return heads[..., cut:] if site == "kv_latent" else heads[..., :cut]


@dataclass(frozen=True, eq=False)
class LatentView(LayerView):
    """A block with latent attention; `q_latent_norm` is None if queries have no latent."""

    layout: LatentLayout
    q_latent_norm: Norm | None
    kv_latent_norm: Norm

    @classmethod
    def of(cls, view: LayerView) -> LatentView:
        """Return the latent view from a general view of its block."""
        family, heads, d_head = view.family, view.layout.n_heads, view.layout.d_head
        down, up = (shape_of(view.module(str(name))) for name in (family.kv_latent, family.kv))

        def norm(name: str | None, width: int) -> Norm:
            return Norm.of(view.module(str(name)), width, f"{view.path}.{name}", view.device)

        rank, rotary = up[0], down[1] - up[0]
        layout = LatentLayout("latent", heads, 1, d_head, rank, up[1] // heads - d_head, rotary)
        q_norm = norm(family.q_latent_norm, shape_of(view.module(family.q))[0]) if family.q_latent else None
        given: dict[str, Any] = {**vars(view), "layout": layout, "q_latent_norm": q_norm}
        return cls(**given, kv_latent_norm=norm(family.kv_latent_norm, rank))

    def _reading(self) -> dict[str, Any]:
        return {
            "q": self.module(self.family.q_latent or self.family.q),
            "kv_latent": self.module(str(self.family.kv_latent)),
        }

    def _read_by(self, outputs: Mapping[str, Tensor]) -> Heads:
        q, kv, heads = outputs["q"], outputs["kv_latent"].unsqueeze(-2), self.layout.n_heads
        if self.q_latent_norm is None:
            by_head = q.unflatten(-1, (heads, -1))
        else:
            by_head = q.unsqueeze(-2).expand(*q.shape[:-1], heads, -1)  # all heads read the same latent
        return Heads(by_head, kv, kv[..., : self.layout.rank])

    @property
    def d_read(self) -> int:
        return max(part.shape[-1] for part in self.qkv_weight())

    def _up(self) -> Heads:
        """Return the weights from the latents: to q `[latent, heads, d_head]`; to the keys without position, and to the
        values, of all heads `[latent, 1, features]`."""
        q, kv = (self.weight(self.module(str(name))) for name in (self.family.q, self.family.kv))
        return Heads(self.layout.parts("q", q)["q"], **self.layout.parts("kv", kv))

    def values_of(self, kind: str, read: Tensor, heads: Tensor) -> Tensor:
        up, rank = self._up(), self.layout.rank
        if kind == "q":
            if self.q_latent_norm is None:
                return read[..., : up.q.shape[-1]]
            latent = self.q_latent_norm(read[..., : len(up.q)])
            queries: Tensor = einsum(latent, up.q[:, heads], "... h r, r h e -> ... h e")
            return queries
        values: Tensor = self.kv_latent_norm(read[..., :rank]) @ getattr(up, kind).squeeze(1)
        return values if kind == "v" else torch.cat([values, read[..., rank : rank + self.layout.rotary]], dim=-1)

    def at_read(self, stream: Tensor, gradient: Heads) -> Heads:
        up, bias = self._up(), self.qkv_bias()
        read = self.projected(stream if self.attn_norm is None else self.attn_norm(stream))
        read = read if bias is None else Heads(*map(torch.add, read, bias))
        q = gradient.q
        if self.q_latent_norm is not None:
            q = self.q_latent_norm.pull_back(read.q[..., :1, :], einsum(q, up.q, "... h e, r h e -> ... h r"))
        at_plain, at_rotary = gradient.k.split([gradient.k.shape[-1] - self.layout.rotary, self.layout.rotary], dim=-1)
        k, v = (
            self.kv_latent_norm.pull_back(read.v, at @ weight.squeeze(1).T)
            for at, weight in ((at_plain, up.k), (gradient.v, up.v))
        )
        return Heads(q, torch.cat([k, at_rotary], dim=-1), v)

    def values_by_head(self, value: Tensor) -> Tensor:
        by_head: Tensor = value.squeeze(-2).unflatten(-1, (self.layout.n_heads, -1))
        return by_head
