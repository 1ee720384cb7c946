"""What tells one long run from another, so that a checkpoint serves only the run that left it.

A digest of everything that decides effects: the prompts and answers, a few values of every weight, and the metric by
its name and by its values on the first pair (a function of one's own has no other mark).
"""

from __future__ import annotations

from torch import Tensor

from circuitfind.batch import Batch
from circuitfind.checkpoint import key_of
from circuitfind.engine.capture import capture
from circuitfind.metrics import Metric
from circuitfind.models.adapter import Adapter

FROM_EACH_WEIGHT = 64


def run_key(adapter: Adapter, batch: Batch, metric: Metric, *settings: object) -> str:
    """The digest; `settings` are whatever else decides the effects, arrays by content and all else by its text."""
    first = batch.rows(slice(0, 1)).trimmed()
    logits = [capture(adapter, side).logits for side in (first.clean, first.corrupted)]
    first = first.with_reference(logits[0])
    tensors = [*batch.clean, *batch.corrupted, batch.answers, batch.wrong, *(metric(one, first) for one in logits)]
    tensors += [] if batch.alignment is None else [batch.alignment]
    tensors += map(_some, adapter.model.parameters())
    return key_of(*(tensor.cpu().numpy() for tensor in tensors), adapter.graph, metric.name, *settings)


def _some(weight: Tensor) -> Tensor:
    """A few of a tensor's values, spread over it."""
    flat = weight.detach().flatten()
    return flat[:: max(1, len(flat) // FROM_EACH_WEIGHT)].float()
