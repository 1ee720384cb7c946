"""What a model makes of its final norm's output: logits as a linear map, and what comes after it.

    logits = f(W x + b)

1. `W` and `b` are the language modelling head's.
2. `f` acts on each logit: nothing, a scale (Cohere, Granite) or a soft-cap (Gemma 2). It is learnt by putting numbers
   in the place of the head's output: its slope at 0, and whether a large number keeps it (a soft-cap's does not).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from circuitfind.batch import Inputs
from circuitfind.errors import ScoreError
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import undisturbed
from circuitfind.models.layer import module_at

SMALL, LARGE = 2.0**-7, 2.0**10  # exact in half precision; no cap that matters leaves the large one as it is
BENT = 0.01


class Unembedding(NamedTuple):
    """`weight [vocab, d_model]` as the model holds it, `bias [vocab]` or None; logits = slope x (weight . x + bias)
    where they are not `capped`, and for small ones where they are."""

    weight: Tensor
    bias: Tensor | None
    slope: float
    capped: bool


def unembedding(adapter: Adapter) -> Unembedding:
    """Learns it from three passes of one token.

    Raises:
        ScoreError: between final norm and unembedding the model does something else (ModernBERT's head).
    """
    adapter.check_free()
    require_plain_head(adapter)
    head = adapter.model.get_output_embeddings()
    slope, later = (_after_head(adapter, head, value) / value for value in (SMALL, LARGE))
    bias, capped = getattr(head, "bias", None), abs(later - slope) > BENT * abs(slope)
    return Unembedding(head.weight.detach(), None if bias is None else bias.detach(), slope, capped)


def require_plain_head(adapter: Adapter) -> None:
    """Refuses a model whose unembedding does not read what the final norm gives."""
    norm, head = module_at(adapter.model, adapter.family.final_norm), adapter.model.get_output_embeddings()
    seen: dict[str, Tensor] = {}
    hooks = [
        norm.register_forward_hook(lambda _, __, output: seen.update(norm=output)),
        head.register_forward_pre_hook(lambda _, args: seen.update(head=args[0])),
    ]
    ids = torch.zeros(1, 1, dtype=torch.long, device=adapter.device)
    try:
        with torch.no_grad(), undisturbed(adapter.model):
            adapter.model(**adapter.keywords(Inputs(ids, ids == 0, ids)))
    finally:
        for hook in hooks:
            hook.remove()
    if not torch.equal(seen["norm"].flatten(), seen["head"].flatten()):
        raise ScoreError(
            f"the logits of '{adapter.kind}' are no linear map of its final norm's output, so no score can be read off"
            " its weights: take a method that runs the model (eap-ig-inputs, exact)"
        )


def _after_head(adapter: Adapter, head: nn.Module, value: float) -> float:
    """The logit that the model makes of this number."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=adapter.device)
    handle = head.register_forward_hook(lambda _, __, output: torch.full_like(output, value))
    try:
        with torch.no_grad(), undisturbed(adapter.model):
            logits = adapter.model(**adapter.keywords(Inputs(ids, ids == 0, ids))).logits
    finally:
        handle.remove()
    return float(logits.flatten()[0])
