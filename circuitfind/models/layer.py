"""One block of a model: its weights by head, its norms, what its readers read, and what it writes to the stream.

1. A `Layout` divides the output features of a projection into heads. Weights, biases, activations and gradients all
   have these features on their last axis, so the same layout splits all of them.
2. Given the scale s of the post-norm (1 without one), what attention adds to the stream is linear in the concatenated
   heads `z`: head h writes `(s z_h) W_O^h`, with the post-norm's weight and the residual multiplier folded into `W_O`.
3. The q, k and v readers are one affine map of the residual stream, `value = r(x) W'^T x + b'`: the norm's weight and
   centring are folded into the projection, the norm's bias into the projection's bias, and only the scale r depends on
   the token. A reader's value therefore costs one product with its stream, and the normed stream is never stored.

In this file, *d_read* is the number of features of such a value. In plain attention they are the head's q, k or v;
latent and gated attention read more (`latent.py`, `Family.gated`).
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
"""The kinds of heads (q, k, v) at each site of the readers: outputs of separate, fused or latent projections, and a
mixer's input."""
Chosen = tuple[Tensor, Tensor]  # the indices `[n]` of some heads, and their values `[..., n, features]`


def module_at(root: Any, path: str) -> Any:
    """Return the module (or nnsight envoy) at a dotted path."""
    for key in path.split("."):
        inside = vars(root).get("_modules", ())  # faster than `getattr`, and every run asks for every site
        root = inside[key] if key in inside else root[int(key)] if key.isdigit() else getattr(root, key)
    return root


def weight_of(module: Any) -> Tensor:
    """Return a projection's weight as `[in, out]`, in the model's own precision."""
    weight = held(module)
    assert weight is not None, "a projection has a weight"
    return weight if isinstance(module, Conv1D) else weight.T


def shape_of(module: Any) -> tuple[int, int]:
    """Return the shape of `weight_of`, without reading the weight."""
    first, second = module.weight.shape
    return (first, second) if isinstance(module, Conv1D) else (second, first)


class Heads(NamedTuple):
    """q `[..., heads, d_head]`, k and v `[..., kv_heads, d_head]`; in latent attention their widths differ."""

    q: Tensor
    k: Tensor
    v: Tensor

    def together(self) -> Tensor:
        """Return `[..., readers, features]` in the order of the graph's readers, padded with zeros to equal width."""
        short = [max(part.shape[-1] for part in self) - part.shape[-1] for part in self]
        padded = (nn.functional.pad(part, (0, less)) if less else part for part, less in zip(self, short, strict=True))
        return torch.cat(list(padded), dim=-2)

    def with_chosen(self, new: Mapping[str, Chosen]) -> Heads:
        """Return a copy in which some heads of each kind are replaced."""
        changed = {
            kind: getattr(self, kind).to(heads.dtype).index_copy(-2, at, heads) for kind, (at, heads) in new.items()
        }
        return self._replace(**changed)


@dataclass(frozen=True)
class Layout:
    """The order of a projection's output features; `kind`: as in `Family.layout`; `d_head`: the width of a head at the
    input of the output projection."""

    kind: str
    n_heads: int
    n_kv_heads: int
    d_head: int

    @property
    def features(self) -> tuple[int, int]:
        """The number of features of all query heads, and of all key (or value) heads."""
        return self.n_heads * self.d_head, self.n_kv_heads * self.d_head

    def split(self, features: Tensor) -> Heads:
        """Split `[..., features]` of a fused projection into heads; views if the layout allows it."""
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
        """Split a projection's output into its kinds of heads, `[..., heads, d_head]` each."""
        if site == "qkv":
            return self.split(value)._asdict()
        return {site: value.unflatten(-1, (self.n_heads if site == "q" else self.n_kv_heads, -1))}

    def gather(self, outputs: Mapping[str, Tensor]) -> Heads:
        """Return q, k and v from the outputs of all projections, by site."""
        parts: dict[str, Tensor] = {}
        for site, value in outputs.items():
            parts |= self.parts(site, value)
        return Heads(**parts)

    def whole(self, site: str, parts: Mapping[str, Tensor], own: Tensor | None = None) -> Tensor:
        """Return a projection's output from its `parts`; features that belong to no head are taken from `own`, or 0."""
        return self.join(Heads(**parts)) if site == "qkv" else parts[site].flatten(-2)

    def here(self, site: str, kind: str, heads: Tensor) -> Tensor:
        """Return the features of some heads that are part of this site's output."""
        return heads

    def output(self, site: str, heads: Heads) -> Tensor:
        """Return a projection's output from all heads."""
        return self.whole(site, {kind: self.here(site, kind, getattr(heads, kind)) for kind in PROJECTIONS[site]})

    def replaced(self, site: str, value: Tensor, new: Mapping[str, Chosen]) -> Tensor:
        """Return a projection's output with some heads replaced; kinds that are not part of it are ignored."""
        parts = self.parts(site, value)
        for kind, (at, heads) in new.items():
            if kind in parts:
                parts[kind] = parts[kind].index_copy(-2, at, self.here(site, kind, heads).to(value.dtype))
        return self.whole(site, parts, value)


@dataclass(frozen=True, eq=False)
class LayerView:
    """One block of a model.

    Weights are read from the modules at each use, in `work` precision on `device` (`circuitfind.models.placement`), so
    no copy stays in memory. `copies`: the number of readers of each key and each value head: 1, or in an ungrouped
    graph the number of query heads in a group.
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
    device: torch.device
    copies: int = field(default=1, kw_only=True)

    def module(self, name: str) -> Any:
        return module_at(self.block, name)

    def weight(self, module: Any) -> Tensor:
        """Return `weight_of` in work precision on circuitfind's device."""
        return weight_of(module).to(self.device, self.work)

    @property
    def norms(self) -> dict[str, Norm]:
        """The block's norms, by field name."""
        found = {name: getattr(self, name) for name in NORMS}
        return {name: norm for name, norm in found.items() if norm is not None}

    # ---------------------------------------------------------------- attention's readers
    def _reading(self) -> dict[str, Any]:
        """Return the linear modules that read the normed stream, by site."""
        return {site: self.module(getattr(self.family, site)) for site in self.family.projections}

    def _read_by(self, outputs: Mapping[str, Tensor]) -> Heads:
        """Split values of the modules of `_reading` (outputs, weights or biases; features last) by reader, `[...,
        readers, d_read]` each. Copies of a key or value head get the same values."""
        read = self.layout.gather(outputs)
        if self.copies == 1:
            return read
        k, v = (part.repeat_interleave(self.copies, dim=-2) for part in (read.k, read.v))
        return Heads(read.q, k, v)

    def projected(self, x: Tensor) -> Heads:
        """Return the readers' values, without biases, `[..., heads, d_read]` each; `x`: the normed stream."""
        return self._read_by({site: x @ self.weight(one) for site, one in self._reading().items()})

    def qkv_weight(self) -> Heads:
        """Return the weights of the q, k and v readers, `[d_model, heads, d_read]` each."""
        return self._read_by({site: self.weight(one) for site, one in self._reading().items()})

    def pull_back(self, gradient: Tensor, weights: Heads) -> Tensor:
        """Pull gradients at the readers' values, `[readers, tokens, d_read]`, back through `weights` (`qkv_weight`) and
        the norm's weight and centring, but not through its scale: `[readers, tokens, d_model]`."""
        pulled = gradient.new_empty(*gradient.shape[:2], len(weights.q))
        start = 0
        for weight in weights:  # one at a time, so that the weights are not copied
            heads = slice(start, start := start + weight.shape[1])
            torch.bmm(gradient[heads, :, : weight.shape[2]], weight.permute(1, 2, 0), out=pulled[heads])
        return pulled if self.attn_norm is None else self.attn_norm.centre(pulled.mul_(self.attn_norm.weight))

    def qkv_bias(self) -> Heads | None:
        """Return the readers' biases, `[heads, d_read]` each, or None if no projection has one."""
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
        """The number of features of the widest reader's value."""
        return self.layout.d_head * (1 + self.family.gated)

    def values_of(self, kind: str, read: Tensor, heads: Tensor) -> Tensor:
        """Return q, k or v of some heads, `[..., heads, d_head]`, from their readers' values `[..., heads, d_read]`.
        Differentiable."""
        return read[..., : self.layout.d_head] if self.family.gated and kind != "q" else read

    def at_read(self, stream: Tensor, gradient: Heads) -> Heads:
        """Return the gradients at the readers' values of a stream `[..., d_model]`, given those at q, k and v."""
        return gradient

    def values_by_head(self, value: Tensor) -> Tensor:
        """Return the values that each query head attends to, `[..., heads, d_head]`, from `[..., kv_heads, d_head]`."""
        return value.repeat_interleave(self.layout.n_heads // self.layout.n_kv_heads, dim=-2)

    # ---------------------------------------------------------------- what is written

    def output_weight(self) -> Tensor:
        """Return W_O with the post-norm's weight and the residual multiplier folded in, `[heads, d_head, d_model]`."""
        weight = self._written_by(self.module(self.family.o), self.post_attn_norm)
        by_head: Tensor = weight.unflatten(0, (self.layout.n_heads, self.layout.d_head))
        return by_head

    def mlp_weights(self) -> tuple[Tensor, Tensor]:
        """Return the MLP's input projections, `[d_model, hidden]`, and its output projection, `[hidden, d_model]`, the
        latter with the post-norm's weight and the residual multiplier folded in. ModelError for a mixture of experts.
        """
        if self.family.down is None:
            raise ModelError("its MLPs are mixtures of experts: which weights are used depends on the prompt")
        read = torch.cat([self.weight(module) for module in self.mlp_projections()], dim=1)
        return read, self._written_by(self.module(self.family.down), self.post_mlp_norm)

    def mlp_projections(self) -> list[Any]:
        """Return the linear modules of the MLP, except its output projection."""
        down = self.module(self.family.down) if self.family.down else None
        inside = self.module(self.family.mlp_in).modules()
        return [module for module in inside if isinstance(module, (nn.Linear, Conv1D)) and module is not down]

    def _written_by(self, module: Any, norm: Norm | None) -> Tensor:
        weight = self.weight(module)
        if norm is not None:
            weight = norm.centre(weight) * norm.weight
        return weight * self.multiplier if self.multiplier != 1 else weight

    def mlp_reads(self, stream: Tensor) -> Tensor:
        """Return the MLP's input for a stream: the stream after the MLP's norm."""
        return stream if self.mlp_norm is None else self.mlp_norm(stream)

    def mlp_pull_back(self, stream: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient at a stream, given the one at the MLP's input."""
        return gradient if self.mlp_norm is None else self.mlp_norm.pull_back(stream, gradient)

    def scaled_heads(self, z: Tensor, attn_out: Tensor) -> Tensor:
        """Return the heads times this run's post-norm scale, `[batch, pos, heads, d_head]`; times `output_weight` they
        are what each head writes."""
        heads: Tensor = z.to(self.work).unflatten(-1, (self.layout.n_heads, self.layout.d_head))
        if self.post_attn_norm is None:
            return heads
        return heads * self.post_attn_norm.scale(attn_out.to(self.work)).unsqueeze(-1)

    def attn_written(self, attn_out: Tensor, bias: bool = True) -> Tensor:
        """Return what attention adds to the stream, `[batch, pos, d_model]`; `bias`: with its output bias."""
        return self._written(attn_out, None if bias else self.family.o, self.post_attn_norm)

    def mlp_written(self, mlp_out: Tensor) -> Tensor:
        """Return what the MLP adds to the stream, without its output bias, `[batch, pos, d_model]`."""
        return self._written(mlp_out, self.family.down, self.post_mlp_norm)

    def constants(self) -> tuple[Tensor | None, Tensor | None]:
        """Return what the output biases of attention and MLP add to the stream, `[d_model]` each, or None."""
        attn, mlp = (self._bias(name) for name in (self.family.o, self.family.down))
        return None if attn is None else attn * self.multiplier, None if mlp is None else mlp * self.multiplier

    def _bias(self, name: str | None) -> Tensor | None:
        return self._bias_of(self.module(name)) if name else None

    def _bias_of(self, module: Any) -> Tensor | None:
        bias = held(module, "bias")
        return None if bias is None else bias.to(self.device, self.work)

    def _written(self, output: Tensor, biased: str | None, norm: Norm | None) -> Tensor:
        """Return what a module's output adds to the stream; `biased`: the projection whose bias is left out."""
        bias, x = self._bias(biased), output.to(self.work)
        x = x if bias is None else x - bias
        x = x if norm is None else norm(x)
        return x if self.multiplier == 1 else x * self.multiplier


class AttentionReaders:
    """The q, k and v readers of one layer as an affine map, in the graph's order: `weight` `[readers, d_read, d_model]`
    with the norm folded in, and `bias` `[readers, 1, d_read]` or None."""

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
        """Return the values of some readers, `[readers, tokens, d_read]`, each for a stream of its own.

        `streams`: `[readers, tokens, d_model]`; `readers`: their indices within the layer; `centred`: the streams have
        mean 0 already.
        """
        return self.scaled_values(streams, readers, centred)[0]

    def scaled_values(self, streams: Tensor, readers: Tensor, centred: bool) -> tuple[Tensor, Tensor | None]:
        """Return `values`, and the norm's scale for each stream, `[readers, tokens, 1]` (None without a norm)."""
        weight, bias = self._of(readers)
        values, scale = torch.bmm(streams, weight.mT), None
        if self.norm is not None:
            scale = self._scale(self.norm, streams, centred)
            values *= scale
        return values if bias is None else values + bias, scale

    def _of(self, readers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of some readers."""
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
        """Replace the streams, one per reader, by the gradients at them, in place; `gradient`: at the values.

        `values`, `scale`: what `scaled_values` returned for these streams. As `value = r W'^T x + b`, the gradient
        through r needs no further product with W': `r W' g - r^2 / d_model (g . (value - b)) x`.
        """
        weight, bias = self._of(readers)
        if self.norm is None or scale is None:
            torch.bmm(gradient, weight, out=streams)
            return
        if self.norm.centred and not centred:
            streams -= streams.mean(-1, keepdim=True)
        along = torch.linalg.vecdot(gradient, values if bias is None else values - bias).unsqueeze(-1)
        streams.mul_(along * scale**2 / -streams.shape[-1]).baddbmm_(gradient * scale, weight)

    def pull_back_together(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient at a stream that all readers read, `[..., d_model]`, from those at their values, `[...,
        readers, d_read]`."""
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
