"""One forward pass, remembered: what every writer wrote and what every reader read, with gradients if asked.

1. `capture` runs a model and keeps its writers (`engine/writers.py`), its residual streams, and its logits at the read
   positions.
2. `capture_gradients` roots autograd at a detached layer-0 input and takes gradients at the q, k, v projection outputs,
   the MLP inputs and the final norm's input. MLP inputs get a fresh autograd node (`view_as`): a norm shared by
   attention and MLP would otherwise count both branches' gradients at either reader.
3. Outputs of attention or MLP modules can be given: they become constants, which no gradient flows through.

Where prompts are aligned by spans, the corrupted run is seen from the clean prompts (`capture_corrupted`). What it left
at position `alignment[t]` stands at the clean prompt's position t, the embedding with its learned position included, so
every writer has an ablated value at every token. The run with every edge ablated has the corrupted run's logits: the
unembedding reads the sum of the ablated values and biases, which is the corrupted stream. But its writers do not write
the ablated values (a head attends over the clean prompt's tokens there), so it is computed as under mean ablation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from circuitfind.batch import Batch, Inputs
from circuitfind.costs import count_backward
from circuitfind.engine.writers import Writers
from circuitfind.errors import ScoreError, TaskError
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import STOP, Stop, through, undisturbed
from circuitfind.models.layer import PROJECTIONS, Heads

# ("attn_out" or "mlp_out", layer) -> what that module returns: the attention's output projection, or the MLP
Outputs = Mapping[tuple[str, int], Tensor]


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
        if site in PROJECTIONS:
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
        self._separate |= self.adapter.layers[0].layout.parts(site, value)
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
    parts: list[dict[str, Tensor]] = [{} for _ in range(n_layers)]
    for (site, layer), grad in grads.items():
        if site in PROJECTIONS:
            parts[layer] |= layout.parts(site, grad)
    qkv = [Heads(**found) for found in parts]
    mlp = [grads["mlp_in", layer].view(shape) for layer in range(n_layers)]
    return Gradients(recorder.run, ReaderGradients(qkv, mlp, grads["final", n_layers]), values.detach())


def _loss_scale(at_logits: Tensor, dtype: torch.dtype) -> float:
    """A power of two that brings a float16 model's gradients at the logits to about 1: they would underflow."""
    largest = float(at_logits.abs().max())
    return 2.0 ** -round(math.log2(largest)) if dtype == torch.float16 and 0 < largest < math.inf else 1.0


# -------------------------------------------------------------------- prompts that are aligned by spans
def capture_corrupted(adapter: Adapter, batch: Batch, stop: bool = False) -> Run:
    """The corrupted run, moved onto the clean prompts' positions where pairs are aligned; its logits are its own.

    Args:
        stop: end the pass before the unembedding (no logits).
    """
    run = capture(adapter, batch.corrupted, stop)
    if batch.alignment is None:
        return run

    def at_clean(values: list[Tensor]) -> list[Tensor]:
        return [moved(value, batch) for value in values]

    return Run(
        resid=at_clean(run.resid),
        middle=at_clean(run.middle),
        heads=at_clean(run.heads),
        mlps=at_clean(run.mlps),
        qkv=[Heads(*at_clean(list(heads))) for heads in run.qkv],
        mlp_in=at_clean(run.mlp_in),
        attn_out=at_clean(run.attn_out),
        mlp_out=at_clean(run.mlp_out),
        logits=run.logits,
    )


def moved(value: Tensor, batch: Batch) -> Tensor:
    """Values of the corrupted run, `[batch, pos, ...]` or `[batch x pos, ...]`, on the clean prompts' positions."""
    if batch.alignment is None:
        return value
    index = batch.alignment.to(value.device)
    rows = torch.arange(len(index), device=value.device).unsqueeze(1)
    return value.reshape(*index.shape, -1)[rows, index].reshape(value.shape)


def refuse_aligned(batch: Batch, what: str, remedy: str) -> None:
    """For what has no meaning between aligned prompts.

    Raises:
        TaskError: the pairs are aligned; it says `what`, and the `remedy`.
    """
    if batch.alignment is not None:
        raise TaskError(f"{what} is not defined between prompts aligned by spans: {remedy}")
