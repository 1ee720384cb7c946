"""Files and pictures of circuits: round trips, what a drawing shows, and what is said when something is wrong."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import networkx
import numpy as np
import pytest

from circuitfind.circuit import Circuit
from circuitfind.errors import FileError
from circuitfind.export import arrows, circuit_file, graphs, picture
from circuitfind.export.graphs import EdgeRow
from circuitfind.graph import Graph
from circuitfind.record import Record

GRAPH = Graph(3, 4, 4, 16)
GROUPED = Graph(2, 4, 2, 16)
EDGES = ["input->a0.h1<q>", "input->a0.h1<k>", "a0.h1->m0", "m0->a2.h3<v>", "input->m1", "m1->logits", "a2.h3->logits"]
needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz's dot is not installed")


def circuit(graph: Graph = GRAPH, edges: list[str] = EDGES) -> Circuit:
    """Effects that fall off; the second edge opposes; the first three are measured, the third with the other sign."""
    estimates = np.full((graph.n_writers, graph.n_readers), np.nan, dtype=np.float32)
    exact = estimates.copy()
    for i, name in enumerate(edges):
        estimates[graph.edge(name)] = (-1 if i == 1 else 1) * 2.0**-i
        if i < 3:
            exact[graph.edge(name)] = (-1 if i else 1) * 2.0**-i
    return Circuit.of(graph, edges, estimates=estimates, exact=exact, record=Record(model="tiny", seed=7))


def arrows_of(source: str) -> dict[tuple[str, str], list[str]]:
    """`{(source, target): [attributes, ...]}` of the visible arrows in Graphviz text."""
    found: dict[tuple[str, str], list[str]] = {}
    for start, end, attributes in re.findall(r'^\s*"([^"]+)" -> "([^"]+)" \[(.*)\]$', source, re.MULTILINE):
        if "style=invis" not in attributes:
            found.setdefault((start, end), []).append(attributes)
    return found


def ranks_of(source: str) -> list[list[str]]:
    """Boxes of every rank, in the order in which the anchors are chained."""
    ranks = {}
    for line in re.findall(r"^\s*\{ rank=same; (.*) \}$", source, re.MULTILINE):
        anchor, *boxes = re.findall(r'"([^"]+)" \[', line)
        ranks[anchor] = boxes
    chain = next(line for line in source.splitlines() if "style=invis" in line)
    return [ranks[anchor] for anchor in re.findall(r'"(rank\d+)"', chain)]


# ------------------------------------------------------------------------------------------------ circuit.json
def test_json_round_trip(tmp_path: Path) -> None:
    made = circuit()
    made.facts.update(faithfulness=0.9, interval=(0.8, float("nan")), n=np.int64(3), values=np.array([1.0, np.inf]))
    path = made.save(tmp_path / "new" / "folder" / "circuit.json")
    back = Circuit.open(path)
    assert back == made and back.record == made.record and back.edges == made.edges
    np.testing.assert_array_equal(np.isnan(back.exact), np.isnan(made.exact))
    for edge in EDGES:
        assert back.estimates[GRAPH.edge(edge)] == made.estimates[GRAPH.edge(edge)]
    assert back.facts == {"faithfulness": 0.9, "interval": [0.8, None], "n": 3, "values": [1.0, None]}
    assert [file.name for file in path.parent.iterdir()] == ["circuit.json"]  # no temporary file is left


def test_json_is_strict_json_by_name(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = circuit().save(tmp_path / "c.json").read_text()
    raw = json.loads(text, parse_constant=refuse)
    assert (raw["format"], raw["version"]) == ("circuitfind.circuit", 1)
    assert {row["edge"]: row["exact"] for row in raw["edges"]}["m1->logits"] is None
    assert raw["nodes"] == circuit().nodes
    assert sum(line.lstrip().startswith('{"edge"') for line in text.splitlines()) == len(EDGES)


def test_json_empty_and_grouped(tmp_path: Path) -> None:
    empty = Circuit.empty(GRAPH)
    assert Circuit.open(empty.save(tmp_path / "e.json")) == empty
    grouped = circuit(GROUPED, ["input->a1.kv0<k>", "a1.h0->logits"])
    assert Circuit.open(grouped.save(tmp_path / "g.json")) == grouped


def valid() -> dict:
    return {"format": circuit_file.FORMAT, "version": 1, "graph": asdict(GRAPH), "edges": [{"edge": "input->m1"}]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other.thing"}, "format 'other.thing', expected 'circuitfind.circuit'"),
        ({"version": 2}, "newer circuitfind (version 2"),
        ({"version": "1"}, "version: input should be a valid integer, not '1'"),
        ({"version": True}, "version True of circuitfind.circuit is unknown"),
        ({"edges": [{"edge": "a9.h0->m2"}]}, "no writer 'a9.h0'"),
        ({"edges": [{"edge": "m2->a0.h0<q>"}]}, "runs backwards"),
        ({"edges": [{"edge": "input->m1"}, {"edge": "input->m1"}]}, "'input->m1' is listed twice"),
        ({"edges": [{"edge": "input->m1", "exact": "big"}]}, "edges[0].exact: input should be a valid number"),
        ({"edges": [{"estimate": 1.0}]}, "edges[0].edge: field required"),
        ({"edges": "all"}, "edges: input should be a valid list, not 'all'"),
        ({"graph": {"n_layers": 3}}, "graph.n_heads: field required (and 2 more)"),
        ({"graph": {"n_layers": 3, "n_heads": 4, "n_kv_heads": 3, "d_model": 8}}, "no such graph"),
        ({"record": {"seed": "zero"}}, "record.seed: input should be a valid integer"),
    ],
)
def test_json_errors_name_file_and_problem(tmp_path: Path, change: dict, said: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(valid()))
    assert len(circuit_file.read(path).rows) == 1  # without the change the file is fine
    path.write_text(json.dumps({**valid(), **change}))
    with pytest.raises(FileError) as error:
        circuit_file.read(path)
    message = str(error.value)
    assert said in message and message.startswith(str(path))
    assert "\n" not in message and "pydantic" not in message


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"{oops", "not JSON"), (b"\xff\xfe", "not JSON"), (b"[1]", "a JSON list"), (b'{"a": NaN}', "NaN")],
)
def test_json_not_a_circuit(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=re.escape(said)):
        circuit_file.read(path)


def test_json_missing_and_unwritable(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        circuit_file.read(tmp_path / "none.json")
    with pytest.raises(FileError, match="this is a folder: name a file in it"):
        circuit_file.read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        circuit().save(tmp_path / "file" / "c.json")


def test_json_keeps_the_old_file_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = circuit().save(tmp_path / "c.json")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(FileError, match="disk is full"):
        Circuit.empty(GRAPH).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------ networkx, GraphML
def test_networkx_attributes() -> None:
    graph = circuit().to_networkx()
    assert graph.nodes["a2.h3"] == {"kind": "head", "layer": 2, "head": 3}
    assert graph.nodes["m1"] == {"kind": "mlp", "layer": 1}
    assert (graph.nodes["input"]["kind"], graph.nodes["logits"]["kind"]) == ("input", "logits")
    assert graph.number_of_edges() == len(EDGES)
    assert set(graph["input"]["a0.h1"]) == {"a0.h1<q>", "a0.h1<k>"}
    edge = graph.edges["a0.h1", "m0", "m0"]
    assert edge == {"edge": "a0.h1->m0", "kind": "mlp", "estimate": 0.25, "exact": -0.25, "effect": -0.25}
    assert "exact" not in graph.edges["input", "m1", "m1"]


def test_networkx_shared_heads_reach_every_query_head_inside() -> None:
    edges = ["input->a1.kv0<k>", "input->a1.h0<q>", "a1.h0->logits", "a1.h1->logits"]
    graph = circuit(GROUPED, edges).to_networkx()
    assert {(u, v) for u, v, key in graph.edges(keys=True) if key == "a1.kv0<k>"} == {
        ("input", "a1.h0"),
        ("input", "a1.h1"),
    }
    alone = circuit(GROUPED, ["input->a1.kv1<v>"]).to_networkx()
    assert alone.nodes["a1.kv1"] == {"kind": "kv", "layer": 1, "head": 1}


def test_graphml_round_trip(tmp_path: Path) -> None:
    made = circuit()
    back = networkx.read_graphml(made.to_graphml(tmp_path / "sub" / "c.graphml"), force_multigraph=True)
    straight = made.to_networkx()
    assert dict(back.nodes(data=True)) == dict(straight.nodes(data=True))
    assert {data["edge"]: (u, v, data) for u, v, data in back.edges(data=True)} == {
        data["edge"]: (u, v, data) for u, v, data in straight.edges(data=True)
    }


def test_graphml_leaves_unknown_values_out(tmp_path: Path) -> None:
    rows = [EdgeRow(0, GRAPH.edge("input->m1")[1], float("nan"), None)]
    path = graphs.write_graphml(tmp_path / "c.graphml", graphs.to_networkx(GRAPH, rows, ["input", "m1"]))
    (found,) = (data for *_, data in networkx.read_graphml(path).edges(data=True))
    assert found.keys() & {"estimate", "exact", "effect"} == set()


# ------------------------------------------------------------------------------------------------ Graphviz source
def test_dot_has_every_edge_once_with_its_style() -> None:
    source = circuit().to_dot()
    found = arrows_of(source)
    assert sum(map(len, found.values())) == len(EDGES)
    assert {pair for pair in found} == {(u, r.partition("<")[0]) for u, r in (name.split("->", 1) for name in EDGES)}
    (q, k) = sorted(found["input", "a0.h1"], key=lambda text: "<k>" in text)
    assert picture.COLORS["q"] in q and picture.COLORS["k"] in k and picture.COLORS["v"] in found["m0", "a2.h3"][0]
    dashed = {pair for pair, texts in found.items() for text in texts if "style=dashed" in text}
    assert dashed == {("input", "a0.h1"), ("a0.h1", "m0")} and "dashed" not in q  # by the exact effect where known
    assert "estimate +0.25\\nexact -0.25" in found["a0.h1", "m0"][0]
    assert "exact not measured" in found["m1", "logits"][0]


def test_dot_marks_measured_edges_and_only_those() -> None:
    heads = {
        text: re.search(r"arrowhead=(\w+)", text)[1]
        for texts in arrows_of(circuit().to_dot()).values()
        for text in texts
    }
    for text, head in heads.items():
        assert head == ("onormal" if "not measured" in text else "normal")
    assert sorted(heads.values()) == ["normal"] * 3 + ["onormal"] * 4


def test_dot_leaves_room_inside_a_hollow_head() -> None:
    """Graphviz draws it with the arrow's pen; a head of size 1 is 10 points long."""
    for texts in arrows_of(circuit().to_dot()).values():
        for text in texts:
            if "onormal" in text:
                width, size = (float(re.search(rf"{name}=([\d.]+)", text)[1]) for name in ("penwidth", "arrowsize"))
                assert 10 * size >= 3.5 * width and size >= 0.7


def test_dot_folds_large_circuits_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    effects = {"input->a0.h0<q>": 3.0, "input->a0.h1<q>": -1.0, "a0.h0->m0": 0.5, "a0.h0->a2.h1<v>": 0.25}
    made = Circuit.of(GRAPH, [*effects, "a0.h1->a2.h3<k>", "m0->logits"], exact=np.full(GRAPH.real.shape, np.nan))
    for edge, value in effects.items():
        made.exact[GRAPH.edge(edge)] = value
    found = arrows_of(made.to_dot(fold=True))
    pairs = [("input", "a0"), ("a0", "m0"), ("a0", "a2"), ("m0", "logits")]
    assert sorted(found) == sorted(pairs) and made.to_dot() != made.to_dot(fold=True)
    (text,) = found["input", "a0"]
    assert "input to a0\\n2 edges, sum +2, of magnitudes 4\\nstrongest input->a0.h0<q> +3" in text
    assert picture.COLORS["q"] in text and "arrowhead=normal" in text
    (text,) = found["a0", "a2"]
    assert picture.COLORS["mlp"] in text and "arrowhead=onormal" in text  # keys and values; one is not measured
    assert len(arrows.folded(arrows.arrows(GRAPH, made.rows()), 2)[0]) == 2
    monkeypatch.setattr(picture, "MOST_DRAWN", 5)
    assert made.to_dot() == made.to_dot(fold=True) and "6 edges, folded by layer" in made.to_dot()
    monkeypatch.setattr(picture, "MOST_DRAWN", 6)
    assert made.to_dot() == made.to_dot(fold=False)


def test_dot_frames_groups() -> None:
    source = circuit().with_group("early\x01<movers>", ["a0.h1", "m0"]).to_dot()
    framed = re.findall(r'"([\w.]+)" \[[^\]]*color="#CC79A7" penwidth=3', source)
    assert sorted(framed) == ["a0.h1", "m0"] and "early &lt;movers&gt;" in source  # no control characters


def test_dot_width_grows_with_the_effect() -> None:
    found = arrows_of(circuit().to_dot())
    width = {pair: max(float(re.search(r"penwidth=([\d.]+)", t)[1]) for t in texts) for pair, texts in found.items()}
    assert width["input", "a0.h1"] > width["a0.h1", "m0"] > width["m0", "a2.h3"] > width["a2.h3", "logits"]
    shares = {arrow.edge: arrow.share for arrow in arrows.arrows(GRAPH, circuit().rows())}
    assert (shares[EDGES[0]], shares[EDGES[2]], shares[EDGES[4]]) == pytest.approx((1, 0.5, 0.25))
    assert list(shares) == EDGES[::-1]  # weakest first


def test_dot_ranks_heads_below_mlp() -> None:
    assert ranks_of(circuit().to_dot()) == [["input"], ["a0.h1"], ["m0"], ["m1"], ["a2.h3"], ["logits"]]
    parallel = Graph(3, 4, 4, 16, parallel=True)
    edges = ["input->a0.h1<q>", "input->m0", "a0.h1->logits", "m0->logits"]
    assert ranks_of(circuit(parallel, edges).to_dot()) == [["input"], ["a0.h1", "m0"], ["logits"]]


def test_dot_shared_heads_have_a_box_of_their_own() -> None:
    edges = ["input->a1.kv0<k>", "input->a1.kv0<v>", "input->a1.h0<q>", "a1.h0->logits", "a1.h1->logits"]
    source = circuit(GROUPED, edges).to_dot()
    assert ranks_of(source) == [["input"], ["a1.kv0"], ["a1.h0", "a1.h1"], ["logits"]]
    found = arrows_of(source)
    stubs = {pair for pair, texts in found.items() if "dir=none" in texts[0]}
    assert stubs == {("a1.kv0", "a1.h0"), ("a1.kv0", "a1.h1")}
    assert len(found["input", "a1.kv0"]) == 2 and ("input", "a1.h1") not in found


def test_dot_is_deterministic_and_escapes() -> None:
    assert circuit().to_dot(title="x") == circuit().to_dot(title="x")
    assert "<b>a &lt; b &amp; &quot;c&quot;</b>" in circuit().to_dot(title='a < b & "c"')
    assert picture.quote('a"b\\c\nd\x00') == '"a\\"b\\\\c\\nd"'


def test_dot_without_effects_and_empty() -> None:
    plain = Circuit.of(GRAPH, EDGES).to_dot()
    assert "supports" not in plain and "style=dashed" not in plain and "penwidth=nan" not in plain
    empty = Circuit.empty(GRAPH).to_dot()
    assert "empty circuit" in empty and arrows_of(empty) == {} and ranks_of(empty) == [["input"], ["logits"]]
    assert "empty circuit" not in plain


def test_pen_thins_out_in_a_crowd() -> None:
    assert arrows.pen(0.1, 400).width < arrows.pen(0.1, 20).width
    assert arrows.pen(0.1, 400).opacity < arrows.pen(0.1, 20).opacity
    for before, after in pairwise(arrows.pen(share / 10, 400) for share in range(11)):
        assert before.width < after.width and before.opacity < after.opacity


# ------------------------------------------------------------------------------------------------ rendering
@needs_dot
def test_render_svg_shows_every_node_and_edge_bottom_up(tmp_path: Path) -> None:
    path = circuit().render(tmp_path / "new" / "c.svg", title="A < B")
    text = path.read_text()
    root = ElementTree.fromstring(text)
    texts = {"".join(item.itertext()): float(item.get("y", 0)) for item in root.iter() if item.tag.endswith("text")}
    assert set(circuit().nodes) <= set(texts) and "A < B" in texts
    order = [texts[name] for name in ("input", "a0.h1", "m0", "m1", "a2.h3", "logits")]
    assert order == sorted(order, reverse=True)  # in SVG y grows downwards
    titles = [value for item in root.iter() for name, value in item.attrib.items() if name.endswith("}title")]
    for edge in EDGES:
        assert any(title.startswith(edge + "\n") for title in titles), edge


@needs_dot
@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("SVG", b"<?xml")])
def test_render_formats(tmp_path: Path, ending: str, magic: bytes) -> None:
    assert circuit().render(tmp_path / f"c.{ending}").read_bytes().startswith(magic)


@needs_dot
@pytest.mark.parametrize("made", [Circuit.empty(GRAPH), Circuit.full(GRAPH), Circuit.full(GROUPED)])
def test_render_extremes(tmp_path: Path, made: Circuit) -> None:
    assert made.render(tmp_path / "c.svg").stat().st_size > 500


def test_render_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileError, match=r"c\.bmp: pictures end in \.svg, \.png, \.pdf"):
        circuit().render(tmp_path / "c.bmp")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileError, match="Install Graphviz") as error:
        circuit().render(tmp_path / "c.svg")
    assert ".dot text" in str(error.value) and not (tmp_path / "c.svg").exists()


@needs_dot
def test_render_reports_what_graphviz_says(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"Graphviz says: .*syntax error"):
        picture.render(tmp_path / "c.svg", "digraph {")
