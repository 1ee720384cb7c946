"""The EAP-IG library's files and MIB's folders: round trips, order, signs, grouped heads, known faults, wrong input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import circuitfind as cf
from circuitfind.cli.app import main
from circuitfind.errors import FileError
from circuitfind.export import mib
from circuitfind.export.eap_ig import cells
from circuitfind.graph import Graph

PLAIN, PARALLEL, GROUPED = Graph(2, 3, 3, 6), Graph(2, 2, 2, 4, parallel=True), Graph(2, 4, 2, 8)
SMALL = Graph(1, 1, 1, 2)  # one head: the case that broadcasting breaks on
FORMS = ["json", "pt"]


def random_scores(graph: Graph, seed: int = 0) -> cf.Scores:
    values = np.random.default_rng(seed).standard_normal((graph.n_writers, graph.n_readers)).astype(np.float32)
    return cf.Scores(graph, values)


def literal_edges(graph: Graph) -> list[str]:
    """Edge names as the library builds its graph: node by node, in nested loops."""
    edges, stream = [], ["input"]
    for layer in range(graph.n_layers):
        heads = [f"a{layer}.h{head}" for head in range(graph.n_heads)]
        if graph.parallel:
            for writer in stream:
                edges += [f"{writer}->{head}<{letter}>" for head in heads for letter in "qkv"]
                edges.append(f"{writer}->m{layer}")
            stream += heads
        else:
            edges += [f"{writer}->{head}<{letter}>" for writer in stream for head in heads for letter in "qkv"]
            stream += heads
            edges += [f"{writer}->m{layer}" for writer in stream]
        stream.append(f"m{layer}")
    return edges + [f"{writer}->logits" for writer in stream]


# -------------------------------------------------------------------- what is written
@pytest.mark.parametrize("graph", [PLAIN, PARALLEL, SMALL], ids=str)
def test_json_as_the_library_writes_it(graph: Graph, tmp_path: Path) -> None:
    scores = random_scores(graph)
    circuit = scores.top(graph.n_edges // 3, prune=False)
    raw = json.loads(circuit.save(tmp_path / "a.json", format="eap-ig").read_text())
    assert list(raw) == ["cfg", "nodes", "edges"]
    assert list(raw["cfg"].items()) == [
        ("n_layers", graph.n_layers),
        ("n_heads", graph.n_heads),
        ("parallel_attn_mlp", graph.parallel),
        ("d_model", graph.d_model),
    ]
    assert list(raw["nodes"]) == list(graph.node_names) and list(raw["edges"]) == literal_edges(graph)
    for name, edge in raw["edges"].items():
        assert list(edge) == ["score", "in_graph"]
        assert edge == {"score": scores[name], "in_graph": name in circuit}, "the effect unchanged: positive = keep"
    assert all(node == {"in_graph": name in circuit.nodes or name == "logits"} for name, node in raw["nodes"].items())


def test_pt_is_of_plain_tensors(tmp_path: Path) -> None:
    scores = random_scores(PLAIN)
    circuit = scores.top(9)
    raw = torch.load(circuit.save(tmp_path / "a.pt", format="eap-ig"), weights_only=True)
    arrays = ["edges_scores", "edges_in_graph", "nodes_in_graph"]
    assert list(raw) == ["cfg", "src_nodes", "dst_nodes", *arrays]
    letters = [[f"a{layer}.h{head}<{letter}>" for letter in "qkv" for head in range(3)] for layer in range(2)]
    assert raw["dst_nodes"] == [*letters[0], "m0", *letters[1], "m1", "logits"]
    assert raw["src_nodes"] == ["input", "a0.h0", "a0.h1", "a0.h2", "m0", "a1.h0", "a1.h1", "a1.h2", "m1"]
    assert [raw[key].dtype for key in arrays] == [torch.float32, torch.bool, torch.bool]
    assert np.array_equal(raw["edges_scores"], np.where(PLAIN.real, scores.values, 0)), "0 where there is no edge"
    assert np.array_equal(raw["edges_in_graph"], circuit.mask)


# -------------------------------------------------------------------- round trips
@pytest.mark.parametrize("graph", [PLAIN, PARALLEL, SMALL], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_round_trips(graph: Graph, form: str, tmp_path: Path) -> None:
    scores = random_scores(graph)
    path = scores.save(tmp_path / f"scores.{form}", format="eap-ig")
    again = cf.Scores.open(path)
    assert again.graph == graph and again.to_dict() == scores.to_dict()
    assert len(cf.Circuit.open(path)) == 0
    circuit = scores.top(5, prune=False)
    opened = cf.Circuit.open(circuit.save(tmp_path / f"circuit.{form}", format="eap-ig"))
    assert opened == circuit and np.array_equal(opened.estimates[graph.real], scores.values[graph.real])  # type: ignore[index]
    assert cf.Scores.open(tmp_path / f"circuit.{form}", sign="change").to_dict() == {
        name: -value for name, value in scores.to_dict().items()
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("graph", [PLAIN, GROUPED], ids=str)
def test_node_scores_are_written_and_read(graph: Graph, form: str, tmp_path: Path) -> None:
    """The library itself cannot write these as JSON: it asks `logits` for a score."""
    nodes = cf.NodeScores(graph, np.linspace(-1, 1, graph.n_writers, dtype=np.float32))
    path = nodes.save(tmp_path / f"nodes.{form}", format="eap-ig")
    assert cf.NodeScores.open(path).to_dict() == nodes.to_dict()
    assert cf.NodeScores.open(path, sign="change")["m1"] == -nodes["m1"]
    if form == "json":
        raw = json.loads(path.read_text())["nodes"]
        assert raw["logits"] == {"in_graph": True} and raw["m0"] == {"in_graph": False, "score": nodes["m0"]}


def test_node_scores_that_a_file_lacks(tmp_path: Path) -> None:
    nodes = cf.NodeScores(PLAIN, np.ones(PLAIN.n_writers, dtype=np.float32))
    path = nodes.save(tmp_path / "nodes.json", format="eap-ig")
    raw = json.loads(path.read_text())
    del raw["nodes"]["a1.h1"]["score"]
    path.write_text(json.dumps(raw))
    with pytest.raises(FileError, match=r"'a1.h1' has no score"):
        cf.NodeScores.open(path)
    with pytest.raises(FileError, match="holds no node scores"):
        cf.NodeScores.open(random_scores(PLAIN).save(tmp_path / "edges.json", format="eap-ig"))
    with pytest.raises(FileError, match="positions first"):
        by_position = cf.NodeScores(PLAIN, np.ones((PLAIN.n_writers, 3), dtype=np.float32))
        by_position.save(tmp_path / "x.json", format="eap-ig")


def test_unlisted_edges_are_out_and_scores_may_be_missing(tmp_path: Path) -> None:
    raw = {"cfg": config(PLAIN), "nodes": {}, "edges": {"m0->logits": {"in_graph": True}}}
    path = written(tmp_path, raw)
    circuit = cf.Circuit.open(path)
    assert circuit.edges == ["m0->logits"] and circuit.estimates is None
    with pytest.raises(FileError, match="holds no edge scores"):
        cf.Scores.open(path)
    raw["edges"]["m1->logits"] = {"in_graph": False, "score": 2.5}
    scores = cf.Scores.open(written(tmp_path, raw))
    assert {name: value for name, value in scores.to_dict().items() if value} == {"m1->logits": 2.5}


def test_a_circuit_without_scores_is_written_with_membership(tmp_path: Path) -> None:
    circuit = cf.Circuit.of(PLAIN, ["input->m0", "m0->logits"])
    raw = json.loads(circuit.save(tmp_path / "a.json", format="eap-ig").read_text())
    assert {name for name, edge in raw["edges"].items() if edge["score"] == 1.0} == set(circuit.edges)
    assert all(edge["score"] == float(edge["in_graph"]) for edge in raw["edges"].values())


def test_what_is_no_number(tmp_path: Path) -> None:
    """NaN is legal in Python's JSON: unknown in a circuit, refused as scores, never written."""
    raw = {"cfg": config(PLAIN), "nodes": {}, "edges": {"m0->logits": {"in_graph": True, "score": math.nan}}}
    circuit = cf.Circuit.open(written(tmp_path, raw))
    assert circuit.rows()[0].estimate is None
    with pytest.raises(FileError, match=r"a.json: 'm0->logits' has no score that is a number"):
        cf.Scores.open(tmp_path / "a.json")
    again = circuit.save(tmp_path / "b.json", format="eap-ig").read_text()
    assert "NaN" not in again and json.loads(again)["edges"]["m0->logits"] == {"score": 0.0, "in_graph": True}


def test_cells_that_are_no_edges_are_passed_over(tmp_path: Path) -> None:
    """The library's own cut by nodes marks whole rows, cells that are no edges too."""
    path = random_scores(PLAIN).save(tmp_path / "a.pt", format="eap-ig")
    raw = torch.load(path, weights_only=True)
    raw["edges_in_graph"][:] = True
    raw["edges_scores"][~torch.tensor(PLAIN.real)] = math.nan
    torch.save(raw, path)
    assert cf.Circuit.open(path) == cf.Circuit.full(PLAIN)
    assert len(cf.Scores.open(path)) == PLAIN.n_edges


# -------------------------------------------------------------------- grouped keys and values
@pytest.mark.parametrize("form", FORMS)
def test_a_grouped_circuit_goes_out_to_every_query_head_and_comes_back(form: str, tmp_path: Path) -> None:
    circuit = random_scores(GROUPED).top(12, prune=False)
    path = circuit.save(tmp_path / f"a.{form}", format="eap-ig")
    wide = cf.Circuit.open(path)
    assert wide.graph == GROUPED.ungrouped()
    expected = set()
    for edge in circuit.edges:
        writer, reader = edge.split("->")
        if ".kv" not in reader:
            expected.add(edge)
            continue
        layer, shared, letter = reader[1], int(reader.split(".kv")[1][0]), reader[-2]
        expected |= {f"{writer}->a{layer}.h{shared * 2 + i}<{letter}>" for i in range(2)}
    assert set(wide.edges) == expected
    assert cf.Circuit.open(path, graph=GROUPED) == circuit


def test_grouped_scores_come_in_as_sums_and_do_not_go_out(tmp_path: Path) -> None:
    wide = random_scores(GROUPED.ungrouped())
    path = wide.save(tmp_path / "a.json", format="eap-ig")
    scores = cf.Scores.open(path, graph=GROUPED)
    for letter in "kv":
        both = wide[f"m0->a1.h2<{letter}>"] + wide[f"m0->a1.h3<{letter}>"]
        assert scores[f"m0->a1.kv1<{letter}>"] == pytest.approx(both, rel=1e-6)
    assert scores["m0->a1.h3<q>"] == wide["m0->a1.h3<q>"] and scores["m0->m1"] == wide["m0->m1"]
    # an edge into a shared head is in if it is in for any of its heads
    one = cf.Circuit.of(wide.graph, ["m0->a1.h3<k>"])
    assert cf.Circuit.open(one.save(tmp_path / "b.json", format="eap-ig"), graph=GROUPED).edges == ["m0->a1.kv1<k>"]
    with pytest.raises(FileError, match=r"2 heads share each key and value.*scores\.top"):
        scores.save(tmp_path / "c.json", format="eap-ig")
    assert not (tmp_path / "c.json").exists()
    with pytest.raises(FileError, match=r"for 2 layers, 4 heads \(d_model 8\), the given graph has 2 layers, 3 heads"):
        cf.Scores.open(path, graph=PLAIN)


# -------------------------------------------------------------------- wrong input
def config(graph: Graph) -> dict[str, Any]:
    shape = {"n_layers": graph.n_layers, "n_heads": graph.n_heads}
    return {**shape, "parallel_attn_mlp": graph.parallel, "d_model": graph.d_model}


def written(folder: Path, raw: dict[str, Any]) -> Path:
    path = folder / "a.json"
    path.write_text(json.dumps(raw))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cfg": {"n_layers": 2}}, "cfg: no n_heads, parallel_attn_mlp, d_model"),
        ({"cfg": config(PLAIN) | {"n_heads": 0}}, "no such graph"),
        ({"cfg": config(PLAIN) | {"parallel_attn_mlp": 1.5}}, "parallel_attn_mlp true or false"),
        ({"edges": {"m1->m0": {"score": 1, "in_graph": True}}}, "runs backwards"),
        ({"edges": {"m0->a1.h3<q>": {"score": 1, "in_graph": True}}}, "no reader 'a1.h3<q>'"),
        ({"edges": {"m0->m1": {"score": 1}}}, "'m0->m1': in_graph"),
        ({"edges": {"m0->m1": {"score": "1", "in_graph": True}}}, "'m0->m1': its score is not a number: '1'"),
        ({"edges": []}, "edges are not listed by name"),
        ({"nodes": {"a0.h3": {"in_graph": True}}}, "no writer 'a0.h3'"),
        ({"nodes": {"m0": {"in_graph": True, "neurons": [True, False]}}}, "'m0' is in .* some of its neurons"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = written(tmp_path, {"cfg": config(PLAIN), "nodes": {}, "edges": {}, **changes})
    for kind in (cf.Circuit, cf.Scores):
        with pytest.raises(FileError, match=said) as error:
            kind.open(path)
        assert str(error.value).startswith(str(path))


def test_neurons_that_are_all_in_are_a_node(tmp_path: Path) -> None:
    nodes = {"m0": {"in_graph": True, "neurons": [True] * 6}, "m1": {"in_graph": False, "neurons": [False] * 6}}
    raw = {"cfg": config(PLAIN), "nodes": nodes, "edges": {"m0->logits": {"score": 1, "in_graph": True}}}
    assert cf.Circuit.open(written(tmp_path, raw)).edges == ["m0->logits"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.pop("dst_nodes"), "not an EAP-IG graph: no dst_nodes"),
        (lambda raw: raw["src_nodes"].reverse(), "src_nodes are not the names"),
        (lambda raw: raw.update(edges_scores=torch.zeros(2, 2)), r"edges_scores is not a tensor of shape \[9, 21\]"),
        (lambda raw: raw.update(neurons_in_graph=torch.eye(9, 6) > 0, nodes_in_graph=torch.ones(9)), "its neurons"),
        (lambda raw: raw.update(cfg=3), "cfg: no n_layers"),
        (lambda raw: raw.update(extra=Path("x")), "not a file of plain tensors"),
    ],
)
def test_broken_pt_files_are_named(tmp_path: Path, change: Callable[[dict], object], said: str) -> None:
    path = random_scores(PLAIN).save(tmp_path / "a.pt", format="eap-ig")
    raw = torch.load(path, weights_only=True)
    change(raw)
    torch.save(raw, path)
    with pytest.raises(FileError, match=said) as error:
        cf.Circuit.open(path)
    assert str(error.value).startswith(str(path))


def test_mistakes_of_format_and_sign(tmp_path: Path) -> None:
    scores = random_scores(PLAIN)
    own = scores.save(tmp_path / "own.safetensors")
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: scores.save(tmp_path / "a.json", format="eapig"), "format='eapig'"),  # type: ignore[arg-type]
        (lambda: scores.save(tmp_path / "a.txt", format="eap-ig"), r"end in .json or .pt"),
        (lambda: cf.Scores.open(own, sign="change"), "own.safetensors: sign='change' is for EAP-IG's files"),
        (lambda: cf.Scores.open(own, sign="loss"), "sign='loss' is unknown"),  # type: ignore[arg-type]
        (lambda: cf.Circuit.open(tmp_path / "nowhere.pt", sign="change"), "no such file"),
        (lambda: cf.Scores.open(tmp_path / "nowhere.json"), "no such file"),
    ]
    for call, said in cases:
        with pytest.raises(FileError, match=said):
            call()
    assert cf.Scores.open(own).to_dict() == scores.to_dict()


# -------------------------------------------------------------------- MIB's folders
def test_mib_takes_the_best_edges_that_fit() -> None:
    graph = Graph(2, 12, 3, 24)  # grouped: an edge into a shared key or value counts four times
    scores = random_scores(graph)
    total = graph.ungrouped().n_edges
    for percent, mask in zip(mib.PERCENT, mib.circuits(graph, scores.ranked("signed")), strict=True):
        chosen, spent = set(), 0
        for name, _ in sorted(scores.to_dict().items(), key=lambda item: -item[1]):
            spent += 4 if ".kv" in name else 1
            if spent > int(percent / 100 * total):
                break
            chosen.add(name)
        assert set(graph.names(mask)) == chosen


def submission(root: Path) -> None:
    small, gemma = Graph(12, 12, 12, 24), Graph(26, 8, 4, 16)
    mask = np.zeros(small.real.shape, dtype=np.float32)
    mask[0, -1] = 0.5
    cf.Scores(small, mask).save(root / "ioi_gpt2" / "importances.json", format="eap-ig")
    mib.write_circuits(root, "arc-easy_gemma2", gemma, random_scores(gemma).ranked("signed"))


def test_a_submission_passes_its_check(tmp_path: Path) -> None:
    submission(tmp_path)
    assert [(entry.name, entry.holds, entry.problem) for entry in mib.check(tmp_path)] == [
        ("arc-easy_gemma2", "9 circuits", ""),
        ("ioi_gpt2", "importances", ""),
    ]
    sizes = [len(cf.Circuit.open(tmp_path / "arc-easy_gemma2" / f"{p:g}.pt")) for p in mib.PERCENT]
    # a shared key or value costs two edges: what is left over is less than that
    assert all(0 <= int(p / 100 * 74218) - size < 2 for p, size in zip(mib.PERCENT, sizes, strict=True))


def test_what_a_check_finds(tmp_path: Path) -> None:
    submission(tmp_path)
    full = json.loads((tmp_path / "ioi_gpt2" / "importances.json").read_text())
    for name in ("arc_easy_llama3", "mcqa_gpt2", "ioi_qwen2.5", "arithmetic-addition_llama3"):
        (tmp_path / name).mkdir()
    (tmp_path / "ioi_qwen2.5" / "importances.json").write_text(json.dumps(full))
    one = cf.Circuit.of(Graph(12, 12, 12, 24), ["input->logits"])
    one.save(tmp_path / "ioi_gpt2" / "importances.json", format="eap-ig")
    (tmp_path / "arc-easy_gemma2" / "0.1.pt").unlink()
    problems = {entry.name: entry.problem for entry in mib.check(tmp_path)}
    assert "write TASK_MODEL, the task one of ioi" in problems["arc_easy_llama3"]
    assert "mcqa on qwen2.5, gemma2, llama3, not on 'gpt2'" in problems["mcqa_gpt2"]
    assert "24 layers and 14 heads, this is 12 layers, 12 heads" in problems["ioi_qwen2.5"]
    assert "holds no scores" in problems["ioi_gpt2"]
    assert "8 files" in problems["arc-easy_gemma2"] and "0 files" in problems["arithmetic-addition_llama3"]
    assert problems["."] == "no folder that MIB could evaluate"


def test_a_tenth_empty_circuit_is_taken_and_a_large_one_is_not(tmp_path: Path) -> None:
    graph = Graph(12, 12, 12, 24)
    mib.write_circuits(tmp_path, "ioi_gpt2", graph, random_scores(graph).ranked("signed"))
    cf.Circuit.of(graph, []).save(tmp_path / "ioi_gpt2" / "0.pt", format="eap-ig")
    entries = mib.check(tmp_path)
    assert entries[0] == ("ioi_gpt2", "10 circuits", "")
    assert [entry.problem for entry in entries[1:]] == [
        f"a submission needs at least two {w}s" for w in ("task", "model")
    ]
    random_scores(graph).top(40, prune=False).save(tmp_path / "ioi_gpt2" / "0.1.pt", format="eap-ig")
    assert "40 edges, but at most 0.1% are allowed, 32" in mib.check(tmp_path)[0].problem


# -------------------------------------------------------------------- the command line
def test_export_to_and_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scores = random_scores(PLAIN)
    scores.save("scores.safetensors")
    scores.top(7).save("circuit.json")
    assert main(["export", "scores.safetensors", "--to", "eap-ig", "--out", "made"]) == 0
    assert cf.Scores.open("made/scores.eap-ig.json").to_dict() == scores.to_dict()
    assert main(["export", "circuit.json", "--out", "circuit.pt"]) == 0
    assert cf.Circuit.open("circuit.pt") == scores.top(7)
    assert main(["export", "made/scores.eap-ig.json", "--sign", "change", "--out", "back.safetensors"]) == 0
    assert cf.Scores.open("back.safetensors")["m0->m1"] == -scores["m0->m1"]
    assert main(["export", "scores.safetensors", "--to", "json", "--top", "7", "--out", "cut.json"]) == 0
    assert cf.Circuit.open("cut.json") == scores.top(7)
    capsys.readouterr()
    for words, said in (
        (("scores.safetensors", "--out", "a.json"), "--top"),
        (
            ("circuit.json", "--to", "safetensors", "--out", "x"),
            "circuit.json: a circuit without a score for every edge",
        ),
        (("circuit.json", "--to", "eap-ig", "--out", "a.svg"), "does not end in .json or .pt"),
        (("scores.safetensors", "--to", "mib", "--out", "sub"), "--entry"),
        (("scores.safetensors", "--to", "mib", "--entry", "ioi_gpt2", "--out", "sub"), "12 layers and 12 heads"),
    ):
        assert main(["export", *words]) == 2
        assert said in capsys.readouterr().err


def test_export_writes_and_checks_mib_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    random_scores(Graph(12, 12, 12, 24)).save("gpt2.safetensors")
    random_scores(Graph(24, 14, 2, 28)).save("qwen.safetensors")
    assert main(["export", "gpt2.safetensors", "--to", "mib", "--entry", "ioi_gpt2", "--out", "sub"]) == 0
    assert main(["mib", "sub"]) == 1, "one task and one model are too few"
    assert "at least two models" in capsys.readouterr().out
    assert main(["export", "qwen.safetensors", "--to", "mib", "--entry", "mcqa_qwen2.5", "--out", "sub"]) == 0
    assert sorted(path.name for path in Path("sub/mcqa_qwen2.5").iterdir()) == sorted(f"{p:g}.pt" for p in mib.PERCENT)
    capsys.readouterr()
    assert main(["mib", "sub", "--json"]) == 0
    assert [entry["problem"] for entry in json.loads(capsys.readouterr().out)["entries"]] == ["", ""]


# -------------------------------------------------------------------- the field's own file
@pytest.mark.shared
@pytest.mark.parametrize("form", FORMS)
def test_the_benchmarks_example_round_trip(shared: Path, tmp_path: Path, form: str) -> None:
    golden = shared / "conformance/eap-ig/gpt2_ioi_mib_example.json"
    circuit = cf.Circuit.open(golden)
    assert (len(circuit), circuit.graph.n_edges, len(circuit.nodes)) == (756, 32491, 81 + 0)
    again = cf.Circuit.open(circuit.save(tmp_path / f"a.{form}", format="eap-ig"))
    text = again.save(tmp_path / "b.json", format="eap-ig").read_text()
    assert json.loads(text) == json.loads(golden.read_text()) and text == golden.read_text()


@pytest.mark.shared
def test_the_benchmarks_example_by_sign(shared: Path) -> None:
    """A name mover supports the behaviour, a negative one opposes it: the file holds changes."""
    scores = cf.Scores.open(shared / "conformance/eap-ig/gpt2_ioi_mib_example.json", sign="change")
    assert scores["a9.h9->logits"] == pytest.approx(0.2815, abs=1e-4)
    assert scores["a10.h7->logits"] == pytest.approx(-0.1964, abs=1e-4)
    assert scores.graph.edge_name(*scores.ranked("signed")[0].tolist()) == "a9.h9->logits"


def test_the_files_order_is_every_edge_once() -> None:
    graph = Graph(12, 12, 12, 768)
    writers, readers = cells(graph)
    assert len(writers) == 32491 and graph.real[writers, readers].all()
    assert len(set(zip(writers.tolist(), readers.tolist(), strict=True))) == 32491
