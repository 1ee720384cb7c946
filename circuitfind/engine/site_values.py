"""What one kind of site carries in a run, layer by layer, and what it carries when it is ablated.

1. `resid`, `middle`, `attn_out`, `mlp_out`, `q`, `k` and `v` are what a captured `Run` holds anyway.
2. `z` (the heads before the output projection) and `hidden` (an MLP's neurons) are noted by a hook on the input of that
   projection; `pattern` is the second result of the attention module, which transformers fills under its "eager"
   implementation only: the model is switched to it for the pass and back.
3. A pattern is believed only if it is one: pattern x values must give the heads that the same pass computed.

All values are `[batch, pos, ...]`; a pattern is `[batch, query, heads, key]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import einsum
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from circuitfind.batch import Batch, Inputs
from circuitfind.engine.capture import Run, capture
from circuitfind.engine.memory import in_batches
from circuitfind.errors import ModelError
from circuitfind.models.adapter import Adapter

Values = dict[int, Tensor]  # by layer
PATTERN_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
HALF_TOLERANCE = 0.05


def capture_site(adapter: Adapter, inputs: Inputs, site: str, layers: Sequence[int]) -> tuple[Run, Values]:
    """Runs the model and notes a site's values in some layers.

    Raises:
        ModelError: the family has no such site, or does not hand out its attention patterns.
    """
    if site in ("resid", "middle", "attn_out", "mlp_out"):
        run = capture(adapter, inputs)
        return run, {layer: getattr(run, site)[layer].view(run.resid[0].shape) for layer in layers}
    if site in ("q", "k", "v"):
        run = capture(adapter, inputs)
        return run, {layer: getattr(run.qkv[layer], site) for layer in layers}
    if site == "pattern":
        return _capture_patterns(adapter, inputs, layers)
    return _capture_inputs(adapter, inputs, site, layers)


def site_means(
    adapter: Adapter, batch: Batch, site: str, layers: Sequence[int], by_position: bool, batch_size: int | None
) -> Values:
    """A site's means over the corrupted prompts and all their real positions, or at each position."""

    axes = 0 if by_position else (0, 1)

    def summed(part: Batch, _: slice) -> Values:
        values = capture_site(adapter, part.corrupted, site, layers)[1]
        weight = part.corrupted.mask.to(adapter.work)

        def total(value: Tensor) -> Tensor:
            spread = weight.view(*weight.shape, *[1] * (value.ndim - 2))
            return (value.to(adapter.work) * spread).sum(axes, keepdim=True)

        return {layer: total(value) for layer, value in values.items()}

    parts = [part for _, part in in_batches(adapter, batch, summed, batch_size, "mean activations")]
    count = len(batch) if by_position else int(batch.corrupted.mask.sum())
    return {layer: torch.stack([part[layer] for part in parts]).sum(0) / count for layer in layers}


def _capture_inputs(adapter: Adapter, inputs: Inputs, site: str, layers: Sequence[int]) -> tuple[Run, Values]:
    values: Values = {}
    with ExitStack() as hooks:
        for layer in layers:
            module = projection_of(adapter, site, layer)

            def note(_: nn.Module, args: tuple, layer: int = layer) -> None:
                values[layer] = args[0].detach()

            hooks.callback(module.register_forward_pre_hook(note).remove)
        run = capture(adapter, inputs)
    shape = run.resid[0].shape[:2]
    values = {layer: value.view(*shape, -1) for layer, value in values.items()}
    if site == "z":
        values = {layer: value.unflatten(-1, (adapter.graph.n_heads, -1)) for layer, value in values.items()}
    return run, values


def projection_of(adapter: Adapter, site: str, layer: int) -> Any:
    """The linear module that a site's values enter: the attention's (`z`) or the MLP's (`hidden`) output projection.

    Raises:
        ModelError: the family's MLP has no single output projection.
    """
    family = adapter.family
    name = family.o if site == "z" else family.down
    if name is None:
        raise ModelError(
            f"the MLPs of '{getattr(adapter.config, 'model_type', '?')}' are mixtures of experts without one output"
            " projection: their neurons cannot be patched (patch what='mlp' instead)"
        )
    return adapter.layers[layer].module(name)


def input_rows(adapter: Adapter, site: str, layer: int) -> Tensor:
    """`[features, d_model]`: what each feature of `z` or `hidden` adds to the output of the projection it enters.

    In the model's own precision, because few of the rows are wanted at a time.
    """
    module = projection_of(adapter, site, layer)
    weight = module.weight if isinstance(module, Conv1D) else module.weight.T
    return weight.detach()


def _capture_patterns(adapter: Adapter, inputs: Inputs, layers: Sequence[int]) -> tuple[Run, Values]:
    outputs: dict[int, Any] = {}
    with ExitStack() as stack:
        stack.enter_context(eager_attention(adapter))
        for layer in layers:
            attention = adapter.layers[layer].module(adapter.family.o.rpartition(".")[0])

            def note(_: nn.Module, __: tuple, output: Any, layer: int = layer) -> None:
                outputs[layer] = output

            stack.callback(attention.register_forward_hook(note).remove)
        run, z = capture_site(adapter, inputs, "z", layers)
    values = {}
    for layer in layers:
        tensors = [part for part in outputs[layer] if isinstance(part, Tensor)] if outputs[layer] is not None else []
        pattern = tensors[1].detach().transpose(1, 2) if len(tensors) > 1 and tensors[1].ndim == 4 else None
        if pattern is None or not makes_heads(adapter, pattern, run.qkv[layer].v, z[layer], inputs.mask):
            raise ModelError(
                f"this model ('{getattr(adapter.config, 'model_type', '?')}') does not hand out its attention patterns:"
                " load it with attn_implementation='eager', or patch what='heads', 'q' or 'k' instead"
            )
        values[layer] = pattern
    return capture(adapter, inputs), values  # the run as the user's implementation computes it


def attended(adapter: Adapter, pattern: Tensor, value: Tensor, heads: Sequence[int]) -> Tensor:
    """`[batch, query, heads, d_head]` that these heads' patterns make of values `[batch, key, kv_heads, d_head]`."""
    shared = value[:, :, [head // adapter.graph.group for head in heads]]
    return einsum(pattern.to(adapter.work), shared.to(adapter.work), "b q h k, b k h e -> b q h e")


def makes_heads(adapter: Adapter, pattern: Tensor, value: Tensor, z: Tensor, mask: Tensor) -> bool:
    """Whether these are the patterns that the pass used: at real positions they make its heads.

    Args:
        pattern: `[batch, query, heads, key]`.
        value: `[batch, key, kv_heads, d_head]`.
        z: `[batch, query, heads, d_head]`, before the output projection.
    """
    if pattern.shape[:3] != z.shape[:3]:
        return False
    off = (attended(adapter, pattern, value, range(z.shape[2])) - z.to(adapter.work))[mask.to(z.device)].abs().max()
    return bool(off <= PATTERN_TOLERANCE.get(adapter.dtype, HALF_TOLERANCE) * z.abs().max().clamp(min=1e-6))


@contextmanager
def eager_attention(adapter: Adapter) -> Iterator[None]:
    """Runs inside compute attention step by step, as transformers' "eager" implementation does."""
    model, before = adapter.model, adapter.config._attn_implementation
    if before == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
