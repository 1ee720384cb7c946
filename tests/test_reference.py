"""Published circuits: their counts, the twin that lists their edges literally, and references from files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import circuitfind as cf
from circuitfind.errors import FileError
from circuitfind.graph import Graph

SMALL = Graph(2, 2, 2, 8)


def by_kind(reference: cf.Reference) -> dict[str, int]:
    """Edges by what writes and what reads: in, a, m, logits."""
    short = {"i": "in", "a": "a", "m": "m", "l": "logits"}
    pairs = (edge.split("->") for edge in reference.circuit.edges)
    return dict(Counter(f"{short[writer[0]]}->{short[reader[0]]}" for writer, reader in pairs))


# -------------------------------------------------------------------- counts, as the papers print them
@pytest.mark.parametrize(
    ("name", "edges", "with_direct", "heads"),
    [("ioi", 963, 1041, 26), ("greater-than", 235, 262, 9), ("docstring", 24, 37, 6)],
)
def test_counts(name: str, edges: int, with_direct: int, heads: int) -> None:
    reference = cf.reference(name)
    assert (reference.n_edges, reference.n_edges + reference.direct) == (edges, with_direct)
    assert len(reference.circuit) == len(set(reference.circuit.edges)) == edges
    classes = [head for names in reference.heads.values() for head in names]
    assert len(classes) == len(set(classes)) == heads
    touched = {node for node in reference.circuit.nodes if node.startswith("a")}
    assert touched == set(classes), "heads of a class and heads with an edge are the same"
    assert int(reference.head_mask.sum()) == heads
    assert "arXiv" in reference.source and reference.circuit.record.settings["source"] == reference.source
    assert reference.circuit == reference.circuit.connected(), "every edge lies on a path from input to logits"


def test_ioi_by_kind_and_class() -> None:
    reference = cf.reference("ioi")
    kinds = {"m->a": 567, "a->a": 124, "a->m": 123, "m->m": 66, "in->a": 45}
    assert by_kind(reference) == kinds | {"a->logits": 13, "in->m": 12, "m->logits": 12, "in->logits": 1}
    assert {kind: len(heads) for kind, heads in reference.heads.items()} == {
        "name mover": 3,
        "backup name mover": 8,
        "negative name mover": 2,
        "S2 inhibition": 4,
        "induction": 4,
        "duplicate token": 3,
        "previous token": 2,
    }


def test_the_attention_only_model_has_no_edges_of_mlps() -> None:
    reference = cf.reference("docstring")
    assert reference.attention_only and not any("m" in edge for edge in reference.circuit.edges)
    graph = reference.graph
    names = graph.names(reference.possible)
    assert names == [name for name in graph.names(graph.real) if "m" not in name]
    # layer l's 24 inputs each read input and 8 heads of every earlier layer; logits read all
    assert len(names) == sum(24 * (1 + 8 * layer) for layer in range(4)) + 33


# -------------------------------------------------------------------- literal twins
def existing(graph: Graph, edges: Iterable[str]) -> set[str]:
    """Those edges that the graph has."""
    return set(edges) & set(graph.names(graph.real))


def test_ioi_from_its_definition() -> None:
    """Every pair of nodes and letter on its own, from the definition: who feeds whom."""
    reference = cf.reference("ioi")
    kind_of = {head: kind for kind, heads in reference.heads.items() for head in heads}
    last = {"name mover", "backup name mover", "negative name mover"}

    def feeds(writer: str, letter: str, head: str) -> bool:
        to = kind_of[head]
        if writer.startswith("m"):
            return True
        if writer == "input":
            early = to in ("previous token", "duplicate token")
            return early or (to == "S2 inhibition" and letter == "q") or (to in last and letter in "kv")
        of = kind_of.get(writer)
        return (
            (of == "previous token" and to == "induction" and letter in "kv")
            or (of in ("induction", "duplicate token") and to == "S2 inhibition" and letter in "kv")
            or (of == "S2 inhibition" and to in last and letter == "q")
        )

    writers = ["input", *kind_of, *(f"m{layer}" for layer in range(12))]
    edges = {
        f"{u}->{head}<{letter}>" for u in writers for head in kind_of for letter in "qkv" if feeds(u, letter, head)
    }
    edges |= {f"{u}->m{layer}" for u in writers for layer in range(12)}
    edges |= {f"{u}->logits" for u in writers if u not in kind_of or kind_of[u] in last}
    assert existing(reference.graph, edges) == set(reference.circuit.edges)


def test_greater_than_from_its_definition() -> None:
    reference = cf.reference("greater_than")
    middle = {"a5.h5", "a6.h1", "a6.h9", "a7.h10", "a8.h11", "a9.h1"}
    early, late = {f"m{i}" for i in range(4)}, {f"m{i}" for i in range(8, 12)}
    edges = set()
    for writer in reference.graph.writer_names:
        for reader in reference.graph.reader_names:
            node, letter = reader.partition("<")[0], reader[-2:-1] if "<" in reader else ""
            into_late = writer in middle | late and node in late
            from_input = writer == "input" and (node in early or node in ("a0.h1", "a0.h3", "a0.h5"))
            from_early = writer in early | {"a0.h1"} and (node in early or node in middle)
            from_pair = writer in ("a0.h3", "a0.h5") and node in middle
            mlps = writer.startswith("m") and node.startswith("m") and int(writer[1:]) < 9 and int(node[1:]) < 9
            queries = writer.startswith("m") and node in middle and letter == "q"
            out = node == "logits" and writer in middle | late
            if into_late or from_input or from_early or from_pair or mlps or queries or out:
                edges.add(f"{writer}->{reader}")
    assert existing(reference.graph, edges) == set(reference.circuit.edges)


def test_docstring_edge_by_edge() -> None:
    expected = {"input->a0.h5<v>", "input->a1.h4<v>", "a0.h5->a1.h4<v>", "a1.h4->a2.h0<v>"}
    for head in ("a1.h2", "a2.h0"):
        expected |= {f"{writer}->{head}<{letter}>" for writer in ("input", "a0.h5") for letter in "qk"}
    for head in ("a3.h0", "a3.h6"):
        expected |= {f"a1.h4->{head}<q>", f"a2.h0->{head}<k>", f"a1.h2->{head}<k>", f"{head}->logits"}
        expected |= {f"input->{head}<v>", f"a0.h5->{head}<v>"}
    assert set(cf.reference("docstring").circuit.edges) == expected


# -------------------------------------------------------------------- of one's own
def own(path: Path, **changes: object) -> Path:
    content = {"graph": asdict(SMALL), "heads": {"first": ["a0.h1"]}, "edges": ["input->a0.h1<v>", "a0.h1->logits"]}
    path.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value is not None}))
    return path


def test_a_reference_of_ones_own(tmp_path: Path) -> None:
    reference = cf.reference(own(tmp_path / "mine.json", model="tiny"))
    assert (reference.name, reference.model, reference.graph) == ("mine", "tiny", SMALL)
    assert reference.circuit.edges == ["input->a0.h1<v>", "a0.h1->logits"]
    assert reference.heads == {"first": ("a0.h1",)} and reference.direct == 1
    only_heads = cf.Reference.from_file(own(tmp_path / "heads.json", edges=None, heads={"x": ["a1.h0"]}))
    assert only_heads.n_edges == 0 and np.flatnonzero(only_heads.head_mask).tolist() == [SMALL.head(1, 0)]


@pytest.mark.parametrize("format", ["circuitfind", "eap-ig"])
def test_a_circuits_file_is_a_reference(tmp_path: Path, format: str) -> None:
    circuit = cf.Circuit.of(SMALL, ["input->a0.h1<v>", "a0.h1->m1", "m1->logits"])
    circuit.save(tmp_path / "circuit.json", format=format)  # type: ignore[arg-type]
    reference = cf.reference(tmp_path / "circuit.json")
    assert reference.circuit == circuit and reference.heads == {} and reference.name == "circuit"
    assert np.flatnonzero(reference.head_mask).tolist() == [SMALL.head(0, 1)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heads": {"first": ["a0.h2"]}}, "no head 'a0.h2'"),
        ({"heads": {"first": ["m0"]}}, "no head 'm0'"),
        ({"edges": ["a1.h0->a0.h1<q>"]}, "runs backwards"),
        ({"graph": {"n_layers": 2}}, "n_heads"),
        ({"edge": []}, "edge"),
        ({"attention_only": True, "edges": ["m0->logits"]}, "does not have"),
    ],
)
def test_errors_name_the_file_and_the_thing(tmp_path: Path, changes: dict, said: str) -> None:
    path = own(tmp_path / "mine.json", **changes)
    with pytest.raises(FileError, match=said) as error:
        cf.reference(path)
    assert str(path) in str(error.value)


def test_unknown_names_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="did you mean 'greater-than'"):
        cf.reference("greater-then")
    with pytest.raises(FileError, match="given by name or path, not by a int"):
        cf.reference(3)  # type: ignore[arg-type]
    with pytest.raises(FileError, match="Known: ioi, greater-than, docstring"):
        cf.reference("pronouns")
    with pytest.raises(FileError, match="no such file"):
        cf.reference(str(tmp_path / "nowhere.json"))
