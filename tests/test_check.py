"""The strongest estimates beside their exact effects, and the default method of nodes and places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import id_task, wrapped

import circuitfind as cf
from circuitfind.attribution.methods import default_of
from circuitfind.cli.app import main
from circuitfind.errors import ScoreError

VERB = ("attribute", "tiny", "--task", "greater_than", "--n", "4", "--no-check")


# -------------------------------------------------------------------- the default
@pytest.mark.parametrize("what", [None, "heads", "resid", "k"])
def test_the_default_is_the_first_that_the_ablation_allows(what: str | None) -> None:
    model, task = wrapped("llama"), id_task((5, 5, 5))
    usual = "atp" if what == "k" else "eap-ig-inputs"
    for ablation, method in (("corrupted", usual), ("zero", "atp"), ("mean", "atp"), ("resample", "atp")):
        found = cf.attribute(model, task, level="node", what=what, ablation=ablation)
        assert found.record.method == method
        named = cf.attribute(model, task, method, level="node", what=what, ablation=ablation)
        np.testing.assert_array_equal(*(one.values if what is None else one.effects for one in (found, named)))
        if what is not None:
            assert cf.approximation(model, task, what, ablation=ablation).record.method == method
    assert default_of("edge") == default_of("edge", "zero") == "eap-ig-inputs"


def test_each_kind_of_place_has_its_own_default() -> None:
    model, task = wrapped("llama"), id_task((5, 5, 5))
    found = cf.approximation(model, task, ["heads", "k"])
    assert [one.estimated.record.method for one in found.compared.values()] == ["eap-ig-inputs", "atp"]
    assert found.record.method == "eap-ig-inputs, atp"
    assert "'eap-ig-inputs'" in found.remarks[0] and "'atp'" in found.remarks[1]


def test_the_default_takes_a_metric_that_is_flat_at_the_clean_run() -> None:
    assert cf.attribute(wrapped("gpt2"), id_task((5, 5)), level="node", metric="kl").values.any()


@pytest.mark.parametrize("level", [("--level", "node"), ("--level", "node", "--what", "heads")])
def test_the_verb_says_what_it_takes_in_place_of_the_default(
    level: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    why = "the default, eap-ig-inputs, needs ablation corrupted, not zero"
    for more, said, expected in (((), "method eap-ig-inputs", False), (("--ablation", "zero"), "method atp:", True)):
        assert main([*VERB, "--out", str(tmp_path), "--max-checks", "0", *level, *more]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert said in out and (why in out) == expected
    assert main(["approximation", *VERB[1:], "--out", str(tmp_path), "--what", "heads", "--ablation", "zero"]) == 0
    assert why in " ".join(capsys.readouterr().out.split())


# -------------------------------------------------------------------- the check
SCORED: dict[str, dict[str, Any]] = {
    "edges": {"level": "edge"},
    "nodes": {},
    "nodes by position": {"by_position": True},
    "nodes, denoising": {"direction": "denoising"},
    "nodes, zero": {"ablation": "zero"},
    "heads": {"what": "heads"},
    "stream of a layer by position": {"what": "resid", "layers": [1]},
    "MLPs": {"what": "mlp", "by_position": False, "metric": "logprob"},
    "keys": {"what": "k"},
}


@pytest.mark.parametrize("kind", SCORED)
@pytest.mark.parametrize("by", ["absolute", "signed"])
def test_exact_effects_are_those_of_the_exact_method(kind: str, by: Any) -> None:
    model, task = wrapped("llama"), id_task((5, 5, 5))
    asked = {"level": "node", **SCORED[kind]}
    scores = cf.attribute(model, task, **asked)
    whole = cf.attribute(model, task, "exact", **asked)
    found = cf.check(model, task, scores, 4, by=by)
    assert len(found.checked) == (2 if kind == "MLPs" else 4) and found.record == scores.record
    if isinstance(scores, cf.Sweep):
        rows, known = scores.top(4, by), {(row.name, row.position): row for row in whole.rows()}
        estimates = [(row.name, row.position, row.effect) for row in rows]
        exact = [known[row.name, row.position].effect for row in rows]
        ends = [(known[row.name, row.position].low, known[row.name, row.position].high) for row in rows]
        np.testing.assert_allclose([row.interval for row in found.checked], ends, rtol=1e-4, atol=1e-6)
    elif isinstance(scores, cf.NodeScores):
        rows = scores.top(4, by)
        estimates = [(name, "", float(np.sum(scores[name]))) for name in rows]
        whole = cf.attribute(model, task, "exact", **asked | {"by_position": False})  # the node's positions together
        exact = [whole[name] for name in rows]
    else:
        rows = [model.graph.edge_name(*edge) for edge in scores.ranked(by)[:4]]
        estimates, exact = [(name, "", scores[name]) for name in rows], [whole[name] for name in rows]
    assert [(row.name, row.position) for row in found.checked] == [name[:2] for name in estimates]
    np.testing.assert_allclose([row.estimate for row in found.checked], [name[2] for name in estimates], rtol=1e-5)
    np.testing.assert_allclose([row.exact for row in found.checked], exact, rtol=1e-4, atol=1e-6)
    off = [abs(row.estimate - row.exact) > abs(row.exact) / 2 for row in found.checked]
    assert found.off == sum(off) and found.wrong_signs == sum(row.estimate * row.exact < 0 for row in found.checked)


def test_places_by_span() -> None:
    model = cf.load("tiny", check=False)
    task = cf.task("ioi", model, n=4)
    scores = cf.attribute(model, task, level="node", what="resid", by_span=True)
    known = {(row.name, row.position): row.effect for row in cf.patch(model, task, "resid", by_span=True).rows()}
    for row in cf.check(model, task, scores, 3).checked:
        assert row.exact == pytest.approx(known[row.name, row.position], rel=1e-4, abs=1e-6)


def test_only_what_is_checked_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from circuitfind.engine.restart import Restart

    model, task, runs = wrapped("llama"), id_task((5, 5, 5)), []
    scores = [cf.attribute(model, task, level="node", what=what) for what in (None, "heads", "mlp")]
    really = Restart.from_stream
    monkeypatch.setattr(Restart, "from_stream", lambda self, at, new: runs.append(len(new)) or really(self, at, new))
    for one in scores:
        runs.clear()
        cf.check(model, task, one, 3)
        assert sum(runs) == 3


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda model, task: cf.attribute(model, task, "exact"), "method 'exact' are measured: there is nothing to"),
        (lambda model, task: cf.patch(model, task, "heads"), "method 'patch' are measured"),
        (lambda model, task: cf.attribute(model, task, "hisp", level="node"), "'hisp' estimate no effect"),
        (lambda model, task: cf.attribute(model, task, "direct", level="node"), "'direct' estimate no effect"),
        (lambda model, task: cf.attribute(wrapped("gpt_neox"), task), "the scores belong to another graph"),
        (lambda model, task: 3, "check needs scores of edges, nodes or places, not int"),
        (
            lambda model, task: cf.attribute(model, id_task((4, 4)), level="node", what="resid"),
            "these pairs have 2 x 5 places and the scores 2 x 4",
        ),
    ],
)
def test_what_cannot_be_checked(scores: Any, message: str) -> None:
    model, task = wrapped("llama"), id_task((5, 5, 5))
    with pytest.raises(ScoreError, match=message):
        cf.check(model, task, scores(model, task))


@pytest.mark.parametrize("level", ["edge", "node"])
def test_the_verb_checks_its_strongest_rows(level: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*VERB, "--out", str(tmp_path), "--level", level, "--json"])
    said = capsys.readouterr().err
    found = cf.open(tmp_path / "checks.json")
    model = cf.load("tiny", check=False)
    task = cf.task("greater_than", model, n=4)
    expected = cf.check(model, task, cf.attribute(model, task, level=level))
    assert code == 0 and isinstance(found, cf.Checks) and len(found.checked) == 10
    assert [row.name for row in found.checked] == [row.name for row in expected.checked]
    np.testing.assert_allclose([row.exact for row in found.checked], [row.exact for row in expected.checked], atol=1e-6)
    counts = f"{found.wrong_signs} with the wrong sign, {found.off - found.wrong_signs} more wrong by more than half"
    assert f"10 estimates by eap-ig-inputs measured exactly: {counts}" in " ".join(said.split())
    line = next(line.split() for line in said.splitlines() if line.split()[:1] == [found.checked[0].name])
    assert float(line[1]) == pytest.approx(found.checked[0].estimate, abs=1e-3)
    assert float(line[2]) == pytest.approx(found.checked[0].exact, abs=1e-3) and line[4] == "to"
    assert main(["show", str(tmp_path / "checks.json")]) == 0
    assert counts in " ".join(capsys.readouterr().out.split())


def test_how_many_rows_the_verb_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = [*VERB, "--level", "node", "--json", "--out"]
    for name, words, expected in (
        ("two", ("--max-checks", "2"), 2),
        ("none", ("--max-checks", "0"), None),
        ("ranked", ("--method", "hisp"), None),
        ("exact", ("--method", "exact"), None),
    ):
        assert main([*where, str(tmp_path / name), *words]) == 0
        content = json.loads(capsys.readouterr().out)
        assert len(content.get("checks", {}).get("checked", [])) == (expected or 0)
        assert (tmp_path / name / "checks.json").exists() == (expected is not None)
    assert main([*where, str(tmp_path), "--method", "hisp", "--max-checks", "2"]) == 2
    assert "there is nothing to check" in capsys.readouterr().err
