"""Soft circuits: one forward pass in which every edge is let through in part, differentiable in how much.

With `D_u = current_u - ablated_u` for each writer and a mask m, 1 = the edge carries its current value, 0 = its ablated
one, every reader v reads, exactly,

    empty residual + sum over u of m_uv D_u

which for a 0/1 mask is the circuit of `circuit_run.py` in its sparse form. (It equals the model's own residual minus
`(1 - m_uv) D_u`, but a mask that is nearly closed would leave rounding noise there, which a norm would blow up.)

1. As the model computes its writers, each D is kept once, `[writers, tokens, d_model]` in all.
2. A reader's stream is one product of the mask's column with the D's before it, then normed and projected. It is
   computed again on the way back (`torch.utils.checkpoint`), so only one layer's streams are held at a time.
3. The weights are frozen; gradients flow to the mask through the streams, and through the activations to the streams of
   earlier layers. At the mask of all ones the gradient is the EAP score of every edge.

A node's gate is a mask whose row has one value: `gate[:, None].expand(-1, n_readers)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from circuitfind.costs import count_backward
from circuitfind.engine.capture import metric_gradient, power_of_two
from circuitfind.engine.prepare import Prepared
from circuitfind.errors import ScoreError
from circuitfind.metrics import Metric
from circuitfind.models.backends import through_hooks, undisturbed
from circuitfind.models.layer import PROJECTIONS, Heads

After = Callable[[Tensor], Tensor] | None


class MaskGradient(NamedTuple):
    """The metric `[batch]` of a masked run, and the gradient `[writers, readers]` of its sum."""

    values: Tensor
    gradient: Tensor


def run_masked(prepared: Prepared, mask: Tensor) -> Tensor:
    """Logits `[batch, reads, vocab]` of a soft circuit, differentiable in the mask.

    `mask`: `[writers, readers]` in the adapter's `work` precision; cells that are no edges are ignored.
    """
    adapter, shape = prepared.adapter, prepared.adapter.graph.real.shape
    if mask.shape != shape:
        raise ScoreError(f"the mask has shape {list(mask.shape)}, the graph needs {list(shape)}")
    with torch.enable_grad(), undisturbed(adapter.model):
        return through_hooks(adapter, prepared.batch.clean, MaskedVisitor(prepared, mask))


def mask_gradient(prepared: Prepared, mask: Tensor, metric: Metric) -> MaskGradient:
    """A masked run, forwards and backwards; ScoreError if the metric cannot be differentiated."""
    leaf = mask.detach().clone().requires_grad_(True)
    logits = run_masked(prepared, leaf)
    values, at_logits = metric_gradient(
        logits.to(prepared.adapter.work),
        lambda at: metric(at, prepared.batch),
        f"metric '{metric.name}'",
        "masks are learned by gradients; acdc and exact patching need none",
    )
    scale = power_of_two(at_logits)
    count_backward(len(logits))
    (gradient,) = torch.autograd.grad(logits, leaf, grad_outputs=(at_logits / scale).to(logits.dtype))
    return MaskGradient(values, gradient * scale)


class MaskedVisitor:
    """Collects D as writers are computed and overwrites what every reader reads."""

    def __init__(self, prepared: Prepared, mask: Tensor) -> None:
        self.prepared, self.mask, self.adapter = prepared, mask, prepared.adapter
        self.graph = self.adapter.graph
        embed = prepared.ablated.embed
        self.batch, self.length, self.width = embed.shape
        self._embed = self._rows(prepared.clean.resid[0].to(embed) - embed)
        self._heads: list[Tensor] = []  # D by layer, `[heads, tokens, d_model]`
        self._mlps: list[Tensor] = []
        self._z: Tensor
        self._values: Heads  # of the layer `_values_of`
        self._values_of = -1

    def __call__(self, site: str, layer: int, value: Tensor) -> Tensor | None:
        if site in PROJECTIONS:
            if self._values_of != layer:
                self._values, self._values_of = self._attention_values(layer), layer
            new = self.adapter.layers[layer].layout.whole(site, self._values._asdict())
            return new.to(value.dtype, copy=True)  # OLMo clips this tensor in place
        if site == "z":
            self._z = value
        elif site == "attn_out":
            scaled = self.adapter.layers[layer].scaled_heads(self._z, value) - self.prepared.ablated.heads[layer]
            self._heads.append(self._rows(self.adapter.head_outputs(layer, scaled)))
        elif site == "mlp_in":
            base = self._rows(self.prepared.empty.middle[layer])
            stream = self._read("mlp", layer, base, self._seen(layer, "mlp"))[0]
            return self.adapter.layers[layer].mlp_reads(stream).view(value.shape).to(value.dtype)
        elif site == "mlp_out":
            ablated = self.prepared.ablated.mlps[layer]
            self._mlps.append(self._rows(self.adapter.layers[layer].mlp_written(value).view(ablated.shape) - ablated))
        elif site == "final":
            return self._final(value)
        return None

    def _rows(self, value: Tensor) -> Tensor:
        """`[writers, tokens, d_model]`: D of some writers, or (as one of them) what readers without an edge see."""
        return self.adapter.centre(value.reshape(-1, self.batch * self.length, self.width).to(self.adapter.work))

    def _seen(self, layer: int, kind: str) -> list[Tensor]:
        """D of the writers that a layer's readers of this kind see, in the graph's order."""
        seen = [self._embed]
        for heads, mlp in zip(self._heads[:layer], self._mlps[:layer], strict=True):
            seen += [heads, mlp]
        own_heads = kind == "mlp" and not self.graph.parallel
        return [*seen, self._heads[layer]] if own_heads else seen

    def _read(self, kind: str, layer: int, base: Tensor, seen: list[Tensor], after: After = None) -> Tensor:
        """What a layer's readers of one kind see, `[readers, tokens, d_model]`, or only what `after` makes of it.

        `base`, `seen`: what a reader without an edge sees, and the writers' D, as `_rows` makes them.
        """
        columns = self.mask[: self.graph.reads(layer, kind), self.graph.readers(layer, kind)]

        def read(columns: Tensor, base: Tensor, *seen: Tensor) -> Tensor:
            flat = torch.addmm(base.flatten(1), columns.T, torch.cat(seen).flatten(1))
            streams = flat.unflatten(1, (-1, self.width))
            return streams if after is None else after(streams)

        streams: Tensor = checkpoint(read, columns, base, *seen, use_reentrant=False, preserve_rng_state=False)
        return streams

    def _attention_values(self, layer: int) -> Heads:
        """`[batch, pos, heads, d_head]` for q, k and v."""
        folded = self.prepared.readers(layer)
        every = torch.arange(len(folded.weight))
        base, seen = self._rows(self.prepared.empty.resid[layer]), self._seen(layer, "qkv")
        project = partial(folded.values, readers=every, centred=self.adapter.centred)
        values = self._read("qkv", layer, base, seen, project).transpose(0, 1).unflatten(0, (self.batch, self.length))
        n_kv = self.graph.n_kv_heads
        return Heads(*values.split([self.graph.n_heads, n_kv, n_kv], dim=2))

    def _final(self, value: Tensor) -> Tensor:
        """The final norm's input; only where the metric reads the logits is it the soft circuit's."""
        read = torch.zeros_like(self.prepared.batch.clean.mask)
        read.scatter_(1, self.prepared.batch.clean.read, True)
        at = read.flatten().nonzero().squeeze(1)
        base, seen = self._rows(self.prepared.empty.resid[-1]), self._seen(self.graph.n_layers, "logits")
        stream = self._read("logits", self.graph.n_layers, base[:, at], [part[:, at] for part in seen])
        return base[0].index_copy(0, at, stream[0]).view(value.shape).to(value.dtype)
