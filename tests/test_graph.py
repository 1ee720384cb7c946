"""Names and index arithmetic: the field's edge counts, names there and back, errors that say what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from circuitfind.errors import FileError
from circuitfind.graph import Graph

GPT2 = Graph(12, 12, 12, 768)
SMALL = {
    "sequential": Graph(2, 3, 3, 12),
    "parallel": Graph(2, 3, 3, 12, parallel=True),
    "grouped": Graph(3, 4, 2, 16),
    "one key/value head": Graph(2, 4, 1, 16),
    "grouped parallel": Graph(2, 6, 2, 24, parallel=True),
    "smallest": Graph(1, 1, 1, 4),
}
small = pytest.mark.parametrize("graph", SMALL.values(), ids=SMALL)


@pytest.mark.parametrize(
    ("graph", "writers", "readers", "edges"),
    [
        (GPT2, 157, 445, 32_491),
        (Graph(12, 12, 12, 768, parallel=True), 157, 445, 32_347),  # Pythia-160m
        (Graph(6, 8, 8, 512, parallel=True), 55, 151, 3_580),  # Pythia-70m
        (Graph(24, 14, 2, 896).ungrouped(), 361, 1_033, 179_749),  # Qwen2.5-0.5B
        (Graph(26, 8, 4, 2304).ungrouped(), 235, 651, 74_218),  # Gemma-2-2B
        (Graph(32, 32, 8, 4096).ungrouped(), 1_057, 3_105, 1_592_881),  # Llama-3.1-8B
        (Graph(48, 25, 25, 1600), 1_249, 3_649, 2_235_025),  # GPT-2 XL
    ],
)
def test_counts_of_the_field(graph: Graph, writers: int, readers: int, edges: int) -> None:
    assert (graph.n_writers, graph.n_readers, graph.n_edges) == (writers, readers, edges)


@pytest.mark.parametrize(
    ("graph", "edges"),
    [
        (Graph(24, 14, 2, 896), 79_813),  # Qwen2.5-0.5B
        (Graph(26, 8, 4, 2304), 50_610),  # Gemma-2-2B
        (Graph(32, 32, 8, 4096), 805_681),  # Llama-3.1-8B
        (Graph(5, 8, 4, 64), 1_701),  # stories260K
    ],
)
def test_grouped_counts(graph: Graph, edges: int) -> None:
    assert graph.n_edges == edges


def spelled_out(graph: Graph) -> list[str]:
    """Every edge's name, by nested loops over the definition."""
    names, writers = [], ["input"]
    kv = "h" if graph.n_heads == graph.n_kv_heads else "kv"
    for layer in range(graph.n_layers):
        heads = [f"a{layer}.h{head}" for head in range(graph.n_heads)]
        readers = [f"{head}<q>" for head in heads]
        readers += [f"a{layer}.{kv}{g}<{kind}>" for kind in "kv" for g in range(graph.n_kv_heads)]
        names += [f"{writer}->{reader}" for reader in readers for writer in writers]
        names += [f"{writer}->m{layer}" for writer in (writers if graph.parallel else writers + heads)]
        writers = [*writers, *heads, f"m{layer}"]
    return names + [f"{writer}->logits" for writer in writers]


@small
def test_names_and_their_order(graph: Graph) -> None:
    names = spelled_out(graph)
    assert graph.names(graph.real) == names
    assert graph.n_edges == len(names) == len(set(names))
    assert graph.n_nodes == len(graph.node_names) == graph.n_writers + 1
    assert graph.reader_names[-1] == graph.node_names[-1] == "logits"


@small
def test_every_name_round_trips(graph: Graph) -> None:
    for name in spelled_out(graph):
        u, r = graph.edge(name)
        assert graph.edge_name(u, r) == name
        assert graph.real[u, r] and u < graph.limits[r]
        assert graph.names(graph.mask([name])) == [name]
    assert np.array_equal(graph.mask(spelled_out(graph)), graph.real)


@small
def test_readers_taken_apart(graph: Graph) -> None:
    for index, name in enumerate(graph.reader_names):
        layer, kind, head = graph.reader(index)
        if kind == "logits":
            assert (name, layer) == ("logits", graph.n_layers)
            continue
        prefix = "h" if kind == "q" or graph.group == 1 else "kv"
        assert name == (f"m{layer}" if kind == "mlp" else f"a{layer}.{prefix}{head}<{kind}>")
        slot = graph.readers(layer, kind)
        assert slot.start + head == index < slot.stop
        assert graph.limits[index] == graph.reads(layer, kind)
        assert graph.readers(layer, "all").start <= index < graph.readers(layer, "all").stop
        assert (index in range(*graph.readers(layer, "qkv").indices(graph.n_readers))) == (kind != "mlp")


@small
def test_what_a_reader_serves(graph: Graph) -> None:
    group = graph.n_heads // graph.n_kv_heads
    for index, name in enumerate(graph.reader_names):
        layer, kind, head = graph.reader(index)
        if kind in ("k", "v"):
            expected = {f"a{layer}.h{h}" for h in range(graph.n_heads) if h // group == head}
        else:
            expected = {name.removesuffix("<q>")}
        assert {graph.node_names[i] for i in np.flatnonzero(graph.serves[index])} == expected


@small
def test_writers_by_index(graph: Graph) -> None:
    for index, name in enumerate(graph.writer_names):
        assert graph.writer(name) == index
        layer = graph.layer_of(index)
        assert layer == (-1 if name == "input" else int(name.split(".")[0][1:]))
        if name.startswith("m"):
            assert graph.mlp(layer) == index
        elif name != "input":
            assert graph.head(layer, int(name.split("h")[1])) == index
            assert graph.heads(layer).start <= index < graph.heads(layer).stop


@pytest.mark.parametrize(
    ("graph", "name", "message"),
    [
        (GPT2, "a0.h1", "'a0.h1' is not an edge: write it as WRITER->READER, such as 'a0.h1->m2'"),
        (GPT2, "a0.h1=>m2", "is not an edge: write it as"),
        (GPT2, "head3->m2", "edge 'head3->m2': 'head3' is not a writer's name (such as a11.h11, m11)"),
        (GPT2, "a0.h1->x", "edge 'a0.h1->x': 'x' is not a reader's name (such as m11, logits)"),
        (GPT2, "logits->m2", "'logits' is not a writer's name"),
        (GPT2, "input->a0.h1", "has no reader 'a0.h1': did you mean 'a0.h1<q>'?"),
        (GPT2, "a0.h12->m2", "this graph (12 layers, 12 heads) has no writer 'a0.h12'"),
        (GPT2, "input->m12", "this graph (12 layers, 12 heads) has no reader 'm12'"),
        (GPT2, "input->a3.kv0<k>", "has no reader 'a3.kv0<k>'"),
        (GPT2, "m2->a2.h0<q>", "edge 'm2->a2.h0<q>' runs backwards: 'a2.h0<q>' is computed before 'm2'"),
        (GPT2, "m2->m2", "runs backwards"),
        (SMALL["parallel"], "a1.h0->m1", "edge 'a1.h0->m1' runs backwards"),
        (SMALL["grouped"], "input->a1.h3<k>", "are grouped, name the key/value head (a0.kv0 to a0.kv1)"),
        (SMALL["grouped"], "input->a1.kv2<k>", "this graph (3 layers, 4 heads on 2 key/value heads) has no reader"),
        (SMALL["grouped"], "a1.kv0->logits", "'a1.kv0' is not a writer's name"),
    ],
)
def test_errors_say_what_is_wrong(graph: Graph, name: str, message: str) -> None:
    with pytest.raises(FileError) as caught:
        graph.edge(name)
    assert message in str(caught.value) and name in str(caught.value)
    with pytest.raises(FileError):
        graph.mask(["input->logits", name])


def test_unknown_writers_are_named() -> None:
    with pytest.raises(FileError, match="has no writer 'm12'"):
        GPT2.writer("m12")
    with pytest.raises(FileError, match="'logits' is not a writer's name"):
        GPT2.writer("logits")


@pytest.mark.parametrize("sizes", [(0, 4, 4), (2, 0, 1), (2, 4, 3), (2, 4, 8), (2, 4, 0)])
def test_impossible_graphs_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(FileError, match="no such graph"):
        Graph(*sizes, 16)


@pytest.mark.shared
def test_edges_of_a_published_file(shared: Path) -> None:
    """GPT-2 small's edges as EAP-IG writes them, all 32,491."""
    content = json.loads((shared / "conformance/eap-ig/gpt2_ioi_mib_example.json").read_text())
    assert set(content["edges"]) == set(GPT2.names(GPT2.real))
