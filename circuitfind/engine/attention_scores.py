"""Attention scores as they enter the softmax, in a run whose queries or keys are replaced.

1. The layer's attention runs from the base run with its projection's output replaced, and the pass ends where the
   heads reach the output projection. Rotary positions, norms of queries and keys, windows, caps and sinks are the
   model's own.
2. It runs under transformers' "eager" implementation, whose one softmax is watched: what enters it are the scores, a
   sink as one more column.
3. They are believed only if they are the scores: softmax(scores) x values must give the heads of the same pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from circuitfind.engine.restart import Restart
from circuitfind.engine.site_values import eager_attention, makes_heads
from circuitfind.errors import ModelError

SOFTMAX = (nn.functional.softmax, torch.softmax, Tensor.softmax)


class _Watch(TorchFunctionMode):
    """Notes what enters every softmax inside."""

    def __init__(self) -> None:
        super().__init__()
        self.entered: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in SOFTMAX:
            self.entered.append(args[0])
        return func(*args, **(kwargs or {}))


def attention_scores(restart: Restart, layer: int, kind: str, values: Tensor) -> Tensor:
    """`[patches, batch, heads, query, key]`, with a sink one key more; masked scores are very low, but finite.

    Args:
        kind: "q" or "k".
        values: `[patches, batch, pos, heads or kv_heads, d_head]`, as they are projected.

    Raises:
        ModelError: the model's attention does not show its scores.
    """
    adapter = restart.adapter
    with eager_attention(adapter), _Watch() as watch:
        z = restart.heads_from_projection(layer, kind, values)
    scores = watch.entered[0].to(adapter.work) if len(watch.entered) == 1 else None
    times, (examples, length) = len(values), restart.inputs.ids.shape
    shown = scores is not None and scores.shape[:3] == (times * examples, adapter.graph.n_heads, length)
    if scores is not None and shown:
        pattern = scores.softmax(-1)[..., :length].transpose(1, 2)
        v, mask = (x.repeat(times, *[1] * (x.ndim - 1)) for x in (restart.base.qkv[layer].v, restart.inputs.mask))
        shown = makes_heads(adapter, pattern, v, z, mask)
    if scores is None or not shown:
        raise ModelError(
            f"this model ('{getattr(adapter.config, 'model_type', '?')}') does not show its attention scores: load it"
            " with attn_implementation='eager', or use method='atp'"
        )
    return scores.clamp(min=torch.finfo(adapter.dtype).min).unflatten(0, (times, -1))
