"""Every byte budget of the package, and how large a batch may be.

1. `estimate_memory` counts what grows with the batch: activations that autograd keeps, captured writers and streams,
   logits of the whole vocabulary, and the contraction's working set. `benchmarks/memory.py` holds it against what a
   process grows by.
2. `batch_size_for` is the largest batch within the budget; `plan_memory` what a header line says of it.
3. Working sets and runs side by side are as large as their budgets, or the part of them that a call has found to be
   there (`Room`; `engine/batches.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from circuitfind import processes
from circuitfind.batch import Batch
from circuitfind.models.adapter import Adapter
from circuitfind.models.layer import module_at

BUDGET = 2**30  # of activations, where free memory is not known
KEPT_RUNS = 2 * 2**30  # clean and empty runs that are kept between circuits; beyond that they are computed again
KEPT_WEIGHTS = 128 * 2**20  # folded weights that are kept between runs
STREAMS = 2**30  # readers' streams that a revision keeps between trials
HELD = 256 * 2**20  # `[writers, tokens, d_model]` that is formed at a time
# A processor's: glibc keeps what was freed for the next such request if it is smaller than the largest that it has seen
# freed, up to 32 MiB. Anything larger is mapped anew, page by page, which took a fifth of the time of short passes.
RECYCLED, FEWEST = 2**25 - 2**20, 32  # bytes; tokens that are worth more
POINTS, WAITING = 8, 256 * 2**20  # of gradients that wait for one contraction: how many, and their bytes
STEPS = 5  # of them that the default method of scores takes
BY_EXAMPLE = 4 * 2**30  # scores of every example at once
IN_CACHE = {"cpu": 8 * 2**20}  # what fits in a processor's cache; other devices have none worth a small slice

# What is kept of a token in one block while scores are made, in round numbers: by autograd, of the captured runs, and
# of the gradients. Values of width d_model (the second: with post-norms), of all query heads, of the key/value heads.
STREAM, POST_NORMED, QUERIES, KEYS = 6, 4, 8, 5
READ = 2  # values as wide as a latent, of every reader, where q, k and v are read through one
GATED, PLAIN, COMPOSED = 3, 2, 5  # of the MLP's width: gated, one activation, one made of several operations in Python
LOGITS, SOFTMAXES = 3, 12  # copies of the logits that are read: by a metric of single logits, of a softmax
ENDS = 8  # values of width d_model of a token in a block: what is kept of two runs, and their difference
WITHOUT_GRADIENTS = 6  # values of width d_model of a token of a running block
# Block by block, of both runs and the gradients, with what the heap does not give back: of the same widths.
BLOCKS, QUERIES_BY_BLOCK, KEYS_BY_BLOCK = 9, 3, 2
RUN_PER_LAYER = 10  # values of width d_model that a captured run holds of a block, in round numbers


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
def within_room(room: Room) -> Iterator[None]:
    """Inside, this is the `Room` of the call that is running."""
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


class Kept(NamedTuple):
    """What a method keeps.

    points: at which it takes gradients; of each, something waits for the contraction. 0: it takes none (exact effects,
        sweeps, circuits). patterns: of each head, that autograd keeps under its rules. by_block: gradients may go back
        block by block; those of masks do not. runs: captured runs where it takes no gradients: patching (`PATCHING`)
        needs of the other run what it writes alone. circuits: some are run, too;
        masks: their gradients are taken, too, as a search does.
    """

    points: int = STEPS
    patterns: int = 0
    by_block: bool = True
    runs: float = 2.0
    circuits: bool = False
    masks: bool = False


DEFAULT, PATCHING, JUDGING = Kept(), Kept(points=0, runs=1.3), Kept(points=0, circuits=True)


def estimate_memory(
    adapter: Adapter, examples: int, length: int, reads: int = 1, softmax: bool = True, kept: Kept = DEFAULT
) -> MemoryEstimate:
    """Memory that scoring a batch of so many examples of this length takes.

    Args:
        reads: positions at which the metric reads the logits; softmax: whether it takes one over the vocabulary.
    """
    if not kept.points:
        return _without_gradients(adapter, examples, length, reads, softmax, kept.runs)
    graph, tokens = adapter.graph, examples * length
    held = next(token_slices(tokens, graph.n_writers, adapter, HELD))
    contraction = graph.n_writers * (held.stop - held.start) * row_bytes(adapter)
    scores = 3 * graph.n_writers * graph.n_readers * adapter.work.itemsize  # of a point, their sum, their mean
    by_block = kept.by_block and goes_by_block(adapter, length, reads)
    activations = _of_gradients(adapter, tokens, length, kept, by_block=by_block)
    return MemoryEstimate(activations + logits_bytes(adapter, examples * reads, softmax), contraction + scores)


def _without_gradients(
    adapter: Adapter, examples: int, length: int, reads: int, softmax: bool, runs: float
) -> MemoryEstimate:
    graph, tokens = adapter.graph, examples * length
    beside = max(tokens, PATCHES.at_most(adapter.device)) * adapter.work.itemsize
    at_work = beside * (WITHOUT_GRADIENTS * graph.d_model + _kept_of_mlp(adapter))
    rows = beside // (length * adapter.work.itemsize) * reads
    logits = logits_bytes(adapter, rows, softmax) // (1 if softmax else LOGITS)
    return MemoryEstimate(run_bytes(adapter, tokens, runs), at_work + logits)


def _of_circuits(adapter: Adapter, sizes: tuple[int, int, int], softmax: bool) -> int:
    """Bytes of a circuit of all writers, with their outputs, and of the runs that are kept for it."""
    pairs, length, reads = sizes
    tokens = max(length, min(pairs * length, CIRCUITS.at_most(adapter.device)))
    each = adapter.graph.n_writers * row_bytes(adapter)
    written = max(length * each, min(tokens * each, budget(adapter.device)))
    kept = min(run_bytes(adapter, pairs * length, runs=2), KEPT_RUNS)
    return written + kept + _without_gradients(adapter, 1, length, reads, softmax, runs=0).total


def circuits_at_once(adapter: Adapter, tokens: int, writers: int, free: int) -> int:
    """How many circuits of so many tokens and writers run side by side, whose outputs fit so many free bytes."""
    held = tokens * writers * row_bytes(adapter)
    return max(1, min(CIRCUITS.runs(adapter.device, tokens), int(free * room().part) // max(1, held)))


def _of_gradients(adapter: Adapter, tokens: int, length: int, kept: Kept, *, by_block: bool) -> int:
    """Bytes that passes forwards and backwards hold."""
    graph, size, work = adapter.graph, adapter.dtype.itemsize, adapter.work.itemsize
    stream = STREAM + POST_NORMED * adapter.coupled
    queries, keys = max(view.layout.features for view in adapter.layers)
    heads = QUERIES * queries + KEYS * keys
    if adapter.family.kv or graph.mixers:
        heads += READ * graph.readers_per_layer * adapter.d_read
    stored = (stream * graph.d_model + heads + _kept_of_mlp(adapter)) * (size + work) // 2
    eager = getattr(adapter.config, "_attn_implementation", "") == "eager"
    stored += size * graph.n_heads * length * max(eager, kept.patterns)
    waiting = min(kept.points, points_at_once(adapter, tokens)) * (graph.d_model + graph.readers_per_layer)
    if kept.points > 1:  # both ends of the lines that the points lie on
        waiting += ENDS * graph.d_model
    of_layer = stored + waiting * work
    if not by_block:
        return tokens * graph.n_layers * of_layer
    of_layer = (BLOCKS * graph.d_model + QUERIES_BY_BLOCK * queries + KEYS_BY_BLOCK * keys + waiting) * work
    return tokens * (graph.n_layers * of_layer + stored)


def goes_by_block(adapter: Adapter, length: int, reads: int) -> bool:
    """Whether gradients of a single pair go back block by block: in one pass they would not fit the budget. Not under
    the user's hooks, which may tie blocks together at some tokens only."""
    if adapter.by_block is False or adapter.state.hooks:
        return False
    one = _of_gradients(adapter, length, length, DEFAULT, by_block=False) + logits_bytes(adapter, reads)
    return one > budget(adapter.device) * room().part


def points_at_once(adapter: Adapter, tokens: int) -> int:
    """How many points' gradients of so many tokens wait for one contraction."""
    each = tokens * adapter.graph.n_layers * row_bytes(adapter)
    return max(1, min(POINTS, int(WAITING * room().part) // max(1, each)))


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
    run side by side), with so many bytes beside the bytes of the weights; `by_block`: gradients go back block by block,
    as in one pass those of a single pair would not fit."""

    batch_size: int
    chunk: int
    beside: int
    weights: int
    by_block: bool


def plan_memory(
    adapter: Adapter,
    sizes: tuple[int, int, int],
    batch_size: int | None = None,
    softmax: bool = True,
    kept: Kept = DEFAULT,
) -> MemoryPlan:
    """What scoring pairs of these sizes takes; `batch_size` as it was asked for, the rest as for `estimate_memory`."""
    pairs, length, reads = sizes
    at_once = min(batch_size or batch_size_for(adapter, *sizes, patterns=kept.patterns), pairs)
    chunk = max(at_once * length, PATCHES.at_most(adapter.device))
    if kept.points:
        chunk = next(token_slices(at_once * length, adapter.graph.n_writers, adapter, HELD)).stop
    beside = estimate_memory(adapter, at_once, length, reads, softmax, kept).total
    if kept.circuits:
        beside = max(beside, _of_circuits(adapter, sizes, softmax))
    if kept.masks:
        beside = max(beside, plan_learning(adapter, sizes, pairs, batch_size, softmax).beside)
    return MemoryPlan(
        at_once,
        chunk,
        beside,
        weight_bytes(adapter),
        kept.points > 0 and kept.by_block and goes_by_block(adapter, length, reads),
    )


def learning_size(adapter: Adapter, pairs: int, length: int, reads: int = 1) -> int:
    """The largest batch of masked runs: both autograd's activations and every writer's output are held."""
    sizes = (pairs, length, reads)
    return min(batch_size_for(adapter, *sizes, by_block=False), batch_size_for(adapter, *sizes, streams=True))


def plan_learning(
    adapter: Adapter, sizes: tuple[int, int, int], per_step: int, batch_size: int | None = None, softmax: bool = True
) -> MemoryPlan:
    """`plan_memory` of masks that are learned, from so many pairs a step: beside the gradients, every writer's output
    and the clean and empty runs, of all pairs where these are kept."""
    pairs, length, reads = sizes
    step = min(per_step, pairs)
    size = batch_size or learning_size(adapter, step, length, reads)
    plan = plan_memory(adapter, (step, length, reads), size, softmax, Kept(points=1, by_block=False))
    written = plan.batch_size * length * adapter.graph.n_writers * row_bytes(adapter)
    kept = run_bytes(adapter, pairs * length, runs=2)
    kept = kept if kept <= KEPT_RUNS else run_bytes(adapter, plan.batch_size * length, runs=2)
    return plan._replace(beside=plan.beside + written + kept)


def sizes_of(batch: Batch) -> tuple[int, int, int]:
    """Pairs, tokens of a prompt, positions at which logits are read."""
    return len(batch), batch.clean.ids.shape[1], batch.clean.read.shape[1]


def weight_bytes(adapter: Adapter) -> int:
    """Bytes of the model's weights."""
    return sum(value.numel() * value.element_size() for value in adapter.model.parameters())


def row_bytes(adapter: Adapter) -> int:
    """Bytes of one `[d_model]` in circuitfind's own precision."""
    return int(adapter.graph.d_model * adapter.work.itemsize)


def run_bytes(adapter: Adapter, n_tokens: int, runs: float) -> int:
    """Bytes that so many captured runs of so many tokens hold."""
    return int(runs * n_tokens * adapter.graph.n_layers * RUN_PER_LAYER * row_bytes(adapter))


def batch_size_for(
    adapter: Adapter,
    examples: int,
    length: int,
    reads: int = 1,
    streams: bool = False,
    patterns: int = 0,
    by_block: bool = True,
) -> int:
    """The largest batch that fits the budget, at least 1.

    `streams`: every writer's output is held in full, as exact circuits do, and no gradients are. `patterns` and
    `by_block`: as for `Kept`.
    """
    kept = Kept(patterns=patterns, by_block=by_block)
    one = estimate_memory(adapter, 1, length, reads, kept=kept).activations
    if streams:
        one = length * adapter.graph.n_writers * row_bytes(adapter) + logits_bytes(adapter, reads)
    return max(1, min(examples, budget(adapter.device) // one))


def budget(device: torch.device) -> int:
    """Bytes that may be held beside the weights."""
    free = None if device.type == "cpu" else min(processes.of_each(lambda: _free(device)), key=lambda one: one or 0)
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
