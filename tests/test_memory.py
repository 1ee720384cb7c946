"""Batching: the same numbers whatever the batch size, and a batch that does not fit is halved."""

from __future__ import annotations

import errno
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import edge_scores, off, random_pairs
from toys import id_task, wrapped

import circuitfind as cf
from circuitfind.batch import Batch
from circuitfind.engine.batches import in_batches, within_memory
from circuitfind.engine.memory_plan import (
    JUDGING,
    PATCHES,
    Kept,
    batch_size_for,
    circuits_at_once,
    estimate_memory,
    plan_learning,
    plan_memory,
    room,
    row_bytes,
    run_bytes,
)
from circuitfind.errors import TaskError
from circuitfind.evaluation import faithfulness
from circuitfind.models.adapter import Adapter


def ids_of(batch: Batch, rows: slice) -> list[list[int]]:
    assert len(batch) == rows.stop - rows.start
    return batch.clean.ids.tolist()


@pytest.fixture()
def seven() -> Batch:
    return random_pairs((0,) * 7, (0,) * 7)


@pytest.mark.parametrize("size", [1, 2, 3, None])
def test_the_batch_size_does_not_matter(size: int | None, adapter_of: Callable[..., Adapter], pairs: Batch) -> None:
    adapter = adapter_of("gemma2")
    parts = [part for _, part in in_batches(adapter, pairs, lambda b, _: edge_scores(adapter, b), size, "scores")]
    assert len(parts) == {1: 3, 2: 2, 3: 1, None: 1}[size]
    assert off(sum(parts), edge_scores(adapter, pairs)) < 1e-5


def test_every_row_comes_once_and_in_order(adapter_of: Callable[..., Adapter], seven: Batch) -> None:
    adapter = adapter_of("gpt2")
    for size in (1, 3, 7, 50):
        parts = list(in_batches(adapter, seven, ids_of, size, "rows"))
        assert [row for _, part in parts for row in part] == seven.clean.ids.tolist()
        assert [rows.start for rows, _ in parts] == list(range(0, 7, size))


def test_a_batch_that_does_not_fit_is_halved(adapter_of: Callable[..., Adapter], seven: Batch) -> None:
    adapter, tried = adapter_of("gpt2"), []

    def function(batch: Batch, rows: slice) -> list[list[int]]:
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return ids_of(batch, rows)

    with pytest.warns(UserWarning, match="out of memory: trying again with batches of"):
        parts = list(in_batches(adapter, seven, function, 50, "rows"))
    assert [row for _, part in parts for row in part] == seven.clean.ids.tolist()
    assert tried[:2] == [7, 3] and max(tried[2:]) <= 2
    with within_memory(adapter), pytest.warns(UserWarning):
        for _ in range(2):  # the second loop of a call knows what did not fit in the first
            list(in_batches(adapter, seven, function, 7, "rows"))
    assert tried.count(7) == 2


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "2.00 GiB"),
        (MemoryError(), ""),
        (MemoryError("Unable to allocate 728. TiB for an array with shape (100000000000000,)"), "728. TiB"),
        (
            RuntimeError(
                "[enforce fail] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
                " 512 bytes. Error code 12"
            ),
            "512 bytes",
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."), "99 bytes"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB). Tried to allocate 1.5 GB"), "1.5 GB"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ""),
        (RuntimeError("could not create a memory object"), ""),
        (RuntimeError("std::bad_alloc"), ""),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ""),
    ],
)
def test_every_way_of_saying_it_ends_in_one_line(
    error: Exception, asked: str, adapter_of: Callable[..., Adapter], seven: Batch
) -> None:
    adapter, rooms = adapter_of("gpt2"), []

    def function(batch: Batch, rows: slice) -> None:
        rooms.append((len(batch), PATCHES.runs(adapter.device, 8), room().part))
        raise error

    with pytest.warns(UserWarning) as warned, pytest.raises(cf.ModelError) as raised, within_memory(adapter):
        list(in_batches(adapter, seven, function, 4, "rows"))
    assert rooms == [(4, 256, 1), (2, 128, 0.5), (1, 64, 0.25), (1, 1, 0)]  # runs of 8 tokens beside each other
    assert str(warned[-1].message) == "out of memory: trying again with one run at a time"
    text = str(raised.value)
    assert text.startswith("out of memory on cpu with a batch of 1 pair of 9 tokens (rows)")
    assert ("asked for" in text) == bool(asked) and asked in text and "shorter or fewer prompts" in text


def test_what_was_computed_is_let_go_of_before_the_next_try(adapter_of: Callable[..., Adapter], seven: Batch) -> None:
    """A traceback holds the frames of what failed, and they hold its tensors."""
    held: list[Any] = []

    def function(batch: Batch, rows: slice) -> int:
        assert all(reference() is None for reference in held)
        own = torch.zeros(3)
        held.append(weakref.ref(own))
        if len(batch) > 1:
            raise torch.OutOfMemoryError
        return 0

    with pytest.warns(UserWarning):
        assert len(list(in_batches(adapter_of("gpt2"), seven, function, 7, "rows"))) == 7


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OSError])
def test_other_errors_are_raised(error: type[Exception], adapter_of: Callable[..., Adapter], seven: Batch) -> None:
    def function(batch: Batch, rows: slice) -> None:
        raise error("no")

    with pytest.raises(error, match="no"), within_memory(adapter_of("gpt2")):
        list(in_batches(adapter_of("gpt2"), seven, function, 1, "rows"))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "at least 1, not 0"),
        (-3, "at least 1, not -3"),
        (1.5, "a whole number, not 1.5"),
        ("2", "a whole number, not '2'"),
    ],
)
def test_impossible_batch_sizes_are_refused(
    size: Any, message: str, adapter_of: Callable[..., Adapter], seven: Batch
) -> None:
    with pytest.raises(TaskError, match=f"batch_size must be {message}"):
        list(in_batches(adapter_of("gpt2"), seven, ids_of, size, "rows"))


def test_the_estimate_grows_with_the_batch(adapter_of: Callable[..., Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_of("gpt2")
    one, two = estimate_memory(adapter, 1, 16), estimate_memory(adapter, 2, 16)
    assert two.activations == 2 * one.activations > 0 and one.total == one.activations + one.contraction
    plain = estimate_memory(adapter, 1, 32).activations
    monkeypatch.setattr(adapter.config, "_attn_implementation_internal", "eager")
    assert estimate_memory(adapter, 1, 32).activations > plain  # patterns are kept, and quadratic in the length
    monkeypatch.undo()
    sizes = (3, 16, 1)
    scored, exact = plan_memory(adapter, sizes), plan_memory(adapter, sizes, kept=Kept(points=0))
    assert scored.batch_size == exact.batch_size == 3 and scored.chunk == 48 and exact.chunk == 2048
    assert (
        scored.beside == estimate_memory(adapter, 3, 16).total
        and exact.beside == estimate_memory(adapter, 3, 16, kept=Kept(points=0)).total
    )
    learned, step = plan_learning(adapter, (64, 16, 1), 4), plan_memory(adapter, (4, 16, 1), kept=Kept(1))
    written = 4 * 16 * adapter.graph.n_writers * row_bytes(adapter)
    assert learned.batch_size == 4 and learned.beside == step.beside + written + run_bytes(adapter, 64 * 16, runs=2)
    assert batch_size_for(adapter, 5, 16) == 5 and batch_size_for(adapter, 5, 10**7) == 1


def test_circuits_run_side_by_side_as_their_outputs_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are worth it, or fewer, where what their writers write would not fit; the numbers stay."""
    model, task = wrapped("gpt2"), id_task((6, 6))
    adapter, graph = model.adapter, model.graph
    held = 12 * graph.n_writers * row_bytes(adapter)
    assert [circuits_at_once(adapter, 12, graph.n_writers, free) for free in (0, held, 3 * held, 2**40)] == [
        1,
        1,
        3,
        85,
    ]
    rng, counts = np.random.default_rng(0), []
    masks = graph.real & (rng.random((7, *graph.real.shape)) < 0.8)
    run = faithfulness.run_circuits
    monkeypatch.setattr(faithfulness, "run_circuits", lambda *args: counts.append(len(args[1])) or run(*args))
    whole = faithfulness.Evaluator.of(model, task).run(masks).metric
    monkeypatch.setattr(faithfulness, "budget", lambda device: 2 * held)
    np.testing.assert_allclose(faithfulness.Evaluator.of(model, task).run(masks).metric, whole, atol=1e-5)
    assert counts == [7, 2, 2, 2, 1]
    judged = plan_memory(adapter, (64, 16, 1), kept=JUDGING).beside
    written = 1024 * graph.n_writers * row_bytes(adapter)
    assert judged > written + run_bytes(adapter, 64 * 16, runs=2)


def test_trimming_takes_only_columns_that_are_padding_everywhere() -> None:
    batch = random_pairs(left=(2, 3), right=(3, 1)).trimmed()
    assert batch.clean.ids.shape == batch.corrupted.mask.shape == (2, 8)  # the left stays: positions are indices
    assert batch.clean.mask[1, -1] and not batch.clean.mask[:, 0].any()
