"""Node rankings as edge rankings and as circuits, against sorted lists of names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_circuit import GRAPHS, GROUPED, PLAIN, graphs, heads_of

from circuitfind.circuit import Circuit
from circuitfind.errors import FileError, ScoreError
from circuitfind.graph import Graph
from circuitfind.record import SIGN, Record
from circuitfind.scores import NodeScores, Scores

both_ways = pytest.mark.parametrize("by", ["absolute", "signed"])


def random_nodes(graph: Graph, seed: int = 0, ties: bool = False) -> NodeScores:
    values = np.random.default_rng(seed).normal(size=graph.n_writers).astype(np.float32)
    return NodeScores(graph, np.round(values) if ties else values, Record(method="atp"))


def ends(nodes: NodeScores, by: str) -> dict[str, tuple[float, float]]:
    """By edge, in the graph's order: the scores of its weaker and its stronger end."""
    of_node = {name: abs(v) if by == "absolute" else v for name, v in nodes.to_dict().items()}
    of_node |= {"input": float("inf"), "logits": float("inf")}
    pairs = {}
    for edge in nodes.graph.names(nodes.graph.real):
        writer, reader = edge.split("->")
        both = of_node[writer], max(of_node[node] for node in heads_of(nodes.graph, reader))
        pairs[edge] = min(both), max(both)
    return pairs


@graphs
@both_ways
@pytest.mark.parametrize("ties", [False, True])
def test_edges_come_in_with_their_weaker_end(graph: Graph, by: str, ties: bool, tmp_path: Path) -> None:
    nodes = random_nodes(graph, ties=ties)
    pairs = ends(nodes, by)
    expected = sorted(pairs, key=lambda edge: (-pairs[edge][0], -pairs[edge][1]))  # stable: the graph's order at last
    scores = nodes.to_edges(by)
    saved = Scores.open(scores.save(tmp_path / "edges.safetensors"))
    for one in (scores, saved):
        assert [graph.edge_name(u, r) for u, r in one.ranked(by)] == expected
    best = max(weaker for weaker, _ in pairs.values() if weaker != float("inf"))
    for edge, (weaker, _) in pairs.items():
        assert scores[edge] == pytest.approx(min(weaker, best), rel=1e-4, abs=1e-30)
    assert scores.values.dtype == np.float32 and not scores.values[~graph.real].any()


@graphs
@both_ways
@pytest.mark.parametrize("ties", [False, True])
def test_the_circuit_of_nodes_has_every_edge_between_them(graph: Graph, by: str, ties: bool) -> None:
    nodes = random_nodes(graph, seed=1, ties=ties)
    ranked = [name for name in nodes.top(graph.n_writers, by) if name != "input"]
    for n in (0, 1, 3, len(ranked), 100):
        kept = {"input", "logits", *ranked[:n]}
        expected = [
            edge
            for edge in graph.names(graph.real)
            if edge.split("->")[0] in kept and set(heads_of(graph, edge.split("->")[1])) & kept
        ]
        circuit = nodes.circuit(n, by)
        assert circuit.edges == nodes.circuit(ranked[:n]).edges == expected
        assert circuit.connected() == circuit and circuit.estimates is None
        assert kept <= set(circuit.nodes)
        if not ties:
            assert nodes.to_edges(by).top(len(circuit), by, prune=False) == circuit


def test_circuits_of_nodes_by_name() -> None:
    nodes = random_nodes(PLAIN)
    assert nodes.circuit([]).edges == ["input->logits"]
    assert nodes.circuit("m0").edges == ["input->m0", "input->logits", "m0->logits"]
    assert nodes.circuit(["m0", "input", "logits"]) == nodes.circuit("m0")
    assert nodes.circuit(PLAIN.writer_names) == Circuit.full(PLAIN)
    shared = random_nodes(GROUPED).circuit(["a0.h0"])
    assert "input->a0.kv0<k>" in shared.edges, "a shared head is in with any head that it serves"
    with pytest.raises(FileError, match="has no writer 'm99'"):
        nodes.circuit(["m99"])
    for wrong in (-1, 2.5, True):
        with pytest.raises(ScoreError, match=r"nodes=.*: give a whole number, 0 or more"):
            nodes.circuit(wrong)
    with pytest.raises(ScoreError, match="by='size' is unknown"):
        nodes.to_edges("size")


def test_edges_of_nodes_are_no_effects_and_remember_their_source() -> None:
    nodes = random_nodes(PLAIN)
    scores, circuit = nodes.to_edges("signed"), nodes.circuit(2)
    assert nodes.record.sign == SIGN and not scores.record.is_effect
    assert scores.record.sign == "not an effect: the score of the weaker of an edge's two nodes"
    assert scores.record.method == "atp" and scores.record.settings == {"level": "edge", "nodes_by": "signed"}
    assert scores.top(20).estimates is None
    assert circuit.record.settings == {"cut": "nodes", "n": 2, "by": "absolute"}


def test_positions_are_summed_first() -> None:
    values = np.random.default_rng(3).normal(size=(PLAIN.n_writers, 5)).astype(np.float32)
    apart, total = NodeScores(PLAIN, values), NodeScores(PLAIN, values.sum(1))
    np.testing.assert_array_equal(apart.to_edges().values, total.to_edges().values)
    assert apart.circuit(3) == total.circuit(3)


def test_equal_nodes_leave_the_graphs_order() -> None:
    for graph in GRAPHS.values():
        for value in (0.0, -2.0):
            scores = NodeScores(graph, np.full(graph.n_writers, value, np.float32)).to_edges("signed")
            names = [graph.edge_name(u, r) for u, r in scores.ranked("signed")]
            outer = [name for name in graph.names(graph.real) if name.startswith("input") or name.endswith("logits")]
            outer.remove("input->logits")
            inner = [name for name in graph.names(graph.real) if name not in {*outer, "input->logits"}]
            assert names == ["input->logits", *outer, *inner]


@both_ways
def test_the_order_survives_neighbouring_floats(by: str) -> None:
    # scores one float32 step apart leave no room between them for the steps that break ties
    graph = Graph(3, 8, 8, 64)
    values = np.empty(graph.n_writers, np.float32)
    values[0] = 0.5
    for at in range(1, graph.n_writers):
        values[at] = np.nextafter(values[at - 1], np.float32(1))
    nodes = NodeScores(graph, np.random.default_rng(0).permutation(values))
    pairs = ends(nodes, by)
    expected = sorted(pairs, key=lambda edge: (-pairs[edge][0], -pairs[edge][1]))
    assert [graph.edge_name(u, r) for u, r in nodes.to_edges(by).ranked(by)] == expected
