"""Gradients at every reader of the residual stream, by one backward pass or block by block.

1. `capture_gradients` starts autograd at a detached layer-0 input and takes gradients at the outputs of the q, k and v
   projections, at the MLP inputs and at the final norm's input. MLP inputs get an autograd node of their own
   (`view_as`): where attention and MLP share a norm, the gradient at either would otherwise include that of the other.
   If outputs of attention or MLP modules are replaced, they are constants, and no gradient flows through them.
2. Autograd's activations of a long prompt may not fit in memory. If the plan says so (`engine/memory_plan.py`), the
   forward pass runs without gradients. Then, from the last block to the first, each block runs again from the recorded
   stream where it begins, and the gradient at its output gives those at its readers and at that stream. So activations
   of one block are held at a time, for one more forward pass: activation checkpointing.
   This is only right if blocks are connected through the stream alone. Each model is therefore tested once, on a few
   tokens. If the two ways differ, or under the user's hooks, gradients are taken in one pass.
3. In an ungrouped graph (`Adapter.ungrouped`) each query head has a key and a value reader of its own: a copy of the
   key or value head that its group shares. (Other tools repeat keys and values before attention.) A query head's output
   `z` depends on its own copies only, so the gradient at a copy is the part that flows back from that head. It takes
   one backward pass from z to the projections for each copy, of one head in every group at once. Rotary positions,
   norms of keys and the kind of attention need no code of their own. If one norm takes all keys of a layer together
   (OLMo 2), the first copies of all groups share one norm, and so do the second, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from circuitfind.batch import Inputs
from circuitfind.costs import count_backward
from circuitfind.engine.capture import READ, Outputs, Recorder, Run, rounding
from circuitfind.engine.memory_plan import goes_by_block
from circuitfind.errors import ModelError, ScoreError
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import STOP, Stop, through, through_hooks, undisturbed
from circuitfind.models.layer import PROJECTIONS, Heads, LayerView

HandOn = Callable[[str, int, Tensor], Tensor]
Places = Mapping[tuple[str, int], Tensor]  # (site, layer) -> a value, or the gradient at it
ADD_UP = 1e-3  # how far the copies' gradients may be from adding up to their head's, relative to the largest
FEW = 32  # tokens on which gradients block by block are tested


class ReaderGradients(NamedTuple):
    """Gradients of the summed metric: by layer at the outputs of the q, k and v projections (by head) and at the MLP's
    input `[batch, pos, d_model]`, and at the final norm's input."""

    qkv: list[Heads]
    mlp: list[Tensor]
    final: Tensor


class Gradients(NamedTuple):
    """A forward and backward pass: the run, the gradients at its readers, and the metric's `[batch]` values."""

    run: Run
    at: ReaderGradients
    values: Tensor


@dataclass
class _Leaves:
    """The visitor that gives every reader's value an autograd node of its own, and records it to take its gradient."""

    adapter: Adapter
    hand_on: HandOn | None = None
    at: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def __call__(self, site: str, layer: int, value: Tensor) -> Tensor | None:
        if site in PROJECTIONS:
            value = value.view_as(value) if site == "mixer" else value  # the output of a norm, which others may read
            self.at[site, layer] = value
            value = value if self.hand_on is None else self.hand_on(site, layer, value)
            return value.clone()  # OLMo clips this tensor in place; the gradient is taken before that
        if site == "z" and self.adapter.layers[layer].copies > 1:
            self.at[site, layer] = value
        elif site == "mlp_in":
            self.at[site, layer] = value.view_as(value)
            return self.at[site, layer]
        elif site == "final":  # not replaced: a hook on that norm would see the tensor from before nnsight replaces it
            self.at[site, layer] = value
        return None


def capture_gradients(
    adapter: Adapter,
    inputs: Inputs,
    metric: Callable[[Tensor], Tensor],
    embed: Tensor | None = None,
    outputs: Outputs | None = None,
    hand_on: HandOn | None = None,
    keep: Collection[str] | None = None,
) -> Gradients:
    """Run the model forwards and backwards.

    Args:
        metric: from logits `[batch, reads, vocab]` to `[batch]` values; their sum is differentiated.
        embed, outputs: as for `Recorder`; replaced outputs are constants.
        hand_on: called with (site, layer, output) of each q, k and v projection; the model continues with the tensor
            that it returns.
        keep: as for `capture`; the lists in `READ` are always filled.

    Raises:
        ScoreError: the metric is not differentiable.
        ModelError: see `_at_heads`.
    """
    keep = None if keep is None else {*keep, *READ}
    whole = _Pass(adapter, inputs, metric, embed, outputs or {}, hand_on, keep)
    sizes = (inputs.ids.shape[1], inputs.read.shape[1])
    return whole.by_block() if goes_by_block(adapter, *sizes) and _equal_by_block(whole) else whole.at_once()


@dataclass
class _Pass:
    """The arguments of `capture_gradients`, and the two ways to take the gradients."""

    adapter: Adapter
    inputs: Inputs
    metric: Callable[[Tensor], Tensor]
    embed: Tensor | None = None
    outputs: Outputs = field(default_factory=dict)
    hand_on: HandOn | None = None
    keep: Collection[str] | None = None

    def at_once(self) -> Gradients:
        adapter, leaves = self.adapter, _Leaves(self.adapter, self.hand_on)
        recorder = Recorder(adapter, embed=self.embed, outputs=self.outputs, keep=self.keep)

        def visit(site: str, layer: int, value: Tensor) -> Tensor | Stop | None:
            new = recorder(site, layer, value)
            if (site, layer) == ("resid", 0):
                return recorder.run.resid[0].clone().requires_grad_()
            return leaves(site, layer, value) if new is None else new

        with torch.enable_grad(), undisturbed(adapter.model):
            logits = through(adapter, self.inputs, visit)
            values, seed, scale = self._seed(logits)
            split = any(view.copies > 1 for view in adapter.layers)
            at = self._gradients(logits, seed, leaves.at, split)
            read = [self._at_readers(layer, leaves.at, at, scale) for layer in range(adapter.graph.n_layers)]
        recorder.run.logits = logits.detach()
        final = self._scaled(at["final", adapter.graph.n_layers], scale)
        return Gradients(recorder.run, _by_reader(read, final), values)

    def by_block(self) -> Gradients:
        adapter, blocks = self.adapter, len(self.adapter.layers)
        run = Recorder(adapter, embed=self.embed, outputs=self.outputs, keep=self.keep).record(self.inputs)
        values, seed, scale = self._seed(run.logits)
        read: list[tuple[Heads, Tensor]] = []
        with torch.enable_grad(), undisturbed(adapter.model):
            for block in reversed(range(blocks + 1)):  # the last one is from the final norm to the logits
                leaves = _Leaves(adapter, self.hand_on)
                end = self._run_block(block, run.resid[block], leaves)
                found = self._gradients(end, seed, leaves.at, block < blocks and adapter.layers[block].copies > 1)
                if block == blocks:
                    seed = found["final", block]
                    final = self._scaled(seed, scale)
                else:
                    seed = found["resid", block]
                    read.append(self._at_readers(block, leaves.at, found, scale))
                del leaves, end, found
        return Gradients(run, _by_reader(read[::-1], final), values)

    def _run_block(self, block: int, start: Tensor, leaves: _Leaves) -> Tensor:
        """Run one block from the stream `start`; returns the stream after it (for the last one: the logits)."""
        blocks = len(self.adapter.layers)
        entered, left = (("resid" if at < blocks else "final", at) for at in (block, block + 1))
        ends: list[Tensor] = []

        def visit(site: str, layer: int, value: Tensor) -> Tensor | Stop | None:
            if (site, layer) == entered:
                leaves.at[entered] = start.clone().requires_grad_()
                return leaves.at[entered]
            if (site, layer) == left:
                ends.append(value)
                return STOP
            given = self.outputs.get((site, layer))
            if layer != block or given is not None:
                return None if given is None else given.clone()
            return leaves(site, layer, value)

        skips = {view.path: start for at, view in enumerate(self.adapter.layers) if at != block}
        logits = through_hooks(self.adapter, self.inputs, visit, skips)
        return ends[0] if ends else logits

    def _seed(self, logits: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return the metric's values, the gradient at the logits divided by a scale, and the scale."""
        values, at_logits = metric_gradient(
            logits.to(self.adapter.work),
            self.metric,
            "the metric",
            "attribution needs a gradient; exact patching (method='exact') does not",
        )
        scale = power_of_two(at_logits) if self.adapter.dtype == torch.float16 else 1.0
        count_backward(len(self.inputs.ids) * self.inputs.part)
        return values, (at_logits / scale).to(logits.dtype), scale

    def _gradients(self, end: Tensor, seed: Tensor, leaves: Places, again: bool) -> dict[tuple[str, int], Tensor]:
        given = bool(self.outputs)  # leaves that only affect replaced outputs have no gradient
        found = torch.autograd.grad(end, [*leaves.values()], seed, materialize_grads=given, retain_graph=again)
        return dict(zip(leaves, found, strict=True))

    def _at_readers(self, layer: int, leaves: Places, at: Places, scale: float) -> tuple[Heads, Tensor]:
        """Return the gradients at a layer's q, k and v by reader, and at its MLP's input."""
        heads = _at_heads(self.adapter.layers[layer], layer, leaves, at)
        mlp = self._scaled(at["mlp_in", layer], scale).view(*self.inputs.ids.shape, -1)
        return Heads(*(self._scaled(part, scale) for part in heads)), mlp

    def _scaled(self, gradient: Tensor, scale: float) -> Tensor:
        gradient = gradient.to(self.adapter.work)
        return gradient if scale == 1 else gradient * scale


def _by_reader(read: list[tuple[Heads, Tensor]], final: Tensor) -> ReaderGradients:
    return ReaderGradients([qkv for qkv, _ in read], [mlp for _, mlp in read], final)


def _equal_by_block(whole: _Pass) -> bool:
    """Whether the model's gradients block by block equal those of one pass; tested once, on a few tokens."""
    adapter = whole.adapter
    if adapter.by_block is None:
        few = whole.inputs.ids[:1].repeat(1, FEW)[:, : adapter.at_most(FEW)]
        last = torch.full_like(few[:, :1], few.shape[1] - 1)
        inputs = Inputs(few, torch.ones_like(few, dtype=torch.bool), last)
        short = _Pass(adapter, inputs, lambda logits: logits.logsumexp(-1).sum(-1), hand_on=whole.hand_on)
        ways = [[*chain(*at.qkv), *at.mlp, at.final] for at in (short.at_once().at, short.by_block().at)]
        tolerance = rounding(adapter.dtype)
        pairs = zip(*ways, strict=True)
        adapter.by_block = all(bool((a - b).abs().max() <= tolerance * a.abs().max()) for a, b in pairs if a.numel())
    return adapter.by_block


def _at_heads(view: LayerView, layer: int, leaves: Places, at: Places) -> Heads:
    """Return the gradients by reader at a layer's q, k and v; in an ungrouped graph, of each copy of a key or value.

    Raises:
        ModelError: the copies' gradients do not add up to that of their head, because another layer uses it, too.
    """

    def parts(gradients: Iterable[Tensor], sites: Iterable[str]) -> dict[str, Tensor]:
        by_site = zip(sites, gradients, strict=True)
        return {kind: part for site, value in by_site for kind, part in view.layout.parts(site, value).items()}

    sites = view.family.projections
    if view.copies == 1:
        return view.layout.gather({site: at[site, layer] for site in sites})
    whole = parts((at[site, layer] for site in sites), sites)
    shared = [site for site in sites if site != "q"]
    z, given, layout = leaves["z", layer], at["z", layer], view.layout
    copy_of = torch.arange(layout.n_heads, device=z.device).repeat_interleave(layout.d_head) % view.copies
    copies = []
    for copy in range(view.copies):
        alone = (given.view(*given.shape[:-1], -1) * (copy_of == copy)).view(z.shape)
        found = torch.autograd.grad(z, [leaves[site, layer] for site in shared], alone, retain_graph=True)
        copies.append(parts(found, shared))
    split = {kind: torch.stack([one[kind] for one in copies], dim=-2) for kind in "kv"}  # ... kv_heads copies d_head
    for kind, of_copies in split.items():
        off = (of_copies.sum(-2) - whole[kind]).abs().max()
        if off > max(ADD_UP, 8 * torch.finfo(z.dtype).eps) * of_copies.abs().sum(-2).max():
            raise ModelError(
                f"layer {layer}: its {'keys' if kind == 'k' else 'values'} are used outside this layer's attention,"
                " too, so they have no scores by query head: leave ungrouped=True out"
            )
    return Heads(whole["q"], *(split[kind].flatten(-3, -2) for kind in "kv"))


def metric_gradient(
    logits: Tensor, metric: Callable[[Tensor], Tensor], name: str, remedy: str
) -> tuple[Tensor, Tensor]:
    """Return a metric's `[batch]` values and the gradient of their sum with respect to the logits; ScoreError, which
    names the metric and the remedy, if the values do not depend on the logits differentiably."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_(True)
        values = metric(leaf)
        if not values.requires_grad:
            raise ScoreError(
                f"{name} does not depend on the logits in a differentiable way (an argmax, a comparison, or .item()"
                f" inside?): {remedy}"
            )
        (gradient,) = torch.autograd.grad(values.sum(), leaf, materialize_grads=True)
    return values.detach(), gradient


def power_of_two(gradient: Tensor) -> float:
    """Return a power of two near the largest gradient, by which gradients are divided so that they do not
    underflow in a float16 model."""
    largest = float(gradient.abs().max())
    return 2.0 ** round(math.log2(largest)) if 0 < largest < math.inf else 1.0
