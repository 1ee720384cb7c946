"""Tokens before the first difference of a batch are run once, and every score stays what it was."""

from __future__ import annotations

import families
import numpy as np
import pytest
import torch

import circuitfind as cf
from circuitfind.costs import measuring
from circuitfind.engine import prefix
from circuitfind.engine.memory_plan import SideBySide
from circuitfind.models.load import Model

FROM, LENGTH, PAIRS = 7, 12, 8
NEVER = SideBySide(10**9, 10**9)
SHARP = ("opt", "gpt_bigcode-multihead")  # in float32, rounding of single scores reaches 1e-5


def alike(padded: bool = False, positions: list[int] | None = None, end: int = FROM + 2) -> cf.Task:
    """Random pairs that differ at the positions from FROM to `end`."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(3, 120, (PAIRS, LENGTH), generator=generator)
    corrupted = clean.clone()
    corrupted[:, FROM:end] = torch.randint(3, 120, (PAIRS, end - FROM), generator=generator)
    mask = torch.ones_like(clean)
    if padded:
        mask[0, -2:] = 0
    more = {} if positions is None else {"positions": positions}
    return cf.Task(clean, corrupted, [5] * PAIRS, [6] * PAIRS, attention_mask=mask, **more)


LATENTS = ["axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "mistral4", "youtu", "youtu-direct"]
WHOLE = {*LATENTS, *families.HYBRIDS}  # keys are made anew of what is kept; a mixer keeps more than keys and values


def forwards(model: Model, task: cf.Task) -> tuple[np.ndarray, float]:
    with measuring() as costs:
        values = cf.attribute(model, task, "eap").values
    return values, costs.forwards


@pytest.mark.parametrize("name", families.swept(families.EVERY_FAMILY))
def test_scores_are_those_of_whole_prompts(name: str, monkeypatch: pytest.MonkeyPatch, padded: bool = True) -> None:
    precision = torch.float64 if name in SHARP else torch.float32
    model, task = cf.wrap(families.build(name).to(precision), name=name), alike(padded)
    forwards(model, task)  # the first time, one pair is run both ways
    found, fewer = forwards(model, task)
    monkeypatch.setattr(prefix, "SHARED", NEVER)
    expected, passes = forwards(model, task)
    assert passes == 2 * PAIRS  # the corrupted and the clean prompts
    if name in WHOLE:
        assert (model.adapter.divided, fewer) == (-1, passes)
    else:
        assert model.adapter.divided == LENGTH
        assert fewer == pytest.approx(PAIRS * (2 * (LENGTH - FROM) + FROM) / LENGTH)
    np.testing.assert_allclose(found, expected, atol=5e-6 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_scores_of_prompts_of_one_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test_scores_are_those_of_whole_prompts(name, monkeypatch, padded=False)


@pytest.mark.parametrize("method", ["eap-ig-inputs", "relp", "clean-corrupted", "eap-ig-activations"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_every_method_of_points(method: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = cf.wrap(families.build("llama")), alike()
    found = cf.attribute(model, task, method, direction=direction).values
    assert model.adapter.divided == LENGTH
    monkeypatch.setattr(prefix, "SHARED", NEVER)
    expected = cf.attribute(model, task, method, direction=direction).values
    np.testing.assert_allclose(found, expected, atol=5e-6 * np.abs(expected).max(), rtol=0)


def test_whole_prompts_where_what_is_ablated_is_not_the_corrupted_run() -> None:
    model = cf.wrap(families.build("llama"))
    with measuring() as costs:
        cf.attribute(model, alike(), "eap", ablation="zero")
    assert costs.forwards == PAIRS
    assert model.adapter.divided == 0


def test_divided_no_later_than_what_is_read() -> None:
    task = alike(positions=[3] * PAIRS).on(cf.wrap(families.build("llama")))
    assert prefix._first_difference(task.batch) == 3


def test_a_model_that_forgets_its_cache_runs_whole_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = families.build("llama")
    forward = type(hf).forward

    def forgets(self: torch.nn.Module, *args: object, past_key_values: object = None, **keywords: object) -> object:
        return forward(self, *args, **keywords)

    monkeypatch.setattr(type(hf), "forward", forgets)
    model = cf.wrap(hf)
    forwards(model, alike())
    assert model.adapter.divided == -1
    assert forwards(model, alike())[1] == 2 * PAIRS


def test_a_longer_prompt_is_compared_again() -> None:
    model = cf.wrap(families.build("llama"))
    batch = alike().on(model).batch
    assert prefix._divides(model.adapter, batch.clean.positions(slice(0, 9)), FROM)
    assert model.adapter.divided == 9
    assert prefix._divides(model.adapter, batch.clean, FROM)
    assert model.adapter.divided == LENGTH


def test_whole_prompts_under_the_users_hooks() -> None:
    hf = families.build("llama")
    handle = hf.model.layers[1].register_forward_hook(lambda *_: None)
    model = cf.wrap(hf)
    forwards(model, alike())
    assert model.adapter.divided == 0
    handle.remove()
    forwards(model, alike())
    assert model.adapter.divided == LENGTH


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "falcon"])
def test_exact_effects_nodes_and_circuits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = cf.wrap(families.build(name)), alike(end=LENGTH)

    def everything() -> list[np.ndarray]:
        scores = cf.attribute(model, task, "eap-ig-inputs", metric="kl")
        circuits = [scores.top(n, by="absolute") for n in (3, 20)]
        evaluated = [cf.evaluate(model, task, circuit, metric="kl").metric for circuit in circuits]
        edges = cf.attribute(model, task, "exact").values
        nodes = [cf.attribute(model, task, method, level="node").values for method in ("atp", "exact")]
        by_position = cf.attribute(model, task, "exact", level="node", by_position=True).values
        kept = cf.acdc(model, task, threshold=1e-3, metric="kl").mask
        return [*map(np.asarray, evaluated), edges, *nodes, by_position, kept]

    found = everything()
    assert model.adapter.divided == LENGTH
    monkeypatch.setattr(prefix, "SHARED", NEVER)
    for one, other in zip(found, everything(), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max() + 1e-6, rtol=0)
