"""How much memory a run takes, how large a batch may be, and what happens when it is too large after all.

The estimate counts what grows with the batch: activations that autograd keeps, captured writers and streams, and the
contraction's working set. A batch that runs out of memory is halved and tried again, with a warning that says so.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import NamedTuple, TypeVar

import torch

from circuitfind.batch import Batch
from circuitfind.engine.contract import held_tokens
from circuitfind.errors import TaskError
from circuitfind.models.adapter import Adapter
from circuitfind.progress import progress

R = TypeVar("R")
BUDGET_BYTES = 2**30  # of activations, where free memory is not known
KEPT_PER_LAYER = 18  # activations of width d_model that autograd keeps in one block, in round numbers


class SideBySide(NamedTuple):
    """How many tokens of runs are worth running as one batch, on a processor and elsewhere: more gains nothing."""

    processor: int
    elsewhere: int

    def runs(self, device: torch.device, tokens: int) -> int:
        """How many runs of so many tokens, at least one."""
        return max(1, (self.processor if device.type == "cpu" else self.elsewhere) // tokens)


PATCHES = SideBySide(2048, 65536)


class MemoryEstimate(NamedTuple):
    """Bytes beyond the model's weights: `activations` while scoring, `contraction` for the kernel's working set."""

    activations: int
    contraction: int

    @property
    def total(self) -> int:
        return self.activations + self.contraction


def estimate_memory(adapter: Adapter, examples: int, length: int) -> MemoryEstimate:
    """Memory that scoring a batch of so many examples of this length takes."""
    graph, tokens = adapter.graph, examples * length
    captured = 6 * adapter.work.itemsize
    kept = KEPT_PER_LAYER * adapter.dtype.itemsize + captured
    attention = 2 * adapter.dtype.itemsize * graph.n_heads * length
    activations = tokens * graph.n_layers * (kept * graph.d_model + attention)
    rows = graph.n_writers * held_tokens(adapter, tokens)
    return MemoryEstimate(activations, rows * graph.d_model * adapter.work.itemsize)


def batch_size_for(adapter: Adapter, examples: int, length: int, streams: bool = False) -> int:
    """The largest batch that fits the budget, at least 1.

    Args:
        streams: every writer's output is held in full, as exact circuits do, and no gradients are.
    """
    one = estimate_memory(adapter, 1, length).activations
    if streams:
        one = length * adapter.graph.n_writers * adapter.graph.d_model * adapter.work.itemsize
    return max(1, min(examples, budget(adapter.device) // one))


def budget(device: torch.device) -> int:
    """Bytes that may be held beside the weights."""
    if device.type == "cpu":
        return BUDGET_BYTES
    memory_info = getattr(torch.accelerator, "get_memory_info", None)  # newer than the oldest torch that works
    if memory_info is None:
        return BUDGET_BYTES
    free, _ = memory_info(device)
    return max(BUDGET_BYTES, free // 3)


def obtainable(device: torch.device) -> int | None:
    """Bytes that could be had at all: what is free on an accelerator, what the machine has; None if not known."""
    if device.type == "cpu":
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):  # not on every system
            return None
    memory_info = getattr(torch.accelerator, "get_memory_info", None)
    return None if memory_info is None else int(memory_info(device)[0])


def out_of_memory(error: Exception) -> bool:
    """Whether this is how a device or processor says so."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def in_batches(
    adapter: Adapter, batch: Batch, function: Callable[[Batch, slice], R], batch_size: int | None, label: str
) -> Iterator[tuple[slice, R]]:
    """Applies a function to slices of a batch: it gets a slice's pairs, and which rows they are.

    Yields:
        (rows of the batch, the function's result for them), in order. When memory runs out the slice is halved and only
        the failed rows are done again.
    """
    size = batch_size_for(adapter, len(batch), batch.clean.ids.shape[1]) if batch_size is None else batch_size
    if not isinstance(size, Integral):
        raise TaskError(f"batch_size must be a whole number, not {size!r}")
    if size < 1:
        raise TaskError(f"batch_size must be at least 1, not {size}")
    start = 0
    with progress(label, len(batch)) as advance:
        while start < len(batch):
            rows = slice(start, min(start + size, len(batch)))
            try:
                result = function(batch.rows(rows).trimmed(), rows)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or size == 1:
                    raise
                size //= 2
                gc.collect()
                if adapter.device.type != "cpu":
                    torch.accelerator.empty_cache()
                warnings.warn(f"out of memory: trying again with batches of {size}", stacklevel=2)
                continue
            yield rows, result
            start = rows.stop
            advance(rows.stop - rows.start)
