"""What a model makes of its final norm's output: logits as a linear map, and what comes after it.

    logits = f(W s x + b)

1. `W` and `b` are the language modelling head's; a number `s` (MiniCPM) scales what it is given of the norm's output.
2. `f` acts on each logit: nothing, a scale (Cohere, Granite) or a soft-cap (Gemma 2). It is learnt by putting numbers
   in the place of the head's output: its slope at 0, and whether a large number keeps it (a soft-cap's does not). `s`
   is learnt in the same way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from circuitfind.batch import Inputs
from circuitfind.errors import ScoreError
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import undisturbed
from circuitfind.models.layer import module_at, weight_of
from circuitfind.models.placement import held

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
    """Learns it from three passes of one token; ScoreError where the model does something else between final norm and
    unembedding (ModernBERT's head)."""
    adapter.check_free()
    scale, head = head_scale(adapter), adapter.model.get_output_embeddings()
    weight, bias = weight_of(head).T.to(adapter.device), held(head, "bias")
    slope, later = (_after_head(adapter, head, value) / value for value in (SMALL, LARGE))
    bias, capped = None if bias is None else bias.to(adapter.device), abs(later - slope) > BENT * abs(slope)
    return Unembedding(weight, bias, scale, slope, capped)


def head_scale(adapter: Adapter) -> float:
    """How much of the final norm's output the unembedding is given; refuses a model where it is given anything else."""
    norm, head = module_at(adapter.model, adapter.family.final_norm), adapter.model.get_output_embeddings()
    ramp = torch.linspace(-1, 2, adapter.graph.d_model, dtype=adapter.dtype, device=adapter.device)
    given: list[Tensor] = []
    handles = [
        norm.register_forward_hook(lambda _, __, output: ramp.expand_as(output)),
        head.register_forward_pre_hook(lambda _, args: given.append(args[0].flatten().double().cpu())),
    ]
    _logit(adapter, handles)
    expected = ramp.double().cpu()
    scale = float(given[0][-1] / expected[-1]) if given[0].shape == expected.shape else 0.0
    if not scale or (given[0] - scale * expected).abs().max() > BENT * abs(scale):
        raise ScoreError(
            f"the logits of '{adapter.kind}' are no linear map of its final norm's output, so no score can be read off"
            " its weights: take a method that runs the model (eap-ig-inputs, exact)"
        )
    return scale


def _after_head(adapter: Adapter, head: nn.Module, value: float) -> float:
    """The logit that the model makes of this number."""
    return _logit(adapter, [head.register_forward_hook(lambda _, __, output: torch.full_like(output, value))])


def _logit(adapter: Adapter, handles: list[RemovableHandle]) -> float:
    """The first logit of a pass of one token under these hooks, which are removed."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=adapter.device)
    try:
        with torch.no_grad(), undisturbed(adapter.model):
            logits = adapter.model(**adapter.keywords(Inputs(ids, ids == 0, ids))).logits
    finally:
        for handle in handles:
            handle.remove()
    return float(logits.flatten()[0])
