"""Tokens that come before anything differs between the two prompts of a pair: run once for all runs.

Up to the first difference every run of a pair is the same (attention only looks back), so under interchange nothing
that is scored, patched or ablated is there. These tokens are run once; the other runs hold the later tokens only, and
see the earlier ones by their keys and values, in transformers' cache.

1. Prompts are divided where the first pair of the batch differs, or is read.
2. Whether a model does the same in two parts is tried: the longest pair is run both ways the first time, and again when
   a longer one comes. Where it does not (latent attention and mixers keep other things than keys and values), under the
   user's hooks and without such a cache, whole prompts are run.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from circuitfind.batch import Batch, Inputs
from circuitfind.engine.batches import out_of_memory
from circuitfind.engine.capture import capture
from circuitfind.engine.memory_plan import SHARED
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import past_of

TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest value in the stream
OTHERWISE = 1e-4


def after_prefix(adapter: Adapter, batch: Batch) -> Batch:
    """The same pairs from where the first of them differs, if enough is gained by it; positions are others then."""
    start = _first_difference(batch)
    if start * len(batch) < SHARED.at_most(adapter.device) or not _divides(adapter, batch.clean, start):
        return batch
    clean = after(adapter, batch.clean, start)
    corrupted = batch.corrupted.positions(slice(start, None))._replace(past=clean.past)
    return replace(batch, clean=clean, corrupted=corrupted)


def after(adapter: Adapter, inputs: Inputs, start: int) -> Inputs:
    """The same prompts from a position on."""
    return inputs.positions(slice(start, None))._replace(past=past_of(adapter, inputs, start))


def _first_difference(batch: Batch) -> int:
    """The first position at which the sides of any pair differ, or are read."""
    clean, corrupted = batch.clean, batch.corrupted
    same = ((clean.ids == corrupted.ids) & (clean.mask == corrupted.mask)).all(0)
    read = min(int(clean.read.min()), int(corrupted.read.min()))
    return min(int(same.long().cumprod(0).sum()), read)


def _divides(adapter: Adapter, inputs: Inputs, start: int) -> bool:
    """Whether the model gives the same in two parts; proved on the longest prompt, unless it was on a longer one."""
    if adapter.state.hooks or adapter.divided < 0 or not adapter.caches:
        return False
    lengths = inputs.mask.sum(-1)
    longest = int(lengths.argmax())
    if int(lengths[longest]) > adapter.divided:
        error = _division_error(adapter, inputs.rows(slice(longest, longest + 1)), start)
        holds = error <= TOLERANCE.get(adapter.dtype, OTHERWISE)  # false for NaN
        adapter.divided = int(lengths[longest]) if holds else -1
    return adapter.divided > 0


def _division_error(adapter: Adapter, inputs: Inputs, start: int) -> float:
    """How far a prompt's last stream is from that in two parts, relative to the largest value; infinite if it fails."""
    whole = capture(adapter, inputs, stop=True).resid[-1][:, start:]
    try:
        parts = capture(adapter, after(adapter, inputs, start), stop=True).resid[-1]
    except Exception as error:  # a model of the user's own may do anything with a cache
        if out_of_memory(error):
            raise
        return torch.inf
    real = inputs.mask[:, start:]
    return float((whole - parts)[real].abs().max() / whole[real].abs().max())
