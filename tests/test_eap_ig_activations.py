"""EAP-IG over activations against its definition: one component held constant, one gradient pass a point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from toys import FOUR, Twin, gradients_at, id_task, off_scores, wrapped

import circuitfind as cf
from circuitfind.attribution import eap
from circuitfind.batch import Inputs

CLOSE = 1e-5
AWKWARD = ["falcon", "opt", "bloom", "gpt_oss"]  # in-place addition, flattened MLPs, residuals inside, a tuple


def modules_of(twin: Twin) -> list[nn.Module]:
    """By layer: the attention's output projection, and what returns the MLP's output."""
    family = twin.literal.family
    return [block.get_submodule(name) for block in twin.literal.blocks for name in (family.o, family.mlp_out)]


def outputs(twin: Twin, inputs: Inputs) -> list[Tensor]:
    """What each of these modules returns."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: tuple, output: Tensor | tuple) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    modules = modules_of(twin)
    handles = [module.register_forward_hook(keep) for module in modules]
    order: list[int] = []
    handles += [m.register_forward_hook(lambda *_, at=at: order.append(at)) for at, m in enumerate(modules)]
    with torch.no_grad():
        twin.literal._plain_logits(inputs)
    for handle in handles:
        handle.remove()
    return [found[order.index(at)] for at in range(len(modules))]


@contextmanager
def holding(module: nn.Module, value: Tensor) -> Iterator[None]:
    """The module returns this constant instead."""

    def hold(_: nn.Module, __: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return (value.clone(), *output[1:]) if isinstance(output, tuple) else value.clone()

    handle = module.register_forward_hook(hold)
    try:
        yield
    finally:
        handle.remove()


def expected(twin: Twin, steps: int) -> Tensor:
    """`[writers, readers]`: the mean gradient of all passes, times clean minus corrupted."""
    clean, corrupted = (outputs(twin, side) for side in (twin.batch.clean, twin.batch.corrupted))
    passes = []
    low, high = twin.corrupted.writers["input"], twin.clean.writers["input"]
    for k in range(1, steps + 1):
        held = k / steps * high + (1 - k / steps) * low
        passes.append(gradients_at(twin.literal, twin.batch.clean, twin.metric, held))
        for module, whole, other in zip(modules_of(twin), clean, corrupted, strict=True):
            with holding(module, k / steps * whole + (1 - k / steps) * other):
                passes.append(gradients_at(twin.literal, twin.batch.clean, twin.metric, unused=True))
    change = {name: value - twin.corrupted.writers[name] for name, value in twin.clean.writers.items()}
    mean = {reader: sum(one[reader] for one in passes) / len(passes) for reader in passes[0]}
    return twin._matrix(lambda writer, reader: (change[writer] * mean[reader]).sum() / len(twin.batch))


@pytest.mark.parametrize("name", [*FOUR, *AWKWARD])
def test_activations_equal_autograd_with_one_component_held(name: str) -> None:
    model = wrapped(name)
    bound = id_task((6, 4)).on(model)
    matrix = expected(Twin(model, bound), steps=2)
    scores = cf.attribute(model, bound, "eap-ig-activations", steps=2)
    assert matrix.abs().max() > 1e-3 and off_scores(scores, matrix) < CLOSE
    for batch_size in (1, 2):
        scores = cf.attribute(model, bound, "eap-ig-activations", steps=2, batch_size=batch_size)
        assert off_scores(scores, matrix) < CLOSE


def test_metrics_with_a_reference_take_the_clean_run() -> None:
    model = wrapped("llama")
    bound = id_task((6, 5), metric="kl").on(model)
    scores = cf.attribute(model, bound, "eap-ig-activations", steps=2)
    assert off_scores(scores, expected(Twin(model, bound), steps=2)) < CLOSE


def test_one_step_holds_every_component_at_its_clean_value() -> None:
    # nothing changes in such a pass, but no gradient comes through: not plain EAP
    model = wrapped("gpt2")
    bound = id_task((6, 5)).on(model)
    scores = cf.attribute(model, bound, "eap-ig-activations", steps=1)
    assert off_scores(scores, expected(Twin(model, bound), steps=1)) < CLOSE
    assert off_scores(scores, torch.from_numpy(cf.attribute(model, bound, "eap").values)) > 0.01


def test_the_points_cover_every_component() -> None:
    points = eap.between_outputs("noising", 2, {"steps": 3})
    assert len(points) == 3 * 5 and sum(point.weight for point in points) == pytest.approx(1)
    components = [None, ("attn_out", 0), ("mlp_out", 0), ("attn_out", 1), ("mlp_out", 1)]
    assert [(p.component, p.alpha) for p in points] == [(c, k / 3) for c in components for k in (1, 2, 3)]


def test_the_record_has_its_steps_and_no_rule() -> None:
    record = cf.attribute(wrapped("gpt2"), id_task((5, 5)), "eap-ig-activations", steps=2).record
    assert record.is_effect and record.settings == {"level": "edge", "steps": 2, "notes": []}
