"""One forward pass, remembered: what every writer wrote and what every reader read, with gradients if asked.

1. `capture` runs a model and keeps its writers (`engine/writers.py`), its residual streams, and its logits at the read
   positions.
2. `capture_gradients` roots autograd at a detached layer-0 input and takes gradients at the q, k, v projection outputs,
   the MLP inputs and the final norm's input. MLP inputs get a fresh autograd node (`view_as`): a norm shared by
   attention and MLP would otherwise count both branches' gradients at either reader. Given outputs of attention or MLP
   modules become constants, which no gradient flows through.
3. Over an ungrouped graph (`Adapter.ungrouped`) each query head reads its own copy of a key and a value, as in tools
   that repeat keys and values before attention. A query head's `z` depends on its own copies only, so the gradient at a
   copy is what comes back from that head alone: each layer is gone back from z to the projections once for each head of
   a group, all groups together. Where a norm takes all keys of a layer together (OLMo 2), the first copies of all
   groups share one norm, and so on.

Where prompts are aligned by spans, the corrupted run is moved onto the clean prompts' positions (`capture_corrupted`):
its values at `alignment[t]`, the embedding with its learned position included, stand at position t, so every writer has
an ablated value at every token. The run with every edge ablated then has the corrupted run's logits, because the
unembedding reads the sum of the ablated values and biases. But its writers do not write the ablated values (a head
attends over the clean prompt's tokens there), so it is computed as under mean ablation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from circuitfind.batch import Batch, Inputs
from circuitfind.costs import count_backward
from circuitfind.engine.writers import Writers
from circuitfind.errors import ModelError, ScoreError, TaskError
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import STOP, Stop, through, undisturbed
from circuitfind.models.layer import PROJECTIONS, Heads, LayerView

# ("attn_out" or "mlp_out", layer) -> what that module returns: the attention's output projection, or the MLP
Outputs = Mapping[tuple[str, int], Tensor]
HandOn = Callable[[str, int, Tensor], Tensor]
Places = Mapping[tuple[str, int], Tensor]  # (site, layer) -> a value, or the gradient at it
ADD_UP = 1e-3  # of the copies' largest gradient: how far their sum may be off that of their head


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
    """What a pass left behind. Lists are by layer; `resid` has one more entry, the final norm's input. In the model's
    own precision `resid [batch, pos, d_model]`, the residual entering each block, and `middle`, what each MLP reads,
    before its norm; `qkv`, `mlp_in`: values at the projections' outputs and at the MLP's input, as the module sees
    them; `attn_out`, `mlp_out`: raw outputs of the attention's output projection and of the MLP; `logits [batch, reads,
    vocab]`, empty if the pass was stopped before the unembedding."""

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

    def map(self, function: Callable[[Tensor], Tensor]) -> Run:
        """The same function of every value but the logits."""

        def each(value: Any) -> Any:
            return Heads(*map(function, value)) if isinstance(value, Heads) else function(value)

        names = (one.name for one in fields(self) if one.name != "logits")
        return Run(**{name: list(map(each, getattr(self, name))) for name in names}, logits=self.logits)


@dataclass
class Recorder:
    """The visitor that fills a `Run`; arguments as for `capture` and `capture_gradients`."""

    adapter: Adapter
    stop: bool = False
    embed: Tensor | None = None
    differentiate: bool = False
    outputs: Outputs = field(default_factory=dict)
    hand_on: HandOn | None = None

    def __post_init__(self) -> None:
        self.run = Run()
        self.leaves: dict[tuple[str, int], Tensor] = {}
        self._projected: dict[str, Tensor] = {}  # of a layer whose other projections are waited for
        self._z: Tensor  # the heads of the layer whose output is waited for

    def record(self, inputs: Inputs) -> Run:
        """Runs the model without gradients."""
        with torch.no_grad(), undisturbed(self.adapter.model):
            self.run.logits = through(self.adapter, inputs, self)
        return self.run

    def __call__(self, site: str, layer: int, value: Tensor) -> Tensor | Stop | None:
        given = self.outputs.get((site, layer))
        value = value if given is None else given
        run, detached = self.run, value.detach()
        if site == "resid":
            return self._enter_block(layer, value)
        if site in PROJECTIONS:
            self._projected[site] = detached
            view = self.adapter.layers[layer]
            if len(self._projected) == len(view.family.projections):
                run.qkv.append(view.layout.gather(self._projected))
                self._projected = {}
            if self.differentiate:
                value = value.view_as(value) if site == "mixer" else value  # a norm's output: others may read it, too
                self.leaves[site, layer] = value
                value = value if self.hand_on is None else self.hand_on(site, layer, value)
                return value.clone()  # OLMo clips this tensor in place: the gradient is needed from before
        elif site == "z":
            self._z = detached
            if self.differentiate and self.adapter.layers[layer].copies > 1:
                self.leaves[site, layer] = value
        elif site == "attn_out":
            view = self.adapter.layers[layer]
            run.heads.append(view.scaled_heads(self._z, detached))
            run.attn_out.append(detached)
            resid = run.resid[layer]
            run.middle.append(resid if self.adapter.graph.parallel else resid + view.attn_written(detached).to(resid))
        elif site == "mlp_out":
            run.mlp_out.append(detached.clone())  # Falcon adds into this tensor in place
            written = self.adapter.layers[layer].mlp_written(run.mlp_out[-1])
            run.mlps.append(written.view(run.resid[0].shape))
        else:
            (run.resid if site == "final" else run.mlp_in).append(detached)
            if self.differentiate:
                # the final norm's input stays itself: a hook on that norm sees what it was before nnsight replaces it
                leaf = value if site == "final" else value.view_as(value)
                self.leaves[site, layer] = leaf
                return None if leaf is value else leaf
            return STOP if site == "final" and self.stop else None
        return None if given is None else given.clone()  # Falcon adds into the MLP's output in place

    def _enter_block(self, layer: int, value: Tensor) -> Tensor | None:
        if layer or not (self.differentiate or self.embed is not None):
            self.run.resid.append(value.detach())
            return None
        root = (value if self.embed is None else self.embed.to(value.dtype)).detach()
        self.run.resid.append(root)
        return root.clone().requires_grad_(self.differentiate)


def capture(adapter: Adapter, inputs: Inputs, stop: bool = False) -> Run:
    """Runs the model without gradients; `stop`: end the pass before the unembedding (no logits)."""
    return Recorder(adapter, stop).record(inputs)


def capture_gradients(
    adapter: Adapter,
    inputs: Inputs,
    metric: Callable[[Tensor], Tensor],
    embed: Tensor | None = None,
    outputs: Outputs | None = None,
    hand_on: HandOn | None = None,
) -> Gradients:
    """Runs the model forwards and backwards.

    `metric`: from logits `[batch, reads, vocab]` to `[batch]` values, whose sum is differentiated; `embed`: `[batch,
    pos, d_model]` in place of the residual that enters layer 0; `outputs`: constants in place of these modules'
    outputs; `hand_on`: of (site, layer, output) of a projection of q, k and v to what the model is given in its place.
    """
    recorder = Recorder(adapter, embed=embed, differentiate=True, outputs=outputs or {}, hand_on=hand_on)
    with torch.enable_grad(), undisturbed(adapter.model):
        logits = through(adapter, inputs, recorder)
        values, at_logits = metric_gradient(
            logits.to(adapter.work),
            metric,
            "the metric",
            "attribution needs a gradient; exact patching (method='exact') does not",
        )
        scale = power_of_two(at_logits) if adapter.dtype == torch.float16 else 1.0
        count_backward(len(inputs.ids) * inputs.part)
        seed, leaves = (at_logits / scale).to(logits.dtype), list(recorder.leaves.values())
        split = any(view.copies > 1 for view in adapter.layers)
        # what only a given output depends on has no gradient
        found = torch.autograd.grad(
            logits, leaves, grad_outputs=seed, materialize_grads=bool(outputs), retain_graph=split
        )
        at = dict(zip(recorder.leaves, found, strict=True))
        heads = [_at_heads(view, layer, recorder.leaves, at) for layer, view in enumerate(adapter.layers)]

    def scaled(gradient: Tensor) -> Tensor:
        return gradient.to(adapter.work) * scale

    run = recorder.run
    run.logits = logits.detach()
    qkv = [Heads(*map(scaled, parts)) for parts in heads]
    mlp = [scaled(at["mlp_in", layer]).view(run.resid[0].shape) for layer in range(len(heads))]
    return Gradients(run, ReaderGradients(qkv, mlp, scaled(at["final", len(mlp)])), values)


def _at_heads(view: LayerView, layer: int, leaves: Places, at: Places) -> Heads:
    """Gradients by reader at a layer's projections: of copies of keys and values, each copy's own. ModelError where
    these do not add up to the gradient of their head, which then serves another layer, too."""

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
                f"layer {layer}: its {'keys' if kind == 'k' else 'values'} serve more than this layer's attention, so"
                " they have no scores by query head: leave ungrouped=True out"
            )
    return Heads(whole["q"], *(split[kind].flatten(-3, -2) for kind in "kv"))


def metric_gradient(
    logits: Tensor, metric: Callable[[Tensor], Tensor], name: str, remedy: str
) -> tuple[Tensor, Tensor]:
    """A metric's `[batch]` values, and the gradient of their sum at the logits; ScoreError if there is none."""
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
    """The power of two next to the largest gradient: divided by it, none underflows in a float16 model."""
    largest = float(gradient.abs().max())
    return 2.0 ** round(math.log2(largest)) if 0 < largest < math.inf else 1.0


# -------------------------------------------------------------------- prompts that are aligned by spans
def capture_corrupted(adapter: Adapter, batch: Batch, stop: bool = False) -> Run:
    """The corrupted run, moved onto the clean prompts' positions where pairs are aligned; its logits are its own."""
    run = capture(adapter, batch.corrupted, stop)
    return run if batch.alignment is None else run.map(lambda value: moved(value, batch))


def moved(value: Tensor, batch: Batch) -> Tensor:
    """Values of the corrupted run, `[batch, pos, ...]` or `[batch x pos, ...]`, on the clean prompts' positions."""
    if batch.alignment is None:
        return value
    index = batch.alignment.to(value.device)
    rows = torch.arange(len(index), device=value.device).unsqueeze(1)
    return value.reshape(*index.shape, -1)[rows, index].reshape(value.shape)


def refuse_aligned(batch: Batch, what: str, remedy: str) -> None:
    """Raises a TaskError for `what` has no meaning between aligned prompts, if these are."""
    if batch.alignment is not None:
        raise TaskError(f"{what} is not defined between prompts aligned by spans: {remedy}")
