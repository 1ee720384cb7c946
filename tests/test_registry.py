"""Records of a user's own: passed, registered or named by where they are, they work as the built-in ones do."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import numpy as np
import pytest

import circuitfind as cf
from circuitfind import metrics
from circuitfind.engine.ablation import ABLATIONS
from circuitfind.graph import Graph
from circuitfind.models.families import FAMILIES
from circuitfind.patching.places import KINDS
from circuitfind.tasks import builtin


@pytest.fixture(scope="module")
def model() -> cf.Model:
    return cf.load("tiny")


@pytest.fixture(scope="module")
def task(model: cf.Model) -> cf.Task:
    return cf.task("greater-than", model, n=3)


def _score(experiment, request):
    shape = experiment.graph.real.shape
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) * request.options["factor"]


OWN = cf.Method("own", "counts", "nobody", "none", ("edge",), score=_score, options={"factor": 2})


def test_a_method_of_ones_own_by_record_by_name_and_by_module(model, task) -> None:
    expected = cf.attribute(model, task, OWN)
    assert expected.values[0, 1] == 2 and expected.record.settings["factor"] == 2
    assert cf.attribute(model, task, OWN, factor=3).values[0, 1] == 3
    with pytest.raises(cf.ScoreError, match="method 'own' is unknown"):
        cf.attribute(model, task, "own")
    assert cf.register(OWN) is OWN
    np.testing.assert_array_equal(cf.attribute(model, task, "own").values, expected.values)
    assert "own" in cf.methods("edge").columns()["name"] and "own" not in cf.methods("node").columns()["name"]
    sys.modules["own_methods"] = types.ModuleType("own_methods")
    sys.modules["own_methods"].METHOD = OWN
    np.testing.assert_array_equal(cf.attribute(model, task, "own_methods:METHOD").values, expected.values)
    with pytest.raises(cf.ScoreError, match="cannot be imported"):
        cf.attribute(model, task, "own_methods:OTHER")


def test_an_ablation_a_metric_and_a_kind_of_place(model, task) -> None:
    cf.register(cf.Ablation("half", lambda own, corrupted, mean: (own + corrupted) / 2, corrupted=True))
    halved = cf.attribute(model, task, "eap", ablation="half").values
    np.testing.assert_allclose(halved, cf.attribute(model, task, "eap").values / 2, atol=1e-6)
    cf.register(cf.Metric("first", lambda logits, batch: logits[:, 0, 0], answers=False))
    assert cf.patch(model, task, "mlp", by_position=False, metric="first").record.metric == "first"
    cf.register(replace(KINDS["heads"], name="outputs", label="out{layer}.{unit}"))
    outputs, heads = (cf.patch(model, task, what, layers=1) for what in ("outputs", "heads"))
    np.testing.assert_array_equal(outputs.effects, heads.effects)
    assert outputs.top(1)[0].place.startswith("out1.")
    estimates = [cf.attribute(model, task, level="node", what=what, layers=1) for what in ("outputs", "heads")]
    np.testing.assert_array_equal(estimates[0].effects, estimates[1].effects)


def test_a_task_and_a_family_are_filed_too() -> None:
    builder = replace(builtin.TASKS["ioi"], name="mine")
    assert cf.register(builder) is builder and builtin.TASKS["mine"] is builder
    family = FAMILIES["gpt2"]
    assert cf.register(family, "my-gpt2") is family and FAMILIES["my-gpt2"] is family


def test_what_cannot_be_registered() -> None:
    for record, options, message in (
        ("own", {}, "a str is not one of Method, Ablation, Kind, Metric, TaskBuilder or Family"),
        (FAMILIES["gpt2"], {}, "give model_type="),
        (OWN, {"model_type": "x"}, "model_type= is for a Family"),
        (replace(OWN, name="eap"), {}, "method 'eap' exists"),
        (replace(OWN, score=None), {}, "needs score= or points="),
        (replace(KINDS["heads"], site="q"), {}, "kind of place 'heads' exists"),
        (replace(ABLATIONS["zero"], corrupted=True), {}, "ablation 'zero' exists"),
        (replace(metrics.METRICS["kl"], wrong=True), {}, "metric 'kl' exists"),
    ):
        with pytest.raises(cf.CircuitfindError, match=message):
            cf.register(record, **options)


@pytest.mark.parametrize(
    ("spelt", "meant"),
    [
        ("L9H9", "a9.h9"),
        ("9.9", "a9.h9"),
        ("(9, 9)", "a9.h9"),
        ("A9.H9", "a9.h9"),
        ("head 9.9", "a9.h9"),
        ("layer 9 head 9", "a9.h9"),
        ("blocks.9.attn.hook_z.9", "a9.h9"),
        ("a9.9.q", "a9.h9<q>"),
        ("L9H9.k", "a9.h9<k>"),
        ("blocks.9.attn.9.v", "a9.h9<v>"),
        ("mlp 3", "m3"),
        ("blocks.3.hook_mlp_out", "m3"),
        ("embed", "input"),
        ("Resid End", "logits"),
        ("L12H0", None),
        ("10", None),
        ("resid_pre", None),
    ],
)
def test_names_of_other_tools(spelt: str, meant: str | None) -> None:
    assert Graph(12, 12, 12, 768).meant(spelt) == meant
    if meant == "a9.h9<k>":
        assert Graph(12, 12, 4, 768).meant(spelt) == "a9.kv3<k>"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, task: cf.patch(model, task, "resid_pre"), "did you mean 'resid'"),
        (lambda model, task: cf.patch(model, task, "blocks.1.attn.hook_z"), "did you mean 'heads'"),
        (lambda model, task: cf.patch(model, task, "hook_pattern"), "did you mean 'pattern'"),
        (lambda model, task: cf.attribute(model, task, "EAP-IG"), "did you mean 'eap-ig-inputs'"),
        (lambda model, task: cf.attribute(model, task, "eap", ablation="means"), "did you mean 'mean'"),
        (lambda model, task: cf.attention(model, task, "L1H2"), "has no head 'L1H2': did you mean 'a1.h2'"),
        (lambda model, task: cf.path_patch(model, task, "1.2"), "has no sender '1.2': did you mean 'a1.h2'"),
        (lambda model, task: cf.path_patch(model, task, "m0", "L2H1.q"), "did you mean 'a2.h1<q>'"),
        (lambda model, task: cf.Circuit.of(model.graph, ["L0H1->m2"]), "did you mean 'a0.h1'"),
    ],
)
def test_unknown_names_say_what_may_be_meant(model, task, call, message: str) -> None:
    with pytest.raises(cf.CircuitfindError, match=message):
        call(model, task)
