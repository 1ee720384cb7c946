"""From the final norm's output x to the logits: a linear map, and what follows it.

    logits = f(W s x + b)

1. `W` and `b` are the weight and bias of the language modelling head. A number `s` scales its input (MiniCPM; else 1).
2. `f` acts on each logit: the identity, a scale (Cohere, Granite) or a soft-cap (Gemma 2). It is measured by replacing
   the head's output with numbers: its slope near 0, and whether a large number has the same slope (under a soft-cap it
   does not). `s` is measured by replacing the norm's output.
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

SMALL, LARGE = 2.0**-7, 2.0**10  # exact in half precision; any soft-cap that matters changes the large one
BENT = 0.01  # relative deviation from a linear map


class Unembedding(NamedTuple):
    """logits = slope (weight (scale x) + bias), for x the final norm's output; if `capped`, for small logits only.

    `weight`: `[vocab, d_model]` in the model's precision; `bias`: `[vocab]` or None.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    slope: float
    capped: bool


def unembedding(adapter: Adapter) -> Unembedding:
    """Return a model's unembedding, measured in three passes of one token.

    Raises:
        ScoreError: the model does more than scale between final norm and unembedding (ModernBERT's head).
    """
    adapter.check_free()
    scale, head = head_scale(adapter), adapter.model.get_output_embeddings()
    weight, bias = weight_of(head).T.to(adapter.device), held(head, "bias")
    slope, later = (_after_head(adapter, head, value) / value for value in (SMALL, LARGE))
    bias, capped = None if bias is None else bias.to(adapter.device), abs(later - slope) > BENT * abs(slope)
    return Unembedding(weight, bias, scale, slope, capped)


def head_scale(adapter: Adapter) -> float:
    """Return the number s by which the final norm's output is scaled before the head; ScoreError if the head's input is
    anything else."""
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
            f"the logits of '{adapter.kind}' are not a linear map of its final norm's output, so no score can be"
            " computed from its weights: use a method that runs the model (eap-ig-inputs, exact)"
        )
    return scale


def _after_head(adapter: Adapter, head: nn.Module, value: float) -> float:
    """Return the logit that the model computes if the head's output is `value`."""
    return _logit(adapter, [head.register_forward_hook(lambda _, __, output: torch.full_like(output, value))])


def _logit(adapter: Adapter, handles: list[RemovableHandle]) -> float:
    """Return the first logit of a pass of one token under these hooks, and remove them."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=adapter.device)
    try:
        with torch.no_grad(), undisturbed(adapter.model):
            logits = adapter.model(**adapter.keywords(Inputs(ids, ids == 0, ids))).logits
    finally:
        for handle in handles:
            handle.remove()
    return float(logits.flatten()[0])
