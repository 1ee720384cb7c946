"""Every byte budget of the package, how large a batch may be, and what happens when it is too large after all.

1. `estimate_memory` counts what grows with the batch: activations that autograd keeps, captured writers and streams,
   logits of the whole vocabulary, and the contraction's working set. `benchmarks/memory.py` holds it against what a
   process grows by. `batch_size_for` is the largest batch within the budget.
2. `in_batches` works through the pairs in batches. Where one runs out of memory, the next are half as large, with a
   warning that says so; so are working sets and runs side by side. A single pair is tried once more, one run at a time.
   What a call has learned about its `Room` holds for all of its loops.
3. What does not fit even so leaves a public call as one line (`within_memory`).
"""

from __future__ import annotations

import errno
import gc
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import nn

from circuitfind import processes
from circuitfind.batch import Batch
from circuitfind.errors import ModelError, warn
from circuitfind.models.adapter import Adapter
from circuitfind.models.layer import module_at
from circuitfind.progress import progress
from circuitfind.setting import check_batch_size

R = TypeVar("R")

BUDGET = 2**30  # of activations, where free memory is not known
KEPT_RUNS = 2 * 2**30  # clean and empty runs that are kept between circuits; beyond that they are computed again
KEPT_WEIGHTS = 128 * 2**20  # folded weights that are kept between runs
STREAMS = 2**30  # readers' streams that a revision keeps between trials
HELD = 256 * 2**20  # `[writers, tokens, d_model]` that is formed at a time
# A processor's: glibc keeps what was freed for the next such request if it is smaller than the largest that it has seen
# freed, up to 32 MiB. Anything larger is mapped anew, page by page, which took a fifth of the time of short passes.
RECYCLED, FEWEST = 2**25 - 2**20, 32  # bytes; tokens that are worth more
POINTS = 8  # of gradients that wait for one contraction
STEPS = 5  # of them that the default method of scores takes
BY_EXAMPLE = 4 * 2**30  # scores of every example at once
IN_CACHE = {"cpu": 8 * 2**20}  # what fits in a processor's cache; other devices have none worth a small slice

# What is kept of a token in one block while scores are made, in round numbers: by autograd, of the captured runs, and
# of the gradients. Values of width d_model (the second: with post-norms), of all query heads, of the key/value heads.
STREAM, POST_NORMED, QUERIES, KEYS = 10, 4, 8, 5
READ = 2  # values as wide as a latent, of every reader, where q, k and v are read through one
GATED, PLAIN, COMPOSED = 3, 2, 5  # of the MLP's width: gated, one activation, one made of several operations in Python
LOGITS, SOFTMAXES = 3, 12  # copies of the logits that are read: by a metric of single logits, of a softmax
ENDS = 8  # values of width d_model of a token in a block: what is kept of two runs, and their difference
WITHOUT_GRADIENTS = 6  # values of width d_model of a token of a running block
RUN_PER_LAYER = 10  # values of width d_model that a captured run holds of a block, in round numbers


# How a processor, an accelerator, numpy and the system say that there is no memory left.
OUT_OF_MEMORY = re.compile(
    r"out of memory|(can't|cannot|could not|unable to|failed to) (allocate|create a memory)|not enough memory"
    r"|bad_alloc|alloc_failed",
    re.IGNORECASE,
)
ASKED_FOR = re.compile(r"allocate ([\d.,]+ ?(?:bytes|[KMGT]i?B))")


@dataclass
class Room:
    """What a call has learned about memory.

    part: of the budgets, halved where memory ran out; 0 is one pair and one run at a time. tried: the last batch.
    """

    part: float = 1.0
    tried: str = ""

    def fitting(self, size: int, pairs: int) -> int:
        """The size of batches of so many pairs, where `size` was to be taken."""
        return max(1, int(min(size, pairs) * self.part))


_room: ContextVar[Room | None] = ContextVar("circuitfind_room", default=None)


def room() -> Room:
    """That of the call that is running."""
    return _room.get() or Room()


@contextmanager
def _within(room: Room) -> Iterator[None]:
    token = _room.set(room)
    try:
        yield
    finally:
        _room.reset(token)


class SideBySide(NamedTuple):
    """How many tokens of runs are worth running as one batch, on a processor and elsewhere: more gains nothing."""

    processor: int
    elsewhere: int

    def at_most(self, device: torch.device) -> int:
        """Of these two, the one for this device, or the part of it that there is room for."""
        return int((self.processor if device.type == "cpu" else self.elsewhere) * room().part)

    def runs(self, device: torch.device, tokens: int) -> int:
        """How many runs of so many tokens, at least one."""
        return max(1, self.at_most(device) // tokens)


PATCHES, CIRCUITS, TRIALS = SideBySide(2048, 65536), SideBySide(1024, 16384), SideBySide(512, 16384)
MOST_TRIALS = SideBySide(4, 32)  # in runs, not in tokens: what was tried after an edge that stays is void


SHARED = SideBySide(32, 16384)  # tokens before anything differs, from which on they are run by themselves


class MemoryEstimate(NamedTuple):
    """Bytes beyond the model's weights: `activations` while scoring, `contraction` for the kernel's working set."""

    activations: int
    contraction: int

    @property
    def total(self) -> int:
        return self.activations + self.contraction


def estimate_memory(
    adapter: Adapter, examples: int, length: int, reads: int = 1, softmax: bool = True, points: int = STEPS
) -> MemoryEstimate:
    """Memory that scoring a batch of so many examples of this length takes.

    Args:
        reads: positions at which the metric reads the logits; softmax: whether it takes one over the vocabulary.
        points: at which gradients are taken; of each, something waits for the contraction. 0: runs without gradients
            (exact effects, sweeps, circuits).
    """
    graph, tokens, size = adapter.graph, examples * length, adapter.dtype.itemsize
    if not points:
        beside = max(tokens, PATCHES.at_most(adapter.device)) * adapter.work.itemsize
        at_work = beside * (WITHOUT_GRADIENTS * graph.d_model + _kept_of_mlp(adapter))
        rows = beside // (length * adapter.work.itemsize) * reads
        logits = logits_bytes(adapter, rows, softmax) // (1 if softmax else LOGITS)
        return MemoryEstimate(run_bytes(adapter, tokens, runs=2), at_work + logits)
    stream = STREAM + POST_NORMED * adapter.coupled
    queries, keys = max(view.layout.features for view in adapter.layers)
    heads = QUERIES * queries + KEYS * keys
    if adapter.family.kv or graph.mixers:
        heads += READ * graph.readers_per_layer * adapter.d_read
    kept = (stream * graph.d_model + heads + _kept_of_mlp(adapter)) * (size + adapter.work.itemsize) // 2
    attention = size * graph.n_heads * length * (getattr(adapter.config, "_attn_implementation", "") == "eager")
    logits = logits_bytes(adapter, examples * reads, softmax)
    held = next(token_slices(tokens, graph.n_writers, adapter, HELD))
    contraction = graph.n_writers * (held.stop - held.start) * row_bytes(adapter)
    waiting = tokens * graph.n_layers * min(points, POINTS) * (graph.d_model + graph.readers_per_layer)
    if points > 1:  # both ends of the lines that the points lie on
        waiting += tokens * graph.n_layers * ENDS * graph.d_model
    scores = 3 * graph.n_writers * graph.n_readers * adapter.work.itemsize  # of a point, their sum, their mean
    activations = tokens * graph.n_layers * (kept + attention) + waiting * adapter.work.itemsize + logits
    return MemoryEstimate(activations, contraction + scores)


def _kept_of_mlp(adapter: Adapter) -> int:
    """Values that are kept of a token in an MLP; of one without a single output projection, as of a common shape."""
    graph, view = adapter.graph, adapter.layers[0]
    if view.family.down is None:
        return GATED * 4 * graph.d_model
    parameters = sum(one.numel() for one in module_at(view.block, view.family.mlp_out).parameters())
    width: int = module_at(view.block, view.family.down).weight.numel() // graph.d_model
    if parameters > 2.5 * width * graph.d_model:
        return GATED * width
    return width * (COMPOSED if any(map(_composed, view.block.modules())) else PLAIN)


def _composed(module: nn.Module) -> bool:
    """Whether this is an activation made of several operations (GPT-2's GELU), each of which keeps its input."""
    if not type(module).__module__.startswith(("torch.nn.modules.activation", "transformers.activations")):
        return False
    with torch.enable_grad():
        last = module(torch.zeros(1, requires_grad=True)).grad_fn
    return last is not None and any(getattr(one, "next_functions", ()) for one, _ in last.next_functions)


def logits_bytes(adapter: Adapter, rows: int, softmax: bool = True) -> int:
    """Bytes of the copies that are made of so many rows of logits."""
    vocabulary: int = adapter.model.get_output_embeddings().weight.shape[0]
    return rows * vocabulary * adapter.work.itemsize * (SOFTMAXES if softmax else LOGITS)


class MemoryPlan(NamedTuple):
    """How pairs will be scored: so many at a time, of which so many tokens are contracted at a time (without gradients:
    run side by side), with so many bytes beside the bytes of the weights."""

    batch_size: int
    chunk: int
    beside: int
    weights: int


def plan_memory(
    adapter: Adapter,
    sizes: tuple[int, int, int],
    batch_size: int | None = None,
    softmax: bool = True,
    points: int = STEPS,
) -> MemoryPlan:
    """What scoring pairs of these sizes takes; `batch_size` as it was asked for, the rest as for `estimate_memory`."""
    pairs, length, reads = sizes
    at_once = min(batch_size or batch_size_for(adapter, *sizes), pairs)
    chunk = max(at_once * length, PATCHES.at_most(adapter.device))
    if points:
        chunk = next(token_slices(at_once * length, adapter.graph.n_writers, adapter, HELD)).stop
    return MemoryPlan(
        at_once,
        chunk,
        estimate_memory(adapter, at_once, length, reads, softmax, points).total,
        weight_bytes(adapter),
    )


def sizes_of(batch: Batch) -> tuple[int, int, int]:
    """Pairs, tokens of a prompt, positions at which logits are read."""
    return len(batch), batch.clean.ids.shape[1], batch.clean.read.shape[1]


def weight_bytes(adapter: Adapter) -> int:
    """Bytes of the model's weights."""
    return sum(value.numel() * value.element_size() for value in adapter.model.parameters())


def row_bytes(adapter: Adapter) -> int:
    """Bytes of one `[d_model]` in circuitfind's own precision."""
    return int(adapter.graph.d_model * adapter.work.itemsize)


def run_bytes(adapter: Adapter, n_tokens: int, runs: int) -> int:
    """Bytes that so many captured runs of so many tokens hold."""
    return runs * n_tokens * adapter.graph.n_layers * RUN_PER_LAYER * row_bytes(adapter)


def batch_size_for(adapter: Adapter, examples: int, length: int, reads: int = 1, streams: bool = False) -> int:
    """The largest batch that fits the budget, at least 1.

    `streams`: every writer's output is held in full, as exact circuits do, and no gradients are.
    """
    one = estimate_memory(adapter, 1, length, reads).activations
    if streams:
        one = length * adapter.graph.n_writers * row_bytes(adapter) + logits_bytes(adapter, reads)
    return max(1, min(examples, budget(adapter.device) // one))


def budget(device: torch.device) -> int:
    """Bytes that may be held beside the weights."""
    free = None if device.type == "cpu" else min(processes.gathered(lambda: _free(device)), key=lambda one: one or 0)
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
    return int(IN_CACHE.get(device.type, HELD) * room().part)


def token_slices(n_tokens: int, rows: int, adapter: Adapter, bytes_at_a_time: int) -> Iterator[slice]:
    """Token slices whose `[rows, tokens, d_model]` fits the budget, and on a processor is recycled."""
    size = int(bytes_at_a_time * room().part) // (rows * row_bytes(adapter))
    if adapter.device.type == "cpu":
        size = min(size, max(FEWEST, RECYCLED // (rows * row_bytes(adapter))))
    size = max(1, size)
    return (slice(start, min(start + size, n_tokens)) for start in range(0, n_tokens, size))


def out_of_memory(error: Exception) -> bool:
    """Whether this is how a device, a library or the system says so."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


@contextmanager
def within_memory(adapter: Adapter) -> Iterator[None]:
    """Inside, loops share their `Room`, and what does not fit ends in one line.

    Raises:
        ModelError: memory ran out, even with one pair and one run at a time.
    """
    here = Room(room().part)
    if adapter.device.type == "cpu":
        torch.empty(RECYCLED + 2**19, dtype=torch.uint8)  # the largest that glibc has seen freed; nothing is written
    try:
        with _within(here):
            yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        asked = ASKED_FOR.search(str(error))
        tried = f" with {here.tried}" * bool(here.tried) + (f", where {asked[1]} were asked for" if asked else "")
        raise ModelError(
            f"out of memory on {adapter.device}{tried}; the model's weights take"
            f" {weight_bytes(adapter) / 2**20:,.0f} MiB: give shorter prompts or fewer, or load the model in half"
            " precision (dtype='bfloat16') or on a device with more memory"
        ) from None


def free_memory(device: torch.device) -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def in_batches(
    adapter: Adapter,
    batch: Batch,
    function: Callable[[Batch, slice], R],
    batch_size: int | None,
    label: str,
    division: processes.Division | None = None,
) -> Iterator[tuple[slice, R]]:
    """Yields (rows of the batch, what the function makes of their pairs and the rows), in order.

    When memory runs out the slice is halved and only the failed rows are done again. Of several processes each runs a
    batch, or none where there are fewer pairs, and all get the results of all. With a `division` of candidates the same
    rows come once from each member.
    """
    check_batch_size(batch_size)
    here, pairs = room(), len(batch)
    asked = batch_size or batch_size_for(adapter, *sizes_of(batch))
    divided = division or processes.division(pairs)
    start = 0
    with progress(label, pairs) as advance:
        while start < pairs:
            size = here.fitting(asked, pairs)
            batches = divided.batches(start, pairs, size)
            takes_part = divided.block < len(batches) and (division is not None or divided.place == 0)
            rows = batches[divided.block] if takes_part else None

            def one(rows: slice | None = rows, size: int = size) -> _Part[R] | None:
                return None if rows is None else _within_room(adapter, batch, rows, function, size, label, here)

            parts = [part for part in processes.gathered(one, f"{label} {start}") if part is not None]
            here.part = min(part.room for part in parts)
            done = min((part.rows.start for part in parts if part.result is None), default=batches[-1].stop)
            for rows, result, _ in parts:
                if result is not None and rows.stop <= done:
                    yield rows, result[0]
            advance(done - start)
            start = done


class _Part(NamedTuple, Generic[R]):
    """What a process made of some rows, in a tuple; None where memory ran out. `room`: the part that is left."""

    rows: slice
    result: tuple[R] | None
    room: float


def _within_room(
    adapter: Adapter,
    batch: Batch,
    rows: slice,
    function: Callable[[Batch, slice], R],
    size: int,
    label: str,
    here: Room,
) -> _Part[R]:
    """A function of some rows; where memory runs out, there is less room."""
    part = batch.rows(rows).trimmed()
    many, length = f"{len(part)} pair{'s' * (len(part) > 1)}", part.clean.ids.shape[1]
    here.tried = f"a batch of {many} of {length} tokens ({label})"
    try:
        with _within(here):
            result = function(part, rows)
        return _Part(rows, (result,), here.part)
    except Exception as error:
        if not out_of_memory(error) or here.part == 0:
            raise
    # the error is let go of before memory is given back: it holds what was computed
    here.part = here.part / 2 if size > 1 else 0.0
    free_memory(adapter.device)
    again = f"batches of {max(1, size // 2)}" if here.part else "one run at a time"
    warn(f"out of memory: trying again with {again}")
    return _Part(rows, None, here.part)
