"""Circuits with soft masks: one forward pass, differentiable in the weight of every edge.

With `D_u = current_u - ablated_u` for each writer u and a mask m (1: the edge carries its current value, 0: its ablated
value), a reader v reads exactly

    empty residual + sum over u of m_uv D_u

For a 0/1 mask this is the circuit of `circuit_run.py` in its sparse form. (It also equals the model's own residual
minus `(1 - m_uv) D_u`, but where a mask is nearly 0 that would leave rounding noise, which a norm amplifies.)

1. Edges with `m_uv != 0` are called open. An edge whose gradient is requested takes part if a path of open edges leads
   from its reader to `logits`; otherwise its gradient is 0. An open edge takes part if a path leads from its reader to
   `logits`, or to the writer of a requested edge that takes part. Modules without a reader that takes part, and
   projections whose outputs are overwritten, are not run, as in the sparse form.
2. D of each writer is stored once, as the model computes it. A reader's stream is its column of the mask times the D of
   the writers before it, then normed and projected. Streams are not kept for the backward pass but computed again
   (`masked_streams.py`).
3. The weights are frozen. Gradients flow to the mask through the readers' streams, and through the activations to the
   streams of earlier layers. At the mask of all ones the gradient is the EAP score of every edge. At a 0/1 circuit, the
   gradient of `only` its own edges costs little more than running it.

A node's gate is a mask whose row has one value: `gate[:, None].expand(-1, n_readers)`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuitfind.costs import count_backward
from circuitfind.engine.circuit_run import Plan, skippable, values_by_kind
from circuitfind.engine.masked_streams import Streams, read, start, write
from circuitfind.engine.prepare import Prepared
from circuitfind.engine.reach import Reach
from circuitfind.engine.reader_gradients import metric_gradient, power_of_two
from circuitfind.errors import ScoreError
from circuitfind.metrics import Metric
from circuitfind.models.backends import through_hooks, undisturbed
from circuitfind.models.layer import PROJECTIONS, Heads


class MaskGradient(NamedTuple):
    """The metric's `values [batch]` in a masked run, and the gradient `[writers, readers]` of their sum."""

    values: Tensor
    gradient: Tensor


class PairGradients(NamedTuple):
    """The metric's `values [batch]` in a masked run, and the gradient of each of them, `[edges, batch]`."""

    values: Tensor
    gradient: Tensor


def run_masked(prepared: Prepared, mask: Tensor) -> Tensor:
    """Return logits `[batch, reads, vocab]` of a circuit with a soft mask, differentiable in the mask.

    `mask`: `[writers, readers]` in the adapter's `work` precision; entries that are no edges are ignored.
    """
    real = prepared.adapter.graph.real
    plan = _plan(prepared, mask, real if mask.requires_grad else np.zeros_like(real))
    with torch.enable_grad():
        streams = Streams(prepared, plan, mask)
        return _run(streams, start(mask, streams))


def mask_gradient(prepared: Prepared, mask: Tensor, metric: Metric, only: np.ndarray | None = None) -> MaskGradient:
    """Run a circuit with a soft mask forwards and backwards; ScoreError if the metric is not differentiable.

    `mask`: as for `run_masked`; `only`: `[writers, readers]` bool, the edges whose gradient is requested (default:
    all); for other edges it is 0. Cheapest are a circuit's own edges at that circuit: nothing outside it is computed.
    """
    only = prepared.adapter.graph.real if only is None else only
    values, streams = _gradient(prepared, mask, metric, only, 1)
    gradient = streams.at_mask()
    return MaskGradient(values, gradient * torch.from_numpy(only).to(gradient.device))


def pair_gradients(prepared: Prepared, mask: Tensor, metric: Metric, only: np.ndarray) -> PairGradients:
    """Compute `mask_gradient` for each pair separately, in one run: `gradient [edges, batch]`, edges in the order of
    `np.argwhere(only)`. Its sum over pairs is `mask_gradient(prepared, mask, metric, only).gradient[only]`."""
    values, streams = _gradient(prepared, mask, metric, only, len(prepared.batch))
    return PairGradients(values, streams.at_edges(*np.nonzero(only)))


def _gradient(
    prepared: Prepared, mask: Tensor, metric: Metric, only: np.ndarray, groups: int
) -> tuple[Tensor, Streams]:
    """Return the metric's `[batch]` values, and the streams with the gradient with respect to the mask."""
    streams = Streams(prepared, _plan(prepared, mask, only), mask, groups)
    token = streams.written.new_zeros((), requires_grad=True)
    logits = _run(streams, token)
    values, at_logits = metric_gradient(
        logits.to(prepared.adapter.work),
        lambda at: metric(at, prepared.batch),
        f"metric '{metric.name}'",
        "learned masks and re-scoring need its gradient; acdc, exact and find(search='absolute') do not",
    )
    scale = power_of_two(at_logits) if prepared.adapter.dtype == torch.float16 else 1.0
    count_backward(len(logits) * prepared.inputs.part)
    if logits.requires_grad:
        torch.autograd.grad(logits, token, grad_outputs=(at_logits / scale).to(logits.dtype))
    streams.finish()
    streams.gradient *= scale
    return values, streams


def _plan(prepared: Prepared, mask: Tensor, wanted: np.ndarray) -> Plan:
    """Return the edges that take part in a masked run, given the edges whose gradient is requested."""
    graph = prepared.adapter.graph
    if mask.shape != graph.real.shape:
        raise ScoreError(f"the mask has shape {list(mask.shape)}, the graph needs {list(graph.real.shape)}")
    is_open = graph.real & (mask.detach() != 0).cpu().numpy()

    def useful(edges: np.ndarray) -> np.ndarray:
        return Reach(graph, edges, prepared.adapter.coupled).useful

    edges, leading = is_open, useful(is_open)
    if (closed := wanted & graph.real & leading & ~is_open).any():
        edges = is_open | closed
        leading = useful(edges)
    return Plan.of(prepared, (edges & leading)[None], sparse=True)


def _run(streams: Streams, token: Tensor) -> Tensor:
    prepared, adapter = streams.prepared, streams.adapter
    with torch.enable_grad(), undisturbed(adapter.model):
        visitor, skips = MaskedVisitor(streams, token), skippable(prepared, streams.plan)
        return through_hooks(adapter, prepared.inputs, visitor, skips)


class MaskedVisitor:
    """The visitor that stores D as writers are computed, and overwrites every reader's input; `token`: from `start`
    (`masked_streams.py`)."""

    def __init__(self, streams: Streams, token: Tensor) -> None:
        self.streams, self.token = streams, token
        self.prepared, self.plan, self.adapter = streams.prepared, streams.plan, streams.adapter
        self._z: Tensor
        self._values: Heads  # q, k and v of the layer `_values_of`
        self._values_of = -1
        ablated, empty = self.prepared.ablated, self.prepared.empty
        streams.write(0, "input", self.prepared.clean.resid[0].to(ablated.embed) - ablated.embed)
        for layer in range(0 if self.prepared.interchange else self.plan.graph.n_layers):
            if not self.plan.runs(layer, "qkv"):  # these writers are constants, and their modules may be skipped
                streams.write(layer, "heads", empty.heads[layer] - ablated.heads[layer])
            if not self.plan.runs(layer, "mlp"):
                streams.write(layer, "mlp", empty.mlps[layer] - ablated.mlps[layer])

    def __call__(self, site: str, layer: int, value: Tensor) -> Tensor | None:
        view, empty = self.adapter.layers[min(layer, self.plan.graph.n_layers - 1)], self.prepared.empty
        if site == "resid":
            return value.detach()  # no reader uses it, so autograd need not keep it
        if site in PROJECTIONS:
            if self._values_of != layer:
                self._values, self._values_of = self._attention_values(layer), layer
            new = view.layout.output(site, self._values)
            return new.to(value.dtype, copy=True)  # OLMo clips this tensor in place
        if site == "z":
            self._z = value
        elif site == "attn_out":
            if self.plan.runs(layer, "qkv"):
                self._write(layer, "heads", view.scaled_heads(self._z, value) - self.prepared.ablated.heads[layer])
        elif site == "mlp_in":
            seen = self._read(layer, "mlp") if self.plan.runs(layer, "mlp") else empty.mlp_in[layer]
            return seen.view(value.shape).to(value.dtype)
        elif site == "mlp_out":
            if self.plan.runs(layer, "mlp"):
                ablated = self.prepared.ablated.mlps[layer]
                self._write(layer, "mlp", view.mlp_written(value).view(ablated.shape) - ablated)
        elif site == "final":
            return self._final(value)
        return None

    def _write(self, layer: int, kind: str, difference: Tensor) -> None:
        self.token = write(self.token, difference, self.streams, layer, kind)

    def _read(self, layer: int, kind: str) -> Tensor:
        return read(self.token, self.streams, layer, kind)

    def _attention_values(self, layer: int) -> Heads:
        own = self.prepared.empty.qkv[layer]
        if not self.plan.runs(layer, "qkv"):
            return own
        read = self._read(layer, "qkv").transpose(0, 1).unflatten(0, self.prepared.inputs.ids.shape)
        return own.with_chosen(values_by_kind(self.adapter.layers[layer], self.plan, layer, read))

    def _final(self, value: Tensor) -> Tensor:
        """Return the final norm's input: the masked circuit's at the read positions, the empty run's elsewhere."""
        base = self.prepared.empty.resid[-1]
        if self.plan.runs(layer=0, kind="logits"):
            at, _ = self.streams.read_tokens()
            flat = base.flatten(0, 1).to(self.adapter.work)
            base = flat.index_copy(0, at, self._read(self.plan.graph.n_layers, "logits"))
        return base.view(value.shape).to(value.dtype)
