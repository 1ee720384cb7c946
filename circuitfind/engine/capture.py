"""One forward pass, remembered: what every writer wrote and what every reader read, with gradients if asked.

1. `Writers` are the parts of the residual stream that edges carry: the embedding, each layer's heads *before* their
   output projection (already times a post-norm's scale), each MLP. They add and subtract like vectors, and heads stay
   `d_head` wide, so a GPT-2 small batch of 8 x 16 tokens takes 10 MB instead of 60.
2. `capture` runs a model and keeps its writers, residual streams and logits at the read positions.
3. `capture_gradients` roots autograd at a detached layer-0 input and takes gradients at the q, k, v projection outputs,
   the MLP inputs and the final norm's input. MLP inputs get a fresh autograd node (`view_as`): a norm shared by
   attention and MLP would otherwise count both branches' gradients at either reader.
4. Outputs of attention or MLP modules can be given: they become constants, which no gradient flows through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from circuitfind.batch import Inputs
from circuitfind.costs import count_backward
from circuitfind.errors import ScoreError
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import STOP, Stop, through, undisturbed
from circuitfind.models.layout import Heads

# ("attn_out" or "mlp_out", layer) -> what that module returns: the attention's output projection, or the MLP
Outputs = Mapping[tuple[str, int], Tensor]


class Writers(NamedTuple):
    """What each writer adds to the residual stream.

    embed: `[batch, pos, d_model]`; heads: by layer `[batch, pos, heads, d_head]`, to be projected by the layer's
    `output_weight`; mlps: by layer `[batch, pos, d_model]`, without output biases.
    """

    embed: Tensor
    heads: list[Tensor]
    mlps: list[Tensor]

    def map(self, function: Callable[[Tensor], Tensor]) -> Writers:
        """The same function of every part."""
        return Writers(function(self.embed), [function(x) for x in self.heads], [function(x) for x in self.mlps])

    def minus(self, other: Writers) -> Writers:
        """Part by part difference."""
        heads = [a - b for a, b in zip(self.heads, other.heads, strict=True)]
        mlps = [a - b for a, b in zip(self.mlps, other.mlps, strict=True)]
        return Writers(self.embed - other.embed, heads, mlps)


class ReaderGradients(NamedTuple):
    """Gradients of the summed metric: at projections' outputs by layer, MLPs' inputs, the final norm's input."""

    qkv: list[Heads]
    mlp: list[Tensor]
    final: Tensor


class Gradients(NamedTuple):
    """A pass forwards and backwards: the run, the gradients at its readers, the metric's `[batch]` values."""

    run: Run
    at: ReaderGradients
    values: Tensor


@dataclass
class Run:
    """What a pass left behind. Lists are by layer; `resid` has one more entry, the final norm's input.

    Attributes:
        resid: `[batch, pos, d_model]` residual entering each block, in the model's own precision.
        middle: `[batch, pos, d_model]` what each MLP reads, before its norm.
        qkv: values at the projections' outputs; mlp_in: values at the MLP's input, as the module sees them.
        attn_out, mlp_out: raw outputs of the attention's output projection and of the MLP.
        logits: `[batch, reads, vocab]`, empty if the pass was stopped before the unembedding.
    """

    resid: list[Tensor] = field(default_factory=list)
    middle: list[Tensor] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    mlps: list[Tensor] = field(default_factory=list)
    qkv: list[Heads] = field(default_factory=list)
    mlp_in: list[Tensor] = field(default_factory=list)
    attn_out: list[Tensor] = field(default_factory=list)
    mlp_out: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def writers(self) -> Writers:
        return Writers(self.resid[0].to(self.mlps[0].dtype), self.heads, self.mlps)


class Recorder:
    """The visitor that fills a `Run`."""

    def __init__(
        self,
        adapter: Adapter,
        stop: bool = False,
        embed: Tensor | None = None,
        differentiate: bool = False,
        outputs: Outputs | None = None,
    ) -> None:
        self.adapter, self.stop, self.embed, self.differentiate = adapter, stop, embed, differentiate
        self.outputs = outputs or {}
        self.run = Run()
        self.leaves: dict[tuple[str, int], Tensor] = {}
        self._separate: dict[str, Tensor] = {}
        self._z: Tensor  # the heads of the layer whose output is being waited for

    def __call__(self, site: str, layer: int, value: Tensor) -> Tensor | Stop | None:
        given = self.outputs.get((site, layer))
        value = value if given is None else given
        run, detached = self.run, value.detach()
        if site in ("mlp_in", "final") and self.differentiate:
            # the final norm's input stays itself: a hook on that norm sees what it was before nnsight replaces it
            leaf = value.view_as(value) if site == "mlp_in" else value
            self.leaves[site, layer] = leaf
            self._note_input(site, detached)
            return None if leaf is value else leaf
        if site == "resid":
            return self._enter_block(layer, value)
        if site in ("q", "k", "v", "qkv"):
            self._note_projection(site, detached)
            if self.differentiate:
                self.leaves[site, layer] = value
                return value.clone()  # OLMo clips this tensor in place: the gradient is needed from before
        elif site == "z":
            self._z = detached
        elif site == "attn_out":
            view = self.adapter.layers[layer]
            run.heads.append(view.scaled_heads(self._z, detached))
            run.attn_out.append(detached)
            resid = run.resid[layer]
            run.middle.append(resid if self.adapter.graph.parallel else resid + view.attn_written(detached).to(resid))
        elif site == "mlp_out":
            out = detached.clone()  # Falcon adds into this tensor in place
            run.mlp_out.append(out)
            run.mlps.append(self.adapter.layers[layer].mlp_written(out).view(run.resid[0].shape))
        else:
            self._note_input(site, detached)
            return STOP if site == "final" and self.stop else None
        return None if given is None else given.clone()  # Falcon adds into the MLP's output in place

    def _enter_block(self, layer: int, value: Tensor) -> Tensor | None:
        if layer or not (self.differentiate or self.embed is not None):
            self.run.resid.append(value.detach())
            return None
        root = (value if self.embed is None else self.embed.to(value.dtype)).detach()
        self.run.resid.append(root)
        return root.clone().requires_grad_(self.differentiate)

    def _note_projection(self, site: str, value: Tensor) -> None:
        layout = self.adapter.layers[0].layout
        if site == "qkv":
            self.run.qkv.append(layout.split(value))
            return
        self._separate[site] = value.unflatten(-1, (-1, layout.d_head))
        if len(self._separate) == 3:
            self.run.qkv.append(Heads(**self._separate))
            self._separate = {}

    def _note_input(self, site: str, value: Tensor) -> None:
        (self.run.resid if site == "final" else self.run.mlp_in).append(value)


def capture(adapter: Adapter, inputs: Inputs, stop: bool = False, embed: Tensor | None = None) -> Run:
    """Runs the model without gradients.

    Args:
        stop: end the pass before the unembedding (no logits).
        embed: `[batch, pos, d_model]` to use in place of the residual that enters layer 0.
    """
    recorder = Recorder(adapter, stop, embed)
    with torch.no_grad(), undisturbed(adapter.model):
        recorder.run.logits = through(adapter, inputs, recorder)
    return recorder.run


def capture_gradients(
    adapter: Adapter,
    inputs: Inputs,
    metric: Callable[[Tensor], Tensor],
    embed: Tensor | None = None,
    outputs: Outputs | None = None,
) -> Gradients:
    """Runs the model forwards and backwards.

    Args:
        metric: from logits `[batch, reads, vocab]` to `[batch]` values; their sum is differentiated.
        embed: `[batch, pos, d_model]` to use in place of the residual that enters layer 0.
        outputs: constants to use in place of these modules' outputs.

    Raises:
        ScoreError: the metric cannot be differentiated.
    """
    recorder = Recorder(adapter, embed=embed, differentiate=True, outputs=outputs)
    with torch.enable_grad(), undisturbed(adapter.model):
        logits = through(adapter, inputs, recorder)
        wide = logits.detach().to(adapter.work).requires_grad_(True)
        values = metric(wide)
        if not values.requires_grad:
            raise ScoreError(
                "the metric does not depend on the logits in a differentiable way (an argmax, a comparison, or .item()"
                " inside?): attribution needs a gradient; exact patching (method='exact') does not"
            )
        (at_logits,) = torch.autograd.grad(values.sum(), wide, allow_unused=True)
        at_logits = torch.zeros_like(wide) if at_logits is None else at_logits
        scale = _loss_scale(at_logits, adapter.dtype)
        leaves = list(recorder.leaves.values())
        count_backward(len(inputs.ids))
        seed = (at_logits * scale).to(logits.dtype)
        # what only a given output depends on has no gradient
        found = torch.autograd.grad(logits, leaves, grad_outputs=seed, materialize_grads=bool(outputs))
        grads = {key: g.to(adapter.work) / scale for key, g in zip(recorder.leaves, found, strict=True)}
    recorder.run.logits = logits.detach()
    layout, n_layers, shape = adapter.layers[0].layout, adapter.graph.n_layers, recorder.run.resid[0].shape
    if adapter.family.qkv:
        qkv = [layout.split(grads["qkv", layer]) for layer in range(n_layers)]
    else:
        heads = {key: grad.unflatten(-1, (-1, layout.d_head)) for key, grad in grads.items() if key[0] in "qkv"}
        qkv = [Heads(*(heads[kind, layer] for kind in "qkv")) for layer in range(n_layers)]
    mlp = [grads["mlp_in", layer].view(shape) for layer in range(n_layers)]
    return Gradients(recorder.run, ReaderGradients(qkv, mlp, grads["final", n_layers]), values.detach())


def _loss_scale(at_logits: Tensor, dtype: torch.dtype) -> float:
    """A power of two that brings a float16 model's gradients at the logits to about 1: they would underflow."""
    largest = float(at_logits.abs().max())
    return 2.0 ** -round(math.log2(largest)) if dtype == torch.float16 and 0 < largest < math.inf else 1.0
