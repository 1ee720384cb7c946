"""On an accelerator: the numbers of the processor, and no waiting inside a pass. Left out where there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import build
from test_devices import pairs_of
from torch import Tensor

import circuitfind as cf
from circuitfind.models import backends

pytestmark = pytest.mark.cuda
NAMES = ["gpt2", "llama", "gemma2"]


def near(one: Any, other: Any, tolerance: float = 1e-3) -> bool:
    one, other = np.asarray(one, float), np.asarray(other, float)
    return bool(np.nanmax(np.abs(one - other)) <= tolerance * np.nanmax(np.abs(other)))


@pytest.fixture(params=NAMES)
def both(request: pytest.FixtureRequest) -> tuple[cf.Model, cf.Model, cf.Task]:
    """A model on the processor and on the accelerator, and pairs that it tells apart."""
    name = request.param
    here = build(name)
    return cf.wrap(here, name=name), cf.wrap(build(name).to("cuda"), name=name), pairs_of(here)


@pytest.mark.parametrize("method", ["eap", "eap-ig-inputs", "relp", "gim", "exact"])
def test_scores_are_those_of_the_processor(both: tuple[cf.Model, cf.Model, cf.Task], method: str) -> None:
    here, there, pairs = both
    assert near(cf.attribute(there, pairs, method).values, cf.attribute(here, pairs, method).values)


def test_circuits_are_those_of_the_processor(both: tuple[cf.Model, cf.Model, cf.Task]) -> None:
    here, there, pairs = both
    scores = cf.attribute(here, pairs, "eap")
    for ablation in ("corrupted", "zero", "mean"):
        found, expected = (
            cf.evaluate(model, pairs, scores.top(40), ablation=ablation).metric for model in (there, here)
        )
        assert near(found, expected), ablation
    order = scores.top(30).edges
    found, expected = (cf.acdc(model, pairs, threshold=0.01, order=order) for model in (there, here))
    close = set(expected.facts.get("close_calls", ()))
    assert set(found.edges) ^ set(expected.edges) <= close
    found, expected = (cf.find(model, pairs, edges=20, random=0, max_checks=4) for model in (there, here))
    assert near(found.checks.evaluation.faithfulness, expected.checks.evaluation.faithfulness, 0.05)


def test_sweeps_are_those_of_the_processor(both: tuple[cf.Model, cf.Model, cf.Task]) -> None:
    here, there, pairs = both
    for kind in ("heads", "pattern", "resid"):
        assert near(cf.patch(there, pairs, kind).effects, cf.patch(here, pairs, kind).effects), kind


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_ranks_as_float32(both: tuple[cf.Model, cf.Model, cf.Task], dtype: str) -> None:
    here, there, pairs = both
    half = cf.wrap(there.hf.to(getattr(torch, dtype)), name=here.name)
    real = here.graph.real
    found, expected = (cf.attribute(model, pairs, "eap-ig-inputs").values[real] for model in (half, here))
    assert np.corrcoef(found, expected)[0, 1] > 0.97


def test_nothing_waits_for_the_device_inside_a_pass(
    both: tuple[cf.Model, cf.Model, cf.Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, there, pairs = both

    def strict(adapter: Any, visit: Any) -> Any:
        def visited(site: str, layer: int, value: Tensor) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return visit(site, layer, value)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return visited

    scores = cf.attribute(there, pairs, "eap")
    monkeypatch.setattr(backends, "_at_home", strict)
    cf.attribute(there, pairs, "eap")
    cf.evaluate(there, pairs, scores.top(40))
    cf.acdc(there, pairs, threshold=0.01, order=scores.top(10).edges)
    cf.find(there, pairs, edges=20, random=0, max_checks=2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_model_over_two_devices_gives_the_same_scores(tmp_path: Any) -> None:
    here = build("llama")
    here.save_pretrained(tmp_path)
    places: dict[str, Any] = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    there = cf.load(str(tmp_path), device_map={**places, "model.layers.0": 0, "model.layers.1": 1})
    pairs = pairs_of(here)
    assert near(cf.attribute(there, pairs, "eap").values, cf.attribute(cf.wrap(here), pairs, "eap").values)
