"""One block of a model: its weights by head, its norms, what its readers see, and what it writes to the stream.

1. A `Layout` divides the output features of a projection into heads. Weights, biases, activations and gradients all
   have these features on their last axis, so it serves all of them.
2. Given the scale s of the post-norm (1 without one), what attention adds to the stream is linear in the concatenated
   heads `z`: head h writes `(s z_h) W_O^h`, with the post-norm's weight and the residual multiplier folded into `W_O`.
3. Attention's readers are one affine map of the raw stream, `value = r(x) W'^T x + b'`: the norm's weight and centring
   are folded into the projection, its bias into the projection's bias, and only the scale r depends on the token. So a
   reader's value costs one product with the stream it reads, and the normed stream is never written out.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from circuitfind.errors import ModelError
from circuitfind.models.families import NORMS, Family
from circuitfind.models.norms import Norm
from circuitfind.models.placement import held

PROJECTIONS = {"q": "q", "k": "k", "v": "v", "qkv": "qkv", "kv_latent": "k", "kv": "kv", "mixer": "q"}
"""Sites: outputs of the separate projections, of the fused one, around a latent; a mixer's input. By site, what it has
of q, k and v."""
Chosen = tuple[Tensor, Tensor]  # the places `[n]` of some heads, and their values `[..., n, features]`


def module_at(root: Any, path: str) -> Any:
    """The module (or nnsight envoy) at a dotted path."""
    for key in path.split("."):
        inside = vars(root).get("_modules", ())  # faster than `getattr`, and every run asks for every site
        root = inside[key] if key in inside else root[int(key)] if key.isdigit() else getattr(root, key)
    return root


def weight_of(module: Any) -> Tensor:
    """`[in, out]` view of a projection's weight, in the model's own precision."""
    weight = held(module)
    assert weight is not None, "a projection has a weight"
    return weight if isinstance(module, Conv1D) else weight.T


def shape_of(module: Any) -> tuple[int, int]:
    """That of `weight_of`, without reading it."""
    first, second = module.weight.shape
    return (first, second) if isinstance(module, Conv1D) else (second, first)


class Heads(NamedTuple):
    """q `[..., heads, d_head]`, k and v `[..., kv_heads, d_head]`; around a latent their widths differ."""

    q: Tensor
    k: Tensor
    v: Tensor

    def together(self) -> Tensor:
        """`[..., readers, features]` in the order of the graph's readers, each as wide as the widest: zeros follow."""
        short = [max(part.shape[-1] for part in self) - part.shape[-1] for part in self]
        padded = (nn.functional.pad(part, (0, less)) if less else part for part, less in zip(self, short, strict=True))
        return torch.cat(list(padded), dim=-2)

    def with_chosen(self, new: Mapping[str, Chosen]) -> Heads:
        """With some heads replaced, by kind."""
        changed = {
            kind: getattr(self, kind).to(heads.dtype).index_copy(-2, at, heads) for kind, (at, heads) in new.items()
        }
        return self._replace(**changed)


@dataclass(frozen=True)
class Layout:
    """Order of the features of a fused projection (kinds: `Family.layout`); `d_head`: the width of what o reads of a
    head."""

    kind: str
    n_heads: int
    n_kv_heads: int
    d_head: int

    @property
    def features(self) -> tuple[int, int]:
        """Of all query heads together, and of all keys (or values) that attention computes with."""
        return self.n_heads * self.d_head, self.n_kv_heads * self.d_head

    def split(self, features: Tensor) -> Heads:
        """`[..., features]` by head; views where the layout allows it."""
        h, g, e = self.n_heads, self.n_kv_heads, self.d_head
        if self.kind == "concat":
            q, k, v = features.split([h * e, g * e, g * e], dim=-1)
            return Heads(q.unflatten(-1, (h, e)), k.unflatten(-1, (g, e)), v.unflatten(-1, (g, e)))
        if self.kind == "per_head":
            return Heads(*rearrange(features, "... (h three e) -> three ... h e", three=3, e=e))
        if self.kind == "four_blocks":
            q, v, k = rearrange(features, "... (four three h e) -> three ... (four h) e", four=4, three=3, e=e)
            return Heads(q, k, v)
        groups = features.unflatten(-1, (g, h // g + 2, e))
        return Heads(groups[..., :-2, :].flatten(-3, -2), groups[..., -2, :], groups[..., -1, :])

    def join(self, heads: Heads) -> Tensor:
        """The inverse of `split`: `[..., features]`."""
        if self.kind == "concat":
            return torch.cat([part.flatten(-2) for part in heads], dim=-1)
        if self.kind == "per_head":
            return rearrange(torch.stack(heads), "three ... h e -> ... (h three e)")
        if self.kind == "four_blocks":
            ordered = torch.stack([heads.q, heads.v, heads.k])
            return rearrange(ordered, "three ... (four h) e -> ... (four three h e)", four=4)
        queries = heads.q.unflatten(-2, (self.n_kv_heads, -1))
        return torch.cat([queries, heads.k.unsqueeze(-2), heads.v.unsqueeze(-2)], dim=-2).flatten(-3)

    def parts(self, site: str, value: Tensor) -> dict[str, Tensor]:
        """By kind, the heads `[..., heads, d_head]` of what a projection puts out: all three of the fused one."""
        if site == "qkv":
            return self.split(value)._asdict()
        return {site: value.unflatten(-1, (self.n_heads if site == "q" else self.n_kv_heads, -1))}

    def gather(self, outputs: Mapping[str, Tensor]) -> Heads:
        """The heads, from what all projections put out."""
        parts: dict[str, Tensor] = {}
        for site, value in outputs.items():
            parts |= self.parts(site, value)
        return Heads(**parts)

    def whole(self, site: str, parts: Mapping[str, Tensor], own: Tensor | None = None) -> Tensor:
        """What a projection puts out, from its `parts`; what belongs to no head is as in `own`, or 0."""
        return self.join(Heads(**parts)) if site == "qkv" else parts[site].flatten(-2)

    def here(self, site: str, kind: str, heads: Tensor) -> Tensor:
        """Of a kind's heads, the features that this projection puts out."""
        return heads

    def output(self, site: str, heads: Heads) -> Tensor:
        """What a projection puts out, from all heads."""
        return self.whole(site, {kind: self.here(site, kind, getattr(heads, kind)) for kind in PROJECTIONS[site]})

    def replaced(self, site: str, value: Tensor, new: Mapping[str, Chosen]) -> Tensor:
        """What a projection puts out with some heads replaced, by kind (kinds that it does not have are ignored)."""
        parts = self.parts(site, value)
        for kind, (at, heads) in new.items():
            if kind in parts:
                parts[kind] = parts[kind].index_copy(-2, at, self.here(site, kind, heads).to(value.dtype))
        return self.whole(site, parts, value)


@dataclass(frozen=True, eq=False)
class LayerView:
    """One block: its paths, its projections and norms. Weights are read from the modules at each use, in `work`
    precision on `device` (where circuitfind computes, `circuitfind.models.placement`), so no copy stays in memory.
    `copies`: how many readers each key and each value head is: one, or in an ungrouped graph one a query head."""

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
    device: torch.device
    copies: int = field(default=1, kw_only=True)

    def module(self, name: str) -> Any:
        return module_at(self.block, name)

    def weight(self, module: Any) -> Tensor:
        """`weight_of`, to compute with."""
        return weight_of(module).to(self.device, self.work)

    @property
    def norms(self) -> dict[str, Norm]:
        """Those that there are, by the names of the fields."""
        found = {name: getattr(self, name) for name in NORMS}
        return {name: norm for name, norm in found.items() if norm is not None}

    # ---------------------------------------------------------------- attention's readers
    def _reading(self) -> dict[str, Any]:
        """By site, the linear modules that read the normed stream."""
        return {site: self.module(getattr(self.family, site)) for site in self.family.projections}

    def _read_by(self, outputs: Mapping[str, Tensor]) -> Heads:
        """What each of q, k and v reads, from what belongs to each module of `_reading`, features last; copies of a key
        or value head read the same."""
        read = self.layout.gather(outputs)
        if self.copies == 1:
            return read
        k, v = (part.repeat_interleave(self.copies, dim=-2) for part in (read.k, read.v))
        return Heads(read.q, k, v)

    def projected(self, x: Tensor) -> Heads:
        """`[..., heads, d_read]` each: what the readers make of `[..., d_model]`, without their biases."""
        return self._read_by({site: x @ self.weight(one) for site, one in self._reading().items()})

    def qkv_weight(self) -> Heads:
        """`[d_model, heads, d_read]` each for q, k and v."""
        return self._read_by({site: self.weight(one) for site, one in self._reading().items()})

    def pull_back(self, gradient: Tensor, weights: Heads) -> Tensor:
        """`[readers, tokens, d_model]`: gradients `[readers, tokens, d_read]` at what the readers make, through
        `weights`, which are `qkv_weight`, and the norm's weight and centring, but not through its scale."""
        pulled = gradient.new_empty(*gradient.shape[:2], len(weights.q))
        start = 0
        for weight in weights:  # no copy of them is made
            heads = slice(start, start := start + weight.shape[1])
            torch.bmm(gradient[heads, :, : weight.shape[2]], weight.permute(1, 2, 0), out=pulled[heads])
        return pulled if self.attn_norm is None else self.attn_norm.centre(pulled.mul_(self.attn_norm.weight))

    def qkv_bias(self) -> Heads | None:
        """`[heads, d_read]` each, or None where the projections have none."""
        modules = self._reading()
        if all(module.bias is None for module in modules.values()):
            return None
        zeros = functools.partial(torch.zeros, dtype=self.work, device=self.device)
        return self._read_by(
            {
                site: zeros(shape_of(one)[1]) if (bias := self._bias_of(one)) is None else bias
                for site, one in modules.items()
            }
        )

    @property
    def d_read(self) -> int:
        """Features of what a reader makes of the stream, of the widest."""
        return self.layout.d_head * (1 + self.family.gated)

    def values_of(self, kind: str, read: Tensor, heads: Tensor) -> Tensor:
        """`[..., heads, d_head]`: q, k or v of some heads, from what they read `[..., heads, d_read]`; here, just that.
        Differentiable."""
        return read[..., : self.layout.d_head] if self.family.gated and kind != "q" else read

    def at_read(self, stream: Tensor, gradient: Heads) -> Heads:
        """The gradient at what the readers make of a stream `[..., d_model]`, from the one at q, k and v of its run."""
        return gradient

    def values_by_head(self, value: Tensor) -> Tensor:
        """`[..., heads, d_head]`: of values `[..., kv_heads, d_head]`, those that each query head takes up."""
        return value.repeat_interleave(self.layout.n_heads // self.layout.n_kv_heads, dim=-2)

    # ---------------------------------------------------------------- what is written

    def output_weight(self) -> Tensor:
        """`[heads, d_head, d_model]`: W_O with the post-norm's weight and the residual multiplier folded in."""
        weight = self._written_by(self.module(self.family.o), self.post_attn_norm)
        by_head: Tensor = weight.unflatten(0, (self.layout.n_heads, self.layout.d_head))
        return by_head

    def mlp_weights(self) -> tuple[Tensor, Tensor]:
        """`[d_model, hidden]`, all projections of the MLP's input, unchanged; `[hidden, d_model]`, its output
        projection, with the post-norm's weight and the residual multiplier folded in."""
        if self.family.down is None:
            raise ModelError("its MLPs are mixtures of experts: which weights are used depends on the prompt")
        read = torch.cat([self.weight(module) for module in self.mlp_projections()], dim=1)
        return read, self._written_by(self.module(self.family.down), self.post_mlp_norm)

    def mlp_projections(self) -> list[Any]:
        """The linear modules of the MLP but its output projection."""
        down = self.module(self.family.down) if self.family.down else None
        inside = self.module(self.family.mlp_in).modules()
        return [module for module in inside if isinstance(module, (nn.Linear, Conv1D)) and module is not down]

    def _written_by(self, module: Any, norm: Norm | None) -> Tensor:
        weight = self.weight(module)
        if norm is not None:
            weight = norm.centre(weight) * norm.weight
        return weight * self.multiplier if self.multiplier != 1 else weight

    def mlp_reads(self, stream: Tensor) -> Tensor:
        """What the MLP is given of a stream."""
        return stream if self.mlp_norm is None else self.mlp_norm(stream)

    def mlp_pull_back(self, stream: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at a stream from the one at what the MLP is given of it."""
        return gradient if self.mlp_norm is None else self.mlp_norm.pull_back(stream, gradient)

    def scaled_heads(self, z: Tensor, attn_out: Tensor) -> Tensor:
        """`[batch, pos, heads, d_head]` heads times the post-norm's scale at this run, ready for `output_weight`."""
        heads: Tensor = z.to(self.work).unflatten(-1, (self.layout.n_heads, self.layout.d_head))
        if self.post_attn_norm is None:
            return heads
        return heads * self.post_attn_norm.scale(attn_out.to(self.work)).unsqueeze(-1)

    def attn_written(self, attn_out: Tensor, bias: bool = True) -> Tensor:
        """`[batch, pos, d_model]`: what attention adds to the stream, with its output projection's bias or without."""
        return self._written(attn_out, None if bias else self.family.o, self.post_attn_norm)

    def mlp_written(self, mlp_out: Tensor) -> Tensor:
        """`[batch, pos, d_model]`: what the MLP adds to the stream, without its output projection's bias."""
        return self._written(mlp_out, self.family.down, self.post_mlp_norm)

    def constants(self) -> tuple[Tensor | None, Tensor | None]:
        """`[d_model]` each: biases of the attention's and the MLP's output projection as added to the stream."""
        attn, mlp = (self._bias(name) for name in (self.family.o, self.family.down))
        return None if attn is None else attn * self.multiplier, None if mlp is None else mlp * self.multiplier

    def _bias(self, name: str | None) -> Tensor | None:
        return self._bias_of(self.module(name)) if name else None

    def _bias_of(self, module: Any) -> Tensor | None:
        bias = held(module, "bias")
        return None if bias is None else bias.to(self.device, self.work)

    def _written(self, output: Tensor, biased: str | None, norm: Norm | None) -> Tensor:
        """`biased`: the projection whose bias is left out."""
        bias, x = self._bias(biased), output.to(self.work)
        x = x if bias is None else x - bias
        x = x if norm is None else norm(x)
        return x if self.multiplier == 1 else x * self.multiplier


class AttentionReaders:
    """q, k and v readers of one layer, in the graph's order: folded weight `[readers, d_read, d_model]`, and bias
    `[readers, 1, d_read]` or None."""

    def __init__(self, view: LayerView, with_bias: bool = True) -> None:
        self.norm = view.attn_norm
        weight = view.qkv_weight().together()  # d_model readers d_read
        self.weight = rearrange(weight if self.norm is None else self.norm.fold(weight), "d r e -> r e d")
        biases = []
        if with_bias and self.norm is not None and self.norm.bias is not None:
            biases.append(einsum(weight, self.norm.bias, "d r e, d -> r e"))
        if with_bias and (projection := view.qkv_bias()) is not None:
            biases.append(projection.together())
        self.bias = torch.stack(biases).sum(0).unsqueeze(1) if biases else None

    @property
    def n_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def values(self, streams: Tensor, readers: Tensor, centred: bool) -> Tensor:
        """`[readers, tokens, d_read]`: what some readers (`[readers]` indices within the layer) make of the streams
        `[readers, tokens, d_model]` that they read; `centred`: the streams have mean 0 already."""
        return self.scaled_values(streams, readers, centred)[0]

    def scaled_values(self, streams: Tensor, readers: Tensor, centred: bool) -> tuple[Tensor, Tensor | None]:
        """`values`, and with a norm its scale at each stream, `[readers, tokens, 1]`."""
        weight, bias = self._of(readers)
        values, scale = torch.bmm(streams, weight.mT), None
        if self.norm is not None:
            scale = self._scale(self.norm, streams, centred)
            values *= scale
        return values if bias is None else values + bias, scale

    def _of(self, readers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of some readers."""
        if len(readers) == len(self.weight):
            return self.weight, self.bias
        return self.weight[readers], None if self.bias is None else self.bias[readers]

    def pull_back_own(
        self,
        streams: Tensor,
        gradient: Tensor,
        values: Tensor,
        scale: Tensor | None,
        readers: Tensor,
        centred: bool,
    ) -> None:
        """Turns streams, each its reader's own, into the gradients at them: in place, from those at their values. With
        `value = r W'^T x + b` the part of r needs no product with x again: `r W' g - r^2 / d_model (g . (value - b))
        x`. Arguments as for and from `scaled_values`."""
        weight, bias = self._of(readers)
        if self.norm is None or scale is None:
            torch.bmm(gradient, weight, out=streams)
            return
        if self.norm.centred and not centred:
            streams -= streams.mean(-1, keepdim=True)
        along = torch.linalg.vecdot(gradient, values if bias is None else values - bias).unsqueeze(-1)
        streams.mul_(along * scale**2 / -streams.shape[-1]).baddbmm_(gradient * scale, weight)

    def pull_back_together(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient `[..., d_model]` at a stream that all readers share, from theirs `[..., readers, d_read]`."""
        together = einsum(gradient, self.weight, "... r e, r e d -> ... d")
        if self.norm is None:
            return together
        y, r = self.norm.normed(x)
        return self.norm.less_scale(y, r * together)

    @staticmethod
    def _scale(norm: Norm, streams: Tensor, centred: bool) -> Tensor:
        if norm.centred and not centred:
            power = streams.var(-1, unbiased=False, keepdim=True)
        else:
            power = torch.linalg.vecdot(streams, streams).unsqueeze(-1) / streams.shape[-1]
        return torch.rsqrt(power + norm.eps)
