"""Every byte budget of the package, how large a batch may be, and what happens when it is too large after all.

1. `estimate_memory` counts what grows with the batch: activations that autograd keeps, captured writers and streams,
   and the contraction's working set. `batch_size_for` is the largest batch within the budget.
2. `in_batches` works through the pairs in batches. One that runs out of memory is halved and tried again, with a
   warning that says so.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch

from circuitfind.batch import Batch
from circuitfind.models.adapter import Adapter
from circuitfind.progress import progress
from circuitfind.setting import check_batch_size

R = TypeVar("R")

BUDGET = 2**30  # of activations, where free memory is not known
KEPT_RUNS = 2 * 2**30  # clean and empty runs that are kept between circuits; beyond that they are computed again
KEPT_WEIGHTS = 128 * 2**20  # folded weights that are kept between runs
STREAMS = 2**30  # readers' streams that a revision keeps between trials
HELD = 256 * 2**20  # `[writers, tokens, d_model]` that is formed at a time
BY_EXAMPLE = 4 * 2**30  # scores of every example at once
IN_CACHE = {"cpu": 8 * 2**20}  # what fits in a processor's cache; other devices have none worth a small slice

KEPT_PER_LAYER = 18  # activations of width d_model that autograd keeps in one block, in round numbers
RUN_PER_LAYER = 10  # values of width d_model that a captured run holds of a block, in round numbers


class SideBySide(NamedTuple):
    """How many tokens of runs are worth running as one batch, on a processor and elsewhere: more gains nothing."""

    processor: int
    elsewhere: int

    def at_most(self, device: torch.device) -> int:
        """Of these two, the one for this device."""
        return self.processor if device.type == "cpu" else self.elsewhere

    def runs(self, device: torch.device, tokens: int) -> int:
        """How many runs of so many tokens, at least one."""
        return max(1, self.at_most(device) // tokens)


PATCHES, CIRCUITS, TRIALS = SideBySide(2048, 65536), SideBySide(1024, 16384), SideBySide(512, 16384)
MOST_TRIALS = SideBySide(4, 32)  # in runs, not in tokens: what was tried after an edge that stays is void


class MemoryEstimate(NamedTuple):
    """Bytes beyond the model's weights: `activations` while scoring, `contraction` for the kernel's working set."""

    activations: int
    contraction: int

    @property
    def total(self) -> int:
        return self.activations + self.contraction


def estimate_memory(adapter: Adapter, examples: int, length: int) -> MemoryEstimate:
    """Memory that scoring a batch of so many examples of this length takes."""
    graph, tokens, size = adapter.graph, examples * length, adapter.dtype.itemsize
    kept = KEPT_PER_LAYER * size + 6 * adapter.work.itemsize  # by autograd, and as captured
    attention = 2 * size * graph.n_heads * length
    activations = tokens * graph.n_layers * (kept * graph.d_model + attention)
    held = next(token_slices(tokens, graph.n_writers, adapter, HELD))
    return MemoryEstimate(activations, graph.n_writers * (held.stop - held.start) * row_bytes(adapter))


class MemoryPlan(NamedTuple):
    """How pairs will be scored: so many at a time, with so many bytes beside the bytes of the weights."""

    batch_size: int
    beside: int
    weights: int


def plan_memory(adapter: Adapter, examples: int, length: int, batch_size: int | None = None) -> MemoryPlan:
    """What scoring so many examples of this length takes; `batch_size` as it was asked for."""
    at_once = min(batch_size or batch_size_for(adapter, examples, length), examples)
    weights = sum(value.numel() * value.element_size() for value in adapter.model.parameters())
    return MemoryPlan(at_once, estimate_memory(adapter, at_once, length).total, weights)


def row_bytes(adapter: Adapter) -> int:
    """Bytes of one `[d_model]` in circuitfind's own precision."""
    return int(adapter.graph.d_model * adapter.work.itemsize)


def run_bytes(adapter: Adapter, n_tokens: int, runs: int) -> int:
    """Bytes that so many captured runs of so many tokens hold."""
    return runs * n_tokens * adapter.graph.n_layers * RUN_PER_LAYER * row_bytes(adapter)


def batch_size_for(adapter: Adapter, examples: int, length: int, streams: bool = False) -> int:
    """The largest batch that fits the budget, at least 1.

    `streams`: every writer's output is held in full, as exact circuits do, and no gradients are.
    """
    one = estimate_memory(adapter, 1, length).activations
    if streams:
        one = length * adapter.graph.n_writers * row_bytes(adapter)
    return max(1, min(examples, budget(adapter.device) // one))


def budget(device: torch.device) -> int:
    """Bytes that may be held beside the weights."""
    free = None if device.type == "cpu" else _free(device)
    return BUDGET if free is None else max(BUDGET, free // 3)


def obtainable(device: torch.device) -> int | None:
    """Bytes that could be had at all: what is free on an accelerator, what the machine has; None if not known."""
    if device.type != "cpu":
        return _free(device)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        return None


def _free(device: torch.device) -> int | None:
    memory_info = getattr(torch.accelerator, "get_memory_info", None)  # newer than the oldest torch that works
    return None if memory_info is None else int(memory_info(device)[0])


def in_cache(device: torch.device) -> int:
    """Bytes worth working on at a time."""
    return IN_CACHE.get(device.type, HELD)


def token_slices(n_tokens: int, rows: int, adapter: Adapter, bytes_at_a_time: int) -> Iterator[slice]:
    """Token slices whose `[rows, tokens, d_model]` fits the budget."""
    size = max(1, bytes_at_a_time // (rows * row_bytes(adapter)))
    return (slice(start, min(start + size, n_tokens)) for start in range(0, n_tokens, size))


def out_of_memory(error: Exception) -> bool:
    """Whether this is how a device or processor says so."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def free_memory(device: torch.device) -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def in_batches(
    adapter: Adapter, batch: Batch, function: Callable[[Batch, slice], R], batch_size: int | None, label: str
) -> Iterator[tuple[slice, R]]:
    """Yields (rows of the batch, what the function makes of their pairs and the rows), in order.

    When memory runs out the slice is halved and only the failed rows are done again.
    """
    check_batch_size(batch_size)
    size = batch_size or batch_size_for(adapter, len(batch), batch.clean.ids.shape[1])
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
                free_memory(adapter.device)
                warnings.warn(f"out of memory: trying again with batches of {size}", stacklevel=2)
                continue
            yield rows, result
            start = rows.stop
            advance(rows.stop - rows.start)
