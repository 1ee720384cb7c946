"""What evaluation returns: one base, files that open as the same, rows with names, the keys of files of before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import contrast, wrapped

import circuitfind as cf
from circuitfind.errors import FileError, ScoreError
from circuitfind.result import Result

RECORD, MEASURED = {"record"}, {"metric", "accurate", "top1", "kl", "full", "empty"}
EVALUATION = {"n_edges", "faithfulness", "interval", "metric", "metric_full", "metric_empty", "accuracy", "kl"}
EVALUATION |= {"accuracy_full", "top1", "top1_full", "seen_pairs", "metric_name", "ablation", "record", "per_example"}
KEYS = {  # of `to_dict` before results had a base
    "evaluate": EVALUATION,
    "curve": {"points", "cpr", "cpr_interval", "cmd", "cmd_interval", "seen_pairs", "per_example"} | RECORD,
    "mib": {"cpr", "cmd", "signed", "absolute"},
    "completeness": {"level", "complement", "whole", "knockouts", "worst", "mean_gap", "mean_gap_interval", "contrast"}
    | {"seen_pairs", "record"},
    "minimality": {"edges", "superfluous", "joint_effect", "summed_effect", "threshold", "circuit", "reduced"}
    | {"seen_pairs", "per_example", "record"},
    "hypotheses": {"n_edges", "tests", "record"},
    "verify": {"correlation", "rank_correlation", "slope", "sign_errors", "checked", "edges", "circuit", "random"},
    "stability": {"samples", "jaccard", "interval", "rank_correlation", "shuffled", "jaccards", "rank_correlations"}
    | {"curve", "stable", "record"},
    "check": {"level", "checked", "wrong_signs", "off", "record", "n_distinct"},
    "approximation": {"kinds", "remarks", "places", "record"},
    "agreement": {"reference", "level", "by", "items", "true", "auroc", "mib_auroc", "average_precision", "circuit"}
    | {"heads"},
    "diagnose": {"name", "findings", "summary"},
    "summarise": {"name", "n", "metric", "accuracy", "top1", "clean", "corrupted", "lowered", "failing", "notes"}
    | {"chance"},
}
ROWS = {
    "evaluate": {"pair", "circuit", "full", "empty", "accurate", "top1", "kl"},
    "curve": {"asked", "n_edges", "fraction", "faithfulness", "low", "high", "metric", "accuracy", "top1", "kl"},
    "mib": {"by", "asked", "faithfulness"},
    "completeness": {"removed", "circuit", "model", "difference", "low", "high", "how"},
    "minimality": {"edge", "writer", "reader", "effect", "low", "high", "superfluous"},
    "hypotheses": {"name", "null", "statistic", "p_value", "adjusted", "rejected", "supports", "reading"},
    "verify": {"edge", "writer", "reader", "estimate", "exact", "low", "high", "wrong_sign"},
    "check": {"name", "position", "estimate", "exact", "low", "high"},
    "stability": {"edge", "frequency"},
    "approximation": {"kind", "layer", "name", "position", "estimate", "exact", "low", "high"},
    "diagnose": {"severity", "text"},
}


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    model, task = wrapped("llama"), contrast(2)
    scores = cf.attribute(model, task, "eap")
    assert isinstance(scores, cf.Scores)
    circuit = scores.top(20)
    reference = cf.Reference("mine", circuit.graph, circuit.mask)
    return {
        "evaluate": cf.evaluate(model, task, circuit),
        "curve": cf.curve(model, task, scores, sizes=[10, 40]),
        "mib": cf.mib(model, task, scores),
        "completeness": cf.completeness(model, task, circuit, knockouts=3),
        "minimality": cf.minimality(model, task, circuit),
        "hypotheses": cf.hypotheses(model, task, circuit, references=4, permutations=9),
        "verify": cf.verify(model, task, scores, top=25, random=2),
        "check": cf.check(model, task, scores, 4),
        "stability": cf.stability(model, task, method="eap", n_edges=20, resamples=4),
        "approximation": cf.approximation(model, task, ["resid", "heads"], layers=[0], by_position=False),
        "agreement": cf.agreement(scores.top(30), reference),
        "diagnose": cf.diagnose(model, task),
        "summarise": cf.summarise(model, task, warn=False),
    }


def plain(value: Any) -> str:
    return json.dumps(json.loads(json.dumps(value).replace("NaN", "null").replace("Infinity", "null")), sort_keys=True)


@pytest.mark.parametrize("call", KEYS)
def test_a_file_opens_as_the_same(results: dict[str, Result], call: str, tmp_path: Path) -> None:
    found = results[call]
    assert isinstance(found, Result) and found.to_dict().keys() >= KEYS[call]
    path = found.save(tmp_path / "it.json", command="passed over")
    again = cf.open(path)
    assert type(again) is type(found)
    assert plain(again.to_dict()) == plain(found.to_dict()) and repr(again) == repr(found)
    assert plain(list(again.rows())) == plain(list(found.rows())) and again.columns().keys() == found.columns().keys()
    assert json.loads(path.read_text())["format"] == found.FORMAT


def test_formats_are_unique(results: dict[str, Result]) -> None:
    assert len({found.FORMAT for found in results.values()}) == len(results)


@pytest.mark.parametrize("call", KEYS)
def test_they_show_themselves(results: dict[str, Result], call: str) -> None:
    found = results[call]
    assert "\n" not in repr(found) and len(repr(found)) < 260 and repr(found).startswith(type(found).__name__)
    assert found._repr_html_().startswith("<div>")


@pytest.mark.parametrize("call", ROWS)
def test_rows_have_names(results: dict[str, Result], call: str, tmp_path: Path) -> None:
    found = results[call]
    columns = found.columns()
    assert columns.keys() >= ROWS[call] and len({len(column) for column in columns.values()}) == 1
    if found.ROWS:
        assert len(found.save(tmp_path / "it.csv").read_text().splitlines()) >= len(found.rows())
    if "writer" in columns:
        assert columns["edge"] == list(map("->".join, zip(columns["writer"], columns["reader"], strict=True)))


def test_what_was_measured_comes_back(results: dict[str, Result], tmp_path: Path) -> None:
    checks = results["verify"]
    assert isinstance(checks, cf.Verification)
    again = cf.Verification.open(checks.save(tmp_path / "verify.json"))
    np.testing.assert_array_equal(again.exact, checks.exact)
    assert np.isfinite(checks.exact).sum() == len(checks.edges) and again.edges == checks.edges
    assert [tuple(edge) for edge in checks.edges] == [(edge.name, edge.estimate, edge.exact) for edge in checks.edges]
    minimal = results["minimality"]
    assert isinstance(minimal, cf.Minimality)
    assert cf.Minimality.open(minimal.save(tmp_path / "minimal.json")).reduced.edges == minimal.reduced.edges
    stable = results["stability"]
    assert isinstance(stable, cf.Stability)
    back = cf.Stability.open(stable.save(tmp_path / "stable.json"))
    np.testing.assert_array_equal(back.frequency, stable.frequency)
    assert back.core().edges == stable.core().edges and back.stable == stable.stable


@pytest.mark.parametrize(("call", "open_it"), [("curve", cf.Curve.open), ("verify", cf.Verification.open)])
def test_files_of_before_open(
    results: dict[str, Result], call: str, open_it: Callable[[Path], Result], tmp_path: Path
) -> None:
    """They had no format, and of a verification no graph."""
    content = json.loads(results[call].save(tmp_path / "it.json").read_text())
    old = {name: value for name, value in content.items() if name in KEYS[call]}
    (tmp_path / "old.json").write_text(json.dumps(old))
    again = open_it(tmp_path / "old.json")
    assert type(cf.open(tmp_path / "old.json")) is type(again)
    assert {name: value for name, value in again.to_dict().items() if name in old}.keys() == old.keys()
    assert repr(again) == repr(results[call]) and plain(list(again.rows())) == plain(list(results[call].rows()))
    if isinstance(again, cf.Verification):
        with pytest.raises(ScoreError, match="lacks the graph"):
            _ = again.exact
    (tmp_path / "other.json").write_text(json.dumps({"points": []}))
    with pytest.raises(FileError, match='no "format" key'):
        open_it(tmp_path / "other.json")
