"""The page in a headless Chromium: it loads without a word on the console, and slider, filters, clicks, keys, wheel and
pointer change what is seen. What is expected is counted from the circuit, not read from the page.

A script of the test's own goes into the page, acts, and leaves JSON in the document, which is dumped and read.
"""

from __future__ import annotations

import html as markup
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_pages import GPT2_SMALL, GROUPED, SMALL, TOKENS, connected_circuit, explored

from circuitfind.circuit import Circuit
from circuitfind.graph import Graph
from circuitfind.report.explorer import first_shown
from circuitfind.report.page import ReportData, html

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

HELPERS = r"""
const errors = [], results = {};
window.addEventListener("error", (event) => errors.push(event.message));
const one = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
const act = (target, type, more = {}) => {
  const kind = type.startsWith("pointer") ? PointerEvent : type.startsWith("key") ? KeyboardEvent
    : type === "wheel" ? WheelEvent : type === "click" ? MouseEvent : Event;
  return target.dispatchEvent(new kind(type, { bubbles: true, cancelable: true, ...more }));
};
const seen = () => all(".plate:not([hidden]) .arrow:not(.hidden)").map((arrow) => arrow.dataset.edge).sort();
const box = (name) => one(`.plate:not([hidden]) .box[data-name="${name}"]`);
const view = () => one(".plate:not([hidden]) svg").getAttribute("viewBox").split(" ").map(Number);
const centre = (element) => {
  const frame = element.getBoundingClientRect();
  return { clientX: frame.x + frame.width / 2, clientY: frame.y + frame.height / 2 };
};
const slide = (value) => {
  one("#size").value = value;
  act(one("#size"), "input");
};
const tick = (selector) => {
  one(selector).checked = !one(selector).checked;
  act(one(selector), "change");
};
const list = (which) => [...(all(".panel ul.edges")[which]?.querySelectorAll(".name") ?? [])].map((e) => e.textContent);
"""


@pytest.fixture()
def browse(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Opens a page, runs a script in it, and gives back what that left in `results`."""

    def run(data: ReportData, script: str, *options: str) -> dict[str, Any]:
        ending = (
            f"<script>try {{ {script} }} catch (error) {{ errors.push(String(error)); }}"
            " const out = document.createElement('pre'); out.id = 'result';"
            " out.textContent = JSON.stringify({ errors, results }); document.body.append(out);</script></body>"
        )
        text = html(data).replace("<body>", f"<body><script>{HELPERS}</script>", 1).replace("</body>", ending, 1)
        page = tmp_path / "page.html"
        page.write_text(text, encoding="utf-8")
        command = [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1200,900",
            *options,
            "--dump-dom",
            page.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in done.stderr, done.stderr
        found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, flags=re.DOTALL)
        assert found is not None, done.stdout[-500:]
        left = json.loads(markup.unescape(found[1]))
        assert left["errors"] == []
        return left["results"]

    return run


def effect(circuit: Circuit, edge: str) -> float:
    """Exact where it was measured, else the estimate."""
    cell = circuit.graph.edge(edge)
    assert circuit.exact is not None and circuit.estimates is not None
    exact = circuit.exact[cell]
    return float(exact if exact == exact else circuit.estimates[cell])


def kind(graph: Graph, edge: str) -> str:
    return graph.reader(graph.edge(edge)[1]).kind


def cells(edges: Iterable[str]) -> list[list[Any]]:
    """Cells of the matrix, each with its number of edges."""
    ends = (edge.partition("<")[0].split("->") for edge in edges)
    named = (" to ".join(end.partition(".")[0] for end in pair) for pair in ends)
    return sorted([name, count] for name, count in Counter(named).items())


def test_slider_and_filters_show_precisely_the_circuit_of_each_size(browse: Callable[..., dict[str, Any]]) -> None:
    """As a graph up to 400 edges, as a matrix above."""
    circuit = connected_circuit(GPT2_SMALL, 1000)
    data = explored(circuit)
    script = """
      const table = () => all(".plate:not([hidden]) .cell").map((cell) =>
        [cell.dataset.name, Number(/: (\\d+) edge/.exec(cell.getAttribute("aria-label"))[1])]).sort();
      results.start = [Number(one("#size").value), one("#shown").textContent];
      results.sizes = {};
      for (let at = 0; at <= Number(one("#size").max); at += 1) {
        slide(at);
        results.sizes[at] = [seen(), one("#shown").textContent, all(".plate:not([hidden])").length, table()];
      }
      results.views = [one("[name=view]:checked").value, one(".of-matrix").hidden, one(".of-graph").hidden];
      tick("[data-kind=q]"); results.without = table(); tick("[data-kind=q]");
      box("m3 to a5").focus();
      act(box("m3 to a5"), "keydown", { key: "Enter" });
      results.cell = [one(".panel h3").textContent, list(0), document.activeElement.dataset.name];
      act(box("m3 to a5"), "keydown", { key: "ArrowRight" });
      results.walked = document.activeElement.dataset.name;
      one("[name=view][value=graph]").click();
      results.forced = [seen().length, one("#shown").textContent, one("#panel").hidden];
      slide(results.start[0]);
      results.kinds = {};
      for (const kind of ["q", "k", "v", "mlp", "logits"]) {
        tick(`[data-kind=${kind}]`);
        results.kinds[kind] = [seen(), one("#shown").textContent];
        tick(`[data-kind=${kind}]`);
      }
      tick("[data-sign=opposes]"); results.supports = seen(); tick("[data-sign=opposes]");
      tick("[data-sign=supports]"); results.opposes = seen(); tick("[data-sign=supports]");
      results.end = seen();
    """.replace("\\\\", "\\")
    left = browse(data, script)
    start = first_shown(data.sizes)
    assert left["start"][0] == start and left["start"][1].startswith(f"{len(data.sizes[start].circuit)} of 1,")
    assert len(left["sizes"]) == len(data.sizes) > 8
    for at, size in enumerate(data.sizes):
        shown, said, plates, table = left["sizes"][str(at)]
        small = len(size.circuit) <= 400
        assert plates == 1 and (shown if small else table) == (sorted if small else cells)(size.circuit.edges)
        assert not (table if small else shown)
        assert said.startswith(
            f"{len(size.circuit):,} of {len(circuit):,} edges: faithfulness {size.faithfulness:.3g} ("
        )
    assert left["views"] == ["matrix", False, True]
    assert left["without"] == cells(edge for edge in circuit.edges if kind(circuit.graph, edge) != "q")
    inside = [edge for edge in circuit.edges if cells([edge]) == [["m3 to a5", 1]]]
    inside.sort(key=lambda edge: -abs(effect(circuit, edge)))
    assert left["cell"] == ["m3 to a5", inside[:8], "m3 to a5"] and left["walked"].startswith("m3 to ")
    drawn = max(len(size.circuit) for size in data.sizes if len(size.circuit) <= 400)
    assert left["forced"][0] == drawn and left["forced"][1].endswith(f"; the graph shows the strongest {drawn}")
    assert left["forced"][2] is True  # a cell is not in the graph
    smaller = data.sizes[start].circuit
    for which, (shown, said) in left["kinds"].items():
        rest = [edge for edge in smaller.edges if kind(circuit.graph, edge) != which]
        assert shown == sorted(rest) and 0 < len(rest) < len(smaller)
        assert said.endswith(f"; the filter hides {len(smaller) - len(rest)} of them")
    assert left["supports"] == sorted(edge for edge in smaller.edges if effect(circuit, edge) >= 0)
    assert left["opposes"] == sorted(edge for edge in smaller.edges if effect(circuit, edge) < 0)
    assert left["end"] == sorted(smaller.edges)


def test_search_groups_and_comparison(browse: Callable[..., dict[str, Any]]) -> None:
    """Two circuits on one page, a group that its file brings, one that is made, and the direct contributions."""
    circuit = connected_circuit(SMALL, 40)
    other = connected_circuit(SMALL, 40, seed=5) | Circuit.of(SMALL, circuit.edges[:9])
    heads = [name for name in circuit.nodes if ".h" in name]
    grouped = circuit.with_group("movers", heads[:2])
    script = f"""
      slide(one("#size").max);
      results.marks = all("[data-mark]").map((box) => [box.dataset.mark, box.parentElement.textContent]);
      results.both = seen();
      tick("[data-mark=there]"); results.here = seen();
      tick("[data-mark=both]"); results.only = seen();
      tick("[data-mark=there]"); tick("[data-mark=both]");
      results.classes = all(".plate:not([hidden]) .arrow").map((a) => [a.dataset.edge, a.classList.contains("there")]);
      const search = (text) => {{ one("#find").value = text; act(one("#find"), "change"); }};
      search("{heads[2].upper()}"); results.found = one(".panel h3").textContent;
      results.direct = one(".panel").textContent.includes("Directly adds +1.5 to the logit difference.");
      results.ringed = all(".plate:not([hidden]) .grouped").map((box) => box.dataset.name).sort();
      one(".panel input").value = "induction"; act(one(".panel input"), "change");
      results.groups = all("#groups .chip").map((chip) => chip.textContent);
      results.kept = one("#keep pre").textContent;
      search("movers"); results.lit = one("[data-group=movers]").getAttribute("aria-pressed");
      act(document, "keydown", {{ key: "Escape" }});
      results.focused = all(".plate:not([hidden]) .box.lit").map((box) => box.dataset.name);
      results.hint = document.querySelector(".explorer").textContent.includes("The other circuit: {len(other)} edges");
      results.places = all("[data-place]").map((box) => box.dataset.place);
      tick('[data-place="S2"]'); results.unplaced = seen(); tick('[data-place="S2"]');
      results.told = describe(edgeNamed.get("{circuit.edges[0]}")).join("; ");
      search("nowhere"); results.none = one("#said").textContent;
      one(".panel").focus(); act(document, "keydown", {{ key: "/" }}); results.slash = document.activeElement.id;
    """
    places = {edge: [("S2" if i % 2 else "the end", 0.5), ("IO", -0.25)] for i, edge in enumerate(circuit.edges)}
    direct = dict.fromkeys(circuit.nodes, 1.5)
    data = ReportData("t", "m", {}, grouped, direct=direct, beside=other, places=places)
    left = browse(data, script)
    here, there = set(circuit.edges), set(other.edges)
    assert left["marks"] == [
        ["both", f"in both ({len(here & there)})"],
        ["here", f"only in this circuit ({len(here - there)})"],
        ["there", f"only in the other ({len(there - here)})"],
    ]
    assert left["both"] == sorted(here | there) and left["here"] == sorted(here)
    assert left["only"] == sorted(here - there)
    assert {edge for edge, only in left["classes"] if only} == there - here
    assert left["found"] == heads[2] and left["direct"]
    assert left["ringed"] == heads[:2] and left["groups"] == ["movers (2)", "induction (1)"]
    assert f'circuit = circuit.with_group("induction", ["{heads[2]}"])' in left["kept"]
    assert left["lit"] == "true" and set(heads[:2]) <= set(left["focused"])
    assert left["places"] == ["the end", "S2"] and left["told"].endswith("at the end +0.5, IO −0.25")
    assert left["unplaced"] == sorted((here | there) - set(circuit.edges[1::2]))
    assert left["hint"] and left["none"].startswith("no node of the circuit") and left["slash"] == "find"


def test_panel_walks_the_graph_and_shows_the_pattern(browse: Callable[..., dict[str, Any]]) -> None:
    circuit = connected_circuit(SMALL, 80)
    graph, data = circuit.graph, explored(circuit)

    def ends(edge: str) -> tuple[str, str]:
        writer, reader = edge.split("->")
        return writer, reader.partition("<")[0]

    heads = [name for name in circuit.nodes if ".h" in name]
    into = {name: [edge for edge in circuit.edges if ends(edge)[1] == name] for name in heads}
    name = max(heads, key=lambda head: len(into[head]))
    inputs = sorted(into[name], key=lambda edge: -abs(effect(circuit, edge)))
    outputs = [edge for edge in circuit.edges if ends(edge)[0] == name]
    outputs.sort(key=lambda edge: -abs(effect(circuit, edge)))
    assert len(inputs) > 8 and outputs  # the list has a button for the rest
    script = f"""
      slide(one("#size").max);
      results.hidden = one("#panel").hidden;
      act(box("{name}"), "click");
      results.title = one(".panel h3").textContent;
      results.pressed = box("{name}").getAttribute("aria-pressed");
      results.lit = all(".plate:not([hidden]) .arrow.lit").map((arrow) => arrow.dataset.edge).sort();
      results.inputs = list(0); results.outputs = list(1);
      results.numbers = all(".panel ul.edges .row")[0].textContent;
      const map = one(".panel canvas");
      results.pattern = [];
      map.focus();
      for (let i = 0; i < {len(TOKENS)}; i += 1) act(map, "keydown", {{ key: "ArrowUp" }});
      for (let i = 0; i < 4; i += 1) act(map, "keydown", {{ key: "ArrowDown" }});
      for (let i = 0; i < 4; i += 1) {{
        act(map, "keydown", {{ key: "ArrowRight" }});
        results.pattern.push(one(".panel .said").textContent);
      }}
      const edge = map.getBoundingClientRect(), cell = (edge.width - 64) / {len(TOKENS)};
      act(map, "pointermove", {{ clientX: edge.x + 62 + cell * 2.5, clientY: edge.y + 62 + cell * 7.5 }});
      results.pointed = one(".panel .said").textContent;
      const ink = map.getContext("2d").getImageData(0, 0, map.width, map.height).data;
      const pixels = Array.from({{ length: ink.length / 4 }}, (_, i) => ink.slice(4 * i, 4 * i + 3).join());
      results.colours = new Set(pixels).size;
      results.why = all(".panel .why li").map((row) => row.textContent);
      all(".panel .more")[0].click();
      results.more = list(0);
      all(".panel ul.edges .row")[0].focus();
      results.edge = all(".plate:not([hidden]) .arrow.lit").map((arrow) => arrow.dataset.edge);
      all(".panel ul.edges .row")[0].click();
      results.walked = [one(".panel h3").textContent, document.activeElement === one(".panel h3")];
      act(document, "keydown", {{ key: "Escape" }});
      results.closed = [one("#panel").hidden, document.activeElement.dataset.name];
    """
    left = browse(data, script)
    assert left["hidden"] is True and left["title"] == name and left["pressed"] == "true"
    assert left["lit"] == sorted([*inputs, *outputs])

    def reader(edge: str) -> str:  # as an output is written
        return edge.partition("->")[2]

    def source(edge: str) -> str:  # as an input is written
        return f"{ends(edge)[0]} {kind(graph, edge)}"

    assert left["inputs"] == [source(edge) for edge in inputs[:8]]
    assert left["outputs"] == [reader(edge) for edge in outputs[:8]]
    assert left["more"] == [source(edge) for edge in inputs]
    assert left["edge"] == [inputs[0]]
    assert left["walked"] == [ends(inputs[0])[0], True]
    assert left["closed"] == [True, ends(inputs[0])[0]]  # the focus is back where it came from
    assert f"{abs(effect(circuit, inputs[0])):.3g}" in left["numbers"]
    weights = data.attention[0].heads[name]
    for key in range(1, 5):  # of the fifth token
        assert (
            f"“{TOKENS[4].strip()}” → “{TOKENS[key].strip()}”: {weights[10 + key] / 255:.2f}."
            in left["pattern"][key - 1]
        )
    assert f"“gave” → “and”: {weights[28 + 2] / 255:.2f}." in left["pointed"]
    assert left["colours"] > 5
    assert left["why"] == ["m0+1.25", "input−0.5", "a0.h1+0.75", "m0 x a0.h1+0.5"]


def test_zoom_pan_hover_and_keys(browse: Callable[..., dict[str, Any]]) -> None:
    circuit = connected_circuit(SMALL, 40)
    script = """
      slide(one("#size").max);
      results.start = view();
      one("[data-zoom=in]").click(); results.zoomed = view();
      one("[data-zoom=fit]").click(); results.fitted = view();
      const at = centre(one("#canvas"));
      results.taken = !act(one("#canvas"), "wheel", { deltaY: -900, ...at }); results.wheel = view();
      act(one("#canvas"), "pointerdown", { pointerId: 1, button: 0, ...at });
      act(window, "pointermove", { pointerId: 1, clientX: at.clientX + 40, clientY: at.clientY });
      act(window, "pointerup", { pointerId: 1 });
      results.dragged = view();
      act(box("logits"), "click"); results.unopened = one("#panel").hidden;
      one("[data-zoom=fit]").click();
      results.left = !act(one("#canvas"), "wheel", { deltaY: 300, ...at });
      act(one("#canvas"), "pointerdown", { pointerId: 1, button: 0, clientX: at.clientX - 50, clientY: at.clientY });
      act(one("#canvas"), "pointerdown", { pointerId: 2, button: 0, clientX: at.clientX + 50, clientY: at.clientY });
      act(window, "pointermove", { pointerId: 1, clientX: at.clientX - 150, clientY: at.clientY });
      act(window, "pointerup", { pointerId: 1 }); act(window, "pointerup", { pointerId: 2 });
      results.pinched = view();
      act(box("logits"), "keydown", { key: "0" }); results.key0 = view();
      act(box("logits"), "keydown", { key: "+" }); results.keyPlus = view();
      act(box("logits"), "keydown", { key: "0" });
      box("input").focus();
      const walk = ["input"];
      for (let i = 0; i < 12; i += 1) {
        act(document.activeElement, "keydown", { key: "ArrowUp" });
        walk.push(document.activeElement.dataset.name);
      }
      results.walk = walk;
      act(document.activeElement, "keydown", { key: "Enter" });
      results.opened = one(".panel h3").textContent;
      act(document, "keydown", { key: "Escape" });
      for (let i = 0; i < 4; i += 1) one("[data-zoom=in]").click();
      for (const type of ["pointerdown", "pointerup", "click"]) act(box("input"), type, { pointerId: 1, button: 0 });
      const [inner, outer] = [box("input").getBoundingClientRect(), one("#canvas").getBoundingClientRect()];
      results.revealed = inner.left > outer.left && inner.right < outer.right && inner.bottom < outer.bottom;
      act(document, "keydown", { key: "Escape" });
      one("[data-zoom=fit]").click();
      one("#canvas").scrollIntoView();
      const arrow = all(".plate:not([hidden]) .arrow:not(.opposes)").at(-1), line = arrow.querySelector(".line");
      const where = line.getPointAtLength(line.getTotalLength() / 2).matrixTransform(line.getScreenCTM());
      act(one("#canvas"), "pointermove", { clientX: where.x + 2, clientY: where.y });
      results.tip = [one("#tip").hidden, one("#tip").innerText];
      act(one("#canvas"), "pointerleave");
      results.gone = one("#tip").hidden;
    """
    left = browse(replace(explored(circuit), level=0.8), script)

    def area(view: list[float]) -> float:
        return view[2] * view[3]

    start = left["start"]
    assert area(left["zoomed"]) == pytest.approx(area(start) / 1.5**2)
    assert left["fitted"] == pytest.approx(start) == left["key0"]
    assert left["taken"] and area(left["wheel"]) < 0.6 * area(start)
    shifted = [after - before for before, after in zip(left["wheel"], left["dragged"], strict=True)]
    assert shifted[0] < 0 and shifted[1:] == pytest.approx([0, 0, 0])  # the drawing follows the pointer
    assert left["unopened"] is True  # a drag that ends on a box is no click
    assert left["left"] is False  # nothing to zoom out of: the page may scroll
    assert area(left["pinched"]) == pytest.approx(area(start) / 4, rel=1e-3)
    assert area(left["keyPlus"]) < area(start)
    layers = [-1 if name == "input" else 99 if name == "logits" else int(name[1]) for name in left["walk"]]
    assert layers == sorted(layers) and layers[-1] == 99 and left["opened"] == "logits"
    hidden, said = left["tip"]
    strongest = max(circuit.edges, key=lambda edge: effect(circuit, edge))
    assert hidden is False and strongest in said and "estimate" in said and "exact" in said and " (80% " in said
    assert left["gone"] is True and left["revealed"] is True


def test_shared_heads_lead_to_the_heads_that_they_serve(browse: Callable[..., dict[str, Any]]) -> None:
    circuit = connected_circuit(GROUPED, 80)
    edge = next(e for e in circuit.edges if ".kv0<v>" in e and {"a1.h0", "a1.h1"} <= set(circuit.nodes) and "->a1" in e)
    into = [e for e in circuit.edges if e.split("->")[1] in ("a1.h0<q>", "a1.kv0<k>", "a1.kv0<v>")]
    script = """
      slide(one("#size").max);
      act(box("a1.kv0"), "click");
      results.serves = all(".panel .more").map((button) => button.textContent);
      all(".panel .more").find((button) => button.textContent === "a1.h0").click();
      all(".panel .more")[0]?.click();
      results.title = one(".panel h3").textContent;
      results.inputs = list(0);
    """
    left = browse(explored(circuit), script)
    assert {"a1.h0", "a1.h1"} <= set(left["serves"]) and left["title"] == "a1.h0"
    assert len(left["inputs"]) == len(into)
    assert f"{edge.split('->')[0]} v via a1.kv0" in left["inputs"]


@pytest.mark.parametrize("edges", [24, 300])
def test_a_narrow_frame_shows_the_whole_width_where_it_can_be_read(
    browse: Callable[..., dict[str, Any]], edges: int
) -> None:
    script = """
      document.body.style.maxWidth = "400px";
      for (const size of [0, one("#size").max]) slide(size); // another drawing starts anew in the narrower frame
      const shown = (kind) => all(".plate:not([hidden]) " + kind);
      const frame = one("#canvas").getBoundingClientRect();
      const [boxes, labels] = [".box rect", ".layer"].map((kind) => shown(kind).map((e) => e.getBoundingClientRect()));
      const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
      results.frame = one("#canvas").clientWidth;
      results.scale = results.frame / view()[2];
      results.whole = Number(one(".plate:not([hidden]) svg").dataset.size.split(" ")[2]);
      results.cut = boxes.filter((box) => box.left < frame.left || box.right > frame.right).length;
      results.covered = labels.filter((label) => boxes.some((box) => meet(box, label))).length;
      results.labels = shown(".layer").map((label) => label.textContent);
      for (let i = 0; i < 6; i += 1) one("[data-zoom=in]").click();
      results.near = shown(".layer").map((label) => label.textContent);
      const names = () => shown(".box text").map((text) => text.textContent);
      results.names = [names()];
      one("[data-zoom=fit]").click();
      results.names.push(names());
      for (const size of [0, one("#size").max]) slide(size);
      one("[name=view][value=matrix]").click();
      one("[name=view][value=graph]").click();
      for (let i = 0; i < 6; i += 1) one("[data-zoom=in]").click();
      results.names.push(names());
    """
    left = browse(explored(connected_circuit(GPT2_SMALL, edges)), script, "--window-size=500,900")
    across = left["frame"] / left["whole"]
    assert 250 < left["frame"] < 400 and all(re.fullmatch(r"layer \d+", name) for name in left["near"])
    if edges == 24:
        assert 0.4 <= across < 1 and left["scale"] == pytest.approx(across, rel=1e-3)
        assert left["cut"] == left["covered"] == 0
        large, small, again = left["names"]
        assert large == again != small, "shortened names come back"
    else:
        assert across < 0.4 and left["scale"] == pytest.approx(0.6) and left["cut"]
    assert [name.split()[-1] for name in left["labels"]] == [name.split()[-1] for name in left["near"]]


def test_bare_pages_work_too(browse: Callable[..., dict[str, Any]]) -> None:
    """Nothing measured; in a narrow window, in the dark."""
    circuit = connected_circuit(SMALL, 40)
    script = """
      slide(0); results.said = one("#shown").textContent;
      act(all(".plate:not([hidden]) .box.head")[0], "click");
      results.note = one(".panel").textContent;
      results.wide = document.documentElement.scrollWidth - window.innerWidth;
      results.dark = getComputedStyle(document.body).backgroundColor;
    """
    data = ReportData("t", "m", {}, circuit, faithfulness=0.9, attention_note="No patterns from this model.")
    left = browse(data, script, "--window-size=500,800", "--force-dark-mode")
    assert left["said"].endswith(f": faithfulness not measured; nearest measured, {len(circuit)} edges: 0.9")
    assert "No patterns from this model." in left["note"] and left["wide"] <= 0
    assert left["dark"] == "rgb(18, 22, 28)"
    assert browse(ReportData("t", "m", {}, Circuit.empty(SMALL)), "results.ok = seen().length") == {"ok": 0}
