"""Gradients block by block are those of one pass, to the bit, and are taken where one pass would not fit."""

from __future__ import annotations

from itertools import chain
from typing import Any

import families
import numpy as np
import pytest
import torch
from families import build, swept
from helpers import random_pairs, surprise
from torch import Tensor, nn
from toys import id_task, wrapped

import circuitfind as cf
from circuitfind.attribution import gradients
from circuitfind.costs import measuring
from circuitfind.engine import memory_plan, reader_gradients
from circuitfind.engine.capture import READ, WRITTEN, capture
from circuitfind.engine.memory_plan import (
    Kept,
    batch_size_for,
    estimate_memory,
    goes_by_block,
    learning_size,
    plan_memory,
)
from circuitfind.engine.reader_gradients import Gradients, capture_gradients


def of(found: Gradients) -> list[Tensor]:
    run, at, values = found
    return [*chain(*at.qkv), *at.mlp, at.final, values, run.logits, *run.resid, *run.middle, *run.heads, *run.mlps]


@pytest.fixture(autouse=True)
def _memory_of_unknown_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that `BUDGET` alone decides."""
    monkeypatch.setattr(memory_plan, "obtainable", lambda device: None)


def by_block(monkeypatch: pytest.MonkeyPatch, always: bool = True) -> None:
    monkeypatch.setattr(reader_gradients, "goes_by_block", lambda *_: always)


@pytest.mark.parametrize("name", swept(families.EVERY_FAMILY))
def test_block_by_block_is_one_pass_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, pairs = cf.wrap(build(name), name=name, check=False).adapter, random_pairs((0, 2), (0, 1))
    expected = capture_gradients(adapter, pairs.clean, surprise)
    by_block(monkeypatch)
    found = capture_gradients(adapter, pairs.clean, surprise)
    assert adapter.by_block
    assert all(torch.equal(one, other) for one, other in zip(of(found), of(expected), strict=True))


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("method", ["eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted", "relp", "gim"])
def test_every_method_of_points(method: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = wrapped("llama"), id_task((9, 6))
    expected = cf.attribute(model, task, method, direction=direction).values
    by_block(monkeypatch)
    model.adapter.by_block = True
    monkeypatch.setattr(reader_gradients._Pass, "at_once", None)
    np.testing.assert_array_equal(cf.attribute(model, task, method, direction=direction).values, expected)


@pytest.mark.parametrize("more", [{"ungrouped": True}, {"level": "node"}, {"level": "node", "what": "k"}])
def test_other_scores(more: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = wrapped("gemma3"), id_task((9, 6))

    def values() -> np.ndarray:
        found = cf.attribute(model, task, "atp" if "level" in more else "eap", **more)
        return found.effects if "what" in more else found.values

    expected = values()
    by_block(monkeypatch)
    np.testing.assert_array_equal(values(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = cf.wrap(build("llama", dtype=dtype), None, check=False).adapter
    inputs = random_pairs((0, 2), (0, 1)).clean
    expected = capture_gradients(adapter, inputs, surprise)
    by_block(monkeypatch)
    assert all(map(torch.equal, of(capture_gradients(adapter, inputs, surprise)), of(expected)))


def test_it_costs_one_more_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = wrapped("llama"), id_task((9,) * 3)
    by_block(monkeypatch)
    cf.attribute(model, task, "eap")  # the first time, a few tokens are gone back both ways
    with measuring() as costs:
        cf.attribute(model, task, "eap")
    assert (costs.forwards, costs.backwards) == (pytest.approx(9), 3)  # both prompts, and the clean one again


def shared_values(model: nn.Module) -> None:
    """Lets the last layer add an earlier one's values, as models do whose layers share keys and values."""
    seen: list[Tensor] = []
    first, last = model.model.layers
    noted, own = type(first.self_attn.v_proj).forward, type(last.self_attn).forward

    def note(module: nn.Module, x: Tensor) -> Tensor:
        seen.append(noted(module, x))
        return seen[-1]

    def more(module: nn.Module, *args: Any, **keywords: Any) -> tuple[Tensor, ...]:
        output, *others = own(module, *args, **keywords)
        return (output + seen[-1].sum(-1, True), *others)

    for module, forward in ((first.self_attn.v_proj, note), (last.self_attn, more)):
        module.__class__ = type("Shared", (type(module),), {"forward": forward})


def test_blocks_that_meet_outside_the_stream_go_back_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that did not when it was last called, too."""
    model, task = build("llama"), id_task((9,))
    loaded = cf.wrap(model, None, check=False)
    monkeypatch.setattr(memory_plan, "BUDGET", 1)
    cf.attribute(loaded, task, "eap")
    assert loaded.adapter.by_block
    other = build("llama")
    shared_values(other)
    model.model.layers = other.model.layers
    found = cf.attribute(loaded, task, "eap").values
    assert loaded.adapter.by_block is False and not goes_by_block(loaded.adapter, 9, 1)
    monkeypatch.undo()
    np.testing.assert_array_equal(found, cf.attribute(loaded, task, "eap").values)


def test_under_hooks_gradients_go_back_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a hook does at late tokens alone, no few tokens tell."""
    model, task, seen = build("llama"), id_task((40,)), []
    loaded = cf.wrap(model, None, check=False)
    first, last = model.model.layers

    def add(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        late = torch.arange(output[0].shape[1]) >= 35
        return (output[0] + seen[-1].sum(-1, True) * late[:, None], *output[1:])

    first.self_attn.v_proj.register_forward_hook(lambda _, __, output: seen.append(output))
    last.self_attn.register_forward_hook(add)
    expected = cf.attribute(loaded, task, "eap").values
    monkeypatch.setattr(memory_plan, "BUDGET", 1)
    np.testing.assert_array_equal(cf.attribute(loaded, task, "eap").values, expected)


def test_where_a_single_pair_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama")
    adapter, sizes = model.adapter, (2, 200, 1)
    one = estimate_memory(adapter, 1, 200).activations
    assert not goes_by_block(adapter, 200, 1) and not plan_memory(adapter, sizes).by_block
    monkeypatch.setattr(memory_plan, "BUDGET", one - 1)
    assert goes_by_block(adapter, 200, 1) and plan_memory(adapter, sizes).by_block
    assert not plan_memory(adapter, sizes, kept=Kept(points=0)).by_block
    with_by_block = estimate_memory(adapter, 1, 200).activations
    monkeypatch.setattr(memory_plan, "BUDGET", one)
    assert with_by_block != estimate_memory(adapter, 1, 200).activations == one  # less in a model of many layers
    with memory_plan.within_room(memory_plan.Room(0.0)):  # memory ran out with one pair: it is tried block by block
        assert goes_by_block(adapter, 200, 1)


def test_a_single_pair_may_take_an_eighth_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = wrapped("llama").adapter
    one = estimate_memory(adapter, 1, 200).activations
    monkeypatch.setattr(memory_plan, "BUDGET", 1)
    for share, expected in ((one, False), (one - 1, True)):
        monkeypatch.setattr(memory_plan, "obtainable", lambda device, share=share: 8 * share)
        assert goes_by_block(adapter, 200, 1) is plan_memory(adapter, (2, 200, 1)).by_block is expected


def test_gradients_of_masks_are_planned_for_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model of many layers, of which more pairs fit block by block."""
    adapter = wrapped("llama").adapter
    monkeypatch.setattr(memory_plan, "_of_gradients", lambda *sizes, by_block: 1 if by_block else memory_plan.BUDGET)
    assert batch_size_for(adapter, 99, 200) > learning_size(adapter, 99, 200) == 1


def test_patterns_that_rules_keep_are_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama")
    monkeypatch.setattr(memory_plan, "BUDGET", 8 * estimate_memory(model.adapter, 1, 9).activations)
    ran: list[int] = []
    count = gradients.capture_gradients
    monkeypatch.setattr(gradients, "capture_gradients", lambda *a: ran.append(len(a[1].ids)) or count(*a))
    for method in ("relp", "gim"):
        cf.attribute(model, id_task((9,) * 8), method)
    assert ran[0] == 8 > ran[1] == batch_size_for(model.adapter, 8, 9, patterns=2)


def test_gradients_wait_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = wrapped("gemma2"), id_task((9, 6))
    expected = cf.attribute(model, task, "eap-ig-inputs").values
    monkeypatch.setattr(memory_plan, "WAITING", 1)
    assert memory_plan.points_at_once(model.adapter, 18) == 1
    found = cf.attribute(model, task, "eap-ig-inputs").values
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max(), rtol=0)


def test_a_run_keeps_what_is_asked_for() -> None:
    adapter, inputs = wrapped("gemma2").adapter, random_pairs((0,), (0,)).clean
    whole, part = capture(adapter, inputs), capture(adapter, inputs, keep=WRITTEN)
    layers = adapter.graph.n_layers
    assert [len(part.resid), len(part.heads), len(part.mlps)] == [1, layers, layers]
    assert not (part.middle or part.qkv or part.mlp_in or part.attn_out or part.mlp_out)
    assert all(map(torch.equal, part.writers.parts, whole.writers.parts))
    run = capture_gradients(adapter, inputs, surprise, keep=set()).run
    assert (len(run.resid), len(run.middle), len(run.heads)) == (layers + 1, layers, 0) and {"resid", "middle"} == READ


def test_differences_take_both_runs_apart() -> None:
    adapter, pairs = wrapped("gemma2").adapter, random_pairs((0,), (0,))
    clean, corrupted = (capture(adapter, side).writers for side in (pairs.clean, pairs.corrupted))
    expected = clean.minus(corrupted)
    assert all(map(torch.equal, clean.less(corrupted).parts, expected.parts))
    assert not (clean.heads or clean.mlps or corrupted.heads or corrupted.mlps)
