"""One of each record added from outside the package: passed or registered, it works like a built-in one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import torch
import typer
from plotly.graph_objects import Figure

import circuitfind as cf
from circuitfind.batch import Batch
from circuitfind.cli import app
from circuitfind.cli.options import option
from circuitfind.cli.output import Output
from circuitfind.opening import HOMES
from circuitfind.plots.plot import FIGURES
from circuitfind.references.published import REFERENCES
from circuitfind.result import Result
from circuitfind.tasks import formats

SOURCE = '''
import torch

import circuitfind as cf
from circuitfind.engine.capture import capture, capture_corrupted


def squared(experiment, request):
    """How much each writer's output changes, squared, the same for all its edges."""
    graph = experiment.graph

    def one(batch, _):
        clean = capture(experiment.adapter, batch.clean, stop=True)
        corrupted = capture_corrupted(experiment.adapter, batch, stop=True)
        delta = clean.writers.minus(experiment.ablated(clean, corrupted))
        sizes = [delta.embed.pow(2).sum()[None]]
        for heads, mlp in zip(delta.heads, delta.mlps):
            sizes += [heads.pow(2).sum((0, 1, 3)), mlp.pow(2).sum()[None]]
        return torch.cat(sizes)

    total = sum(part for _, part in experiment.in_batches(one, "squares")) * request.options["factor"]
    return total[:, None].expand(graph.n_writers, graph.n_readers) if request.level == "edge" else total


METHOD = cf.Method(
    "squared-change", "squared change of a node's output", "this test", "2 forward", ("edge", "node"), score=squared,
    options={"factor": 1.0}, sign=lambda level, options: "not an effect: a squared change",
)
'''


@pytest.fixture(scope="module")
def model() -> cf.Model:
    return cf.load("tiny")


@pytest.fixture(scope="module")
def task(model: cf.Model) -> cf.Task:
    return cf.task("ioi", model, n=8, template="abba-3")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_circuitfind_method.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_circuitfind_method"
    sys.modules.pop("own_circuitfind_method", None)


def test_a_method(model: cf.Model, task: cf.Task, module: str) -> None:
    path = f"{module}:METHOD"
    named = cf.attribute(model, task, path)
    record = sys.modules[module].METHOD
    passed = cf.attribute(model, task, record, factor=2.0)
    np.testing.assert_allclose(passed.values, 2 * named.values, rtol=1e-6)
    assert named.record.method == "squared-change" and not named.record.is_effect
    assert cf.attribute(model, task, record, level="node").top(1)
    with pytest.raises(cf.ScoreError, match="steps"):
        cf.attribute(model, task, record, steps=3)
    assert {entry.method for entry in cf.compare(model, task, {"eap": None, "mine": record}).ranked} == {"eap", "mine"}
    assert cf.find(model, task, method=path, tolerance=0.5, max_checks=2, random=1, prune=False).scores.record.method


def test_a_metric(model: cf.Model, task: cf.Task) -> None:
    def margin(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return logits.gather(-1, batch.answers[:, 0, :1]).squeeze(-1) - logits.mean(-1)

    scores = cf.attribute(model, task, "eap", metric=margin)
    assert scores.record.metric == "margin"
    circuit = scores.top(200)
    with pytest.raises(cf.ScoreError, match="pass metric="):
        cf.evaluate(model, task, circuit)
    assert cf.evaluate(model, task, circuit, metric=margin).record.metric == "margin"
    cf.register(cf.Metric("margin-of-answers", lambda logits, batch: margin(logits[:, 0], batch)))
    assert cf.attribute(model, task, "eap", metric="margin-of-answers").record.metric == "margin-of-answers"


def test_an_ablation(model: cf.Model, task: cf.Task) -> None:
    half = cf.Ablation("half", lambda own, corrupted, mean: (own + corrupted) / 2, corrupted=True)
    cf.register(half)
    whole = cf.attribute(model, task, "eap")
    scores = cf.attribute(model, task, "eap", ablation="half")
    np.testing.assert_allclose(scores.values, whole.values / 2, atol=1e-5)
    assert cf.evaluate(model, task, scores.top(300)).record.ablation == "half"
    sweep = cf.patch(model, task, "heads", ablation="half")
    assert np.isfinite(sweep.effects).all() and sweep.record.ablation == "half"


# -------------------------------------------------------------------- what is not a record
def test_a_file_format(model: cf.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(row: formats.Columns, _: str | None) -> formats.Fields:
        return {"clean": row["good"], "corrupted": row["bad"], "answers": [row["yes"]], "wrong_answers": [row["no"]]}

    own = formats.Format("good and bad", lambda row: "good" in row, read)
    monkeypatch.setattr(formats, "FORMATS", (own, *formats.FORMATS))
    task = cf.task("ioi", model, n=4)
    pairs = zip(task.clean, task.corrupted, task.answers, task.wrong_answers, strict=True)
    rows = [{"good": good, "bad": bad, "yes": yes[0], "no": no[0]} for good, bad, yes, no in pairs]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = cf.attribute(model, cf.Task.from_file(file))
    np.testing.assert_array_equal(found.values, cf.attribute(model, task).values)


def test_a_figure(model: cf.Model, task: cf.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(circuit: cf.Circuit) -> Figure:
        return Figure({"data": [{"type": "bar", "y": [len(circuit)]}]})

    monkeypatch.setitem(FIGURES, "Circuit", {**FIGURES["Circuit"], "sizes": sizes})
    circuit = cf.attribute(model, task).top(50)
    assert circuit.plot("sizes").data[0].y == (len(circuit),)
    assert cf.plot(circuit, "sizes").data[0].y == (len(circuit),)


def test_a_reference_circuit(model: cf.Model, task: cf.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = cf.attribute(model, task, "eap")
    best = scores.top(30)
    mine = cf.Reference("mine", model.graph, best.mask, {"first": ("a0.h0", "a0.h1")}, source="this test")
    monkeypatch.setitem(REFERENCES, "mine", lambda: mine)
    assert cf.reference("mine") is mine
    for judged in (best, scores):
        named, given = (cf.agreement(judged, reference) for reference in ("mine", mine))
        assert named.reference == "mine" and json.dumps(named.to_dict()) == json.dumps(given.to_dict())
    with pytest.raises(cf.FileError, match="did you mean 'mine'"):
        cf.reference("mein")


class Layer(NamedTuple):
    layer: int
    edges: int


@dataclass(frozen=True, eq=False, repr=False)
class EdgesByLayer(Result):
    """How many of a circuit's edges each layer's heads and MLP write."""

    FORMAT: ClassVar[str] = "circuitfind.edges-by-layer"
    ROWS: ClassVar[str] = "layers"
    layers: tuple[Layer, ...]
    record: cf.Record


def test_a_result(model: cf.Model, task: cf.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "circuitfind.own_result", sys.modules[__name__])  # as if the file lay there
    monkeypatch.setitem(HOMES, EdgesByLayer.FORMAT, "own_result:EdgesByLayer")
    circuit = cf.attribute(model, task, "eap").top(50)
    counts = [sum(edge.startswith((f"a{at}.", f"m{at}->")) for edge in circuit.edges) for at in range(4)]
    found = EdgesByLayer(tuple(map(Layer, range(4), counts)), circuit.record)
    back = cf.open(found.save(tmp_path / "edges.json"))
    assert isinstance(back, EdgesByLayer) and back.layers == found.layers and back.record == found.record
    assert found.columns() == {"layer": [0, 1, 2, 3], "edges": counts} and 0 < sum(counts) <= 50
    assert found.save(tmp_path / "edges.csv").read_text().splitlines()[1] == f"0,{counts[0]}"
    assert "EdgesByLayer(" in repr(found) and "<table" in found._repr_html_()


@dataclass(frozen=True)
class Times:
    times: int = option("How often.", 2, least=1)


def hail(options: Times, out: Output) -> None:
    """Greet.

    Example: circuitfind hail --times 3
    """
    out.say("hello " * options.times)


def test_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = typer.Typer()
    app._register(verbs, hail)
    app._register(verbs, app.doctor)
    verbs(args=["hail", "--times", "3"], standalone_mode=False)
    assert capsys.readouterr().out.strip() == "hello hello hello"
