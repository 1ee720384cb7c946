"""What a computation cost: forward and backward passes, seconds, memory. For comparisons of methods.

1. `measuring()` counts everything inside. Each forward pass adds its prompts times the part of the blocks that ran: one
   prompt through the whole model is 1, a restart from the middle layer half. A backward pass adds its prompts.
2. Seconds are the wall's and the CPU time of this whole process, other threads included; passes are this thread's.
3. Memory is the growth of the process's peak resident set (or of the accelerator's allocated memory), where the system
   can tell: Linux resets its peak on request, elsewhere the figure is None.
4. Of several processes (`processes.py`) passes and CPU time are the sum, memory that of the largest.
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
    """Counted so far; `memory` in bytes beyond what was held at the start, None where it cannot be told."""

    forwards: float = 0.0
    backwards: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory: int | None = None


_counter: ContextVar[Costs | None] = ContextVar("circuitfind_costs", default=None)


def count_forward(prompts: float, part: float = 1.0) -> None:
    """Notes a forward pass of so many prompts, or parts of them, through this part of the blocks."""
    if (costs := _counter.get()) is not None:
        costs.forwards += prompts * part


def count_backward(prompts: float) -> None:
    """Notes a backward pass of so many prompts."""
    if (costs := _counter.get()) is not None:
        costs.backwards += prompts


@contextmanager
def measuring() -> Iterator[Costs]:
    """Counts what happens inside; the times and the memory are there when it ends."""
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
    """Bytes held now, with the peak reset to it; None where no peak can be reset."""
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
    """Bytes of a field of Linux's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
