"""Circuits as masks: connectivity against networkx, which nodes are in, set operations."""

from __future__ import annotations

from pathlib import Path

import networkx
import numpy as np
import pytest

from circuitfind.circuit import Circuit, as_circuit, connected
from circuitfind.errors import FileError
from circuitfind.graph import Graph

GRAPHS = {
    "plain": Graph(3, 3, 3, 12),
    "parallel": Graph(3, 3, 3, 12, parallel=True),
    "grouped": Graph(3, 4, 2, 16),
    "one key/value head": Graph(2, 4, 1, 16),
}
graphs = pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
PLAIN, GROUPED = GRAPHS["plain"], GRAPHS["grouped"]


def random_mask(graph: Graph, seed: int) -> np.ndarray:
    """Thin enough that a good part of it hangs loose."""
    random = np.random.default_rng(seed)
    return graph.real & (random.random(graph.real.shape) < random.choice([0.01, 0.03, 0.1, 0.3]))


def heads_of(graph: Graph, reader: str) -> list[str]:
    """Names of the nodes that a reader belongs to, from its name alone."""
    node = reader.split("<")[0]
    if ".kv" not in node:
        return [node]
    layer, head = node.split(".kv")
    group = graph.n_heads // graph.n_kv_heads
    return [f"{layer}.h{h}" for h in range(int(head) * group, (int(head) + 1) * group)]


def on_a_path(graph: Graph, edges: list[str]) -> list[str]:
    """The edges that a walk from `input` to `logits` can use."""
    nodes = networkx.DiGraph()
    nodes.add_nodes_from(["input", "logits"])
    for edge in edges:
        writer, reader = edge.split("->")
        nodes.add_edges_from((writer, node) for node in heads_of(graph, reader))
    reached = networkx.descendants(nodes, "input") | {"input"}
    useful = networkx.ancestors(nodes, "logits") | {"logits"}
    kept = []
    for edge in edges:
        writer, reader = edge.split("->")
        if writer in reached and any(node in useful for node in heads_of(graph, reader)):
            kept.append(edge)
    return kept


@graphs
@pytest.mark.parametrize("seed", range(25))
def test_connectivity_is_that_of_networkx(graph: Graph, seed: int) -> None:
    mask = random_mask(graph, seed)
    before = mask.copy()
    kept = connected(graph, mask)
    assert graph.names(kept) == on_a_path(graph, graph.names(mask))
    assert np.array_equal(mask, before)
    assert np.array_equal(connected(graph, kept), kept)


@pytest.mark.parametrize(
    ("graph", "edges", "kept"),
    [
        (PLAIN, [], []),
        (PLAIN, ["input->logits"], ["input->logits"]),
        (PLAIN, ["input->m0", "m1->logits"], []),  # neither end meets
        (PLAIN, ["input->a0.h1<k>", "a0.h1->logits"], ["input->a0.h1<k>", "a0.h1->logits"]),  # a key alone will do
        (PLAIN, ["input->a0.h1<k>", "a0.h2->logits"], []),
        (GROUPED, ["input->a0.kv0<k>", "a0.h1->logits"], ["input->a0.kv0<k>", "a0.h1->logits"]),
        (GROUPED, ["input->a0.kv0<k>", "a0.h2->logits"], []),  # kv0 serves h0 and h1
    ],
)
def test_connectivity_by_hand(graph: Graph, edges: list[str], kept: list[str]) -> None:
    assert Circuit.of(graph, edges).connected().edges == kept


@graphs
@pytest.mark.parametrize("seed", range(10))
def test_nodes_are_those_that_an_edge_touches(graph: Graph, seed: int) -> None:
    circuit = Circuit(graph, random_mask(graph, seed))
    writers, own, shared = set(), set(), set()
    for edge in circuit.edges:
        writer, reader = edge.split("->")
        writers.add(writer)
        (shared if ".kv" in reader else own).update(heads_of(graph, reader))
    assert set(circuit.nodes) == writers | own, "a head of a shared key/value head counts only if it is used itself"
    assert circuit.nodes == [name for name in graph.node_names if name in circuit.nodes]
    assert shared <= set(graph.node_names)


def test_heads_behind_a_shared_key_value_head_count_when_used() -> None:
    assert Circuit.of(GROUPED, ["input->a1.kv0<v>"]).nodes == ["input"]
    assert Circuit.of(GROUPED, ["input->a1.kv0<v>", "a1.h1->logits"]).nodes == ["input", "a1.h1", "logits"]
    assert Circuit.of(GROUPED, ["input->a1.kv0<v>", "input->a1.h0<q>"]).nodes == ["input", "a1.h0"]
    assert Circuit.of(GROUPED, []).nodes == []


@graphs
def test_set_operations(graph: Graph) -> None:
    a, b = Circuit(graph, random_mask(graph, 3)), Circuit(graph, random_mask(graph, 4))
    in_a, in_b = set(a.edges), set(b.edges)
    assert in_a - in_b and in_b - in_a
    assert set((a | b).edges) == in_a | in_b
    assert set((a & b).edges) == in_a & in_b
    assert set((a - b).edges) == in_a - in_b
    assert set(a.complement().edges) == set(graph.names(graph.real)) - in_a
    assert a.jaccard(b) == len(in_a & in_b) / len(in_a | in_b)
    assert a.complement().complement() == a and a != b and a != "a circuit"
    assert len(a) == len(in_a) and all(edge in a for edge in in_a) and not any(edge in a for edge in in_b - in_a)


def test_full_and_empty() -> None:
    full, empty = Circuit.full(PLAIN), Circuit.empty(PLAIN)
    assert len(full) == PLAIN.n_edges and len(empty) == 0
    assert full.connected() == full and full.complement() == empty
    assert full.nodes == list(PLAIN.node_names)
    assert empty.jaccard(empty) == 1.0 and full.jaccard(empty) == 0.0


def test_what_was_measured_of_the_whole_ends_with_a_change() -> None:
    circuit = Circuit.of(PLAIN, ["input->logits", "input->m0"], facts={"faithfulness": 0.9})
    assert circuit.connected().facts == {} and (circuit | Circuit.empty(PLAIN)).facts == {}
    assert circuit.facts == {"faithfulness": 0.9}


def test_circuits_of_different_graphs_do_not_mix() -> None:
    other = Circuit.empty(GROUPED)
    for operation in ("__or__", "__and__", "__sub__", "jaccard"):
        with pytest.raises(FileError, match="lie in different graphs: 3 layers, 3 heads / 3 layers, 4 heads on 2"):
            getattr(Circuit.empty(PLAIN), operation)(other)
    assert Circuit.empty(PLAIN) != other
    with pytest.raises(FileError, match="belongs to another model"):
        as_circuit(PLAIN, other)


def test_a_circuit_from_names_or_from_a_circuit() -> None:
    circuit = Circuit.of(PLAIN, ["input->logits"])
    assert as_circuit(PLAIN, circuit) is circuit
    assert as_circuit(PLAIN, ["input->logits"]) == circuit
    with pytest.raises(FileError, match="has no writer 'm9'"):
        as_circuit(PLAIN, ["m9->logits"])


def test_impossible_circuits_are_refused() -> None:
    with pytest.raises(FileError, match=r"circuit mask has shape \[2, 2\], its graph needs \[13, 31\]"):
        Circuit(PLAIN, np.zeros((2, 2), dtype=bool))
    with pytest.raises(FileError, match="circuit exact has shape"):
        Circuit(PLAIN, PLAIN.real, exact=np.zeros(3))
    with pytest.raises(FileError, match="cells that are not edges"):
        Circuit(PLAIN, np.ones_like(PLAIN.real))


def test_rows_say_what_is_known() -> None:
    mask = PLAIN.mask(["input->m0", "m0->logits"])
    estimates, exact = np.full(mask.shape, 0.25, np.float32), np.full(mask.shape, np.nan, np.float32)
    exact[PLAIN.edge("m0->logits")] = 1.5
    rows = Circuit(PLAIN, mask, estimates, exact).rows()
    assert [tuple(row)[2:4] for row in rows] == [(0.25, None), (0.25, 1.5)]
    assert [tuple(row)[2:4] for row in Circuit(PLAIN, mask).rows()] == [(None, None)] * 2


def test_save_and_open(tmp_path: Path) -> None:
    mask = random_mask(GROUPED, 5)
    values = np.random.default_rng(0).normal(size=mask.shape).astype(np.float32)
    exact = np.where(np.random.default_rng(1).random(mask.shape) < 0.5, values, np.nan).astype(np.float32)
    saved = Circuit(GROUPED, mask, values, exact, facts={"faithfulness": 0.5})
    opened = Circuit.open(saved.save(tmp_path / "deep" / "circuit.json"))
    assert opened == saved and opened.facts == saved.facts and opened.record == saved.record
    assert np.allclose(opened.estimates[mask], values[mask]) and np.isnan(opened.estimates[~mask]).all()
    assert np.allclose(opened.exact[mask], exact[mask], equal_nan=True)


def test_groups_go_with_the_circuit_and_its_file(tmp_path: Path) -> None:
    circuit = Circuit.of(PLAIN, ["input->a0.h1<q>", "a0.h1->logits"]).with_group("movers", ["a0.h1", "m1", "a0.h1"])
    assert circuit.groups == {"movers": ("a0.h1", "m1")}
    assert circuit.connected().groups == circuit.groups
    path = circuit.save(tmp_path / "circuit.json")
    assert Circuit.open(path).groups == circuit.groups
    assert circuit.with_group("movers", []).groups == {}
    assert "groups" not in circuit.with_group("movers", []).save(tmp_path / "bare.json").read_text()
    with pytest.raises(FileError, match=r"group 'x': this graph .* has no node 'L0H1': did you mean 'a0.h1'?"):
        circuit.with_group("x", "L0H1")
    path.write_text(path.read_text().replace('"m1"', '"m77"'))
    with pytest.raises(FileError, match=r"group 'movers': .*m77"):
        Circuit.open(path)
