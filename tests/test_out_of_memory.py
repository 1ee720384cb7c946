"""Every call that runs batches: it backs off where memory runs out, and else ends in one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from toys import id_task, wrapped

import circuitfind as cf
from circuitfind.models import backends


def circuit_of(model: cf.Model) -> cf.Circuit:
    rng = np.random.default_rng(0)
    return cf.Circuit(model.graph, model.graph.real & (rng.random(model.graph.real.shape) < 0.9))


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
    "find": lambda model, task: cf.find(model, task, top=3, random=2, prune=False).circuit.mask,
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
    with pytest.raises(
        cf.ModelError, match=r"^out of memory on cpu[^\n]*give shorter prompts or fewer[^\n]*$"
    ) as raised:
        CALLS[name](model, task)
    assert name in ("attention", "only") or "with a batch of 1 pair of 6 tokens" in str(raised.value)


LIMITED = """
import resource, warnings
import torch, transformers
import circuitfind as cf

torch.set_num_threads(1)
torch.manual_seed(0)
config = transformers.GPT2Config(n_layer=4, n_embd=256, n_head=8, vocab_size=1000, eos_token_id=1, bos_token_id=1)
model = cf.wrap(transformers.GPT2LMHeadModel(config).eval())
clean, corrupted = torch.randint(3, 1000, (2, 32, 64))
small, task = (cf.Task(clean[:n], corrupted[:n], [5] * n, [6] * n) for n in (1, 32))
cf.attribute(model, small, "eap")  # loads what is loaded late


def limit(megabytes):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20, -1))


def patched():
    return cf.patch(model, task, "heads", by_position=False, batch_size=32).effects


with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    limit(3)
    try:
        patched()
    except cf.ModelError as error:
        print(error)
    heard.clear()
    limit(60)
    found = patched()
assert "out of memory: trying again" in str(heard[0].message), heard
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert abs(found - patched()).max() < 1e-5
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_a_process_that_really_runs_out() -> None:
    run = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=300)
    assert run.stdout.startswith("out of memory on cpu with a batch of 1 pair of 64 tokens"), run.stdout + run.stderr
    assert run.stdout.count("\n") == 1
