"""Half-precision models: what would underflow or round away in float16 does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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
