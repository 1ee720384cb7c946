"""The shared prefix: tokens before the first difference between clean and corrupted prompts are run only once.

Attention is causal, so before the first difference all runs of a pair are the same, and under interchange every
difference and effect there is zero. These tokens are run once. All other runs hold the later tokens only, and attend to
the keys and values of the earlier tokens in transformers' cache.

1. All prompts of a batch are divided at one position: the first at which the sides of any pair differ, or a metric
   reads the logits.
2. Whether a model computes the same in two parts is tested: the longest prompt is run both ways, and again when a
   longer one comes. Whole prompts are run if the results differ (latent attention and mixers cache other things than
   keys and values), under the user's hooks, and for models without such a cache.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from circuitfind.batch import Batch, Inputs
from circuitfind.engine.batches import out_of_memory
from circuitfind.engine.capture import capture, rounding
from circuitfind.engine.memory_plan import SHARED
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import past_of


def after_prefix(adapter: Adapter, batch: Batch) -> Batch:
    """Return the pairs without their shared prefix, if that saves enough tokens and the model allows it.

    Positions then count from the first token that is left.
    """
    start = _first_difference(batch)
    if start * len(batch) < SHARED.at_most(adapter.device) or not _divides(adapter, batch.clean, start):
        return batch
    clean = after(adapter, batch.clean, start)
    corrupted = batch.corrupted.positions(slice(start, None))._replace(past=clean.past)
    return replace(batch, clean=clean, corrupted=corrupted)


def after(adapter: Adapter, inputs: Inputs, start: int) -> Inputs:
    """Return the prompts from a position on, with the keys and values of the tokens before it."""
    return inputs.positions(slice(start, None))._replace(past=past_of(adapter, inputs, start))


def _first_difference(batch: Batch) -> int:
    """Return the first position at which the sides of any pair differ, or logits are read."""
    clean, corrupted = batch.clean, batch.corrupted
    same = ((clean.ids == corrupted.ids) & (clean.mask == corrupted.mask)).all(0)
    read = min(int(clean.read.min()), int(corrupted.read.min()))
    return min(int(same.long().cumprod(0).sum()), read)


def _divides(adapter: Adapter, inputs: Inputs, start: int) -> bool:
    """Whether the model computes the same in two parts; tested on the longest prompt, unless a longer one passed."""
    if adapter.state.hooks or adapter.divided < 0 or not adapter.caches:
        return False
    lengths = inputs.mask.sum(-1)
    longest = int(lengths.argmax())
    if int(lengths[longest]) > adapter.divided:
        error = _division_error(adapter, inputs.rows(slice(longest, longest + 1)), start)
        holds = error <= rounding(adapter.dtype)  # false for NaN
        adapter.divided = int(lengths[longest]) if holds else -1
    return adapter.divided > 0


def _division_error(adapter: Adapter, inputs: Inputs, start: int) -> float:
    """Return the error of the final stream of a prompt run in two parts, relative to the largest value; infinite if the
    model raises an error."""
    whole = capture(adapter, inputs, stop=True).resid[-1][:, start:]
    try:
        parts = capture(adapter, after(adapter, inputs, start), stop=True).resid[-1]
    except Exception as error:  # the user's own model may do anything with a cache
        if out_of_memory(error):
            raise
        return torch.inf
    real = inputs.mask[:, start:]
    return float((whole - parts)[real].abs().max() / whole[real].abs().max())
