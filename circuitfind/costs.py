"""The cost of a computation in forward and backward passes, seconds and memory, to compare methods.

1. `measuring()` counts everything inside its block. A forward pass counts its prompts times the fraction of the blocks
   that ran: 1 for a prompt through the whole model, 1/2 for a restart from the middle layer. A backward pass counts its
   prompts.
2. `seconds` is wall-clock time. CPU time is that of the whole process, other threads included. Passes are those of this
   thread.
3. Memory is the growth of the peak: of CUDA's allocated memory, or without CUDA of the process's resident set. It is
   None where the peak cannot be reset (outside Linux).
4. With several processes (`processes.py`), passes and CPU time are summed, wall-clock time is rank 0's, and memory is
   that of the process with the largest growth.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch

from circuitfind import processes


@dataclass
class Costs:
    """Counts so far. `forwards`, `backwards`: in prompts; `memory`: growth of the peak in bytes, None if unknown."""

    forwards: float = 0.0
    backwards: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory: int | None = None


_counter: ContextVar[Costs | None] = ContextVar("circuitfind_costs", default=None)


def count_forward(prompts: float, part: float = 1.0) -> None:
    """Count a forward pass of `prompts` (a fraction of one, if only part of its tokens ran) through this part of the
    blocks."""
    if (costs := _counter.get()) is not None:
        costs.forwards += prompts * part


def count_backward(prompts: float) -> None:
    """Count a backward pass of `prompts`."""
    if (costs := _counter.get()) is not None:
        costs.backwards += prompts


@contextmanager
def measuring() -> Iterator[Costs]:
    """Count the passes inside this context. Times and memory are filled in when it ends."""
    costs = Costs()
    before = _start_of_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    token = _counter.set(costs)
    try:
        yield costs
    finally:
        _counter.reset(token)
    costs.seconds, costs.cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    if before is not None:
        costs.memory = max(0, _peak() - before)
    every = processes.gathered(lambda: costs)
    costs.forwards, costs.backwards = sum(one.forwards for one in every), sum(one.backwards for one in every)
    costs.seconds, costs.cpu_seconds = every[0].seconds, sum(one.cpu_seconds for one in every)
    costs.memory = None if before is None else max(one.memory or 0 for one in every)


def _start_of_memory() -> int | None:
    """Reset the peak, and return the bytes held now; None if the peak cannot be reset."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(field: str) -> int:
    """Return a field of `/proc/self/status` in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
