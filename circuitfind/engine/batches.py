"""The loop over batches of pairs, with smaller batches when memory runs out.

1. `in_batches` works through the pairs in batches. When memory runs out, it warns, halves the batch size and tries
   again; working sets and the number of runs side by side are halved, too. A single pair that does not fit is tried
   once more, one run at a time. All loops of a call share what was learned (`Room` in `engine/memory_plan.py`).
2. If even that does not fit, the public call ends with a one-line error (`within_memory`).
"""

from __future__ import annotations

import errno
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

import torch

from circuitfind import processes
from circuitfind.batch import Batch
from circuitfind.engine.memory_plan import RECYCLED, Room, batch_size_for, room, sizes_of, weight_bytes, within_room
from circuitfind.errors import ModelError, warn
from circuitfind.models.adapter import Adapter
from circuitfind.progress import progress
from circuitfind.setting import check_batch_size

R = TypeVar("R")

# Out-of-memory messages of the CPU allocator, accelerators, numpy and the operating system.
OUT_OF_MEMORY = re.compile(
    r"out of memory|(can't|cannot|could not|unable to|failed to) (allocate|create a memory)|not enough memory"
    r"|bad_alloc|alloc_failed",
    re.IGNORECASE,
)
ASKED_FOR = re.compile(r"allocate ([\d.,]+ ?(?:bytes|[KMGT]i?B))")


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out: on a device, in a library or in the operating system."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


@contextmanager
def within_memory(adapter: Adapter) -> Iterator[None]:
    """Inside this context, all loops share one `Room`, and running out of memory is a `ModelError` of one line.

    Raises:
        ModelError: memory ran out even with one pair and one run at a time, or outside any loop over pairs.
    """
    here = Room(room().part)
    if adapter.device.type == "cpu":
        # glibc keeps freed memory up to the largest block that it has seen freed (`memory_plan.RECYCLED`): show it one
        torch.empty(RECYCLED + 2**19, dtype=torch.uint8)
    try:
        with within_room(here):
            yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        asked = ASKED_FOR.search(str(error))
        tried = f" with {here.tried}" * bool(here.tried) + (f", where {asked[1]} were asked for" if asked else "")
        raise ModelError(
            f"out of memory on {adapter.device}{tried}; the model's weights take"
            f" {weight_bytes(adapter) / 2**20:,.0f} MiB: use shorter or fewer prompts, or load the model in half"
            " precision (dtype='bfloat16') or on a device with more memory"
        ) from None


def free_memory(device: torch.device) -> None:
    """Release memory that nothing refers to any more."""
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
    """Apply a function to the pairs batch by batch, and yield `(rows, result)` in the order of the pairs.

    Args:
        function: gets some of the pairs, and the slice `rows` that they occupy in the whole batch.
        batch_size: by default as many pairs as fit the memory budget.
        label: names the loop in the progress bar and in messages.
        division: how processes divide pairs and candidates. All members of a block then run the same rows, so these
            are yielded once for each member.

    When memory runs out, the batch size is halved and only the failed rows are run again. With several processes each
    runs a batch of its own (or none, if there are too few pairs), and every process gets all results.
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
                return None if rows is None else _attempt(adapter, batch, rows, function, size, label, here)

            parts = [part for part in processes.gathered(one, f"{label} {start}") if part is not None]
            here.part = min(part.room for part in parts)
            done = min((part.rows.start for part in parts if part.result is None), default=batches[-1].stop)
            for rows, result, _ in parts:
                if result is not None and rows.stop <= done:
                    yield rows, result[0]
            advance(done - start)
            start = done


class _Part(NamedTuple, Generic[R]):
    """One process's result for some rows, in a tuple (None if memory ran out), and its `Room.part` afterwards."""

    rows: slice
    result: tuple[R] | None
    room: float


def _attempt(
    adapter: Adapter,
    batch: Batch,
    rows: slice,
    function: Callable[[Batch, slice], R],
    size: int,
    label: str,
    here: Room,
) -> _Part[R]:
    """Apply the function to some rows; if memory runs out, reduce `here` and return no result."""
    part = batch.rows(rows).trimmed()
    many, length = f"{len(part)} pair{'s' * (len(part) > 1)}", part.clean.ids.shape[1]
    here.tried = f"a batch of {many} of {length} tokens ({label})"
    try:
        with within_room(here):
            result = function(part, rows)
        return _Part(rows, (result,), here.part)
    except Exception as error:
        if not out_of_memory(error) or here.part == 0:
            raise
    # outside the except block, because the error's traceback refers to what was computed
    here.part = here.part / 2 if size > 1 else 0.0
    free_memory(adapter.device)
    again = f"batches of {max(1, size // 2)}" if here.part else "one run at a time"
    warn(f"out of memory: trying again with {again}")
    return _Part(rows, None, here.part)
