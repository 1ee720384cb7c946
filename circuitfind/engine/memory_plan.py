"""Byte budgets of the whole package, and how many pairs fit in a batch.

1. `estimate_memory` adds up everything that grows with the batch: activations kept by autograd, captured runs, logits
   over the vocabulary, and the working set of the contraction. `benchmarks/memory.py` compares the estimate with the
   measured growth of a process.
2. `batch_size_for` returns the largest batch within the budget. `plan_memory` returns the batch size, working set and
   estimate that a verb prints in its header.
3. `goes_by_block` decides whether gradients are taken block by block because a single pair is too large.
4. When memory runs out, `engine/batches.py` halves the budgets for the rest of the call (`Room`).
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

# Budgets in bytes.
BUDGET = 2**30  # activations of a batch, where free memory is not known
OF_MEMORY = 8  # on a processor, a single pair may take this fraction of the machine's memory before it goes by block
KEPT_RUNS = 2 * 2**30  # clean and empty runs kept between circuits; larger ones are computed again for each circuit
KEPT_WEIGHTS = 128 * 2**20  # folded weights kept between runs
STREAMS = 2**30  # residual streams at the readers, kept by a revision between trials
HELD = 256 * 2**20  # one slice of `[writers, tokens, d_model]`
# glibc reuses a freed buffer only if it is smaller than the largest buffer freed so far, up to 32 MiB. Larger buffers
# are mapped again page by page, which took a fifth of the time of short passes. So slices on a processor stay below
# this size, unless they would hold fewer than FEWEST tokens.
RECYCLED, FEWEST = 2**25 - 2**20, 32
POINTS, WAITING = 8, 256 * 2**20  # most gradients (integration points) that wait for one contraction, and their bytes
STEPS = 5  # integration points of the default method
BY_EXAMPLE = 4 * 2**30  # scores of every example at once
IN_CACHE = {"cpu": 8 * 2**20}  # fits in a processor's cache; on other devices small slices gain nothing

# Memory per token and block while gradients are taken: the number of values kept by autograd, in captured runs and in
# gradients, in units of a width. Rounded fits to measured growth.
STREAM, POST_NORMED = 6, 4  # d_model; the second is added in blocks with post-norms
QUERIES, KEYS = 8, 5  # width of all query heads; of all key/value heads
READ = 2  # d_read of every reader, where q, k and v are read through a latent
GATED, PLAIN, COMPOSED = 3, 2, 5  # MLP width: gated; one activation; an activation made of several Python operations
ENDS = 8  # d_model, with several integration points: both end runs and their difference
BLOCKS, QUERIES_BY_BLOCK, KEYS_BY_BLOCK = 9, 3, 2  # d_model, query and key/value heads, where gradients go by block
# The same without gradients.
WITHOUT_GRADIENTS = 6  # d_model, of the block that is running
RUN_PER_LAYER = 10  # d_model, of a captured run
LOGITS, SOFTMAXES = 3, 12  # copies of each row of logits: for a metric of single logits; for one with a softmax


@dataclass
class Room:
    """How much of the budgets a call may use.

    part: fraction of every budget, halved each time memory runs out. 0: one pair and one run at a time.
    tried: describes the last batch that was tried, for the error message.
    """

    part: float = 1.0
    tried: str = ""

    def fitting(self, size: int, pairs: int) -> int:
        """Batch size for `pairs` pairs, where `size` was planned."""
        return max(1, int(min(size, pairs) * self.part))


_room: ContextVar[Room | None] = ContextVar("circuitfind_room", default=None)


def room() -> Room:
    """The `Room` of the current call."""
    return _room.get() or Room()


@contextmanager
def within_room(room: Room) -> Iterator[None]:
    """Make this the `Room` of the current call."""
    token = _room.set(room)
    try:
        yield
    finally:
        _room.reset(token)


class SideBySide(NamedTuple):
    """Most tokens of runs in one batch, on a processor and on other devices. Larger batches are no faster."""

    processor: int
    elsewhere: int

    def at_most(self, device: torch.device) -> int:
        """The limit for this device, within the current `Room`."""
        return int((self.processor if device.type == "cpu" else self.elsewhere) * room().part)

    def runs(self, device: torch.device, tokens: int) -> int:
        """Number of runs of `tokens` tokens each, at least 1."""
        return max(1, self.at_most(device) // tokens)


PATCHES, CIRCUITS, TRIALS = SideBySide(2048, 65536), SideBySide(1024, 16384), SideBySide(512, 16384)
MOST_TRIALS = SideBySide(4, 32)  # ACDC trials, not tokens: once an edge stays, the trials after it are discarded
SHARED = SideBySide(32, 16384)  # a prefix common to all prompts is run separately if it has at least so many tokens


class MemoryEstimate(NamedTuple):
    """Bytes beside the weights: `activations` grow with the batch, `contraction` is the working set of the kernel."""

    activations: int
    contraction: int

    @property
    def total(self) -> int:
        return self.activations + self.contraction


class Kept(NamedTuple):
    """What a method keeps in memory.

    points: integration points, at each of which gradients are taken. 0: no gradients (exact effects, sweeps, circuits).
    patterns: attention patterns that autograd keeps of each head, under the method's own backward rules.
    by_block: gradients may go back block by block. Gradients of masks may not.
    runs: captured runs, for methods without gradients. `PATCHING` needs only the writers of its second run.
    circuits: circuits are run, too.
    masks: gradients of masks are taken, too, as in a search.
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
    """Estimate the memory of scoring one batch.

    Args:
        examples, length: pairs in the batch, tokens of a prompt.
        reads: positions of a prompt at which the metric reads the logits.
        softmax: whether the metric takes a softmax over the vocabulary.
        kept: what the method keeps.
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
    """Bytes of a circuit with every writer in it: all outputs, and the clean and empty runs that are kept."""
    pairs, length, reads = sizes
    tokens = max(length, min(pairs * length, CIRCUITS.at_most(adapter.device)))
    each = adapter.graph.n_writers * row_bytes(adapter)
    written = max(length * each, min(tokens * each, budget(adapter.device)))
    kept = min(run_bytes(adapter, pairs * length, runs=2), KEPT_RUNS)
    return written + kept + _without_gradients(adapter, 1, length, reads, softmax, runs=0).total


def circuits_at_once(adapter: Adapter, tokens: int, writers: int, free: int) -> int:
    """Number of circuits that run in one batch, so that the outputs of their writers fit in `free` bytes."""
    held = tokens * writers * row_bytes(adapter)
    return max(1, min(CIRCUITS.runs(adapter.device, tokens), int(free * room().part) // max(1, held)))


def _of_gradients(adapter: Adapter, tokens: int, length: int, kept: Kept, *, by_block: bool) -> int:
    """Bytes held by forward and backward passes."""
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
    if kept.points > 1:
        waiting += ENDS * graph.d_model
    of_layer = stored + waiting * work
    if not by_block:
        return tokens * graph.n_layers * of_layer
    of_layer = (BLOCKS * graph.d_model + QUERIES_BY_BLOCK * queries + KEYS_BY_BLOCK * keys + waiting) * work
    return tokens * (graph.n_layers * of_layer + stored)


def goes_by_block(adapter: Adapter, length: int, reads: int) -> bool:
    """Whether gradients go back block by block, because those of a single pair are too large for one pass.

    Too large is more than the budget of a batch, and on a processor more than an eighth of the machine's memory: the
    second forward pass of every block costs a quarter to two fifths of the time, so memory that is there is used first.
    Gradients go back in one pass wherever the user's hooks are, as these may connect blocks at a few tokens only.
    """
    if adapter.by_block is False or adapter.state.hooks:
        return False
    one = _of_gradients(adapter, length, length, DEFAULT, by_block=False) + logits_bytes(adapter, reads)
    return one > for_one_pair(adapter.device) * room().part


def for_one_pair(device: torch.device) -> int:
    """Bytes that gradients of a single pair may take in one pass; the same for all processes."""
    most = budget(device)
    if device.type != "cpu":
        return most
    owned = processes.of_each(lambda: obtainable(device))
    return max(most, min(one or 0 for one in owned) // OF_MEMORY)


def points_at_once(adapter: Adapter, tokens: int) -> int:
    """Number of integration points whose gradients are held for one contraction."""
    each = tokens * adapter.graph.n_layers * row_bytes(adapter)
    return max(1, min(POINTS, int(WAITING * room().part) // max(1, each)))


def _kept_of_mlp(adapter: Adapter) -> int:
    """Values kept of a token in an MLP. Without a single output projection, those of a gated MLP of width 4 d_model."""
    graph, view = adapter.graph, adapter.layers[0]
    if view.family.down is None:
        return GATED * 4 * graph.d_model
    parameters = sum(one.numel() for one in module_at(view.block, view.family.mlp_out).parameters())
    width: int = module_at(view.block, view.family.down).weight.numel() // graph.d_model
    if parameters > 2.5 * width * graph.d_model:
        return GATED * width
    return width * (COMPOSED if any(map(_composed, view.block.modules())) else PLAIN)


def _composed(module: nn.Module) -> bool:
    """Whether this activation is made of several operations (GPT-2's GELU), each of which keeps its input."""
    if not type(module).__module__.startswith(("torch.nn.modules.activation", "transformers.activations")):
        return False
    with torch.enable_grad():
        last = module(torch.zeros(1, requires_grad=True)).grad_fn
    return last is not None and any(getattr(one, "next_functions", ()) for one, _ in last.next_functions)


def logits_bytes(adapter: Adapter, rows: int, softmax: bool = True) -> int:
    """Bytes of all copies of `rows` rows of logits."""
    vocabulary: int = adapter.model.get_output_embeddings().weight.shape[0]
    return rows * vocabulary * adapter.work.itemsize * (SOFTMAXES if softmax else LOGITS)


class MemoryPlan(NamedTuple):
    """How pairs will be scored."""

    batch_size: int
    chunk: int  # tokens contracted at a time; without gradients, tokens run at a time
    beside: int  # bytes beside the weights
    weights: int  # bytes
    by_block: bool  # gradients go back block by block


def plan_memory(
    adapter: Adapter,
    sizes: tuple[int, int, int],
    batch_size: int | None = None,
    softmax: bool = True,
    kept: Kept = DEFAULT,
) -> MemoryPlan:
    """Plan the scoring of pairs.

    Args:
        sizes: pairs, tokens of a prompt, positions at which the metric reads the logits (`sizes_of`).
        batch_size: as the user gave it; None lets the budget decide.
        softmax, kept: as for `estimate_memory`.
    """
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
    """Largest batch of masked runs, which hold autograd's activations and the output of every writer."""
    sizes = (pairs, length, reads)
    return min(batch_size_for(adapter, *sizes, by_block=False), batch_size_for(adapter, *sizes, streams=True))


def plan_learning(
    adapter: Adapter, sizes: tuple[int, int, int], per_step: int, batch_size: int | None = None, softmax: bool = True
) -> MemoryPlan:
    """`plan_memory` for learning masks, from `per_step` pairs a step.

    Adds the output of every writer, and the clean and empty runs: of all pairs if these fit `KEPT_RUNS`, else of one
    batch.
    """
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
    """Bytes of one `[d_model]` vector in the precision of circuitfind's own sums."""
    return int(adapter.graph.d_model * adapter.work.itemsize)


def run_bytes(adapter: Adapter, n_tokens: int, runs: float) -> int:
    """Bytes of `runs` captured runs."""
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

    Args:
        streams: the batch holds the output of every writer and no gradients, as exact circuits do.
        patterns, by_block: as for `Kept`.
    """
    kept = Kept(patterns=patterns, by_block=by_block)
    one = estimate_memory(adapter, 1, length, reads, kept=kept).activations
    if streams:
        one = length * adapter.graph.n_writers * row_bytes(adapter) + logits_bytes(adapter, reads)
    return max(1, min(examples, budget(adapter.device) // one))


def budget(device: torch.device) -> int:
    """Bytes that a batch may hold beside the weights: a third of an accelerator's free memory, at least `BUDGET`."""
    free = None if device.type == "cpu" else min(processes.of_each(lambda: _free(device)), key=lambda one: one or 0)
    return BUDGET if free is None else max(BUDGET, free // 3)


def obtainable(device: torch.device) -> int | None:
    """Free bytes of an accelerator, or the memory of the machine; None if not known."""
    if device.type != "cpu":
        return _free(device)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # some systems do not tell
        return None


def _free(device: torch.device) -> int | None:
    memory_info = getattr(torch.accelerator, "get_memory_info", None)  # newer than the oldest torch that works
    return None if memory_info is None else int(memory_info(device)[0])


def in_cache(device: torch.device) -> int:
    """Bytes of a slice that is worked on at a time."""
    return int(IN_CACHE.get(device.type, HELD) * room().part)


def token_slices(n_tokens: int, rows: int, adapter: Adapter, bytes_at_a_time: int) -> Iterator[slice]:
    """Slices of tokens whose `[rows, tokens, d_model]` fits `bytes_at_a_time`, and on a processor `RECYCLED`."""
    size = int(bytes_at_a_time * room().part) // (rows * row_bytes(adapter))
    if adapter.device.type == "cpu":
        size = min(size, max(FEWEST, RECYCLED // (rows * row_bytes(adapter))))
    size = max(1, size)
    return (slice(start, min(start + size, n_tokens)) for start in range(0, n_tokens, size))
