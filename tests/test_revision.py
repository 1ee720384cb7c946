"""Revised runs of a shrinking circuit equal running the shrunken circuit from scratch, whatever the order."""

from __future__ import annotations

import numpy as np
import pytest
from families import STRUCTURES
from helpers import means_of, off

from circuitfind.engine import revision
from circuitfind.engine.circuit_run import run_circuits
from circuitfind.engine.prepare import prepare
from circuitfind.engine.reach import Reach
from circuitfind.engine.revision import CircuitState
from circuitfind.graph import Graph

CASES = [(name, "shuffled") for name in STRUCTURES] + [
    (name, "backwards") for name in ("gpt2", "llama", "bloom", "gemma2")
]


@pytest.mark.parametrize(("name", "order"), CASES)
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
    assert state.reach.useful[last_mlp]
    state.attempt([[(graph.mlp(1), logits)]])
    state.commit(0)
    assert not state.reach.useful[last_mlp]


def scrap(graph: Graph, rng: np.random.Generator, part: float) -> np.ndarray:
    """A random part of the edges."""
    return graph.real & (rng.random(graph.real.shape) < part)


@pytest.mark.parametrize("ablation", ("corrupted", "zero"))
@pytest.mark.parametrize("name", ("gpt2", "llama", "gpt_neox", "gemma2"))
def test_a_state_of_any_mask_equals_that_circuit(name, ablation, adapter_of, pairs):
    """Computed from the mask, then pruned further: every trial equals the circuit run from scratch."""
    adapter, rng = adapter_of(name), np.random.default_rng(0)
    prepared = prepare(adapter, pairs, ablation)
    for part in (0.9, 0.3, 0.1):
        state = CircuitState(prepared, scrap(adapter.graph, rng, part))
        edges = rng.permutation(np.argwhere(state.mask))[:20].tolist()
        for first, second in zip(edges[::2], edges[1::2], strict=False):
            removals = [[(first[0], first[1])], [(second[0], second[1])]]
            masks = np.repeat(state.mask[None], 2, axis=0)
            masks[:, first[0], first[1]] = masks[1, second[0], second[1]] = False
            assert off(state.attempt(removals), run_circuits(prepared, masks, sparse=True)) < 1e-5
            state.commit(int(rng.integers(2)))


@pytest.mark.parametrize("ablation", ("corrupted", "zero"))
@pytest.mark.parametrize("name", ("gpt2", "llama", "gpt_neox", "gemma2"))
def test_a_reader_of_all_edges_reads_what_cut_off_writers_carry(name, ablation, adapter_of, pairs):
    """Layer 0's MLP reads nothing, and all edges from it stay."""
    adapter = adapter_of(name)
    prepared, graph = prepare(adapter, pairs, ablation), adapter.graph
    mask = graph.real.copy()
    mask[:, graph.readers(0, "mlp")] = False
    edge = (graph.mlp(1), graph.n_readers - 1)
    masks = np.stack([mask, mask])
    masks[1][edge] = False
    expected = run_circuits(prepared, masks, sparse=True)
    for stream_bytes in (0, revision.STREAMS):
        assert off(CircuitState(prepared, mask, stream_bytes).attempt([[], [edge]]), expected) < 1e-5


@pytest.mark.parametrize("ablation", ("zero", "mean"))
@pytest.mark.parametrize("name", ("gpt2", "gpt_neox"))
def test_readers_of_many_edges_are_revised_under_every_ablation(name, ablation, adapter_of, pairs, monkeypatch):
    """Small models have no reader with more edges than a few: here two are a few."""
    monkeypatch.setattr(revision, "FEW", 2)
    adapter, rng = adapter_of(name), np.random.default_rng(0)
    prepared = prepare(adapter, pairs, ablation, means_of(adapter, pairs, ablation))
    state = CircuitState(prepared, scrap(adapter.graph, rng, 0.9))
    for edge in rng.permutation(np.argwhere(state.mask))[:25].tolist():
        masks = state.mask[None].copy()
        masks[0, edge[0], edge[1]] = False
        assert off(state.attempt([[(edge[0], edge[1])]]), run_circuits(prepared, masks, sparse=True)) < 1e-5
        state.commit(0)


def test_streams_over_budget_are_computed_again(adapter_of, pairs):
    adapter = adapter_of("llama")
    prepared, graph = prepare(adapter, pairs), adapter.graph
    small, large = CircuitState(prepared, stream_bytes=0), CircuitState(prepared)
    edges = [(int(u), int(r)) for r, u in np.argwhere(graph.real.T)[::-1]]
    for edge in edges[::5]:
        assert off(small.attempt([[edge]]), large.attempt([[edge]])) < 1e-5
        for state in (small, large):
            state.commit(0)
    assert len(small._streams) <= graph.readers_per_layer < len(large._streams)


def coupled_serves(graph: Graph, coupled: bool) -> np.ndarray:
    serves = graph.serves.copy()
    for layer in range(graph.n_layers if coupled else 0):
        serves[graph.readers(layer, "qkv"), graph.heads(layer)] = True
    return serves


@pytest.mark.parametrize("coupled", (False, True))
@pytest.mark.parametrize("graph", (Graph(3, 4, 4, 8), Graph(3, 4, 2, 8), Graph(2, 3, 1, 8, parallel=True)), ids=str)
def test_reach_equals_walking_all_paths(graph, coupled):
    """After each of many removals: what a walk from `input`, and one back from `logits`, comes to."""
    rng = np.random.default_rng(0)
    serves = coupled_serves(graph, coupled)
    reach = Reach(graph, scrap(graph, rng, 0.5), coupled)
    lost = []
    for writer, reader in rng.permutation(np.argwhere(reach.mask)).tolist():
        had = (reach.mask.sum(axis=0) @ serves.astype(int)) > 0
        left = reach.remove(writer, reader)
        inputs = reach.mask.sum(axis=0) @ serves.astype(int)
        assert sorted(left) == np.flatnonzero(had & (inputs == 0)).tolist()
        assert np.array_equal(reach.inputs, inputs)
        leads = (reach.mask.astype(int) @ serves.astype(int)) > 0  # writer -> node
        reached, useful = np.zeros(graph.n_nodes, dtype=bool), np.zeros(graph.n_nodes, dtype=bool)
        reached[0] = useful[-1] = True
        for _ in range(graph.n_nodes):
            reached |= leads[reached[:-1]].any(axis=0)
            useful[:-1] |= leads[:, useful].any(axis=1)
        assert np.array_equal(reach.reached, reached)
        assert np.array_equal(reach.useful, serves[:, useful].any(axis=1))
        lost += left
    assert not reach.mask.any() and len(lost) > graph.n_layers


def test_the_first_edge_that_leaves_a_node_without_inputs_is_known_beforehand():
    graph = Graph(2, 2, 1, 8)
    reach = Reach(graph, np.zeros_like(graph.real))
    edges = [graph.edge(name) for name in ("input->a0.h0<q>", "input->a0.kv0<k>", "input->a0.h1<q>", "input->m0")]
    for edge in edges:
        reach.mask[edge] = True
    reach = Reach(graph, reach.mask)
    assert reach.without_inputs(edges) == 1, "a0.h0 has its q and the shared k; a0.h1 keeps its q"
    assert reach.without_inputs([edges[0], edges[2]]) is None
    assert reach.without_inputs([edges[3]]) == 0
    assert reach.remove(*edges[0]) == [] and reach.remove(*edges[1]) == [graph.head(0, 0)]
