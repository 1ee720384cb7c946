"""The loop over batches of pairs, and what happens where one does not fit in memory.

1. `in_batches` works through the pairs in batches. Where one runs out of memory, the next are half as large, with a
   warning that says so; so are working sets and runs side by side. A single pair is tried once more, one run at a time.
   What a call has learned about its `Room` (`engine/memory_plan.py`) holds for all of its loops.
2. What does not fit even so leaves a public call as one line (`within_memory`).
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

# How a processor, an accelerator, numpy and the system say that there is no memory left.
OUT_OF_MEMORY = re.compile(
    r"out of memory|(can't|cannot|could not|unable to|failed to) (allocate|create a memory)|not enough memory"
    r"|bad_alloc|alloc_failed",
    re.IGNORECASE,
)
ASKED_FOR = re.compile(r"allocate ([\d.,]+ ?(?:bytes|[KMGT]i?B))")


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
        with within_room(here):
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
                return None if rows is None else _tried(adapter, batch, rows, function, size, label, here)

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


def _tried(
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
        with within_room(here):
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
