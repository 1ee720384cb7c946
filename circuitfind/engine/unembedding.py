"""What a model makes of its final norm's output: logits as a linear map, and what comes after it.

    logits = f(W s x + b)

1. `W` and `b` are the language modelling head's. A number `s` stands before it in MiniCPM: it is given so much of
   what the norm puts out.
2. `f` acts on each logit: nothing, a scale (Cohere, Granite) or a soft-cap (Gemma 2). It is learnt by putting numbers
   in the place of the head's output: its slope at 0, and whether a large number keeps it (a soft-cap's does not).
   `s` is learnt in the same way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from circuitfind.batch import Inputs
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import undisturbed
from circuitfind.models.layer import module_at

SMALL, LARGE = 2.0**-7, 2.0**10  # exact in half precision; no cap that matters leaves the large one as it is
BENT = 0.01


class Unembedding(NamedTuple):
    """`weight [vocab, d_model]` as the model holds it, `bias [vocab]` or None; logits = slope x (weight . (scale x) +
    bias) where they are not `capped`, and for small ones where they are."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    slope: float
    capped: bool


def unembedding(adapter: Adapter) -> Unembedding:
    """Learns it from two passes of one token."""
    adapter.check_free()
    head = adapter.model.get_output_embeddings()
    (scale, slope), (_, later) = (_around_head(adapter, head, value) for value in (SMALL, LARGE))
    bias, capped = getattr(head, "bias", None), abs(later - slope) > BENT * abs(slope)
    return Unembedding(head.weight.detach(), None if bias is None else bias.detach(), scale, slope, capped)


def _around_head(adapter: Adapter, head: nn.Module, value: float) -> tuple[float, float]:
    """What the head is given of ones in the place of the norm's output, and what becomes of this number (over it) in
    the place of its own."""
    ids, given = torch.zeros(1, 1, dtype=torch.long, device=adapter.device), []

    def put(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        given.append(float(args[0].flatten()[0]))
        return torch.full_like(output, value)

    norm = module_at(adapter.model, adapter.family.final_norm)
    ones = norm.register_forward_hook(lambda _, __, output: torch.ones_like(output))
    handles = (ones, head.register_forward_hook(put))
    try:
        with torch.no_grad(), undisturbed(adapter.model):
            logits = adapter.model(**adapter.keywords(Inputs(ids, ids == 0, ids))).logits
    finally:
        for handle in handles:
            handle.remove()
    return given[0], float(logits.flatten()[0]) / value
