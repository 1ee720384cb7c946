"""What computations are said to cost."""

import numpy as np
import pytest
import torch

import circuitfind as cf
from circuitfind.attribution.exact import exact_effects
from circuitfind.costs import Costs, count_backward, count_forward, measuring
from circuitfind.engine import prefix
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.memory_plan import SideBySide


@pytest.fixture(scope="module")
def tiny():
    return cf.load("tiny")


@pytest.fixture(autouse=True)
def whole_prompts(monkeypatch):
    """What is saved where prompts begin alike is counted in `test_prefix.py`."""
    monkeypatch.setattr(prefix, "SHARED", SideBySide(10**9, 10**9))


def test_nothing_is_counted_outside():
    count_forward(3)
    with measuring() as costs:
        pass
    assert (costs.forwards, costs.backwards) == (0, 0)


def test_an_inner_measurement_does_not_add_to_the_outer_one():
    with measuring() as outer:
        count_forward(2)
        with measuring() as inner:
            count_forward(5, 0.5)
            count_backward(1)
    assert (outer.forwards, outer.backwards) == (2, 0)
    assert (inner.forwards, inner.backwards) == (2.5, 1)


def test_edge_attribution_patching_is_two_forwards_and_one_backward(tiny):
    bound = cf.task("ioi", tiny, n=6).on(tiny)
    with measuring() as costs:
        cf.attribute(tiny, bound, "eap")
    assert (costs.forwards, costs.backwards) == (12, 6)
    with measuring() as costs:
        cf.attribute(tiny, bound, "eap-ig-inputs", steps=3)
    assert costs.backwards == 18


def test_learned_masks_take_one_forward_and_one_backward_a_step_and_pair(tiny):
    bound = cf.task("ioi", tiny, n=6).on(tiny)
    costs = []
    for steps in (1, 4):
        with measuring() as counted:
            cf.learn_masks(tiny, bound, "ugs", regularisation=0.1, steps=steps)
        costs.append(counted)
    assert [one.backwards for one in costs] == [6, 24]
    assert costs[1].forwards - costs[0].forwards == 18


def test_a_restart_counts_only_the_blocks_that_run(tiny):
    bound = cf.task("ioi", tiny, n=4).on(tiny)
    graph = tiny.graph
    experiment = Experiment.of(tiny, bound)
    for layer in range(graph.n_layers):
        mask = np.zeros_like(graph.real)
        mask[0, graph.readers(layer, "q").start] = True
        with measuring() as costs:
            exact_effects(experiment, mask)
        assert costs.forwards == 4 * (2 + 1 - layer / graph.n_layers)


def test_memory_that_is_taken_shows():
    with measuring() as costs:
        torch.ones(32 * 2**20).sum()
    assert isinstance(costs, Costs)
    if costs.memory is not None:  # the system can tell
        assert 96 * 2**20 <= costs.memory < 256 * 2**20  # up to 32 MiB of pages freed before may be taken again
    assert costs.cpu_seconds > 0 and costs.seconds > 0
