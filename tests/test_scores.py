"""Cutting circuits from scores, against brute-force twins; files; NaN."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_circuit import GRAPHS, GROUPED, PLAIN, graphs, heads_of, on_a_path

from circuitfind.circuit import Circuit
from circuitfind.errors import FileError, ScoreError
from circuitfind.graph import Graph
from circuitfind.record import Record
from circuitfind.scores import NodeScores, Scores

both_ways = pytest.mark.parametrize("by", ["absolute", "signed"])


def random_scores(graph: Graph, seed: int = 0, ties: bool = False) -> Scores:
    values = np.random.default_rng(seed).normal(size=graph.real.shape).astype(np.float32)
    return Scores(graph, np.round(values) if ties else values, Record(method="eap"))


def keyed(scores: Scores, by: str) -> dict[str, float]:
    """What each edge is ranked by; the dictionary is in the graph's order."""
    effects = {name: scores[name] for name in scores.graph.names(scores.graph.real)}
    return {name: abs(value) if by == "absolute" else value for name, value in effects.items()}


def best_first(key: dict[str, float]) -> list[str]:
    return sorted(key, key=lambda name: -key[name])  # stable: ties stay in the graph's order


def grown(graph: Graph, key: dict[str, float], n: int) -> set[str]:
    """Greedy search by asking all edges again after each step."""
    kept: set[str] = set()
    inside = {"logits"}
    while len(kept) < n:
        open_edges = [e for e in key if e not in kept and set(heads_of(graph, e.split("->")[1])) & inside]
        if not open_edges:
            break
        best = max(open_edges, key=lambda name: key[name])  # the first of equals: the graph's order
        kept.add(best)
        inside.add(best.split("->")[0])
    return kept


@graphs
@both_ways
@pytest.mark.parametrize("ties", [False, True])
def test_top_is_the_best_of_a_sorted_list(graph: Graph, by: str, ties: bool) -> None:
    scores = random_scores(graph, ties=ties)
    order = best_first(keyed(scores, by))
    for n in (0, 1, 7, graph.n_edges // 2, graph.n_edges, 10 * graph.n_edges):
        assert set(scores.top(n, by, prune=False).edges) == set(order[:n])
        assert scores.top(n, by).edges == on_a_path(graph, scores.top(n, by, prune=False).edges)
    ranked = [graph.edge_name(u, r) for u, r in scores.ranked(by)]
    assert ranked == order


@graphs
@both_ways
def test_threshold_keeps_what_reaches_it(graph: Graph, by: str) -> None:
    scores = random_scores(graph)
    key = keyed(scores, by)
    for t in (0.0, 0.5, key["input->logits"], 10.0):
        expected = {name for name, value in key.items() if value >= t}
        assert set(scores.threshold(t, by, prune=False).edges) == expected
        assert scores.threshold(t, by).edges == on_a_path(graph, scores.threshold(t, by, prune=False).edges)
    assert scores.threshold(key["input->logits"], by, prune=False).mask[graph.edge("input->logits")]  # >=, not >


@graphs
@both_ways
@pytest.mark.parametrize("ties", [False, True])
def test_greedy_grows_from_the_logits(graph: Graph, by: str, ties: bool) -> None:
    scores = random_scores(graph, seed=1, ties=ties)
    for n in (0, 1, 5, 30, graph.n_edges):
        circuit = scores.greedy(n, by, prune=False)
        assert set(circuit.edges) == grown(graph, keyed(scores, by), n)
        assert len(circuit) == min(n, graph.n_edges)
        assert scores.greedy(n, by).edges == on_a_path(graph, circuit.edges)


def heaped(scores: Scores, by: str, n: int) -> np.ndarray:
    """Greedy search with every edge into the nodes inside on one heap; ties in the graph's order."""
    graph, key = scores.graph, scores.key(by)
    mask = np.zeros_like(graph.real)
    frontier: list[tuple[float, int, int]] = []
    inside, node = set(), graph.n_nodes - 1
    while mask.sum() < n:
        if node not in inside:
            inside.add(node)
            cells = [(r, u) for r in np.flatnonzero(graph.serves[:, node]) for u in range(graph.limits[r])]
            frontier = sorted({*frontier, *((-key[u, r], r, u) for r, u in cells if not mask[u, r])})
        _, reader, writer = frontier.pop(0)
        mask[writer, reader] = True
        node = writer or node  # `input` has no readers
    return mask


@both_ways
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("graph", [Graph(6, 8, 8, 64), Graph(6, 8, 2, 64, parallel=True)])
def test_greedy_on_a_larger_graph(graph: Graph, ties: bool, by: str) -> None:
    scores = random_scores(graph, seed=2, ties=ties)
    for n in (1, 40, 700):
        np.testing.assert_array_equal(scores.greedy(n, by, prune=False).mask, heaped(scores, by, n))


def test_signed_and_absolute_differ() -> None:
    scores = Scores(PLAIN, np.where(PLAIN.real, -1, 0).astype(np.float32))
    scores.values[PLAIN.edge("input->logits")] = 0.5
    assert scores.top(1, "signed").edges == ["input->logits"]
    assert "input->logits" not in scores.top(PLAIN.n_edges - 1, "absolute", prune=False)
    with pytest.raises(ScoreError, match=r"by='size' is unknown: use 'absolute' .* or 'signed'"):
        scores.top(3, "size")


def test_equal_scores_are_cut_in_the_graphs_order() -> None:
    for graph in GRAPHS.values():
        scores = Scores(graph, np.zeros(graph.real.shape, np.float32))
        assert scores.top(9, prune=False).edges == graph.names(graph.real)[:9]
        assert scores.top(9, prune=False) == scores.top(9, prune=False)
        # a0.h0 comes in second, and its first reader lies before `logits`
        assert scores.greedy(3, prune=False).edges == ["input->a0.h0<q>", "input->logits", "a0.h0->logits"]


def test_cells_that_are_no_edges_never_count() -> None:
    values = np.where(PLAIN.real, 0.1, 99).astype(np.float32)
    scores = Scores(PLAIN, values)
    assert len(scores.threshold(0.05, prune=False)) == PLAIN.n_edges
    assert scores.top(PLAIN.n_edges + 50, prune=False) == Circuit.full(PLAIN)
    values[~PLAIN.real] = np.nan
    assert Scores(PLAIN, values).top(5, prune=False) == scores.top(5, prune=False)
    assert np.allclose(Scores(PLAIN, values).of_nodes().values, 0.1 * PLAIN.real.sum(1))


def test_a_cut_carries_its_estimates_and_settings() -> None:
    scores = random_scores(PLAIN)
    circuit = scores.top(20, by="signed")
    assert circuit.estimates is scores.values
    assert circuit.record.settings == {"cut": "top", "n": 20, "by": "signed"}
    assert circuit.record.method == "eap" and scores.record.settings == {}
    assert [row.estimate for row in circuit.rows()] == [scores[name] for name in circuit.edges]


@graphs
def test_every_edge_is_in_the_dictionary(graph: Graph) -> None:
    scores = random_scores(graph)
    content = scores.to_dict()
    assert list(content) == graph.names(graph.real) and len(scores) == len(content)
    assert all(scores[name] == value == scores.values[graph.edge(name)] for name, value in content.items())


def test_nan_is_refused_by_the_edges_name() -> None:
    values = np.zeros(PLAIN.real.shape, np.float32)
    values[PLAIN.edge("m0->a1.h2<v>")] = np.nan
    with pytest.raises(ScoreError, match=r"the score of m0->a1.h2<v> is NaN \(1 of \d+ are\): look for inf or NaN"):
        Scores(PLAIN, values)
    with pytest.raises(ScoreError, match=r"scores have shape \[2, 3\], the graph needs \[13, 31\]"):
        Scores(PLAIN, np.zeros((2, 3), np.float32))


def test_save_and_open(tmp_path: Path) -> None:
    scores = random_scores(GROUPED)
    opened = Scores.open(scores.save(tmp_path / "deep" / "scores.safetensors"))
    assert opened.graph == GROUPED and opened.record == scores.record
    assert np.array_equal(opened.values, scores.values)
    nodes = scores.of_nodes()
    opened_nodes = NodeScores.open(nodes.save(tmp_path / "nodes.safetensors"))
    assert np.array_equal(opened_nodes.values, nodes.values)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"absent\.safetensors: no such file"):
        Scores.open(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("no scores")
    with pytest.raises(FileError, match=r"text\.safetensors: not a scores file"):
        Scores.open(tmp_path / "text.safetensors")
    nodes = random_scores(PLAIN).of_nodes().save(tmp_path / "nodes.safetensors")
    with pytest.raises(FileError, match="expected edge scores, this file holds node scores"):
        Scores.open(nodes)


def test_node_scores() -> None:
    scores = random_scores(PLAIN)
    nodes = scores.of_nodes()
    for name, value in nodes.to_dict().items():
        outgoing = [effect for edge, effect in scores.to_dict().items() if edge.split("->")[0] == name]
        assert value == pytest.approx(sum(outgoing), abs=1e-5) and nodes[name] == value
    assert nodes.heads().shape == (3, 3) and nodes.heads()[1, 2] == nodes["a1.h2"]
    totals = nodes.to_dict()
    assert nodes.top(4) == sorted(totals, key=lambda name: -abs(totals[name]))[:4]
    assert nodes.top(4, by="signed") == sorted(totals, key=lambda name: -totals[name])[:4]


def test_node_scores_by_position() -> None:
    values = np.zeros((PLAIN.n_writers, 5), np.float32)
    values[PLAIN.writer("m1")] = [1, -3, 0, 0, 1]
    values[PLAIN.writer("a0.h2")] = 0.5
    nodes = NodeScores(PLAIN, values)
    assert nodes.top(2) == ["a0.h2", "m1"] and nodes["m1"].tolist() == [1, -3, 0, 0, 1]
    assert nodes.top(1, by="signed") == ["a0.h2"] and nodes.heads().shape == (3, 3, 5)
    values[PLAIN.writer("m1"), 2] = np.nan
    with pytest.raises(ScoreError, match="the score of m1 is NaN"):
        NodeScores(PLAIN, values)
    with pytest.raises(ScoreError, match="node scores for 3 writers, the graph has 13"):
        NodeScores(PLAIN, np.zeros(3))
