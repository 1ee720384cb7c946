"""Calls in two threads: numbers, warnings, costs, progress and torch's settings are those of each call alone."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from families import build
from toys import id_task

import circuitfind as cf
from circuitfind.costs import measuring
from circuitfind.engine import capture
from circuitfind.progress import listening


class Notes:
    def __init__(self) -> None:
        self.labels: list[str] = []
        self.done = 0

    def add_task(self, description: str, *, total: float) -> int:
        self.labels.append(f"{description} {total}")
        return len(self.labels)

    def advance(self, task: int, steps: int) -> None:
        self.done += steps

    def remove_task(self, task: int) -> None:
        pass


def test_costs_and_progress_are_each_threads_own() -> None:
    model, sizes = cf.wrap(build("llama")), (2, 5)

    def run(n: int) -> tuple[float, float, list[str], int]:
        notes = Notes()
        with listening(notes), measuring() as costs:
            cf.attribute(model, id_task((6,) * n), "eap")
        return costs.forwards, costs.backwards, notes.labels, notes.done

    alone = [run(n) for n in sizes]
    assert alone[0] != alone[1]
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(run, sizes)) == alone


def test_memory_that_runs_out_in_one_thread_is_not_the_others(monkeypatch: Any) -> None:
    model, sizes, real = cf.wrap(build("llama")), [], capture.capture_corrupted

    def tight(adapter: Any, batch: Any, **keywords: Any) -> Any:
        sizes.append((threading.current_thread().name, len(batch)))
        if threading.current_thread().name == "tight" and len(batch) > 1:
            raise MemoryError
        return real(adapter, batch, **keywords)

    monkeypatch.setattr("circuitfind.attribution.gradients.capture_corrupted", tight)
    found: dict[str, np.ndarray] = {}

    def run() -> None:
        found[threading.current_thread().name] = cf.attribute(model, id_task((6,) * 4), "eap").values

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=run, name=name) for name in ("tight", "wide")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    np.testing.assert_allclose(found["tight"], found["wide"], rtol=1e-4, atol=1e-5)
    assert ("wide", 4) in sizes and ("wide", 2) not in sizes and ("tight", 1) in sizes
    assert [str(one.message) for one in heard if issubclass(one.category, UserWarning)] == [
        f"out of memory: trying again with batches of {size}" for size in (2, 1)
    ]


def test_one_model_wrapped_twice_runs_one_call_at_a_time() -> None:
    hf = build("llama")
    assert cf.wrap(hf).adapter.lock is cf.wrap(hf).adapter.lock is not cf.wrap(build("llama")).adapter.lock


def test_torchs_settings_come_back_when_calls_of_two_models_overlap() -> None:
    models, inside, leave = [cf.wrap(build("llama")) for _ in range(2)], threading.Event(), threading.Event()
    seen: list[torch.dtype] = []

    def slow(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        inside.set()
        leave.wait(20)
        seen.append(torch.get_default_dtype())
        return logits.sum(-1)

    torch.set_default_dtype(torch.float64)
    try:
        first = threading.Thread(target=lambda: cf.attribute(models[0], id_task((6,)), "eap", metric=slow))
        first.start()
        assert inside.wait(20)

        def quick(logits: torch.Tensor, batch: Any) -> torch.Tensor:
            leave.set()  # the first call ends while this one runs
            first.join(20)
            seen.append(torch.get_default_dtype())
            return logits.sum(-1)

        cf.attribute(models[1], id_task((6,)), "eap", metric=quick)
        assert set(seen) == {torch.float32} and torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
