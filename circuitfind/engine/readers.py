"""Attention readers as one affine map of the raw residual stream: `value = r(x) W'^T x + b'`.

The norm's weight and centring are folded into the projection, its bias into the projection's bias; only the scale r
depends on the token. So a reader's value costs one product with the stream it reads, and the normed stream is never
written out.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor

from circuitfind.models.adapter import LayerView
from circuitfind.models.norms import Norm


class AttentionReaders:
    """q, k and v readers of one layer, in the graph's order.

    Attributes:
        weight: `[readers, d_head, d_model]`, folded.
        bias: `[readers, 1, d_head]`, or None.
    """

    def __init__(self, view: LayerView, with_bias: bool = True) -> None:
        self.norm: Norm | None = view.attn_norm
        weight = torch.cat(view.qkv_weight(), dim=1)  # d_model readers d_head
        folded = weight if self.norm is None else self.norm.fold(weight)
        self.weight = rearrange(folded, "d r e -> r e d")
        self.bias = _bias(view, weight) if with_bias else None

    @property
    def n_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def values(self, streams: Tensor, readers: Tensor, centred: bool) -> Tensor:
        """Projections of some readers.

        Args:
            streams: `[readers, tokens, d_model]`, what each of them reads.
            readers: `[readers]` their indices within the layer.
            centred: the streams have mean 0 already.

        Returns:
            `[readers, tokens, d_head]`.
        """
        every = len(readers) == len(self.weight)
        values = torch.bmm(streams, (self.weight if every else self.weight[readers]).mT)
        if self.norm is not None:
            values *= self._scale(streams, centred)
        return values if self.bias is None else values + (self.bias if every else self.bias[readers])

    def pull_back(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Gradients at a stream that all readers share, from those at their values.

        Args:
            x: `[tokens, d_model]`.
            gradient: `[readers, tokens, d_head]`.

        Returns:
            `[readers, tokens, d_model]`.
        """
        if self.norm is None:
            return torch.bmm(gradient, self.weight)
        y, r = self.norm.normed(x)
        return self.norm.less_scale(y, torch.bmm(gradient * r, self.weight))

    def pull_back_together(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The sum over readers of `pull_back`, `[..., d_model]`, from gradients `[..., readers, d_head]`."""
        together = einsum(gradient, self.weight, "... r e, r e d -> ... d")
        if self.norm is None:
            return together
        y, r = self.norm.normed(x)
        return self.norm.less_scale(y, r * together)

    def _scale(self, streams: Tensor, centred: bool) -> Tensor:
        assert self.norm is not None
        if self.norm.centred and not centred:
            power = streams.var(-1, unbiased=False, keepdim=True)
        else:
            power = torch.linalg.vecdot(streams, streams).unsqueeze(-1) / streams.shape[-1]
        return torch.rsqrt(power + self.norm.eps)


def _bias(view: LayerView, weight: Tensor) -> Tensor | None:
    parts = []
    if view.attn_norm is not None and view.attn_norm.bias is not None:
        parts.append(einsum(weight, view.attn_norm.bias, "d r e, d -> r e"))
    projection = view.qkv_bias()
    if projection is not None:
        parts.append(torch.cat(projection))
    return torch.stack(parts).sum(0).unsqueeze(1) if parts else None
