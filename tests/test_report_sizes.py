"""What the page can be explored by: the slider's sizes, the drawings behind them, measured faithfulness, patterns."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from report_pages import GPT2_SMALL, GROUPED, SMALL, connected_circuit, explored, random_pattern, random_scores

import circuitfind as cf
from circuitfind.circuit import Circuit, connected
from circuitfind.evaluation.verify import EdgeCheck
from circuitfind.graph import Graph
from circuitfind.report import write
from circuitfind.report.explorer import drawn_at, first_shown
from circuitfind.report.page import Attention, ReportData, html
from circuitfind.report.sizes import Size, cuts, say, sizes_of
from circuitfind.report.write import BUDGET, attention, measure_sizes, pack, report_data, save_circuit


def told_of(text: str) -> dict[str, Any]:
    """What the page's script is told."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    assert found is not None
    return json.loads(found[1])


# ------------------------------------------------------------------------------------------------ cuts
@pytest.mark.parametrize("graph", [SMALL, GROUPED, Graph(3, 4, 1, 16, parallel=True)])
def test_a_cut_is_the_connected_part_of_the_strongest_edges(graph: Graph) -> None:
    scores = random_scores(graph)
    circuit = scores.top(90)
    ranked = [edge for edge in scores.ranked() if circuit.mask[tuple(edge)]]
    possible = set()
    for n in range(1, len(ranked) + 1):
        mask = np.zeros_like(circuit.mask)
        for writer, reader in ranked[:n]:
            mask[writer, reader] = True
        possible.add(connected(graph, mask).tobytes())
    found = cuts(circuit, scores.ranked(), count=1000)
    assert {cut.mask.tobytes() for cut in found} == possible - {np.zeros_like(circuit.mask).tobytes()}
    assert found[-1] is circuit and len(found) > 5
    assert [len(cut) for cut in cuts(circuit, count=1000)] == [len(cut) for cut in found]  # |effect| is the default
    few = cuts(circuit, scores.ranked(), count=5)
    assert len(few) <= 5 and few[-1] is circuit
    for smaller, larger in pairwise(few):
        assert len(smaller) < len(larger) and not (smaller.mask & ~larger.mask).any()


def test_what_is_too_large_is_cut_and_what_is_not_connected_is_kept() -> None:
    circuit = connected_circuit(SMALL, 120)
    assert [len(cut) <= 40 for cut in cuts(circuit, most=40)] == [True] * len(cuts(circuit, most=40))
    loose = Circuit.of(SMALL, ["m0->m1", "a0.h0->m1"])
    assert cuts(loose) == [loose]
    assert [len(cut) for cut in cuts(loose, most=1)] == [1]
    assert [len(cut) for cut in cuts(Circuit.empty(SMALL))] == [0]


def test_unmeasured_sizes_name_their_measured_neighbours() -> None:
    circuit = connected_circuit(SMALL, 60)
    sizes = sizes_of(circuit, 0.912, (0.9, 0.95))
    assert [size.faithfulness for size in sizes] == [None] * (len(sizes) - 1) + [0.912]
    assert say(sizes, len(sizes) - 1) == "faithfulness 0.912 (95% interval 0.9 to 0.95)"
    assert say(sizes, 0) == f"faithfulness not measured; nearest measured, {len(circuit)} edges: 0.912"
    both = [Size(sizes[0].circuit, 0.1), Size(sizes[1].circuit, 0.2), Size(sizes[2].circuit, float("nan")), sizes[-1]]
    lengths = [len(size.circuit) for size in both]
    assert say(both, 2).endswith(f"nearest measured, {lengths[1]} edges: 0.2, {lengths[3]} edges: 0.912")
    assert say(sizes_of(circuit, None, None), 0) == "faithfulness not measured"


def test_every_size_has_a_drawing_of_about_its_own() -> None:
    circuit = connected_circuit(GPT2_SMALL, 1000)
    sizes = sizes_of(circuit, None, None)
    lengths = [len(size.circuit) for size in sizes]
    plates = drawn_at(sizes)
    assert plates == sorted(set(plates)) and len(plates) > 2
    assert lengths[plates[-1]] <= 400 < lengths[plates[-1] + 1]  # larger ones are a matrix
    assert drawn_at([Size(circuit)]) == [0]
    assert lengths[first_shown(sizes)] <= 120 < lengths[first_shown(sizes) + 1]
    assert first_shown(sizes) in plates
    assert drawn_at(sizes_of(connected_circuit(SMALL, 36), None, None))[1:] == []  # 30 of 36 need none of their own


def test_page_knows_every_edge_and_where_it_comes_in() -> None:
    circuit = connected_circuit(GROUPED, 70)
    data = explored(circuit)
    told = told_of(html(data))
    assert list(told["edges"]) == circuit.edges
    for name, (source, target, kind, estimate, exact, low, high, first) in told["edges"].items():
        row = circuit.graph.edge(name)
        assert circuit.estimates is not None and circuit.exact is not None
        assert name == f"{source}->{target}" + (f"<{kind}>" if kind in "qkv" else "")
        assert estimate == pytest.approx(float(circuit.estimates[row]), rel=1e-4)
        if np.isnan(circuit.exact[row]):
            assert exact is low is high is None
        else:
            assert (low, exact, high) == pytest.approx([circuit.exact[row] + by for by in (-0.25, 0, 0.25)], rel=1e-4)
        assert [bool(size.circuit.mask[row]) for size in data.sizes] == [i >= first for i in range(len(data.sizes))]
    assert [size["edges"] for size in told["sizes"]] == [len(size.circuit) for size in data.sizes]
    for shared, heads in told["shared"].items():
        layer, group = re.fullmatch(r"a(\d)\.kv(\d)", shared).groups()  # type: ignore[union-attr]
        assert heads and set(heads) <= {f"a{layer}.h{2 * int(group) + i}" for i in (0, 1)}
    assert told["shared"]


def test_page_of_1000_edges_is_under_3_megabytes() -> None:
    """With as many patterns as the budget admits."""
    circuit = connected_circuit(GPT2_SMALL, 1000)
    heads = [name for name in circuit.nodes if ".h" in name]
    length = int((2 * BUDGET / len(heads)) ** 0.5) - 1
    pattern = dict.fromkeys(heads, random_pattern(length))
    assert 0.95 * BUDGET < sum(map(len, pattern.values())) <= BUDGET
    data = explored(circuit)
    full = ReportData(
        data.title,
        data.model,
        {},
        circuit,
        sizes=data.sizes,
        effect_intervals=data.effect_intervals,
        attention=[Attention("prompt", ("token",) * length, pattern)],
        checks=[EdgeCheck(name, 0.12345, 0.12345) for name in circuit.edges],
    )
    assert 1_500_000 < len(html(full).encode()) < 3_000_000


# ------------------------------------------------------------------------------------------------ from the model
@pytest.fixture(scope="module")
def tiny() -> cf.Model:
    return cf.load("tiny", device="cpu")


def test_sizes_are_measured_as_evaluate_does(tiny: cf.Model) -> None:
    task = cf.task("ioi", tiny, n=6).on(tiny)
    circuit = cf.attribute(tiny, task, method="eap").top(40)
    for ablation in ("corrupted", "mean"):
        sizes = measure_sizes(tiny, task, cuts(circuit, count=4), ablation=ablation)
        assert sizes[-1].circuit == circuit and len(sizes) > 2
        for size in sizes:
            value = cf.evaluate(tiny, task, size.circuit, ablation=ablation)
            assert size.faithfulness == pytest.approx(value.faithfulness, abs=1e-5)
            assert size.interval == pytest.approx(tuple(value.interval), abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_patterns_are_those_of_transformers(family: str) -> None:
    """Against `output_attentions` of the eager model, one prompt shorter than the others."""
    hf = build(family)
    model = cf.wrap(hf, None)
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    other = torch.where(torch.arange(7) == 1, (ids + 1) % 60, ids)
    task = cf.Task(clean=ids, corrupted=other, answers=[1, 2, 3], wrong_answers=[4, 5, 6], attention_mask=mask)
    circuit = Circuit.full(model.graph)
    before = hf.config._attn_implementation
    found = attention(model, task, circuit)
    assert hf.config._attn_implementation == before and [len(example.tokens) for example in found] == [5, 7]
    hf.set_attn_implementation("eager")
    for row, example in enumerate(found):
        length = len(example.tokens)
        with torch.no_grad():
            expected = hf(ids[row : row + 1, :length], output_attentions=True).attentions
        assert set(example.heads) == {name for name in circuit.nodes if ".h" in name}
        for name, weights in example.heads.items():
            layer, head = map(int, re.findall(r"\d+", name))
            assert len(weights) == length * (length + 1) // 2
            for query in range(length):
                start = query * (query + 1) // 2
                row_of_bytes = [byte / 255 for byte in weights[start : start + query + 1]]
                assert row_of_bytes == pytest.approx(
                    expected[layer][0, head, query, : query + 1].tolist(), abs=0.5 / 254
                )


def test_patterns_keep_their_budget(tiny: cf.Model) -> None:
    task = cf.task("ioi", tiny, n=4).on(tiny)
    circuit = cf.attribute(tiny, task, method="eap").top(40)
    heads = {name for name in circuit.nodes if ".h" in name}
    both = attention(tiny, task, circuit)
    assert [set(example.heads) for example in both] == [heads, heads]
    assert [example.tokens for example in both] == [task.tokens[0], task.tokens[1]]
    bytes_of = [sum(map(len, example.heads.values())) for example in both]
    one = attention(tiny, task, circuit, budget=sum(bytes_of) - 1)
    assert [set(example.heads) for example in one] == [heads]
    (few,) = attention(tiny, task, circuit, budget=bytes_of[0] - 1)
    assert len(few.heads) == len(heads) - 1
    out = {
        name: sum(abs(r.effect or 0) for r in circuit.rows() if tiny.graph.writer_names[r.writer] == name)
        for name in heads
    }
    assert set(few.heads) == set(sorted(heads, key=lambda name: -out[name])[:-1])
    assert attention(tiny, task, Circuit.of(tiny.graph, ["input->logits"])) == []


def test_the_strongest_heads_are_explained(tiny: cf.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    task = cf.task("ioi", tiny, n=4).on(tiny)
    circuit = cf.attribute(tiny, task, method="eap").top(40)
    monkeypatch.setattr(write, "EXPLAINED", 2)
    first, second = attention(tiny, task, circuit)
    assert list(first.why) == list(first.heads)[:2] and not second.why
    for head, said in first.why.items():
        pattern = np.tril(cf.attention(tiny, task, head, example=0).pattern, -1)
        pattern[:, 0] = 0
        query, key = map(int, np.unravel_index(pattern.argmax(), pattern.shape))
        found = cf.attention_attribution(tiny, task, head, key, query, example=0)
        assert f"From {found.query} to {found.key}: weight {found.weight:.2f}" in said["said"]
        assert said["query side"][0] == (found.query_side(1)[0].node, found.query_side(1)[0].relative)
        assert said["pairs"][0][1] == found.top(1)[0].relative
    assert not write._why(tiny, task, 0, "a0.h0", torch.ones(1, 1)), "one token attends to itself"


def test_patterns_are_of_prompts_that_can_be_read(tiny: cf.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    task = cf.task("ioi", tiny, n=6).on(tiny)
    circuit = Circuit.of(tiny.graph, ["input->a0.h0<q>", "a0.h0->logits"])
    lengths = sorted(map(len, task.tokens))
    assert lengths[0] < lengths[-1]
    monkeypatch.setattr(write, "LONGEST", lengths[-1] - 1)
    found = attention(tiny, task, circuit, prompts=6)
    assert [len(example.tokens) for example in found] == [len(t) for t in task.tokens if len(t) < lengths[-1]]
    assert all(set(example.heads) == {"a0.h0"} for example in found)


def test_pack_writes_query_after_query() -> None:
    weights = torch.tensor([[1.0, 0, 0], [0.25, 0.75, 0], [0.2, 0.3, 0.5]])
    assert list(pack(weights)) == [255, 64, 191, 51, 76, 128]


def test_find_hands_its_page_what_it_measures(tiny: cf.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = cf.task("ioi", tiny, n=16)
    result = cf.find(tiny, task, method="eap", prune=False, max_checks=0, random=1)
    known = {name: getattr(result, name) for name in ("scores", "checks", "curve", "steps", "summary")}
    data = report_data(result.circuit, tiny, result.unseen, **known)
    sizes = data.sizes
    assert sizes[-1].circuit == result.circuit and len(sizes) > 5
    assert sizes[-1].faithfulness == pytest.approx(result.checks.faithfulness, abs=1e-6)
    ranked = result.scores.ranked("absolute").tolist()
    worst = [max(ranked.index(edge) for edge in np.argwhere(size.circuit.mask).tolist()) for size in sizes]
    assert worst == sorted(worst)  # the order is that of the search's scores
    assert [example.prompt for example in data.attention] == list(result.unseen.prompts[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = write.write_report(tmp_path / "report.html", result.circuit, tiny, result.unseen, **known)
    text = path.read_text(encoding="utf-8")
    assert data.tolerance == 0.15 and data.task["held-out pairs"] == data.task["search pairs"] == "8"
    assert "Intervals from only 8 different pairs may miss pairs that behave differently." in text
    told = told_of(text)
    assert [size["edges"] for size in told["sizes"]] == [len(size.circuit) for size in sizes]
    for check, interval in zip(result.checks.edges, result.checks.intervals, strict=True):
        if check.name in told["edges"]:
            assert told["edges"][check.name][4:7] == pytest.approx([check.exact, *interval], rel=1e-3)
    drawn = replace(result.checks, random=(5.0, -5.0, 1.0))  # 5 is more than the circuit's, and less faithful
    assert "2 of 3 random circuits with as many edges are further from 1" in html(
        report_data(result.circuit, checks=drawn)
    )

    def refused(*_: object) -> None:
        raise cf.ModelError("no patterns here")

    monkeypatch.setattr(write, "attention", refused)
    with pytest.warns(UserWarning, match="the report has no attention patterns: no patterns here"):
        without = report_data(result.circuit, tiny, result.unseen, **known)
    assert without.attention == () and "does not hand out" in without.attention_note


def test_a_report_needs_no_more_than_a_circuit(tiny: cf.Model, tmp_path: Path) -> None:
    task = cf.task("ioi", tiny, n=6)
    result = cf.find(tiny, task, method="eap", prune=False, max_checks=3, random=1)
    opened = Circuit.open(result.circuit.save(tmp_path / "circuit.json"))
    alone = report_data(opened)
    assert (alone.faithfulness, alone.interval) == (result.checks.faithfulness, tuple(result.checks.interval))
    assert "Intervals from only 3 different pairs" in html(alone)
    assert alone.model == result.circuit.record.model and not alone.sizes and not alone.attention
    measured = {edge.name: edge.exact for edge in result.checks.edges if edge.name in opened}
    assert {edge.name: edge.exact for edge in alone.checks} == pytest.approx(measured)
    run = report_data(opened, tiny, result.unseen)
    assert run.faithfulness == pytest.approx(result.checks.faithfulness, abs=1e-6)
    assert run.sizes[-1].circuit == opened and [row.prompt for row in run.examples] == list(result.unseen.prompts)
    assert run.attention and "first pair" in run.task
    bare = report_data(Circuit.of(tiny.graph, ["input->logits"]))
    assert bare.title == "A circuit" and bare.faithfulness is None and "<h2>Record</h2>" in html(bare)
    with pytest.raises(cf.TaskError, match=r"needs the model, too, or the task bound to it: task\.on\(model\)"):
        report_data(opened, None, task)


def test_scores_by_place_say_where_an_edge_acts() -> None:
    circuit = connected_circuit(SMALL, 20)
    values = np.zeros((3, *SMALL.real.shape), dtype=np.float32)
    edge = circuit.edges[4]
    values[(slice(None), *SMALL.edge(edge))] = (0.25, -2, 0.1)
    data = report_data(circuit, scores=cf.PlacedScores(SMALL, values, positions=("S1", "S2", "the end")))
    assert data.places[edge] == [("S2", -2.0), ("S1", 0.25)]
    assert told_of(html(data))["places"][edge] == [["S2", -2.0], ["S1", 0.25]]


def test_a_circuit_is_left_as_files(tiny: cf.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    circuit = connected_circuit(tiny.graph, 30)
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match="Install Graphviz"):
        files = save_circuit(circuit, tmp_path, "found", "a title")
    assert [path.name for path in files] == ["found.json", "found.dot"]
    assert Circuit.open(files[0]) == circuit
    assert f"a title: {len(circuit)} edges" in files[1].read_text()
