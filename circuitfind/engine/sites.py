"""Values of one site in a run, layer by layer; their means; and attention scores.

`capture_site` knows these sites. All values are `[batch, pos, ...]`; a pattern is `[batch, query, heads, key]`.

1. `resid`, `middle`, `attn_out`, `mlp_out`, `q`, `k` and `v` are fields of a captured `Run`. `attn` and `mlp` are what
   attention and the MLP add to the stream: after the post-norm and the residual multiplier, without the output bias.
   So `mlp` is the output of the MLP node, and `attn` the sum of the outputs of the layer's heads.
2. `z` (heads before the output projection) and `hidden` (an MLP's neurons) are the inputs of output projections.
3. `pattern` is the second result of the attention module, which transformers returns only in its "eager"
   implementation: the model is switched to it for the pass. A pattern is accepted only if pattern x values reproduces
   the heads of the same pass.

`attention_scores` returns what enters the softmax in a run whose queries or keys are replaced:

1. The layer's attention runs from the base run with the output of its projection replaced, and the pass ends at the
   output projection. Rotary positions, norms, windows, caps and sinks are the model's own.
2. It runs in the "eager" implementation, whose one softmax is intercepted: its input are the scores, with a sink as one
   more column. They are accepted only if softmax(scores) x values reproduces the heads of the same pass.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from einops import einsum
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from circuitfind.batch import Batch, Inputs, side_by_side
from circuitfind.engine.ablation import count_of, summed
from circuitfind.engine.capture import Run, capture
from circuitfind.engine.circuit_run import apart
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.restart import Restart
from circuitfind.errors import ModelError
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import noting
from circuitfind.models.layer import shape_of, weight_of
from circuitfind.models.placement import gathered

Values = dict[int, Tensor]  # by layer
KEPT = {"q": "qkv", "k": "qkv", "v": "qkv", "attn": "attn_out", "mlp": "mlps"}  # the field of a `Run` for a site


def tolerance(adapter: Adapter) -> float:
    """Return how far numbers may be from the model's own, relative to the largest."""
    return {torch.float32: 1e-4, torch.float64: 1e-8}.get(adapter.dtype, 0.05)


def capture_site(
    adapter: Adapter, inputs: Inputs, site: str, layers: Sequence[int], whole: bool = True
) -> tuple[Run, Values]:
    """Run the model and return the run and a site's values in some layers; ModelError if the model does not have it.

    `whole`: record the whole run; otherwise only what the values and the logits need.
    """
    keep = None if whole else {KEPT.get(site, site)}
    if site == "pattern":
        return _capture_patterns(adapter, inputs, layers, keep)
    if site in ("z", "hidden"):
        return _capture_inputs(adapter, inputs, site, layers, keep)
    run = capture(adapter, inputs, keep=keep)
    if site in ("q", "k", "v"):
        return run, {layer: getattr(run.qkv[layer], site) for layer in layers}
    if site == "attn":
        return run, {layer: adapter.layers[layer].attn_written(run.attn_out[layer], bias=False) for layer in layers}
    values = run.mlps if site == "mlp" else getattr(run, site)
    return run, {layer: values[layer].view(run.resid[0].shape) for layer in layers}


def site_means(experiment: Experiment, site: str, layers: Sequence[int]) -> Values:
    """Return a site's means over the corrupted prompts and all their real positions, or at each position, as the
    ablation says."""
    adapter, by_position = experiment.adapter, experiment.ablation.mean == "position"

    def sums(part: Batch, _: slice) -> tuple[Values, int]:
        values = capture_site(adapter, part.corrupted, site, layers, whole=False)[1]
        mask, count = part.corrupted.mask, count_of(part, by_position)
        return {at: summed(value.to(adapter.work), mask, by_position) for at, value in values.items()}, count

    parts = [part for _, part in experiment.in_batches(sums, "mean activations")]
    count = sum(number for _, number in parts)
    return {layer: torch.stack([values[layer] for values, _ in parts]).sum(0) / count for layer in layers}


def _capture_inputs(
    adapter: Adapter, inputs: Inputs, site: str, layers: Sequence[int], keep: Container[str] | None
) -> tuple[Run, Values]:
    with noting({layer: projection_of(adapter, site, layer) for layer in layers}) as noted:
        run = capture(adapter, inputs, keep=keep)
    shape, heads = run.resid[0].shape[:2], adapter.graph.heads_in

    def whole(entered: Tensor, layer: int) -> Tensor:
        value = entered.detach().to(adapter.device)
        return gathered(value, shape_of(projection_of(adapter, site, layer))[0], adapter.processes)

    return run, {
        layer: whole(entered, layer).view(*shape, *((heads(layer),) if site == "z" else ()), -1)
        for layer, (entered, _) in noted.items()
    }


def projection_of(adapter: Adapter, site: str, layer: int) -> Any:
    """Return the output projection that a site's values enter: the attention's (`z`) or the MLP's (`hidden`)."""
    family = adapter.layers[layer].family
    name = family.o if site == "z" else family.down
    if name is None:
        raise ModelError(
            f"the MLPs of '{adapter.kind}' are mixtures of experts without one output projection: their neurons cannot"
            " be patched (patch what='mlp' instead)"
        )
    return adapter.layers[layer].module(name)


def input_rows(adapter: Adapter, site: str, layer: int) -> Tensor:
    """Return the weight `[features, d_model]` of the projection that `z` or `hidden` enters, in the model's precision
    (callers convert the few rows that they need)."""
    return weight_of(projection_of(adapter, site, layer)).to(adapter.device)


def _capture_patterns(
    adapter: Adapter, inputs: Inputs, layers: Sequence[int], keep: Container[str] | None
) -> tuple[Run, Values]:
    views = {layer: adapter.layers[layer] for layer in layers}
    attentions = {layer: view.module(view.family.o.rpartition(".")[0]) for layer, view in views.items()}
    with eager_attention(adapter), noting(attentions) as noted:
        run, z = capture_site(adapter, inputs, "z", layers)
    values = {}
    for layer in layers:
        tensors = [part for part in noted[layer][1] or () if isinstance(part, Tensor)]
        shown = len(tensors) > 1 and tensors[1].ndim == 4
        pattern = _all_heads(adapter, tensors[1].detach()).transpose(1, 2) if shown else None
        by_head = adapter.layers[layer].values_by_head(run.qkv[layer].v)
        if pattern is None or not makes_heads(adapter, pattern, by_head, z[layer], inputs.mask):
            raise ModelError(
                f"this model ('{adapter.kind}') does not return its attention patterns: load it with"
                " attn_implementation='eager', or patch what='heads', 'q' or 'k' instead"
            )
        values[layer] = pattern
    return capture(adapter, inputs, keep=keep), values  # the run as the user's implementation computes it


def _all_heads(adapter: Adapter, value: Tensor) -> Tensor:
    """Return `[rows, heads, ...]` of all heads on the model's own device, given those of this process
    (`models/placement.py`)."""
    group, value = adapter.processes, value.to(adapter.device)
    if group is None:
        return value
    return gathered(value.movedim(1, -1), value.shape[1] * group.size(), group).movedim(-1, 1)


def attended(adapter: Adapter, pattern: Tensor, by_head: Tensor) -> Tensor:
    """Return pattern x values, `[batch, query, heads, d_head]`; `by_head [batch, key, heads, d_head]`: the values."""
    return einsum(pattern.to(adapter.work), by_head.to(adapter.work), "b q h k, b k h e -> b q h e")


def makes_heads(adapter: Adapter, pattern: Tensor, by_head: Tensor, z: Tensor, mask: Tensor) -> bool:
    """Whether patterns `[batch, query, heads, key]` reproduce a pass's heads at real positions.

    `by_head [batch, key, heads, d_head]`: the values; `z [batch, query, heads, d_head]`: the heads before the output
    projection; `mask [batch, query]`: true at real positions.
    """
    if pattern.shape[:3] != z.shape[:3]:
        return False
    real = mask.to(z.device)
    off = (attended(adapter, pattern, by_head) - z.to(adapter.work))[real].abs().max()
    scale = attended(adapter, pattern.abs(), by_head.abs())[real].abs().max()  # rounding of the sum grows with this
    return bool(off <= tolerance(adapter) * scale.clamp(min=1e-6))


@contextmanager
def eager_attention(adapter: Adapter) -> Iterator[None]:
    """Inside this context, the model runs transformers' "eager" attention."""
    before = adapter.config._attn_implementation
    if before != "eager":
        adapter.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if before != "eager":
            adapter.model.set_attn_implementation(before)


# -------------------------------------------------------------------- attention scores
SOFTMAX = (nn.functional.softmax, torch.softmax, Tensor.softmax)
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.baddbmm, Tensor.baddbmm)


class Scored(NamedTuple):
    """The input of the softmax, and the two factors whose product gives the scores (after rotation and norms, scaled
    as the family does).

    Attributes:
        scores: `[patches, batch, heads, query, key]`, with a sink one key more; masked ones are very low but finite.
        queries: `[patches, batch, heads, query, features]`.
        keys: `[patches, batch, heads (or 1, or kv_heads), key, features]`.
    """

    scores: Tensor
    queries: Tensor
    keys: Tensor


class _Watch(TorchFunctionMode):
    """Notes the input of every softmax, and the factors of the last matrix product before it."""

    def __init__(self) -> None:
        super().__init__()
        self.entered: list[tuple[Tensor, Sequence[Tensor]]] = []
        self._factors: Sequence[Tensor] = ()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS:
            named = [kwargs[name] for name in ("batch1", "batch2") if kwargs and name in kwargs]  # as Bloom does
            self._factors = named or args[-2:]
        if func in SOFTMAX:
            self.entered.append((args[0], self._factors))
        return func(*args, **(kwargs or {}))


def attention_scores(restart: Restart, layer: int, kind: str, values: Tensor, instead: str = "") -> Scored:
    """Return a layer's attention scores in runs with its queries ("q") or keys ("k") replaced.

    Args:
        values: `[patches, batch, pos, heads or kv_heads, d_head]`, in place of the projection's output.
        instead: another remedy, to append to the error.

    Raises:
        ModelError: the model does not show its scores.
    """
    adapter = restart.adapter
    with eager_attention(adapter), _Watch() as watch:
        z = restart.heads_from_projection(layer, kind, values)
    entered, factors = watch.entered[0] if len(watch.entered) == 1 else (z, ())
    entered, *factors = (_all_heads(adapter, one) if one.ndim == 4 else one for one in (entered, *factors))
    scores, times = entered.to(adapter.work), len(values)
    examples, length = restart.inputs.ids.shape
    shown = scores.shape[:3] == (times * examples, adapter.graph.n_heads, length) and len(factors) == 2
    if shown:
        pattern = scores.softmax(-1)[..., :length].transpose(1, 2)
        by_head = adapter.layers[layer].values_by_head(restart.base.qkv[layer].v)
        by_head, mask = (side_by_side(x, times) for x in (by_head, restart.inputs.mask))
        shown = makes_heads(adapter, pattern, by_head, z, mask)
    if not shown:
        raise ModelError(
            f"this model ('{adapter.kind}') does not show its attention scores: load it with"
            f" attn_implementation='eager'{instead}"
        )
    queries, keys = (one.to(scores).reshape(len(z), -1, *one.shape[-2:]) for one in factors)
    parts = scores.clamp(min=torch.finfo(adapter.dtype).min), queries, keys.mT
    return Scored(*(apart(part, times) for part in parts))
