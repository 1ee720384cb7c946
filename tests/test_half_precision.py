"""Half-precision models: what would underflow or round away in float16 does not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from families import VOCAB, build

import circuitfind as cf


def unlikely(model: cf.Model) -> cf.Task:
    """A probability difference between tokens of next to no weight: its gradients lie below float16's range."""
    task = cf.task("ioi", model, n=8)
    return cf.Task(task.clean, task.corrupted, [" 17"] * 8, [" was"] * 8, metric="prob_diff")


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_gradients_of_tiny_probabilities_survive(dtype: str) -> None:
    wide, half = cf.load("tiny", dtype="float32"), cf.load("tiny", dtype=dtype)
    expected, found = (cf.attribute(model, unlikely(model), "eap").values for model in (wide, half))
    real = wide.graph.real
    assert 0 < np.abs(expected[real]).max() < 1e-4
    assert np.corrcoef(expected[real], found[real])[0, 1] > 0.97
    assert (found[real] == 0).mean() < 0.02


def test_logit_differences_are_not_rounded_to_the_models_precision() -> None:
    model = cf.load("tiny", dtype="bfloat16")
    batch = cf.task("ioi", model, n=4).on(model).batch
    logits = torch.randn(4, 1, model.vocabulary, generator=torch.Generator().manual_seed(0)).bfloat16() * 8
    exact = cf.METRICS["logit_diff"](logits.double(), batch)
    assert torch.equal(cf.METRICS["logit_diff"](logits, batch).double(), exact)


def _scaled(factor: float, dtype: str) -> tuple[cf.Model, cf.Task]:
    """A Llama with so much in all its blocks' projections."""
    hf = build("llama")
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if "proj" in name:
                weight.mul_(factor)
    ids = torch.randint(3, VOCAB, (2, 2, 6), generator=torch.Generator().manual_seed(0))
    task = cf.Task(clean=ids[0], corrupted=ids[1], answers=[5, 6], wrong_answers=[7, 8])
    return cf.wrap(hf.to(getattr(torch, dtype)), name="llama", check=False), task


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32"))
def test_gradients_that_underflow_are_warned_of(dtype: str) -> None:
    model, task = _scaled(2e-3, dtype)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        scores = cf.attribute(model, task, "eap").values[model.graph.real]
    found = [str(one.message) for one in told if "gradients underflow in float16: more than 2%" in str(one.message)]
    assert bool(found) == (dtype == "float16")
    assert ((scores == 0).mean() > 0.1) == bool(found)


def test_gradients_that_are_no_numbers_are_refused() -> None:
    model, task = _scaled(1e3, "float16")
    with pytest.raises(cf.ScoreError, match="gradients in float16 are NaN or infinite: load the model with dtype="):
        cf.attribute(model, task, "eap")
