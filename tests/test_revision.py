"""Revised runs of a shrinking circuit equal running the shrunken circuit from scratch, whatever the order."""

from __future__ import annotations

import numpy as np
import pytest
from families import EVERY_FAMILY
from helpers import off

from circuitfind.engine.circuit_run import run_circuits
from circuitfind.engine.prepare import prepare
from circuitfind.engine.revision import CircuitState

ORDERS = ("backwards", "shuffled")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_trials_equal_circuits_run_from_scratch(name, order, adapter_of, pairs):
    """Removes a random third of the edges in groups, commits most of them, and compares every trial."""
    adapter = adapter_of(name)
    rng = np.random.default_rng(0)
    prepared = prepare(adapter, pairs)
    state = CircuitState(prepared)
    edges = np.argwhere(adapter.graph.real.T)[::-1, ::-1]
    edges = edges[rng.permutation(len(edges))] if order == "shuffled" else edges
    edges = edges[rng.random(len(edges)) < 0.33]
    worst, at = 0.0, 0
    while at < len(edges):
        count = int(rng.integers(1, 4))
        removals = [[(int(u), int(r))] for u, r in edges[at : at + count]]
        logits = state.attempt(removals)
        masks = np.repeat(state.mask[None], len(removals), axis=0)
        for trial, [(writer, reader)] in enumerate(removals):
            masks[trial:, writer, reader] = False
        worst = max(worst, off(logits, run_circuits(prepared, masks, sparse=True)))
        if rng.random() < 0.8:
            state.commit(int(rng.integers(len(removals))))
        at += count
    assert worst < 1e-5
    assert 0 < state.mask.sum() < adapter.graph.n_edges


def test_only_what_a_removal_can_reach_is_affected(adapter_of, pairs):
    adapter = adapter_of("gpt2")
    graph, state = adapter.graph, CircuitState(prepare(adapter, pairs))
    last_mlp = graph.readers(1, "mlp").start
    readers, writers = state.affected([last_mlp])
    assert np.flatnonzero(readers).tolist() == [last_mlp, graph.n_readers - 1]
    assert np.flatnonzero(writers).tolist() == [graph.mlp(1)]


def test_a_reader_cut_off_from_the_logits_is_known_to_be(adapter_of, pairs):
    adapter = adapter_of("gpt2")
    graph, state = adapter.graph, CircuitState(prepare(adapter, pairs))
    last_mlp, logits = graph.readers(1, "mlp").start, graph.n_readers - 1
    assert state.reaches_logits([last_mlp])
    state.attempt([[(graph.mlp(1), logits)]])
    state.commit(0)
    assert not state.reaches_logits([last_mlp])
