"""What trains the testbed's models runs the edges that circuitfind means: its masked run is the engine's."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import circuitfind as cf
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.testbed.trained import load_trained

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import edges


@pytest.mark.parametrize(("circuit", "form"), [("induction", "gpt2"), ("greater-than", "llama")])
def test_masked_runs_are_those_of_the_engine(circuit: str, form: str) -> None:
    hf = load_trained(circuit, form)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in hf.parameters():  # biases, too
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    model = cf.wrap(hf)
    clean, corrupted = torch.randint(11, (2, 3, 5), generator=generator)
    task = cf.Task(clean=clean, corrupted=corrupted, answers=[1, 2, 3], wrong_answers=[4, 5, 6])
    mask = model.graph.real & (np.random.default_rng(0).random(model.graph.real.shape) < 0.6)
    wanted = Evaluator.of(model, task).metrics(iter([mask]), 1, "masks")[0]
    with torch.no_grad():
        other = edges.run(hf, model.graph, corrupted)[1]
        logits, _ = edges.run(hf, model.graph, clean, torch.from_numpy(mask).float().expand(3, -1, -1), other)
        assert torch.allclose(edges.run(hf, model.graph, clean)[0], hf(clean).logits[:, -1], atol=1e-5)
    given = logits[range(3), [1, 2, 3]] - logits[range(3), [4, 5, 6]]
    assert np.allclose(given, wanted, atol=1e-4)
