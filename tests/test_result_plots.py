"""Figures of paths, direct effects, approximations and several attention patterns hold the results' own numbers."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_plots import EVIL, Tags, ticks, title
from toys import id_task, wrapped

import circuitfind as cf
from circuitfind.patching.attention import AttentionPattern
from circuitfind.plots.plot import drawings
from circuitfind.record import Record

pytest.importorskip("plotly")
RECORD = Record(model="toy", task="names", n_examples=6, metric="logit_diff", method="path patching")
WRITERS = ("input", *(f"a{layer}.h{head}" for layer in range(3) for head in range(4)), "m0", "m1", "m2")
needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")


def path_effects(senders: tuple[str, ...], receivers: tuple[str, ...], absent: float = 0.0) -> cf.PathEffects:
    """Random effects of either sign; a share of the paths does not exist."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(len(senders), len(receivers), 6))
    values[rng.random(values.shape[:2]) < absent] = np.nan
    return cf.PathEffects(senders, receivers, values, rng.normal(3, 1, 6), rng.normal(-3, 1, 6), RECORD)


def cells(figure: Any) -> dict[str, float]:
    """What a heat map shows of each place, by the name that is read on hovering."""
    heat = figure.data[0]
    shown = {
        unescape(re.findall("<b>(.*?)</b>", text)[0]): value
        for texts, values in zip(heat.hovertext, heat.z, strict=True)
        for text, value in zip(texts, values, strict=True)
        if text
    }
    assert len(shown) == sum(bool(text) for texts in heat.hovertext for text in texts)
    return shown


def same(ours: dict[str, float], theirs: dict[str, float]) -> bool:
    return ours.keys() == theirs.keys() and all(
        value == theirs[name] or (np.isnan(value) and np.isnan(theirs[name])) for name, value in ours.items()
    )


@pytest.fixture(scope="module")
def approximated() -> cf.Approximation:
    return cf.approximation(wrapped("llama"), id_task((5, 5, 5)), ["heads", "mlp", "k"])


@pytest.fixture(scope="module")
def direct() -> cf.DirectEffects:
    return cf.direct_effects(wrapped("llama"), id_task((5, 5, 5)))


# -------------------------------------------------------------------- paths
def test_senders_are_a_table_of_heads_and_mlps() -> None:
    found = path_effects(WRITERS, ("a3.h1<q> + a3.h3<v>",), absent=0.2)
    figure = cf.plot(found)
    means = dict(zip(WRITERS, found.per_example[:, 0].mean(axis=1).tolist(), strict=True))
    assert np.isnan(list(means.values())).any() and same(cells(figure), {n: means[n] for n in WRITERS[1:]})
    assert ticks(figure.layout.xaxis) == ["0", "1", "2", "3", "MLP"] and ticks(figure.layout.yaxis) == ["0", "1", "2"]
    said = title(figure)
    assert "into a3.h1&lt;q&gt; + a3.h3&lt;v&gt;: names in toy" in said and f"input {means['input']:+.3g}" in said
    ends = {row.sender: row for row in found.top(99)}
    for text in (text for row in figure.data[0].hovertext for text in row if "no value" not in text):
        row = ends[re.findall("<b>(.*?)</b>", text)[0]]
        assert f"{row.effect:+.4g}<br>95% {row.low:.4g} to {row.high:.4g}" in text


def test_receivers_are_a_table_of_readers() -> None:
    graph = wrapped("llama").graph
    found = path_effects(("a0.h1",), tuple(graph.reader_names))
    figure = cf.plot(found)
    means = dict(zip(found.receivers, found.effects[0].tolist(), strict=True))
    assert same(cells(figure), {name: value for name, value in means.items() if name != "logits"})
    columns = ticks(figure.layout.xaxis)
    assert columns == ["q 0", "q 1", "q 2", "q 3", "k kv0", "k kv1", "v kv0", "v kv1", "MLP"]
    assert np.array(figure.data[0].z)[1, columns.index("v kv1")] == means["a1.kv1<v>"]
    assert "from a0.h1:" in title(figure) and f"logits {means['logits']:+.3g}" in title(figure)
    assert -figure.data[0].zmin == figure.data[0].zmax


def test_senders_by_receivers_keep_the_strongest() -> None:
    found = path_effects(WRITERS, ("a2.h0<q>", "a2.h0<k>", "m2", "logits"), absent=0.4)
    figure = cf.plot(found)
    np.testing.assert_array_equal(np.array(figure.data[0].z), found.effects)
    assert ticks(figure.layout.yaxis) == list(WRITERS) and ticks(figure.layout.xaxis) == list(found.receivers)
    row = WRITERS.index("m0")
    assert figure.data[0].hovertext[row][3] == f"<b>m0 -&gt; logits</b><br>{found.effects[row, 3]:+.4g}"
    few = cf.plot(found, rows=3)
    sizes = np.nan_to_num(np.abs(found.effects))
    rows, columns = (sorted(np.argsort(-sizes.max(axis=axis))[:3].tolist()) for axis in (1, 0))
    np.testing.assert_array_equal(np.array(few.data[0].z), found.effects[rows][:, columns])
    assert "the strongest 3 of 16 senders; the strongest 3 of 4 receivers" in title(few)


def test_a_few_paths_are_bars_with_intervals() -> None:
    found = path_effects(("a0.h1", "m0"), ("a2.h0<q>", "logits"), absent=0.6)
    assert list(drawings(found)) == ["effects"] and list(drawings(path_effects(WRITERS, ("m2", "logits"))))[1:]
    bars, rows = cf.plot(found).data[0], found.top(99)
    assert len(rows) < 4 and list(bars.x) == [row.effect for row in rows]
    assert ticks(cf.plot(found).layout.yaxis) == [f"{row.sender} -> {row.receiver}" for row in rows]
    np.testing.assert_allclose(bars.x + bars.error_x.array, [row.high for row in rows])
    np.testing.assert_allclose(bars.x - bars.error_x.arrayminus, [row.low for row in rows])


# -------------------------------------------------------------------- direct effects
def test_components_add_up_to_the_logit_difference(direct: cf.DirectEffects) -> None:
    figure = cf.plot(direct, "components")
    names = ticks(figure.layout.yaxis)
    assert names == ["input", "a0", "m0", "a1", "m1", "biases"]
    shown = dict(zip(names, figure.data[0].x.tolist(), strict=True))
    assert sum(shown.values()) == pytest.approx(direct.logit_diff.mean(), abs=1e-4)
    scores = direct.scores.to_dict()
    assert shown["a1"] == pytest.approx(sum(scores[f"a1.h{head}"] for head in range(4)), rel=1e-4)
    assert shown["m0"] == pytest.approx(scores["m0"], rel=1e-5)
    assert figure.data[0].hovertext[2].endswith(f"so far {shown['input'] + shown['a0'] + shown['m0']:+.4g}")
    assert figure.data[0].error_x.visible and "blue raises the logit difference" in title(figure)
    of_means = cf.plot(direct.scores, "components")
    assert ticks(of_means.layout.yaxis) == names[:-1] and not of_means.data[0].error_x.visible
    np.testing.assert_allclose(of_means.data[0].x, list(shown.values())[:-1], rtol=1e-5)


def test_direct_effects_are_where_their_names_say(direct: cf.DirectEffects) -> None:
    figure = cf.plot(direct)
    means = dict(zip(direct.graph.writer_names, direct.per_example.mean(axis=1).tolist(), strict=True))
    assert same(cells(figure), {name: value for name, value in means.items() if name != "input"})
    assert f"biases {direct.constant.mean():+.3g}" in title(figure)
    best = sorted(means, key=lambda name: -abs(means[name]))[:4]
    assert ticks(cf.plot(direct, "strongest", n=4).layout.yaxis) == best


# -------------------------------------------------------------------- approximations
def test_a_panel_a_kind_holds_its_places(approximated: cf.Approximation) -> None:
    figure = cf.plot(approximated)
    places, panels = list(approximated.places()), [a.text for a in figure.layout.annotations]
    assert [re.findall("<b>(.*?),", text)[0] for text in panels] == ["heads", "mlp", "k"]
    domains = []
    for what, text in zip(approximated.compared, panels, strict=True):
        fit, cloud = approximated.by_kind[what], next(trace for trace in figure.data if trace.name == what)
        mine = [place for place in places if place.kind == what]
        assert list(cloud.x) == [p.estimate for p in mine] and list(cloud.y) == [p.exact for p in mine]
        assert list(cloud.marker.color) == [p.layer for p in mine]
        assert f"r {fit.r:.3f}, slope {fit.slope:.3f}, {fit.wrong_signs} of {fit.matter}" in text
        assert list(cloud.marker.symbol).count("x") == fit.wrong_signs
        assert all(f"<b>{p.name}".replace("<k>", "&lt;k&gt;") in t for p, t in zip(mine, cloud.hovertext, strict=True))
        number = cloud.xaxis[1:]
        domains.append((figure.layout[f"xaxis{number}"].domain, figure.layout[f"yaxis{number}"].domain))
    for at, (x, y) in enumerate(domains):
        assert all(0 <= low < high <= 1 for low, high in (x, y))
        assert all(x[1] < u[0] or u[1] < x[0] or y[1] < v[0] or v[1] < y[0] for u, v in domains[:at])
    assert sum(bool(trace.marker.showscale) for trace in figure.data) == 1
    for remark in approximated.remarks:
        assert remark in unescape(title(figure))


def test_agreement_by_layer_is_a_heat_map(approximated: cf.Approximation) -> None:
    figure = cf.plot(approximated, "layers")
    shown = {
        (what, int(layer)): value
        for what, values in zip(ticks(figure.layout.yaxis), figure.data[0].z, strict=True)
        for layer, value in zip(ticks(figure.layout.xaxis), values, strict=True)
    }
    expected = {place: fit.r for place, fit in approximated.by_layer.items()}
    np.testing.assert_array_equal([shown[place] for place in expected], list(expected.values()))
    assert (figure.data[0].zmin, figure.data[0].zmax, len(shown)) == (-1, 1, len(expected))


# -------------------------------------------------------------------- attention, positions
def test_several_heads_are_panels_with_their_own_tokens() -> None:
    rng = np.random.default_rng(0)
    tokens = [("a", " b", EVIL), ("x", "y"), ("1", "2", "3", "4")]
    found = [AttentionPattern(f"a0.h{at}", names, rng.random((len(names),) * 2)) for at, names in enumerate(tokens)]
    figure = cf.plot(found)
    for at, (one, trace) in enumerate(zip(found, figure.data, strict=True)):
        np.testing.assert_array_equal(np.array(trace.z), one.pattern)
        number = "" if at == 0 else str(at + 1)
        assert trace.xaxis == f"x{number}" and (trace.zmin, trace.zmax) == (0, 1)
        labels = [f"{place} {token.strip()}" for place, token in enumerate(one.tokens)]
        short = [label if len(label) <= 20 else f"{label[:19]}…" for label in labels]
        assert ticks(figure.layout[f"xaxis{number}"]) == ticks(figure.layout[f"yaxis{number}"]) == short
    assert [a.text for a in figure.layout.annotations] == [f"<b>a0.h{at}</b>" for at in range(3)]
    assert title(figure) == "Attention of a0.h0, a0.h1, a0.h2"
    assert title(cf.plot(found[:1])) == title(cf.plot(found[0])) == "Attention of a0.h0"
    with pytest.raises(cf.ScoreError, match="nothing of type list can be drawn"):
        cf.plot([found[0], 3])


def test_positions_are_called_by_their_tokens() -> None:
    model = cf.load("tiny", check=False)
    task = cf.task("greater_than", model, n=3)
    scores = cf.attribute(model, task, level="node", by_position=True)
    sweep = cf.patch(model, task, "mlp")
    assert isinstance(scores, cf.NodeScores) and scores.positions == sweep.axes[-1].labels
    assert ticks(cf.plot(scores).layout.xaxis) == list(scores.positions)
    whole = cf.attribute(model, task, level="node")
    assert isinstance(whole, cf.NodeScores) and whole.positions is None
    exact = replace(scores, values=2 * scores.values)
    assert any(
        f"m3 at {scores.positions[-1]}</b>" in t for tr in cf.plot((scores, exact)).data[2:] for t in tr.hovertext
    )


@needs_chromium
def test_new_pages_open_without_complaint(
    tmp_path: Path, direct: cf.DirectEffects, approximated: cf.Approximation
) -> None:
    heads = [AttentionPattern(f"a0.h{at}", ("a", EVIL), np.eye(2)) for at in range(3)]
    results = [
        path_effects(WRITERS, (EVIL,)),
        path_effects(WRITERS, ("m2", "logits"), 0.5),
        direct,
        approximated,
        heads,
    ]
    figures = [draw() for result in results for draw in drawings(result).values()]
    path = cf.save_page(figures, tmp_path / "figures.html")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += ["--virtual-time-budget=5000", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    drawn = [a for _, a in Tags(done.stdout).found if "data-figure" in a and "js-plotly-plot" in str(a["class"])]
    assert len(drawn) == len(figures) == 10
