"""Agreement with a reference: against thresholds tried one by one, pairs compared one by one, and known circuits."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import circuitfind as cf
from circuitfind.cli.app import main
from circuitfind.errors import ScoreError
from circuitfind.evaluation.agreement import PERCENTAGES, roc
from circuitfind.graph import Graph
from circuitfind.references.reference import Reference

GRAPHS = [Graph(4, 3, 3, 6), Graph(4, 4, 2, 8), Graph(5, 2, 2, 4, parallel=True)]
LEVELS = ("edge", "node", "head")


def random_scores(graph: Graph, seed: int = 0, steps: int = 6) -> cf.Scores:
    """Few distinct values of either sign, so that many tie."""
    values = np.random.default_rng(seed).integers(-steps, steps + 1, (graph.n_writers, graph.n_readers)) / 4
    return cf.Scores(graph, values.astype(np.float32))


def random_reference(graph: Graph, seed: int = 1, part: float = 0.3) -> Reference:
    mask = (np.random.default_rng(seed).random(graph.real.shape) < part) & graph.real
    mask[0, -1] = False  # never all
    return Reference("random", graph, mask, {"some": ("a0.h0", "a1.h1")})


# -------------------------------------------------------------------- twins
def touches(graph: Graph, edge: str, node: str) -> bool:
    """Whether an edge leaves a node or feeds it; a shared key/value head's edge feeds all heads of its group."""
    writer, reader = edge.split("->")
    if writer == node:
        return True
    target, letter = reader.partition("<")[0], reader[-2:-1]
    if ".kv" not in target:
        return target == node
    layer, shared = target[1:].split(".kv")
    return letter in "kv" and node in [f"a{layer}.h{int(shared) * graph.group + i}" for i in range(graph.group)]


def literal_items(scores: cf.Scores, reference: Reference, by: str, level: str) -> list[tuple[float, bool]]:
    """(score, in the reference) of every item."""
    graph = scores.graph
    effects = {edge: abs(value) if by == "absolute" else value for edge, value in scores.to_dict().items()}
    inside = set(reference.circuit.edges)
    if level == "edge":
        return [(value, edge in inside) for edge, value in effects.items()]
    nodes = [name for name in graph.writer_names if name != "input" and (level == "node" or name[0] == "a")]
    in_class = {head for heads in reference.heads.values() for head in heads}
    true = set(reference.circuit.nodes) | in_class
    return [(max(v for edge, v in effects.items() if touches(graph, edge, node)), node in true) for node in nodes]


def literal_points(items: list[tuple[float, bool]]) -> list[tuple[float, float]]:
    """(false, true) positive rate at every threshold, tried one by one."""
    positives = sum(true for _, true in items)
    points = [(0.0, 0.0)]
    for threshold in sorted({score for score, _ in items}, reverse=True):
        taken = [true for score, true in items if score >= threshold]
        points.append(((len(taken) - sum(taken)) / (len(items) - positives), sum(taken) / positives))
    return points


def literal_area(items: list[tuple[float, bool]]) -> float:
    """Mann and Whitney: of all pairs, how often the true item scores higher; ties count half."""
    wins = [
        1.0 if one > other else 0.5 if one == other else 0.0
        for one, true in items
        for other, also in items
        if true and not also
    ]
    return sum(wins) / len(wins)


def literal_precision(items: list[tuple[float, bool]]) -> float:
    """Mean over the true items of the precision among all that score as high."""
    precisions = []
    for score, true in items:
        if true:
            taken = [also for other, also in items if other >= score]
            precisions.append(sum(taken) / len(taken))
    return sum(precisions) / len(precisions)


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("by", ["absolute", "signed"])
@pytest.mark.parametrize("level", LEVELS)
def test_the_ranking_against_its_twin(graph: Graph, by: str, level: str) -> None:
    scores, reference = random_scores(graph), random_reference(graph, part=0.05)
    found = cf.agreement(scores, reference, by=by, level=level)  # type: ignore[arg-type]
    items = literal_items(scores, reference, by, level)
    assert (found.n_items, found.n_true) == (len(items), sum(true for _, true in items))
    assert found.roc is not None and found.found is None and found.heads == {}
    points = list(zip(found.roc.fpr.tolist(), found.roc.tpr.tolist(), strict=True))
    assert np.array(points) == pytest.approx(np.array(literal_points(items)))
    assert found.auroc == pytest.approx(literal_area(items), abs=1e-12)
    assert found.average_precision == pytest.approx(literal_precision(items), abs=1e-12)


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_a_circuit_against_its_twin(graph: Graph, level: str) -> None:
    circuit = random_scores(graph).top(6, prune=False)
    mask = random_scores(graph, seed=2).top(4, prune=False).mask | graph.mask(circuit.edges[:2])
    reference = Reference("few", graph, mask, {"some": ("a0.h0", "a1.h1")})
    found = cf.agreement(circuit, reference, level=level)  # type: ignore[arg-type]
    mine, true = set(circuit.edges), set(reference.circuit.edges)
    everything = set(graph.names(graph.real))
    if level != "edge":
        in_class = {head for heads in reference.heads.values() for head in heads}
        mine, true = set(circuit.nodes), set(reference.circuit.nodes) | in_class
        everything = {name for name in graph.writer_names if name[0] in ("am" if level == "node" else "a")}
    mine, true = mine & everything, true & everything
    counts = found.found
    assert counts is not None
    assert counts == (len(mine & true), len(mine - true), len(true - mine), len(everything - mine - true))
    assert counts.precision == len(mine & true) / len(mine) and counts.recall == len(mine & true) / len(true)
    assert counts.f1 == pytest.approx(2 / (1 / counts.precision + 1 / counts.recall))
    assert counts.fall_out == len(mine - true) / len(everything - true)


def test_a_circuits_point_lies_on_the_curve_of_its_scores() -> None:
    graph = GRAPHS[0]
    scores, reference = random_scores(graph), random_reference(graph)
    circuit = scores.threshold(0.75, prune=False)
    found = cf.agreement(circuit, reference)
    assert found.roc is not None and found.found is not None, "a circuit with all estimates is a ranking, too"
    where = found.roc.thresholds.tolist().index(0.75)
    assert (found.found.fall_out, found.found.recall) == (found.roc.fpr[where], found.roc.tpr[where])
    assert found.auroc == cf.agreement(scores, reference).auroc


def test_mib_area_by_hand() -> None:
    """Ten greedy circuits, counted by names; the graph is large enough for the smallest to differ."""
    graph = Graph(6, 6, 6, 12)
    scores, reference = random_scores(graph, steps=10**6), random_reference(graph, part=0.1)
    everything, true = set(graph.names(graph.real)), set(reference.circuit.edges)
    points = []
    for part in PERCENTAGES:
        mine = set(scores.greedy(int(part * len(everything))).edges)
        points.append((len(mine - true) / len(everything - true), len(mine & true) / len(true)))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        area += (x1 - x0) / points[-1][0] * (y0 + y1) / 2
    assert cf.agreement(scores, reference).mib_auroc == pytest.approx(area, abs=1e-12)
    assert math.isnan(cf.agreement(scores, reference, level="head").mib_auroc)


# -------------------------------------------------------------------- known answers
@pytest.mark.parametrize("name", ["ioi", "greater-than", "docstring"])
def test_a_reference_agrees_with_itself(name: str) -> None:
    reference = cf.reference(name)
    circuit = reference.circuit
    perfect = cf.Scores(reference.graph, reference.mask.astype(np.float32))
    for level in LEVELS:
        found = cf.agreement(circuit, name, level=level)  # type: ignore[arg-type]
        assert found.found is not None and (found.found.precision, found.found.recall, found.found.f1) == (1, 1, 1)
        assert found.roc is None and math.isnan(found.auroc), "a circuit alone is no ranking"
        ranked = cf.agreement(perfect, name, level=level)  # type: ignore[arg-type]
        assert ranked.auroc == ranked.average_precision == 1
    assert all(heads.missed == () for heads in found.heads.values()) and set(found.heads) == set(reference.heads)


def test_nothing_found_and_nothing_known() -> None:
    reference = random_reference(GRAPHS[0])
    zeros = cf.Scores(reference.graph, np.zeros(reference.graph.real.shape, dtype=np.float32))
    worst = cf.Scores(reference.graph, -reference.mask.astype(np.float32))
    assert cf.agreement(worst, reference, by="signed").auroc == 0 and cf.agreement(worst, reference).auroc == 1
    flat = cf.agreement(zeros, reference)
    share = reference.n_edges / reference.graph.n_edges
    assert flat.auroc == 0.5 and flat.average_precision == pytest.approx(share)
    empty = cf.agreement(cf.Circuit.of(reference.graph, []), reference)
    assert empty.found is not None and math.isnan(empty.found.precision)
    assert (empty.found.recall, empty.found.f1, empty.found.fall_out) == (0, 0, 0)
    assert empty.heads == {"some": ((), ("a0.h0", "a1.h1"))}
    everything = Reference("all", reference.graph, reference.graph.real)
    assert cf.agreement(zeros, everything).roc is None, "with nothing outside there is nothing to tell apart"


def test_an_edge_that_the_hypothesis_lacks_is_missed() -> None:
    """Not counted as found, as the benchmark's own comparison does with what a file does not list."""
    reference = Reference("two", GRAPHS[0], GRAPHS[0].mask(["input->m0", "m0->logits"]))
    found = cf.agreement(cf.Circuit.of(GRAPHS[0], ["input->m0", "m1->logits"]), reference).found
    assert found is not None and found[:3] == (1, 1, 1) and found.recall == 0.5


def test_node_scores_rank_by_themselves() -> None:
    graph = Graph(2, 3, 3, 6)
    values = np.arange(graph.n_writers, dtype=np.float32) - 4.5
    reference = Reference("late", graph, graph.mask(["m1->logits", "a1.h2->logits"]))
    found = cf.agreement(cf.NodeScores(graph, values), reference, by="signed", level="node")
    assert found.auroc == 1
    halves = cf.NodeScores(graph, np.stack([values / 2, values / 2], axis=1))
    assert cf.agreement(halves, reference, by="signed", level="node").auroc == 1
    items = [(abs(v), name in ("m1", "a1.h2")) for name, v in zip(graph.writer_names, values, strict=True)][1:]
    absolute = cf.agreement(cf.NodeScores(graph, values), reference, level="node")
    assert absolute.auroc == pytest.approx(literal_area(items))


def test_an_attention_only_reference_asks_nothing_of_mlps() -> None:
    reference = cf.reference("docstring")
    values = np.where(reference.possible, 0, 9).astype(np.float32) + reference.mask  # high where no edge is possible
    found = cf.agreement(cf.Scores(reference.graph, values), reference)
    assert found.n_items == int(reference.possible.sum()) and found.auroc == 1
    assert cf.agreement(cf.Scores(reference.graph, values), reference, level="node").n_items == 32


# -------------------------------------------------------------------- wrong input
def test_mistakes_are_named() -> None:
    grouped = GRAPHS[1]
    wide = Reference("wide", grouped.ungrouped(), grouped.ungrouped().mask(["input->m0"]))
    scores = random_scores(grouped)
    cases = [
        (lambda: cf.agreement(scores, "ioi"), "4 layers, 4 heads on 2 key/value heads.*'ioi' to 12 layers"),
        (lambda: cf.agreement(scores, wide), "graph=model.graph"),
        (lambda: cf.agreement(random_scores(Graph(12, 12, 12, 64)), "ioi"), "d_model 64.*d_model 768"),
        (lambda: cf.agreement(scores, random_reference(grouped), level="neuron"), "'neuron'"),  # type: ignore[arg-type]
        (lambda: cf.agreement(scores, random_reference(grouped), by="size"), "by='size'"),  # type: ignore[arg-type]
        (lambda: cf.agreement(scores.of_nodes(), random_reference(grouped)), "level='node'"),
        (lambda: cf.agreement({"input->m0": 1}, "ioi"), "dict"),  # type: ignore[arg-type]
        (lambda: cf.agreement(scores, Reference("none", grouped, grouped.real & False)), "no edges"),
        (
            lambda: cf.agreement(scores, Reference("direct", grouped, grouped.mask(["input->logits"])), level="node"),
            "'direct' holds no nodes",
        ),
    ]
    for call, said in cases:
        with pytest.raises(ScoreError, match=said):
            call()
    with pytest.raises(ScoreError, match="no ROC"):
        roc(np.arange(3.0), np.zeros(3, dtype=bool))


# -------------------------------------------------------------------- the command line
def test_agree_prints_what_the_library_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = GRAPHS[0]
    scores, reference = random_scores(graph), random_reference(graph)
    file, named = tmp_path / "scores.safetensors", tmp_path / "mine.json"
    scores.save(file)
    content = {"graph": asdict(graph), "heads": {"some": ["a0.h0"]}, "edges": reference.circuit.edges}
    named.write_text(json.dumps(content))
    words = ["agree", str(file), "--reference", str(named), "--top", "9", "--by", "signed"]
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["agreement"]
    circuit = scores.top(9, by="signed", prune=False)
    for row, level in zip(said, LEVELS, strict=True):
        found = cf.agreement(circuit, cf.reference(named), by="signed", level=level)  # type: ignore[arg-type]
        assert found.found is not None and row["circuit"]["f1"] == found.found.f1
        assert row["auroc"] == (found.auroc if found.roc else None)
    assert said[0]["circuit"]["true_positives"] + said[0]["circuit"]["false_positives"] == 9
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "Heads of the reference" in text and f"{said[0]['auroc']:.3f}" in text
    assert main(["agree", str(file), "--reference", "ioi"]) == 2
    assert "belong to" in capsys.readouterr().err


# -------------------------------------------------------------------- the field's example
@pytest.mark.shared
def test_the_benchmarks_example_against_ioi(shared: Path) -> None:
    """A signed cut of it would take the wrong end; magnitudes do not care."""
    circuit = cf.Circuit.open(shared / "conformance/eap-ig/gpt2_ioi_mib_example.json", sign="change")
    edges, heads = (cf.agreement(circuit, "ioi", level=level) for level in ("edge", "head"))  # type: ignore[arg-type]
    assert edges.found is not None and heads.found is not None
    assert (len(circuit), edges.n_items, edges.n_true) == (756, 32491, 963)
    # counted here by names, from the raw file
    raw = json.loads((shared / "conformance/eap-ig/gpt2_ioi_mib_example.json").read_text())
    mine = {name for name, edge in raw["edges"].items() if edge["in_graph"]}
    true = set(cf.reference("ioi").circuit.edges)
    assert edges.found[:3] == (len(mine & true), len(mine - true), len(true - mine))
    mine = {name for name, node in raw["nodes"].items() if node["in_graph"] and name.startswith("a")}
    true = {head for heads in cf.reference("ioi").heads.values() for head in heads}
    assert heads.found[:3] == (len(mine & true), len(mine - true), len(true - mine))
    scores = np.array([abs(edge["score"]) for edge in raw["edges"].values()])
    names = set(cf.reference("ioi").circuit.edges)
    inside = np.array([name in names for name in raw["edges"]])
    above = (scores[inside][:, None] > scores[~inside]).mean() + (scores[inside][:, None] == scores[~inside]).mean() / 2
    assert edges.auroc == pytest.approx(above, abs=1e-9)
    assert heads.heads["name mover"].missed == () and heads.heads["previous token"].missed == ("a4.h11",)
