"""Other tools' files: Neuronpedia's graphs written, ACDC's and auto-circuit's results read, tables, the hub.

What these formats are was read from the tools' own code: circuit-tracer 0.5.0 (PyPI; `frontend/graph_models.py`, and
`attribution_graph/util-cg.js`, which prepares a file for the page), Neuronpedia (`apps/webapp/app/api/graph/
graph-schema.json`, `[modelId]/graph/utils.ts`), auto-circuit 1.0.1 (PyPI; `types.py`, `utils/graph_utils.py`) and ACDC
(`acdc/TLACDCExperiment.py`: `save_edges`, `save_subgraph`; `acdc/acdc_utils.py`: `TorchIndex`).
"""

from __future__ import annotations

import base64
import json
import pickle
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
import torch

import circuitfind as cf
from circuitfind.cli.app import main
from circuitfind.cli.inputs import of_model
from circuitfind.errors import FileError
from circuitfind.graph import Graph
from circuitfind.record import Record

PLAIN, GROUPED = Graph(3, 4, 4, 16), Graph(3, 4, 2, 16)
RECORD = Record(model="org/model", task="ioi", metric="logit_diff", method="eap", n_examples=7)


def scores(graph: Graph = PLAIN, seed: int = 0) -> cf.Scores:
    values = np.random.default_rng(seed).normal(size=graph.real.shape).astype(np.float32)
    return cf.Scores(graph, np.where(graph.real, values, 0).astype(np.float32), RECORD)


# -------------------------------------------------------------------- Neuronpedia, circuit-tracer
NODE = {
    "node_id": str,
    "feature": int,
    "layer": str,
    "ctx_idx": int,
    "feature_type": str,
    "jsNodeId": str,
    "clerp": str,
}
META = {"slug": str, "scan": str, "transcoder_list": list, "prompt_tokens": list, "prompt": str}


def checked(path: Path) -> dict[str, Any]:
    """The file, if their models take it and their page draws it."""
    raw = json.loads(path.read_text())
    assert set(raw) == {"metadata", "qParams", "nodes", "links"}
    assert all(type(raw["metadata"][name]) is kind for name, kind in META.items())
    assert "node_threshold" not in raw["metadata"], "a number, or absent; 0 or null is not"
    assert set(raw["qParams"]) == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    for node in raw["nodes"]:
        assert all(type(node[name]) is kind for name, kind in NODE.items())
        assert 0 <= node["ctx_idx"] < len(raw["metadata"]["prompt_tokens"])
        assert "error" not in node["feature_type"]
        if node["feature_type"] == "logit":
            assert float(node["clerp"].split("(p=")[1].split(")")[0]) == 1, "the page splits it so"
    ids = [node["node_id"] for node in raw["nodes"]]
    assert len(set(ids)) == len(ids)
    pages = {(node["layer"], node["feature"], node["ctx_idx"]) for node in raw["nodes"]}
    assert len(pages) == len(ids), "what the page tells nodes apart by"
    assert {end for link in raw["links"] for end in (link["source"], link["target"])} <= set(ids)
    pairs = [(link["source"], link["target"]) for link in raw["links"]]
    assert len(set(pairs)) == len(pairs), "the page knows one link from node to node"
    assert all(isinstance(link["weight"], float) for link in raw["links"])
    assert set(raw["qParams"]["pinnedIds"]) <= set(ids)
    return raw


@pytest.mark.parametrize("graph", [PLAIN, GROUPED, Graph(3, 4, 4, 16, mixers=(1,))])
def test_a_circuit_as_a_graph_of_neuronpedia(graph: Graph, tmp_path: Path) -> None:
    circuit = scores(graph).top(60)
    raw = checked(circuit.save(tmp_path / "Some v1.2.neuronpedia.json"))
    assert raw["metadata"]["slug"] == "some-v1-2" and raw["metadata"]["scan"] == "org/model"
    names = {node["node_id"]: node["clerp"] for node in raw["nodes"]}
    assert set(names.values()) - {'Output "logit_diff" (p=1.000)'} == set(circuit.nodes) - {"logits"}
    told = {edge: weight for link in raw["links"] for edge, weight in link["edges"].items()}
    assert told == {edge: pytest.approx(scores(graph)[edge]) for edge in circuit.edges}
    for link in raw["links"]:
        assert link["weight"] == pytest.approx(sum(link["edges"].values()))
        assert all(edge.startswith(f"{names[link['source']]}->") for edge in link["edges"])
    layers = {node["clerp"]: node["layer"] for node in raw["nodes"]}
    assert layers["input"] == "E" and all(layers[name] == name[1] for name in circuit.nodes if name[0] in "am")
    assert raw["metadata"]["generation_settings"]["metric"] == "logit_diff"


def test_groups_are_supernodes(tmp_path: Path) -> None:
    circuit = scores().top(60)
    inside, absent = circuit.nodes[1:4], (set(PLAIN.node_names) - set(circuit.nodes)).pop()
    grouped = circuit.with_group("</script>", inside[:2]).with_group("late", [*inside[1:], absent])
    grouped = grouped.with_group("x", [absent])
    raw = checked(grouped.save(tmp_path / "c.neuronpedia.json"))
    ids = {node["clerp"]: node["node_id"] for node in raw["nodes"]}
    one, two, three = (ids[name] for name in inside)
    assert raw["qParams"]["supernodes"] == [["</script>", one, two], ["late", three]]


def test_edges_at_places_keep_their_columns(tmp_path: Path) -> None:
    values = np.zeros((3, *PLAIN.real.shape), dtype=np.float32)
    for place, edge, effect in (
        (0, "input->a0.h1<k>", 1.0),
        (0, "input->a0.h1<v>", -3.0),
        (2, "input->a0.h1<q>", 2.0),
        (2, "a0.h1->m1", 4.0),
        (2, "m1->logits", 5.0),
    ):
        values[place][PLAIN.edge(edge)] = effect
    placed = cf.PlacedScores(PLAIN, values, RECORD, ("name", "verb", "end"))
    raw = checked(placed.save(tmp_path / "places.neuronpedia.json"))
    assert raw["metadata"]["prompt_tokens"] == ["name", "verb", "end"]
    at = {node["node_id"]: (node["clerp"], node["ctx_idx"]) for node in raw["nodes"]}
    links = {(at[link["source"]], at[link["target"]]): link["weight"] for link in raw["links"]}
    assert links == {
        (("input", 0), ("a0.h1 reads", 0)): -2.0,
        (("input", 2), ("a0.h1", 2)): 2.0,
        (("a0.h1 reads", 0), ("a0.h1", 2)): -2.0,  # from token to token inside the head
        (("a0.h1", 2), ("m1", 2)): 4.0,
        (("m1", 2), ('Output "logit_diff" (p=1.000)', 2)): 5.0,
    }
    assert [where for name, where in at.values() if name == "input"] == [0, 1, 2], "the page names columns by these"


def test_one_place_has_a_second_column(tmp_path: Path) -> None:
    """Their page takes the least width of all columns but the first: of one column that is no number, and no node has
    a place."""
    values = np.zeros((1, *PLAIN.real.shape), dtype=np.float32)
    for edge in ("input->a0.h1<q>", "a0.h1->m1", "m1->logits"):
        values[0][PLAIN.edge(edge)] = 1
    placed = cf.PlacedScores(PLAIN, values, RECORD, ("end",))
    raw = checked(placed.save(tmp_path / "place.neuronpedia.json", 3))
    assert raw["metadata"]["prompt_tokens"] == ["", "end"]
    assert {node["ctx_idx"] for node in raw["nodes"]} == {0, 1} and len(raw["links"]) == 3
    named = {node["node_id"]: node for node in raw["nodes"]}
    assert all(named[end]["ctx_idx"] == 1 for link in raw["links"] for end in (link["source"], link["target"]))


# -------------------------------------------------------------------- ACDC
class TorchIndex:
    """As in ACDC's code."""

    def __init__(self, parts: list[int | None]) -> None:
        self.as_index = tuple(slice(None) if part is None else part for part in parts)
        self.hashable_tuple = tuple(parts)


def acdc_edge(edge: str, last: int = 2) -> tuple[str, TorchIndex, str, TorchIndex]:
    """ACDC's key of an edge: receiver, its index, sender, its index."""
    writer, reader = edge.split("->")
    ends = []
    for name, is_reader in ((reader, True), (writer, False)):
        layer, _, head = name[1:].partition(".h")
        if name[0] == "a":
            hook = f"hook_{name[-2]}_input" if is_reader else "attn.hook_result"
            ends += [f"blocks.{layer}.{hook}", TorchIndex([None, None, int(head.partition("<")[0])])]
        else:
            hooks = {"logits": f"blocks.{last}.hook_resid_post", "input": "blocks.0.hook_resid_pre"}
            own = f"blocks.{layer}.{'hook_mlp_in' if is_reader else 'hook_mlp_out'}"
            ends += [hooks.get(name, own), TorchIndex([None])]
    return tuple(ends)  # type: ignore[return-value]


@pytest.fixture()
def acdc(monkeypatch: pytest.MonkeyPatch) -> None:
    """ACDC's module, to pickle objects of its class."""
    module = types.ModuleType("acdc.acdc_utils")
    monkeypatch.setattr(TorchIndex, "__module__", "acdc.acdc_utils")
    module.TorchIndex = TorchIndex  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "acdc", types.ModuleType("acdc"))
    monkeypatch.setitem(sys.modules, "acdc.acdc_utils", module)


EDGES = ["input->a0.h1<q>", "input->m0", "a0.h1->a1.h3<v>", "m0->a2.h0<k>", "a1.h3->logits", "a2.h0->m2", "m2->logits"]
INSIDE = ("blocks.0.attn.hook_q", (None, None, 1), "blocks.0.hook_q_input", (None, None, 1))


@pytest.mark.usefixtures("acdc")
def test_what_acdc_saves_is_a_circuit(tmp_path: Path) -> None:
    edges = [(acdc_edge(edge), 0.25 * at) for at, edge in enumerate(EDGES)]
    inside = tuple(part if isinstance(part, str) else TorchIndex(list(part)) for part in INSIDE)
    (tmp_path / "edges.pkl").write_bytes(pickle.dumps([*edges, (inside, 0.5)]))
    found = cf.open(tmp_path / "edges.pkl")
    assert isinstance(found, cf.Circuit) and set(found.edges) == set(EDGES)
    assert found.estimates[found.graph.edge("a2.h0->m2")] == 1.25 and found.record.method == "acdc"
    subgraph = OrderedDict(
        ((key[0], key[1].hashable_tuple, key[2], key[3].hashable_tuple), edge != "input->m0")
        for edge, key in ((edge, acdc_edge(edge)) for edge in EDGES)
    )
    torch.save(subgraph | {INSIDE: True}, tmp_path / "subgraph.pth")
    whole = cf.Circuit.open(tmp_path / "subgraph.pth", graph=PLAIN)
    assert whole == cf.Circuit.of(PLAIN, [edge for edge in EDGES if edge != "input->m0"]) and whole.estimates is None
    shared = cf.open(tmp_path / "edges.pkl", graph=GROUPED)
    assert "a0.h1->a1.kv1<v>" in shared.edges and shared.graph == GROUPED


@pytest.mark.usefixtures("acdc")
def test_verbs_take_files_of_other_tools_over_the_models_graph(tmp_path: Path) -> None:
    (tmp_path / "edges.pkl").write_bytes(pickle.dumps([(acdc_edge(edge), 0.5) for edge in EDGES]))
    torch.save(prune_scores(scores()), tmp_path / "scores.pkl")
    model: Any = types.SimpleNamespace(graph=GROUPED)
    assert of_model(cf.Circuit, tmp_path / "edges.pkl", model).graph == GROUPED
    assert of_model(cf.Scores, tmp_path / "scores.pkl", model).graph == GROUPED
    model.graph = Graph(2, 4, 4, 16)
    with pytest.raises(FileError, match="has no reader 'a2"):
        of_model(cf.Circuit, tmp_path / "edges.pkl", model)
    with pytest.raises(FileError, match="this file is for 3 layers"):
        of_model(cf.Scores, tmp_path / "scores.pkl", model)
    assert main(["export", str(tmp_path / "scores.pkl"), "--top", "60", "--out", str(tmp_path / "cut.json")]) == 0
    assert cf.Circuit.open(tmp_path / "cut.json").edges == scores().top(60).edges


@pytest.mark.usefixtures("acdc")
def test_embeddings_of_tokens_and_positions_are_one_input(tmp_path: Path) -> None:
    key = acdc_edge("input->m0")
    both = [((*key[:2], hook, key[3]), 0.5) for hook in ("hook_embed", "hook_pos_embed")]
    (tmp_path / "e.pkl").write_bytes(pickle.dumps([*both, (acdc_edge("m0->logits", last=0), 0.1)]))
    found = cf.open(tmp_path / "e.pkl")
    assert found.edges == ["input->m0", "m0->logits"] and found.estimates[found.graph.edge("input->m0")] == 1.0


def test_pickles_of_more_than_data_are_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "e.pkl").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(FileError, match=r"e.pkl: it names .*, and only plain data are read"):
        cf.open(tmp_path / "e.pkl")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "f.pkl").write_bytes(pickle.dumps({"some": [1, 2]}))
    with pytest.raises(FileError, match="not an EAP-IG graph"):
        cf.open(tmp_path / "f.pkl")
    torch.save([Evil()], tmp_path / "g.pt")
    with pytest.raises(FileError, match=r"g.pt: .*: it names code, and only plain data are read"):
        cf.open(tmp_path / "g.pt")
    assert not (tmp_path / "ran").exists()


PART = ("blocks.0.hook_q_input", (None, None, 1), "blocks.0.hook_resid_pre", (None,))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"cbuiltins\nslice\n(tR.", "not a file of plain tensors"),
        (pickle.dumps([(PART, "x")]), "damaged, or of another version"),
        (pickle.dumps([(PART, 1.0), 3]), "damaged, or of another version"),
        (pickle.dumps([(("blocks.99999999.hook_q_input", *PART[1:]), 1.0)]), "no such graph: 100000000 layers"),
    ],
)
def test_damaged_files_are_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "d.pkl").write_bytes(content)
    with pytest.raises(FileError, match=f"d.pkl: {said}"):
        cf.open(tmp_path / "d.pkl")


# -------------------------------------------------------------------- auto-circuit
def prune_scores(found: cf.Scores, positions: int = 0) -> dict[str, torch.Tensor]:
    """Scores as auto-circuit holds them: by receiver, the writers before it in order."""
    graph, made = found.graph, {}
    for layer in range(graph.n_layers):
        for kind, name in (("q", "q_input"), ("k", "k_input"), ("v", "v_input"), ("mlp", "mlp_in")):
            part = found.values[: graph.reads(layer, kind if kind == "mlp" else "qkv"), graph.readers(layer, kind)].T
            made[f"blocks.{layer}.hook_{name}"] = torch.tensor(part[0] if kind == "mlp" else part)
    made[f"blocks.{graph.n_layers - 1}.hook_resid_post"] = torch.tensor(found.values[:, -1])
    return {name: torch.stack([part / positions] * positions) for name, part in made.items()} if positions else made


@pytest.mark.parametrize("graph", [PLAIN, Graph(3, 4, 4, 16, parallel=True)])
def test_scores_of_auto_circuit(graph: Graph, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = scores(graph)
    torch.save(prune_scores(made), tmp_path / "one.pkl")
    found = cf.open(tmp_path / "one.pkl", graph=graph)
    assert isinstance(found, cf.Scores) and found.to_dict() == made.to_dict() and found.graph == graph
    assert not found.record.is_effect, "what the scores are depends on the algorithm"
    torch.save({"IOI": {"EAP": prune_scores(made), "ACDC": prune_scores(made, positions=2)}}, tmp_path / "cache.pkl")
    several = cf.open(tmp_path / "cache.pkl")
    assert list(several) == ["IOI, EAP", "IOI, ACDC"]
    assert several["IOI, ACDC"].values == pytest.approx(made.values)
    with pytest.raises(FileError, match=r"holds 2 sets of scores, which cf.open gives by name: IOI, EAP; IOI, ACDC"):
        cf.Scores.open(tmp_path / "cache.pkl")
    assert main(["show", str(tmp_path / "cache.pkl")]) == 2
    assert "holds 2 sets of scores (IOI, EAP; IOI, ACDC): save one in Python" in capsys.readouterr().err


def test_what_auto_circuits_acdc_never_removed_ranks_first(tmp_path: Path) -> None:
    made = prune_scores(scores())
    made["blocks.1.hook_mlp_in"][3] = torch.inf
    torch.save(made, tmp_path / "a.pkl")
    found = cf.Scores.open(tmp_path / "a.pkl")
    assert found.graph.edge_name(*found.ranked()[0].tolist()) == f"{PLAIN.writer_names[3]}->m1"
    torch.save({"EAP": made, "more": 3}, tmp_path / "c.pkl")
    with pytest.raises(FileError, match=r"c.pkl: damaged"):
        cf.open(tmp_path / "c.pkl")
    made["blocks.1.hook_mlp_in"] = made["blocks.1.hook_mlp_in"][1:]
    torch.save(made, tmp_path / "b.pkl")
    with pytest.raises(FileError, match=r"b.pkl: blocks.1.hook_mlp_in has scores of shape \[9\], not \[10\]"):
        cf.open(tmp_path / "b.pkl")


# -------------------------------------------------------------------- importances of MIB's leaderboard
def test_importances_with_minus_infinity(tmp_path: Path) -> None:
    """As the EAP-IG library ranks: -inf where there is no edge; an edge or node of -inf is never in."""
    made = scores()
    path = made.save(tmp_path / "importances.pt", format="eap-ig")
    raw = torch.load(path, weights_only=True)
    raw["edges_scores"][~torch.tensor(PLAIN.real)] = -torch.inf
    torch.save(raw, path)
    assert cf.open(path).to_dict() == made.to_dict()
    raw["edges_scores"][PLAIN.edge("m0->m1")] = -torch.inf
    torch.save(raw, path)
    assert PLAIN.edge_name(*cf.open(path).ranked("signed")[-1].tolist()) == "m0->m1"
    nodes = cf.NodeScores(PLAIN, np.arange(PLAIN.n_writers, dtype=np.float32) - 3, RECORD)
    content = json.loads(nodes.save(tmp_path / "nodes.json", format="eap-ig").read_text())
    content["nodes"]["m2"]["score"] = -float("inf")
    content["edges"] = {name: {**edge, "score": -float("inf")} for name, edge in content["edges"].items()}
    (tmp_path / "nodes.json").write_text(json.dumps(content))
    found = cf.open(tmp_path / "nodes.json")
    assert isinstance(found, cf.NodeScores) and found["a2.h3"] == nodes["a2.h3"]
    assert found.top(PLAIN.n_writers, by="signed")[-1] == "m2"


def test_a_submission_of_a_grouped_query_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores by query head, as `attribute(ungrouped=True)` makes them, are importances as they are."""
    monkeypatch.chdir(tmp_path)
    qwen = scores(Graph(24, 14, 2, 28).ungrouped())
    qwen.save("qwen.safetensors")
    scores(Graph(12, 12, 12, 24)).save("gpt2.safetensors")
    for file, entry in (("qwen", "mcqa_qwen2.5"), ("gpt2", "ioi_gpt2")):
        assert main(["export", f"{file}.safetensors", "--to", "mib", "--entry", entry, "--out", "sub"]) == 0
    assert cf.open("sub/mcqa_qwen2.5").to_dict() == qwen.to_dict()
    capsys.readouterr()
    assert main(["mib", "sub"]) == 0
    assert capsys.readouterr().out.count("importances") == 2
    Path("sub/ioi_gpt2/importances.pt").unlink()
    assert main(["mib", "sub"]) == 1
    assert main(["mib", "nowhere"]) == 2


# -------------------------------------------------------------------- tables, GraphML
def test_tables_of_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    circuit = scores().top(60)
    lines = circuit.save(tmp_path / "c.csv").read_text().splitlines()
    assert lines[0] == "edge,writer,reader,estimate,exact" and len(lines) == len(circuit) + 1
    assert lines[1].endswith(","), "what was not measured is empty"
    assert len(scores().save(tmp_path / "s.csv").read_text().splitlines()) == PLAIN.n_edges + 1
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FileError, match=r"c.parquet: Parquet needs pyarrow: .*python.* -m pip install pyarrow"):
        circuit.save(tmp_path / "c.parquet")


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    circuit = scores().top(60)
    assert parquet.read_table(circuit.save(tmp_path / "c.parquet")).to_pydict() == circuit.columns()


def test_graphml_says_where_the_circuit_comes_from(tmp_path: Path) -> None:
    circuit = scores().top(5)
    circuit.facts.update(faithfulness=0.9, interval=[0.8, 1.0], accuracy=float("nan"), note="a\x01b")
    about = networkx.read_graphml(circuit.save(tmp_path / "c.graphml")).graph
    assert (about["model"], about["task"], about["metric"]) == ("org/model", "ioi", "logit_diff")
    assert (about["n_layers"], about["parallel"], about["faithfulness"]) == (3, False, 0.9)
    assert "accuracy" not in about and about["note"] == "a b", "what XML cannot hold"


def test_edges_at_places_are_drawn_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.zeros((2, *PLAIN.real.shape), dtype=np.float32)
    path = cf.PlacedScores(PLAIN, values, RECORD, ("a", "b")).save(tmp_path / "placed.safetensors")
    for form in ("mib", "eap-ig", "csv"):
        assert main(["export", str(path), "--to", form, "--out", str(tmp_path)]) == 2
        assert "scores of edges by position or span can only be drawn: use --to dot, svg" in capsys.readouterr().err


def test_export_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    scores().top(7).save("circuit.json")
    scores().save("scores.safetensors")
    assert main(["export", "circuit.json", "--to", "neuronpedia", "--entry", "gpt2-small"]) == 0
    raw = checked(Path("circuitfind-out/circuit.neuronpedia.json"))
    assert raw["metadata"]["scan"] == "gpt2-small" and raw["metadata"]["slug"] == "circuit"
    assert main(["export", "scores.safetensors", "--top", "9", "--out", "x.neuronpedia.json"]) == 0
    checked(Path("x.neuronpedia.json"))
    assert main(["export", "circuit.json", "--out", "c.graphml"]) == 0
    capsys.readouterr()
    assert main(["export", "c.graphml"]) == 2
    assert (
        "c.graphml: not JSON: this is another kind of file: give a result's .json or .safetensors"
        in capsys.readouterr().err
    )
    assert main(["export", "circuit.json", "--out", "c.csv"]) == 0
    assert main(["export", "scores.safetensors", "--out", "s.csv"]) == 0
    assert len(Path("s.csv").read_text().splitlines()) == PLAIN.n_edges + 1


# -------------------------------------------------------------------- the hub
class Hub(BaseHTTPRequestHandler):
    """A stand-in of the hub: what `create_repo`, `create_commit` and `hf_hub_download` ask of it."""

    files: dict[str, bytes]

    def _answer(self, content: Any, code: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self._answer({"url": f"http://{self.headers['Host']}/datasets/{asked['organization']}/{asked['name']}"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]
            self._answer({"files": modes})
        else:
            for line in map(json.loads, body.splitlines()):
                if line.get("key") == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/datasets/me/ioi/commit/{'1' * 40}"
            self._answer({"success": True, "commitOid": "1" * 40, "commitUrl": url})

    def do_GET(self) -> None:
        name = self.path.partition("/resolve/")[2].partition("/")[2]
        if self.path.startswith("/api/"):
            self._answer({"id": "me/ioi", "sha": "1" * 40, "siblings": []})
        elif name in self.files:
            self._answer(self.files[name], ETag='"abc"', X_Repo_Commit="1" * 40)
        else:
            self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture()
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    import huggingface_hub.constants as constants

    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    yield Hub.files
    server.shutdown()
    server.server_close()


def test_to_the_hub_and_back(hub: dict[str, bytes]) -> None:
    circuit = scores().top(60)
    circuit.facts.update(faithfulness=0.912345, interval=[0.8, 1.0], accuracy=1.0)
    assert circuit.push_to_hub("me/ioi", token="t").endswith(f"/datasets/me/ioi/commit/{'1' * 40}")
    assert set(hub) == {"circuit.json", "README.md"}
    card = hub["README.md"].decode()
    assert card.startswith("---\ntags:\n- circuitfind\n") and 'cf.Circuit.from_hub("me/ioi")' in card
    for said in (
        "| model | org/model |",
        "| faithfulness | 0.9123 |",
        "| interval | 0.8 to 1 |",
        f"| {circuit.edges[0].replace('<', '&lt;')} |",
    ):
        assert said in card
    back = cf.Circuit.from_hub("me/ioi", token="t")
    assert back == circuit and back.record == circuit.record and back.facts == circuit.facts


def test_what_the_hub_refuses_is_said(hub: dict[str, bytes]) -> None:
    with pytest.raises(FileError, match=r"me/none at the Hugging Face hub: .*404"):
        cf.Circuit.from_hub("me/none", token="t")
    with pytest.raises(FileError, match="no such/name/of a repo at the Hugging Face hub"):
        scores().top(3).push_to_hub("no such/name/of a repo", token="t")
