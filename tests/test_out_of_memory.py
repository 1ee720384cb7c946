"""Every call that runs batches: it backs off where memory runs out, and else ends in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from toys import id_task, wrapped

import circuitfind as cf
from circuitfind.engine import batches, memory_plan
from circuitfind.models import backends


def circuit_of(model: cf.Model) -> cf.Circuit:
    rng = np.random.default_rng(0)
    return cf.Circuit(model.graph, model.graph.real & (rng.random(model.graph.real.shape) < 0.3))


def pairs_of(model: cf.Model) -> cf.Task:
    """Pairs that the model does: its own answers."""
    batch = id_task((6,) * 4).on(model).batch
    with torch.no_grad():
        right, wrong = (model.hf(side.ids).logits[:, -1].argmax(-1).tolist() for side in (batch.clean, batch.corrupted))
    return cf.Task(batch.clean.ids, batch.corrupted.ids, right, wrong)


def only(model: cf.Model, task: cf.Task) -> torch.Tensor:
    with cf.only(model, circuit_of(model), task) as held:
        return torch.cat([held.logits(), held.run(task)])


def few(model: cf.Model) -> dict[str, Any]:
    names = model.graph.names(model.graph.real)[-12:]
    return {"order": names, "metric": None}


CALLS: dict[str, Callable[[cf.Model, cf.Task], Any]] = {
    "eap": lambda model, task: cf.attribute(model, task, "eap").values,
    "zero": lambda model, task: cf.attribute(model, task, "eap", ablation="mean").values,
    "exact edges": lambda model, task: cf.verify(model, task, cf.attribute(model, task, "eap"), top=5).edges,
    "exact nodes": lambda model, task: cf.attribute(model, task, "exact", level="node").values,
    "atp*": lambda model, task: cf.attribute(model, task, "atp-star", level="node").values,
    "neurons": lambda model, task: cf.attribute(model, task, level="node", what="neurons", layers=1).per_example,
    "direct": lambda model, task: cf.direct_effects(model, task).per_example,
    "evaluate": lambda model, task: cf.evaluate(model, task, circuit_of(model)).metric,
    "curve": lambda model, task: cf.curve(model, task, cf.attribute(model, task), sizes=[50, 70]).per_example.metric,
    "patch": lambda model, task: cf.patch(model, task, "heads", by_position=True).per_example,
    "patterns": lambda model, task: cf.patch(model, task, "pattern", by_position=False).per_example,
    "path": lambda model, task: cf.path_patch(model, task, ["a0.h0", "a0.h1"], ["logits", "m1"]).per_example,
    "acdc": lambda model, task: cf.acdc(model, task, 0.01, **few(model)).mask,
    "learn": lambda model, task: [row.metric for row in cf.learn_masks(model, task, steps=2).history],
    "diagnose": lambda model, task: cf.diagnose(model, task).summary.clean,
    "completeness": lambda model, task: cf.completeness(model, task, circuit_of(model), knockouts=2).mean_gap,
    "minimality": lambda model, task: cf.minimality(model, task, circuit_of(model)).per_example,
    "hypotheses": lambda model, task: cf.hypotheses(model, task, circuit_of(model), references=3).record.metric,
    "stability": lambda model, task: cf.stability(model, task, method="eap").record.metric,
    "approximation": lambda model, task: cf.approximation(model, task).record.metric,
    "find": lambda model, task: cf.find(model, task, max_checks=3, random=2, prune=False).circuit.mask,
    "attention": lambda model, task: cf.attention(model, task, "a0.h1").pattern,
    "only": only,
}


def values(result: Any) -> np.ndarray:
    if isinstance(result, tuple):  # of rows
        return np.array([row.exact for row in result])
    return np.array([len(result)]) if isinstance(result, str) else np.asarray(result, dtype=float)


@pytest.mark.filterwarnings("ignore::circuitfind.errors.CircuitfindWarning")
@pytest.mark.parametrize("name", CALLS)
def test_calls_back_off_to_one_pair_and_one_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama")
    task = pairs_of(model)
    expected, rows, count = values(CALLS[name](model, task)), [], backends.count_forward

    def tight(prompts: int, part: float = 1.0) -> None:
        rows.append(prompts)
        if prompts > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 512 bytes.")
        count(prompts, part)

    monkeypatch.setattr(backends, "count_forward", tight)
    monkeypatch.setattr(batches.gc, "collect", lambda: 0)  # slow in a process that holds all these tests
    found = values(CALLS[name](model, task))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * (1 + np.nanmax(np.abs(expected))))
    assert rows.count(1) > rows.count(2) or name == "attention"


@pytest.mark.filterwarnings("ignore::circuitfind.errors.CircuitfindWarning")
@pytest.mark.parametrize("name", CALLS)
def test_calls_end_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama")
    task = pairs_of(model)

    def none(prompts: int, part: float = 1.0) -> None:
        raise MemoryError

    monkeypatch.setattr(backends, "count_forward", none)
    monkeypatch.setattr(batches.gc, "collect", lambda: 0)
    with pytest.raises(
        cf.ModelError, match=r"^out of memory on cpu[^\n]*use shorter or fewer prompts[^\n]*$"
    ) as raised:
        CALLS[name](model, task)
    assert name in ("attention", "only") or "with a batch of 1 pair of 6 tokens" in str(raised.value)


LONG = {
    "exact": lambda model, task: cf.attribute(model, task, "exact").values,
    "positions": lambda model, task: cf.patch(model, task, "resid").per_example,
}


@pytest.mark.filterwarnings("ignore::circuitfind.errors.CircuitfindWarning")
@pytest.mark.parametrize("name", LONG)
def test_what_was_measured_of_a_single_pair_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt is a batch of its own: where memory runs out in the middle, runs before it are not made again."""
    model, task = wrapped("llama"), id_task((24,))
    rows, fails, count = [], [0], backends.count_forward

    def once(prompts: int, part: float = 1.0) -> None:
        rows.append(prompts)
        if len(rows) == fails[0]:
            raise MemoryError
        count(prompts, part)

    monkeypatch.setattr(backends, "count_forward", once)
    monkeypatch.setattr(memory_plan, "PATCHES", memory_plan.SideBySide(2 * 24, 2 * 24))  # two runs side by side
    monkeypatch.setattr("circuitfind.engine.restart.PATCHES", memory_plan.PATCHES)
    expected, plain = LONG[name](model, task), sum(rows)
    assert len(rows) > 20
    fails[0] = len(rows) // 2
    rows.clear()
    np.testing.assert_allclose(LONG[name](model, task), expected, atol=1e-5 * np.abs(expected).max())
    assert rows[-5:] == [1] * 5 and sum(rows) <= plain + 6  # the failed pair of runs, and what the runs start from
