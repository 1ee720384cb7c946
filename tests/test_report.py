"""The page and its drawing: nothing from outside, nothing unescaped, every edge and number where it belongs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from circuitfind.circuit import Circuit
from circuitfind.evaluation.verify import EdgeCheck
from circuitfind.graph import Graph
from circuitfind.record import Record
from circuitfind.report import layout, plots
from circuitfind.report.drawing import draw
from circuitfind.report.explorer import compared
from circuitfind.report.page import Attention, ExampleRow, ReportData, html, write
from circuitfind.search.found import FrontierPoint

GRAPH = Graph(4, 4, 4, 16)
EVIL = "<script>alert('x')</script> & \"$title\""


class Point(NamedTuple):
    n_edges: int
    faithfulness: float
    stage: str


class Tags(HTMLParser):
    """Collects tags, and holds that every opened one is closed in order."""

    VOID = ("meta", "link", "input", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def named(self, tag: str, part: str = "") -> list[dict[str, str | None]]:
        return [
            attributes for name, attributes in self.found if name == tag and part in (attributes.get("class") or "")
        ]


def some(n_edges: int, graph: Graph = GRAPH, seed: int = 0) -> Circuit:
    """A circuit of random edges, a third of them opposing, every second one measured."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(np.argwhere(graph.real))[:n_edges]
    mask = np.zeros_like(graph.real)
    mask[tuple(chosen.T)] = True
    values = (rng.exponential(size=mask.shape) * rng.choice([-1, 1, 1], size=mask.shape)).astype(np.float32)
    exact = np.where(rng.random(mask.shape) < 0.5, values, np.nan)
    return Circuit(graph, mask, values, exact, Record(model="tiny", metric="logit_diff", settings={"steps": 5}))


def data(circuit: Circuit) -> ReportData:
    return ReportData(
        title="A circuit",
        model="tiny",
        task={"task": EVIL},
        circuit=circuit,
        faithfulness=0.93,
        interval=(0.9, 0.96),
        metric=2.0,
        metric_full=2.2,
        metric_empty=-1.0,
        checks=[
            EdgeCheck("input->m1", 0.5, 0.4),
            EdgeCheck("m1->logits", 0.02, -0.03),
            EdgeCheck("m0->logits", float("nan"), 0.1),
        ],
        correlation=0.9,
        curve=[
            Point(10, 0.2, "grid"),
            Point(100, 1.3, "grid"),
            Point(40, 0.9, "bisection"),
            Point(30, 0.93, "pruning"),
        ],
        tolerance=0.05,
        random=[0.0, 0.1, 0.95],
        beaten=2,
        examples=[ExampleRow(EVIL, " Mary", 3.0, np.float64(2.5), float("nan"))],
        steps=[("score", EVIL)],
        command="circuitfind find --task 'a<b'",
    )


# ------------------------------------------------------------------------------------------------ the page
def test_page_is_self_contained_and_well_formed(tmp_path: Path) -> None:
    text = write(tmp_path / "new" / "report.html", data(some(60))).read_text(encoding="utf-8")
    tags = Tags(text)
    for _, attributes in tags.found:
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert not re.search(r"https?://|@import|url\(", text)
    policy = next(a["content"] for a in tags.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy
    ids = [a["id"] for _, a in tags.found if "id" in a]
    assert len(ids) == len(set(ids))


def test_page_escapes_what_comes_from_outside() -> None:
    text = html(data(some(20)))
    scripts = Tags(text).named("script")
    assert text.count("<script>") == 1 and [tag.get("type") for tag in scripts] == ["application/json", None]
    assert text.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;$title&quot;") == 3
    assert "a&lt;b" in text
    circuit = Circuit(GRAPH, some(3).mask, record=Record(metric=EVIL, bos=EVIL))
    end = "</script><script>alert('x')</script><!--"
    prompt = Attention(EVIL, (EVIL, end), {"a0.h0": bytes(3)})
    hostile = html(ReportData(EVIL, EVIL, {EVIL: EVIL}, circuit, attention=[prompt], attention_note=end))
    assert hostile.count("<script>") == 1 and len(Tags(hostile).named("script")) == 2
    assert content(hostile)["attention"][0]["tokens"] == [EVIL, end] and content(hostile)["note"] == end
    grouped = circuit.with_group(end, ["m0"])
    beside = Circuit(GRAPH, some(5).mask, record=Record(model=end, task=end))
    places = {edge: [(f"{end}{at}", 1.0)] for at, edge in enumerate(circuit.edges)}
    for more in ({"beside": beside}, {"places": places}):
        hostile = html(ReportData("t", "m", {}, grouped, **more))
        assert hostile.count("<script>") == 1 and len(Tags(hostile).named("script")) == 2
        assert content(hostile)["groups"] == {end: ["m0"]}


def test_page_shows_the_numbers() -> None:
    text = html(data(some(60)))
    for said in ("0.93", "95% interval 0.9 to 0.96", "2 of 3 random circuits", "1 with a wrong estimated sign", "+2.5"):
        assert said in text, said
    assert "nan" not in re.sub(r"<(script|style)>.*?</\1>", "", text, flags=re.DOTALL).lower()
    rows = re.findall(r"<tr><td class=\"name\">(.*?)</td>(.*?)</tr>", text)
    assert [(name, "wrong sign" in rest) for name, rest in rows] == [
        ("input-&gt;m1", False),
        ("m1-&gt;logits", True),
        ("m0-&gt;logits", False),
    ]
    assert len(Tags(text).named("th")) == 10 == text.count('<button type="button">')


def test_intervals_are_of_the_level_that_is_given() -> None:
    """In the head, in the data and, by the script, in tooltips, which name no level of their own."""
    page = html(replace(data(some(60)), level=0.9))
    assert "faithfulness, 90% interval" in page and '"level":"90%"' in page and "95%" not in page
    assert re.search(r"<title>the circuit: faithfulness [\d.]+, 90% interval", page)


def test_settings_without_a_value_are_left_out() -> None:
    circuit = replace(some(5), record=Record(settings={"steps": 5, "edges": None}))
    page = html(replace(data(some(5)), circuit=circuit))
    assert "<dt>steps</dt><dd>5</dd>" in page and "<dt>edges</dt>" not in page


def test_page_without_measurements_has_only_what_is_known() -> None:
    bare, full = html(ReportData("t", "m", {}, some(5))), html(data(some(5)))
    for title in ("As a whole", "Faithfulness by size", "Every example", "Steps of the search", "Estimates against"):
        assert f"<h2>{title}" not in bare and f"<h2>{title}" in full
    assert "<h2>The circuit</h2>" in bare and "<h2>Record</h2>" in bare


def test_a_page_of_one_pair_speaks_of_no_held_out_pairs() -> None:
    points = [FrontierPoint(n, 0, *[0.1 * n] * 10) for n in (2, 4)]
    page = {unseen: replace(some(5), facts={"unseen_pairs": unseen}) for unseen in (0, 1)}
    one, two = (html(replace(data(page[unseen]), frontier=points)) for unseen in (0, 1))
    assert "nothing is held out" in one and "held-out pairs" not in one and ">held out<" not in one
    assert two.count("held-out pairs") == 2 and ">held out<" in two


def test_a_comparison_takes_effects_from_whichever_circuit_knows_them() -> None:
    known = some(9)
    bare, other = Circuit(GRAPH, known.mask), replace(known, estimates=known.estimates * 2, exact=None)
    assert compared(bare, known)[0].estimates[known.mask] == pytest.approx(known.estimates[known.mask])
    assert compared(known, other)[0].estimates[known.mask] == pytest.approx(known.estimates[known.mask])


def content(text: str) -> dict[str, Any]:
    """What the page's script is told."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    assert found is not None
    return json.loads(found[1])


# ------------------------------------------------------------------------------------------------ the drawing
@pytest.mark.parametrize("graph", [GRAPH, Graph(4, 4, 2, 16), Graph(4, 4, 4, 16, parallel=True)])
def test_drawing_has_every_node_and_edge_once(graph: Graph) -> None:
    circuit = some(80, graph)
    tags = Tags(draw(graph, circuit.rows(), circuit.nodes))
    boxes = {a["data-name"] for a in tags.named("g", "box")}
    assert set(circuit.nodes) <= boxes and all(".kv" in str(name) for name in boxes - set(circuit.nodes))
    text = draw(graph, circuit.rows(), circuit.nodes)
    titles = re.findall(r"<title>(.*?)\n", text)
    assert sorted(titles) == sorted(name.replace(">", "&gt;").replace("<", "&lt;") for name in circuit.edges)
    arrows = tags.named("g", "arrow")
    rows = circuit.rows()
    assert sum("measured" in str(a["class"]) for a in arrows) == sum(row.exact is not None for row in rows)
    assert sum("opposes" in str(a["class"]) for a in arrows) == sum((row.effect or 0) < 0 for row in rows)
    effect = {graph.edge_name(row.writer, row.reader): abs(row.effect or 0) for row in rows}
    drawn = [effect[str(a["data-edge"])] for a in arrows]
    assert drawn == sorted(drawn) and len(set(drawn)) == len(rows)  # the strongest is painted last
    assert text == draw(graph, circuit.rows(), circuit.nodes)


def test_drawing_of_an_empty_circuit_says_so() -> None:
    text = draw(GRAPH, [], [])
    assert "empty circuit" in text and ">input<" in text and ">logits<" in text
    assert "empty circuit" not in draw(GRAPH, some(3).rows(), some(3).nodes)


def test_layout_keeps_boxes_apart_and_layers_in_order() -> None:
    levels = [["input"], ["a0.h0", "a0.h1", "a0.h2"], ["m0"], ["a1.h0", "a1.h1"], ["logits"]]
    widths = {name: 50.0 for names in levels for name in names}
    links = {("input", name): (1, 1.0) for names in levels[1:] for name in names} | {
        (name, "logits"): (2, 1.0) for names in levels[1:-1] for name in names
    }
    plan = layout.layout(levels, widths, links, lane=6.0)
    for names in levels:
        at = sorted(plan.boxes[name].x for name in names)
        assert all(after - before >= 50 for before, after in pairwise(at))
        assert len({plan.boxes[name].y for name in names}) == 1
    heights = [plan.boxes[names[0]].y for names in levels]
    assert heights == sorted(heights, reverse=True)  # input at the bottom
    for points in plan.paths.values():  # long arrows pass between the boxes, never through them
        for point in points[1:-1]:
            for box in plan.boxes.values():
                assert point.y != box.y or abs(point.x - box.x) >= 25
    assert all(0 <= box.x <= plan.width for box in plan.boxes.values())


def test_layout_removes_crossings_that_can_be_removed() -> None:
    levels = [["a", "b", "c"], ["x", "y", "z"]]
    links = {("a", "z"): (1, 1.0), ("b", "y"): (1, 1.0), ("c", "x"): (1, 1.0)}
    plan = layout.layout(levels, {name: 40.0 for row in levels for name in row}, links, lane=6.0)
    for low, high in links:
        assert plan.boxes[low].x == pytest.approx(plan.boxes[high].x, abs=1)


@pytest.mark.parametrize("graph", [Graph(30, 9, 3, 576), Graph(32, 32, 8, 4096), Graph(12, 12, 12, 768)], ids=str)
def test_drawing_of_a_deep_model_fits_a_window(graph: Graph) -> None:
    """Layers are rows in their order, boxes stand apart, and shared heads stand beside those that they serve."""
    circuit = some(300, graph).connected()
    text = draw(graph, circuit.rows(), circuit.nodes)
    found = re.search(r'viewBox="0 0 (\d+) (\d+)"', text)
    assert found is not None and int(found[1]) < 2000 and int(found[2]) < 30 * graph.n_layers + 60
    boxes = {
        name: (float(y), float(x), float(x) + float(width))
        for name, x, y, width in re.findall(
            r'class="box \w+" data-name="([^"]+)"[^>]*><rect x="([-\d.]+)" y="([-\d.]+)" width="([\d.]+)"', text
        )
    }
    by_row: dict[float, list[tuple[float, float, str]]] = {}
    for name, (y, left, right) in boxes.items():
        by_row.setdefault(y, []).append((left, right, name))
    for row in by_row.values():
        assert all(a[1] < b[0] for a, b in pairwise(sorted(row)))
    ranked = [int(re.sub(r"\D.*", "", row[0][2][1:]) or -1) for _, row in sorted(by_row.items())]
    inner = [layer for layer in ranked if layer >= 0]
    assert inner == sorted(inner, reverse=True) and len(by_row) <= 2 * graph.n_layers + 2


# ------------------------------------------------------------------------------------------------ the plots
def test_curve_marks_stages_and_the_choice() -> None:
    tags = Tags(plots.curve(data(some(5)).curve, (35, 0.93), 0.05))
    assert len(tags.named("circle", "grid")) == 2 and len(tags.named("rect", "bisection")) == 1
    assert len(tags.named("path", "pruning")) == len(tags.named("rect", "tolerance")) == 1
    chosen = tags.named("circle", "chosen")[0]
    grid = sorted(float(str(a["cx"])) for a in tags.named("circle", "grid"))
    assert grid[0] < float(str(chosen["cx"])) < grid[1]
    assert not Tags(plots.curve([Point(0, float("nan"), "grid")], None, None)).named("circle")


def test_scatter_marks_wrong_signs() -> None:
    tags = Tags(plots.scatter(data(some(5)).checks))
    assert len(tags.named("circle", "check")) == 1 and len(tags.named("path", "error")) == 1


def test_strip_has_a_dot_for_each_random_circuit() -> None:
    tags = Tags(plots.strip([0.0, 0.1, float("nan")], 0.9, (0.8, 1.0)))
    assert len(tags.named("circle", "random")) == 2 and len(tags.named("line", "interval")) == 1
    assert not Tags(plots.strip([], 0.9, None)).named("line", "interval")


def test_axes_have_round_ticks() -> None:
    assert plots.ScaledAxis(0.0, 1.06, 0, 300).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert plots.ScaledAxis(4, 40_000, 0, 400, "log").ticks()[:2] == [10, 100]
    root = plots.ScaledAxis(-0.3, 1.0, 0, 400, "root")
    assert 0.0 in root.ticks() and root.at(0.25) - root.at(0) == pytest.approx((root.at(1) - root.at(0)) / 2)
    assert plots.around([2.0, 2.0]) == pytest.approx((1.8, 2.2))
