"""Figures hold the results' own numbers under their own names; pages stand alone; `show` opens every file."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import contrast, wrapped

import circuitfind as cf
from circuitfind.cli.app import main
from circuitfind.comparison import page as comparison_page
from circuitfind.errors import FileError, ScoreError
from circuitfind.graph import Graph
from circuitfind.patching.attention import AttentionPattern
from circuitfind.patching.sweep import Axis, Sweep
from circuitfind.plots import scatter
from circuitfind.plots.patching import attention
from circuitfind.plots.plot import drawings
from circuitfind.record import Record

pytest.importorskip("plotly")
GRAPH = Graph(3, 4, 2, 16)
RECORD = Record(model="toy", task="names", n_examples=6, metric="logit_diff", method="patch")
EVIL = "</script><b>x</b>"
TOKENS = ("0 The", f"1 {EVIL}", "2 the", "2 the")  # labels may repeat
needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")


def sweep(what: str, *axes: Axis, seed: int = 0, **changes: Any) -> Sweep:
    """Random effects of either sign; the two ends of the metric are well apart."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 1, (*(len(axis.labels) for axis in axes), 6)) + 0.1
    return Sweep(what, GRAPH, axes, values, rng.normal(3, 1, 6), rng.normal(-3, 1, 6), replace(RECORD, **changes))


def numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


LAYERS, HEADS, POSITIONS = Axis("layer", numbers(3)), Axis("head", numbers(4)), Axis("position", TOKENS)


def node_scores(*positions: int) -> cf.NodeScores:
    values = np.random.default_rng(1).normal(size=(GRAPH.n_writers, *positions)).astype(np.float32)
    return cf.NodeScores(GRAPH, values, replace(RECORD, method="atp"))


def edge_scores() -> cf.Scores:
    values = np.random.default_rng(2).normal(size=GRAPH.real.shape).astype(np.float32)
    return cf.Scores(GRAPH, np.where(GRAPH.real, values, np.float32(0)), replace(RECORD, method="eap"))


@pytest.fixture(scope="module")
def llama() -> cf.Model:
    return wrapped("llama")


@pytest.fixture(scope="module")
def found(llama: cf.Model) -> cf.Scores:
    scores = cf.attribute(llama, contrast(2), "eap")
    assert isinstance(scores, cf.Scores)
    return scores


@pytest.fixture(scope="module")
def checks(llama: cf.Model, found: cf.Scores) -> cf.Verification:
    return cf.verify(llama, contrast(2), found, 20, random=0)


@pytest.fixture(scope="module")
def curve(llama: cf.Model, found: cf.Scores) -> cf.Curve:
    return cf.curve(llama, contrast(2), found, percentages=(0.001, 0.1, 0.5, 1))


@pytest.fixture(scope="module")
def compared(llama: cf.Model) -> cf.Comparison:
    made = cf.compare(llama, contrast(2), ["eap", "random", "eap-ig-inputs"], percentages=(0.05, 0.2, 1))
    refused = replace(made.entries[0], method=EVIL, refused="flat <here>")
    return replace(made, entries=(*made.entries, refused))


def title(figure: Any) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", figure.layout.title.text).split())


def ticks(axis: Any) -> list[str]:
    """An axis' labels, in order; every one has a place of its own."""
    assert list(axis.tickvals) == list(range(len(axis.ticktext)))
    return [unescape(text) for text in axis.ticktext]


# -------------------------------------------------------------------- heat maps
@pytest.mark.parametrize("axes", [(LAYERS, HEADS), (LAYERS, POSITIONS)])
@pytest.mark.parametrize("normalised", [False, True])
def test_heat_maps_hold_the_effects(axes: tuple[Axis, ...], normalised: bool) -> None:
    given = sweep("resid" if axes[1] is POSITIONS else "heads", *axes)
    figure = cf.plot(given, normalised=normalised)
    heat = figure.data[0]
    expected = given.normalised if normalised else given.effects
    np.testing.assert_array_equal(np.array(heat.z), expected)
    assert -heat.zmin == heat.zmax == np.abs(expected).max()
    assert ticks(figure.layout.yaxis) == list(axes[0].labels)
    assert ticks(figure.layout.xaxis) == list(axes[1].labels)
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # layer 0 on top
    names = np.array(given.names()).reshape(expected.shape)
    for at, name in np.ndenumerate(names):
        text = heat.hovertext[at[0]][at[1]]
        assert text.startswith(f"<b>{name}</b>") and f"{given.effects[at]:+.4g}" in text
    for said in ("activation patching", "names in toy", "logit_diff", "noising", "6 pairs", "blue supports"):
        assert said in title(figure), said


def test_positive_is_blue_and_zero_is_white() -> None:
    scale = cf.plot(sweep("heads", LAYERS, HEADS)).data[0].colorscale
    low, middle, high = (
        [int(part) for part in re.findall(r"\d+", scale[at][1])] for at in (0, len(scale) // 2, len(scale) - 1)
    )
    assert low[0] > low[2] and high[2] > high[0] and min(middle) > 240


def test_heads_by_position_have_a_row_a_head_and_the_strongest_rows_stay() -> None:
    given = sweep("heads", LAYERS, HEADS, POSITIONS)
    figure = cf.plot(given)
    np.testing.assert_array_equal(np.array(figure.data[0].z), given.effects.reshape(12, 4))
    assert ticks(figure.layout.yaxis) == [f"a{layer}.h{head}" for layer in range(3) for head in range(4)]
    assert ticks(figure.layout.xaxis) == list(TOKENS)
    few = cf.plot(given, rows=5)
    rows = {f"a{layer}.h{head}": given.effects[layer, head] for layer in range(3) for head in range(4)}
    best = sorted(rows, key=lambda name: -np.abs(rows[name]).max())[:5]
    kept = [name for name in rows if name in best]
    assert ticks(few.layout.yaxis) == kept
    np.testing.assert_array_equal(np.array(few.data[0].z), [rows[name] for name in kept])
    assert "strongest 5 of 12 rows" in title(few) and "rows" not in title(figure)


def test_long_labels_are_cut_and_keep_their_place() -> None:
    figure = cf.plot(sweep("resid", LAYERS, Axis("position", ("0 short", f"1 {'long' * 20}"))))
    short, cut = ticks(figure.layout.xaxis)
    assert short == "0 short" and cut.startswith("1 longlong") and cut.endswith("…") and len(cut) == 20
    assert f"at 1 {'long' * 20}<br>" in figure.data[0].hovertext[2][1]


def test_key_value_heads_are_named_as_such() -> None:
    figure = cf.plot(sweep("k", LAYERS, Axis("key/value head", numbers(2))))
    assert figure.data[0].hovertext[1][1].startswith("<b>a1.kv1&lt;k&gt;</b>")
    assert figure.layout.xaxis.title.text == "key/value head"


def test_nodes_are_where_their_names_say() -> None:
    scores = node_scores()
    figure = cf.plot(scores)
    columns = ticks(figure.layout.xaxis)
    cells = {
        (f"m{layer}" if column == "MLP" else f"a{layer}.h{column}"): value
        for layer, row in enumerate(figure.data[0].z)
        for column, value in zip(columns, row, strict=True)
    }
    assert {**cells, "input": scores["input"]} == scores.to_dict()
    assert f"input {scores['input']:+.3g}" in title(figure)


def test_nodes_by_position_take_the_tokens() -> None:
    scores = node_scores(3)
    figure = cf.plot(scores, tokens=["John", " gave", "John"])
    assert ticks(figure.layout.xaxis) == ["0 John", "1 gave", "2 John"]
    rows = dict(zip(ticks(figure.layout.yaxis), np.array(figure.data[0].z).tolist(), strict=True))
    assert rows == scores.to_dict()
    assert ticks(cf.plot(scores).layout.xaxis) == ["0", "1", "2"]
    with pytest.raises(ScoreError, match="2 tokens for scores by 3 positions"):
        cf.plot(scores, tokens=["a", "b"])
    with pytest.raises(ScoreError, match="not by position"):
        cf.plot(node_scores(), tokens=["a"])


def test_edges_of_a_deep_model_are_on_one_screen_and_not_drowned() -> None:
    """`input->m0` is fifty times the rest; each layer of 30 has its cells, in 1,400 pixels."""
    graph = Graph(30, 9, 3, 576)
    values = np.where(graph.real, np.random.default_rng(0).normal(size=graph.real.shape), 0).astype(np.float32)
    values[graph.edge("input->m0")] = 3000
    figure = cf.plot(cf.Scores(graph, values, Record()))
    heat = figure.data[0]
    marked = np.argwhere(np.array(heat.text) == "×").tolist()
    assert heat.zmax < 300 and f"{len(marked)} cells beyond the colour scale, marked ×" in title(figure)
    names = [heat.hovertext[u][r].partition("<br>")[0] for u, r in marked]
    assert "<b>input -&gt; m0</b>" in names and len(names) <= 0.01 * graph.n_edges
    assert figure.layout.width < 1400 and figure.layout.height < 900 and np.array(heat.z).shape == (61, 121)


def test_edges_by_layer_are_sums_over_their_names() -> None:
    scores = edge_scores()
    figure = cf.plot(scores)
    totals: dict[tuple[str, str], float] = {}
    for name, value in scores.to_dict().items():
        writer, reader = name.split("->")
        kind = re.sub(r"\.(h|kv)\d+", "", writer), re.sub(r"\.(h|kv)\d+", "", reader)
        totals[kind] = totals.get(kind, 0.0) + value
    shown = {
        (row, column): value
        for row, values in zip(ticks(figure.layout.yaxis), figure.data[0].z, strict=True)
        for column, value in zip(ticks(figure.layout.xaxis), values, strict=True)
    }
    assert {cell for cell, value in shown.items() if not np.isnan(value)} == totals.keys()
    assert {cell: shown[cell] for cell in totals} == pytest.approx(totals, abs=1e-9)
    text = next(t for row in figure.data[0].hovertext for t in row if t.startswith("<b>a0 -&gt; a2&lt;k&gt;"))
    best = max((e for e in scores.to_dict() if re.match(r"a0\..*->a2.*<k>", e)), key=lambda e: abs(scores[e]))
    assert "8 edges" in text and f"strongest {best} {scores[best]:+.4g}" in unescape(text)


def test_a_circuit_without_effects_shows_how_many_edges_it_has() -> None:
    names = ["input->a0.h0<q>", "input->a0.h1<q>", "a0.h1->logits"]
    figures = drawings(cf.Circuit.of(GRAPH, names))
    assert list(figures) == ["layers"]
    z = np.array(figures["layers"]().data[0].z)
    assert sorted(z[np.isfinite(z)].tolist()) == [1, 2]
    with pytest.raises(ScoreError, match="the figures of this Circuit are layers"):
        cf.plot(cf.Circuit.of(GRAPH, names), "strongest")


def test_attention_goes_from_zero_to_one() -> None:
    pattern = np.array([[1.0, 0, 0], [0.25, 0.75, 0], [0.1, 0.2, 0.3]])
    figure = cf.plot(AttentionPattern("a1.h2", ("a", " b", "\n"), pattern))
    assert title(figure) == "Attention of a1.h2"
    np.testing.assert_array_equal(np.array(figure.data[0].z), pattern)
    assert (figure.data[0].zmin, figure.data[0].zmax) == (0, 1)
    assert ticks(figure.layout.xaxis) == ticks(figure.layout.yaxis) == ["0 a", "1 b", "2 '\\n'"]
    assert figure.data[0].hovertext[1][0] == "<b>1 b</b> attends to <b>0 a</b><br>0.2500"
    with pytest.raises(ScoreError, match=r"is \[2, 2\], this one is \[3, 3\]"):
        attention(AttentionPattern("a1.h2", ("a", "b"), pattern))


# -------------------------------------------------------------------- bars and histograms
def test_layers_are_bars_with_intervals() -> None:
    given = sweep("attn", LAYERS)
    bars = cf.plot(given).data[0]
    np.testing.assert_array_equal(np.array(bars.x), given.effects)
    np.testing.assert_allclose(bars.x + bars.error_x.array, given.intervals()[:, 1])
    np.testing.assert_allclose(bars.x - bars.error_x.arrayminus, given.intervals()[:, 0])
    assert [colour == bars.marker.color[0] for colour in bars.marker.color] == [
        (value >= 0) == (given.effects[0] >= 0) for value in given.effects
    ]
    part = cf.plot(given, normalised=True).data[0]
    contrast_of = given.full.mean() - given.empty.mean()
    np.testing.assert_allclose(part.x + part.error_x.array, given.intervals()[:, 1] / contrast_of)


def test_the_strongest_are_those_of_the_result() -> None:
    given = sweep("heads", LAYERS, HEADS, POSITIONS)
    figure = cf.plot(given, "strongest", n=7)
    rows = given.top(7)
    assert list(figure.data[0].x) == [row.effect for row in rows]
    assert ticks(figure.layout.yaxis) == [f"{row.name}, {row.position}" for row in rows]
    scores = edge_scores()
    figure = cf.plot(scores, "strongest", n=9)
    best = sorted(scores.to_dict(), key=lambda name: -abs(scores[name]))[:9]
    assert ticks(figure.layout.yaxis) == best and list(figure.data[0].x) == [scores[name] for name in best]
    by_position = node_scores(3)
    totals = {name: sum(values) for name, values in by_position.to_dict().items()}
    figure = cf.plot(by_position, "strongest", n=4)
    assert ticks(figure.layout.yaxis) == sorted(totals, key=lambda name: -abs(totals[name]))[:4]


def test_neurons_are_counted_by_layer_and_the_strongest_are_named() -> None:
    given = sweep("neurons", LAYERS, Axis("neuron", numbers(40)))
    figure = cf.plot(given)
    assert [trace.type for trace in figure.data] == ["histogram"] * 3 + ["scatter"]
    for layer, trace in enumerate(figure.data[:3]):
        np.testing.assert_array_equal(np.array(trace.x), given.effects[layer])
        assert trace.xbins.start < given.effects.min() and trace.xbins.end > given.effects.max()
    rows = given.top(20)
    assert list(figure.data[3].x) == [row.effect for row in rows]
    assert [re.findall("<b>(.*?)</b>", text)[0] for text in figure.data[3].hovertext] == [row.name for row in rows]


# -------------------------------------------------------------------- estimate against exact
def test_scatter_of_a_verification(checks: cf.Verification) -> None:
    figure = cf.plot(checks)
    points = [(x, y) for trace in figure.data[2:] for x, y in zip(trace.x, trace.y, strict=True)]
    assert sorted(points) == sorted((edge.estimate, edge.exact) for edge in checks.edges)
    crosses = sum(symbol == "x" for trace in figure.data[2:] for symbol in trace.marker.symbol)
    assert crosses == checks.sign_errors
    said = f"r {checks.correlation:.3f}, slope {checks.slope:.3f}, {checks.sign_errors} of {len(checks.edges)}"
    assert said in title(figure)
    same, fitted = figure.data[:2]
    assert list(same.x) == list(same.y) and np.array(fitted.y) == pytest.approx(checks.slope * np.array(fitted.x))
    for trace in figure.data[2:]:
        kind = {"queries": "<q>", "keys": "<k>", "values": "<v>", "logits": "logits"}.get(trace.name.split()[0], "")
        names = [unescape(re.findall("<b>(.*?)</b>", text)[0]) for text in trace.hovertext]
        assert all(name.endswith(kind) for name in names)
        ends = dict(zip((edge.name for edge in checks.edges), checks.intervals, strict=True))
        np.testing.assert_allclose(np.array(trace.y) + trace.error_y.array, [ends[name].high for name in names])
    low, high = figure.layout.yaxis.range
    assert all(low < end < high for interval in checks.intervals for end in interval), "no interval is cut off"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a0.h1->a3.kv2<k>", "keys"),
        ("a0.h1->m2", "MLPs"),
        ("m1->logits", "logits"),
        ("a0.h1", "heads"),
        ("a4.h0<q> at 3 to", "queries"),
        ("m1.n17", "neurons"),
        ("resid3 at 4 a->m1", "residual stream"),
        ("a7 at 0 The", "attention"),
        ("what", "others"),
    ],
)
def test_kinds_are_read_off_names(name: str, kind: str) -> None:
    assert scatter.EffectPair(name, 0.0, 0.0).kind == kind


def test_two_results_of_the_same_places_go_against_each_other() -> None:
    exact = sweep("heads", LAYERS, HEADS, POSITIONS)
    estimated = sweep("heads", LAYERS, HEADS, POSITIONS, seed=5, method="atp")
    trace = cf.plot((estimated, exact)).data[2]
    pairs = set(zip(estimated.effects.ravel().tolist(), exact.effects.ravel().tolist(), strict=True))
    assert set(zip(trace.x, trace.y, strict=True)) == pairs and len(pairs) == 48
    scores = edge_scores()
    doubled = cf.Scores(GRAPH, 2 * scores.values, scores.record)
    figure = cf.plot((scores, doubled))
    assert "r 1.000, slope 2.000, 0 of" in title(figure)
    assert sum(len(trace.x) for trace in figure.data[2:]) == GRAPH.n_edges
    with pytest.raises(ScoreError, match="direction 'noising' and 'denoising'"):
        cf.plot((exact, sweep("heads", LAYERS, HEADS, POSITIONS, direction="denoising")))
    with pytest.raises(ScoreError, match="not of the same places"):
        cf.plot((exact, sweep("q", LAYERS, HEADS, POSITIONS)))
    with pytest.raises(ScoreError, match="against its like"):
        cf.plot((exact, scores))


def test_baselines_have_no_estimates_to_compare(checks: cf.Verification) -> None:
    nothing = replace(checks, edges=tuple(edge._replace(estimate=float("nan")) for edge in checks.edges))
    with pytest.raises(ScoreError, match="0 of 20 have both"):
        cf.plot(nothing)


# -------------------------------------------------------------------- faithfulness by size
def test_curves_hold_the_points(curve: cf.Curve) -> None:
    figure = cf.plot({"one": curve, EVIL: curve.points[1:]})
    assert [unescape(trace.name) for trace in figure.data] == ["one", EVIL]
    for trace, points in zip(figure.data, (curve.points, curve.points[1:]), strict=True):
        assert list(trace.x) == [max(point.asked, 1) for point in points]
        assert list(trace.y) == [point.faithfulness for point in points]
        np.testing.assert_allclose(np.array(trace.y) + trace.error_y.array, [p.interval.high for p in points])
        np.testing.assert_allclose(np.array(trace.y) - trace.error_y.arrayminus, [p.interval.low for p in points])
    assert curve.points[0].asked == 0 and figure.layout.xaxis.type == "log"
    assert [shape.y0 for shape in figure.layout.shapes] == [1] == [shape.y1 for shape in figure.layout.shapes]
    assert "noising" not in title(cf.plot(curve)) and "ablation corrupted" in title(cf.plot(curve))


def test_both_selections_of_mib_are_two_lines(curve: cf.Curve) -> None:
    both = cf.Mib(curve, replace(curve, points=curve.points[:2]))
    assert [len(trace.x) for trace in cf.plot(both).data] == [4, 2]


def test_more_methods_than_colours_stay_apart(curve: cf.Curve) -> None:
    looks = [(t.line.color, t.marker.symbol) for t in cf.plot({f"{i}": curve for i in range(25)}).data]
    assert len(set(looks)) == 25


def test_a_search_shows_what_it_ran_and_what_it_chose(llama: cf.Model) -> None:
    result = cf.find(llama, contrast(2), random=0, max_checks=5)
    figure = cf.plot(result)
    tried = {(point.n_edges or 1, point.faithfulness) for point in result.curve}
    assert set(zip(figure.data[0].x, figure.data[0].y, strict=True)) == tried
    assert figure.data[1].x == (len(result.circuit),)
    assert figure.data[1].y == (result.circuit.facts["faithfulness_on_search_pairs"],)
    assert list(drawings(result)) == ["faithfulness", "scatter", "layers", "strongest"]
    layers = np.array(cf.plot(result, "layers").data[0].z)
    effects = [row.effect for row in result.circuit.rows()]
    assert np.nansum(layers) == pytest.approx(sum(effects))


def test_what_cannot_be_drawn_is_said() -> None:
    for nothing in (3, "text", {}, ()):
        with pytest.raises(ScoreError, match=f"nothing of type {type(nothing).__name__} can be drawn"):
            cf.plot(nothing)
    with pytest.raises(ScoreError, match="'mine' is a Scores: give curves"):
        cf.plot({"mine": edge_scores()})
    for nothing in ([], ()):
        with pytest.raises(FileError, match=r"page\.html: no figures are given: .* circuitfind\.plot makes"):
            cf.save_page(nothing, "page.html")
    with pytest.raises(FileError, match="not of type Sweep"):
        cf.save_page([sweep("heads", LAYERS, HEADS)], "page.html")
    with pytest.raises(ScoreError, match="what='pie': the figures of this Sweep are effects, strongest"):
        cf.plot(sweep("heads", LAYERS, HEADS), "pie")


# -------------------------------------------------------------------- pages
class Tags(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def hostile() -> list[Any]:
    """One figure of each form, with labels that would end a script or a tag."""
    rough = sweep("resid", LAYERS, POSITIONS, task=EVIL)
    long = sweep("heads", LAYERS, HEADS, Axis("position", tuple(f"{i} {EVIL}" for i in range(40))))
    neurons = sweep("neurons", LAYERS, Axis("neuron", numbers(40)))
    pair = (edge_scores(), edge_scores())
    return [cf.plot(rough), cf.plot(long), cf.plot(long, "strongest"), cf.plot(neurons), cf.plot(pair)]


def test_page_stands_alone(tmp_path: Path) -> None:
    path = cf.save_page(hostile(), tmp_path / "new" / "page.html", title=EVIL)
    text = path.read_text(encoding="utf-8")
    assert text == cf.save_page(hostile(), tmp_path / "again.html", title=EVIL).read_text(encoding="utf-8")
    tags = Tags(text).found
    for _, attributes in tags:
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    policy = next(a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy and "http" not in policy
    assert [tag for tag, _ in tags].count("script") == 5 + 2 and "b" not in [tag for tag, _ in tags]
    assert text.count("* plotly.js v") == 1
    with pytest.raises(FileError, match="cannot be written"):
        cf.save_page(hostile()[0], path / "below.html")


@needs_chromium
def test_page_opens_without_complaint(tmp_path: Path, compared: cf.Comparison) -> None:
    several = [comparison_page.faithfulness_by_size(compared, "signed"), comparison_page.overlap(compared)]
    path = cf.save_page([*hostile(), *several], tmp_path / "figures.html")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += ["--virtual-time-budget=5000", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    drawn = [a for _, a in Tags(done.stdout).found if "data-figure" in a and "js-plotly-plot" in str(a["class"])]
    assert len(drawn) == 7
    assert "1 &lt;/script&gt;&lt;b&gt;x" in done.stdout  # as text below an axis


def test_without_plotly_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compared: cf.Comparison
) -> None:
    edge_scores().save(tmp_path / "scores.safetensors")
    figure = cf.plot(edge_scores())
    for name in [name for name in sys.modules if name == "plotly" or name.startswith("plotly.")]:
        monkeypatch.setitem(sys.modules, name, None)
    for call in (
        lambda: cf.plot(edge_scores()),
        lambda: cf.save_page(figure, tmp_path / "page.html"),
        lambda: comparison_page.write_page(compared, tmp_path / "page.html"),
        lambda: cf.plot({"eap": compared["eap"].signed}),
    ):
        with pytest.raises(FileError, match=f"{re.escape(sys.executable)} -m pip install plotly$"):
            call()
    assert main(["show", str(tmp_path / "scores.safetensors")]) == 0
    said = capsys.readouterr()
    assert "Strongest of" in said.out and said.err.count("\n") == 1 and "-m pip install plotly" in said.err
    assert main(["show", str(tmp_path / "scores.safetensors"), "--what", "strongest"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.glob("*.html"))


# -------------------------------------------------------------------- the comparison's page
def test_comparison_page_shows_the_comparison(compared: cf.Comparison, tmp_path: Path) -> None:
    text = comparison_page.write_page(compared, tmp_path / "compare.html").read_text(encoding="utf-8")
    assert f"3 methods on {compared.record.task}" in text and "flat &lt;here&gt;" in text
    for by in ("signed", "absolute"):
        figure = comparison_page.faithfulness_by_size(compared, by)
        for trace in figure.data:
            assert list(trace.y) == [point.faithfulness for point in getattr(compared[trace.name], by)]
    for name, order in (("cpr", -1), ("cmd", 1)):
        figure = comparison_page.area(compared, name)
        values = {entry.method: getattr(entry, name) for entry in compared.ranked}
        assert ticks(figure.layout.yaxis) == sorted(values, key=lambda method: order * values[method])
        assert list(figure.data[0].x) == sorted(values.values(), key=lambda value: order * value)
    spent = comparison_page.cost(compared).data[0]
    assert dict(zip(spent.text, spent.y, strict=True)) == {entry.method: entry.cpr for entry in compared.ranked}
    expected = {entry.method: max(entry.costs.cpu_seconds, 1e-3) for entry in compared.ranked}
    assert dict(zip(spent.text, spent.x, strict=True)) == expected


def test_overlap_has_every_size(compared: cf.Comparison) -> None:
    figure = comparison_page.overlap(compared)
    slider = figure.layout.sliders[0]
    for step, (size, matrix) in zip(slider.steps, sorted(compared.overlap.items()), strict=True):
        assert step.label == f"{size:,}"
        np.testing.assert_array_equal(np.array(step.args[0]["z"][0]), np.array(matrix))
    shown = sorted(compared.overlap)[slider.active]
    np.testing.assert_array_equal(np.array(figure.data[0].z), compared.overlap[shown])
    assert shown == int(0.05 * compared.n_edges)


def test_a_comparison_in_which_all_were_refused_has_a_page(compared: cf.Comparison, tmp_path: Path) -> None:
    nothing = replace(compared, entries=compared.entries[-1:], overlap={})
    assert "Not compared" in comparison_page.write_page(nothing, tmp_path / "none.html").read_text(encoding="utf-8")


# -------------------------------------------------------------------- circuitfind show
def saved(folder: Path, checks: cf.Verification, curve: cf.Curve, compared: cf.Comparison) -> dict[str, tuple]:
    """A file of every kind: what it holds, and its figures."""
    from circuitfind.export.files import plain

    sweep("heads", LAYERS, HEADS).save(folder / "sweep.safetensors")
    edge_scores().save(folder / "scores.safetensors")
    node_scores(3).save(folder / "nodes.safetensors")
    scores = edge_scores()
    circuit = replace(scores.top(30), exact=0.5 * scores.values)
    circuit.save(folder / "circuit.json")
    cf.Circuit.of(GRAPH, ["input->logits"]).save(folder / "bare.json")
    curve.save(folder / "curve.json")
    compared.save(folder / "compare.json")
    (folder / "verify.json").write_text(json.dumps(plain(checks.to_dict())))
    return {
        "sweep.safetensors": ("sweep", ["effects", "strongest"]),
        "scores.safetensors": ("edge scores", ["layers", "strongest", "nodes"]),
        "nodes.safetensors": ("node scores", ["effects", "strongest"]),
        "circuit.json": ("circuit", ["layers", "strongest", "scatter"]),
        "bare.json": ("circuit", ["layers"]),
        "curve.json": ("curve", ["faithfulness"]),
        "compare.json": ("comparison", ["comparison"]),
        "verify.json": ("verification", ["scatter"]),
    }


def test_show_opens_every_file(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    checks: cf.Verification,
    curve: cf.Curve,
    compared: cf.Comparison,
) -> None:
    for name, (holds, figures) in saved(tmp_path, checks, curve, compared).items():
        assert main(["show", str(tmp_path / name), "--json"]) == 0, name
        said = json.loads(capsys.readouterr().out)
        page = (tmp_path / name).with_suffix(".html")
        assert said == {"file": str(tmp_path / name), "holds": holds, "page": str(page), "figures": figures}
        count = 6 if holds == "comparison" else len(figures)
        assert page.read_text(encoding="utf-8").count('type="application/json"') == count
        page.unlink()


def figures_of(page: Path) -> list[dict[str, Any]]:
    """What plotly is given in a page."""
    found = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text(encoding="utf-8"))
    return [json.loads(text) for text in found]


def numbers_of(values: Any) -> list[float]:
    """A list of numbers as plotly writes it: as it is, or packed."""
    if isinstance(values, list):
        return values
    return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist()


def test_show_prints_the_strongest_and_draws_what_the_file_holds(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    checks: cf.Verification,
    curve: cf.Curve,
    compared: cf.Comparison,
) -> None:
    saved(tmp_path, checks, curve, compared)
    page = tmp_path / "one.html"
    assert main(["show", str(tmp_path / "sweep.safetensors"), "--what", "strongest", "--out", str(page)]) == 0
    out = capsys.readouterr().out
    names = re.findall(r"^\s+(a\d\.h\d)\s", out, flags=re.MULTILINE)
    assert names == [row.name for row in sweep("heads", LAYERS, HEADS).top(15)]
    assert [figure["data"][0]["type"] for figure in figures_of(page)] == ["bar"]
    assert main(["show", str(tmp_path / "verify.json")]) == 0
    traces = figures_of(tmp_path / "verify.html")[0]["data"][2:]
    assert sorted(y for trace in traces for y in numbers_of(trace["y"])) == sorted(edge.exact for edge in checks.edges)
    out = capsys.readouterr().out
    best = max(checks.edges, key=lambda edge: abs(edge.exact))
    assert best.name in out.splitlines()[next(i for i, line in enumerate(out.splitlines()) if "estimate" in line) + 2]
    assert main(["show", str(tmp_path / "curve.json")]) == 0
    assert f"{curve.points[2].faithfulness:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.json", None, "no such file"),
        ("a.csv", "x,y", "no result: give a sweep's or scores' .safetensors"),
        ("a.json", "[1, 2]", "a JSON list, not a result of circuitfind"),
        ("a.json", "{", "not JSON"),
        ("a.json", '{"x": 1, "y": 2}', "holds a JSON object of x, y, no result: give a sweep's"),
        ("a.json", '{"format": "other.thing"}', "holds 'other.thing', no result"),
        ("a.json", '{"nodes": {}}', "Read are: a sweep's"),
        ("a.json", '{"points": [{"n": 1}], "cpr": 1, "per_example": {}, "record": {}}', "write it again"),
        ("a.safetensors", "nonsense", "no safetensors file"),
    ],
)
def test_show_refuses_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert main(["show", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert said in error and name in error and error.count("\n") == 1


def test_show_refuses_figures_and_pages_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = edge_scores().save(tmp_path / "scores.safetensors")
    assert main(["show", str(path), "--what", "pie"]) == 2
    assert "has the figures layers, strongest, nodes" in capsys.readouterr().err
    assert main(["show", str(path), "--out", str(tmp_path / "page.png")]) == 2
    assert "must end in .html" in capsys.readouterr().err


def test_showing_scores_does_not_wait_for_torch(tmp_path: Path) -> None:
    path = edge_scores().save(tmp_path / "scores.safetensors")
    script = (
        "import sys; from circuitfind.cli.app import main; main(['show', sys.argv[1]]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
