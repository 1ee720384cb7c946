"""`circuitfind evaluate` with a curve, completeness and minimality, and what it says of pairs that were searched on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import circuitfind as cf
from circuitfind.cli.app import main


@pytest.fixture(scope="module")
def tiny() -> cf.Model:
    return cf.load("tiny")


@pytest.fixture()
def run(
    tiny: cf.Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """`evaluate` in a folder with scores and a circuit of the first 4 of 8 pairs' split."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(cf, "load", lambda *_, **__: tiny)
    seen, _ = cf.task("ioi", tiny, n=8).on(tiny).split()
    scores = cf.attribute(tiny, seen)
    scores.save("scores.safetensors")
    scores.top(40, by="signed").save("circuit.json")

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["evaluate", "--n", "8", *words])
        return (code, *capsys.readouterr())

    return call


def test_everything_of_a_circuit_in_one_document(run: Callable, tiny: cf.Model) -> None:
    code, out, err = run(
        "--circuit", "circuit.json", "--curve", "scores.safetensors", "--completeness", "--minimality", "--json"
    )
    assert code == 0, err
    content = json.loads(out)
    bound, circuit = cf.task("ioi", tiny, n=8).on(tiny), cf.Circuit.open("circuit.json")
    value, scores = cf.evaluate(tiny, bound, circuit), cf.Scores.open("scores.safetensors")
    for name in ("faithfulness", "kl", "top1", "accuracy", "seen_pairs"):
        assert content[name] == getattr(value, name)
    assert content["seen_pairs"] == 4 and content["per_example"]["kl"] == value.per_example.kl.tolist()
    both = cf.mib(tiny, bound, scores)
    assert (content["curve"]["cpr"], content["curve"]["cmd"]) == pytest.approx((both.cpr, both.cmd))
    assert [point["asked"] for point in content["curve"]["signed"]["points"]] == [p.asked for p in both.signed.points]
    assert content["completeness"]["complement"]["seen_pairs"] == 4 and content["completeness"]["worst"]["gap"] > 0
    minimal = cf.minimality(tiny, bound, circuit)
    assert content["minimality"]["superfluous"] == list(minimal.superfluous)
    assert len(content["minimality"]["edges"]) == len(circuit)


def test_tables_fit_and_seen_pairs_are_named(run: Callable) -> None:
    code, out, err = run("--circuit", "circuit.json", "--curve", "scores.safetensors", "--completeness", "--minimality")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    for part in (
        "Faithfulness (logit_diff) of the edges of highest signed score",
        "Faithfulness (logit_diff) of the edges of highest magnitude",
        "CPR",
        "CMD",
        "nodes knocked out",
        "complement",
        "What the circuit loses without each edge",
        "superfluous",
        "divergence",
        "used 4 of these 8 pairs: --unseen leaves them out",
    ):
        assert part in " ".join(out.split()), part


def test_a_curve_names_the_metric_of_its_own_scores(run: Callable) -> None:
    """The circuit is judged by the metric that it was found by, the scores beside it by theirs."""
    scores = cf.Scores.open("scores.safetensors")
    replace(scores, record=replace(scores.record, metric="logprob")).save("other.safetensors")
    code, out, err = run("--circuit", "circuit.json", "--curve", "other.safetensors")
    said = " ".join(out.split())
    assert code == 0 and "ioi, logit_diff: 8 pairs" in said, err
    assert "Faithfulness (logprob) of the edges of highest signed score" in said


def test_unseen_pairs_only(run: Callable) -> None:
    code, out, err = run("--circuit", "circuit.json", "--unseen")
    assert code == 0 and "used none of these 4 pairs" in out, err
    code, out, err = run("--curve", "scores.safetensors", "--unseen", "--json")
    content = json.loads(out)
    assert code == 0 and content["run"]["pairs"] == 8 - 4 and content["curve"]["signed"]["seen_pairs"] == 0
    assert "faithfulness" not in content


def test_the_same_pairs_are_known_with_another_start_token(run: Callable) -> None:
    code, out, err = run("--circuit", "circuit.json", "--bos", "--json")
    assert code == 0 and json.loads(out)["seen_pairs"] == 4, err
    assert "BOS rule" in err


@pytest.mark.parametrize("option", ["completeness", "minimality", "per-example"])
def test_what_needs_a_circuit_says_so(run: Callable, option: str) -> None:
    code, _, err = run("--curve", "scores.safetensors", f"--{option}")
    assert code == 2 and f"--{option} needs a circuit: add --circuit FILE" in err
    code, _, err = run(f"--{option}")
    assert code == 2 and "give --circuit FILE (a circuit.json)" in err


def test_few_pairs_are_said_once(run: Callable) -> None:
    code, out, err = run("--circuit", "circuit.json", "--curve", "scores.safetensors", "--completeness", "--minimality")
    assert code == 0, err
    said = "Intervals from only 8 different pairs may miss pairs that behave differently."
    assert " ".join(out.split()).count(said) == 1
    code, out, err = run("--circuit", "circuit.json", "--n", "1")
    assert code == 0 and "One pair gives no interval" in out, err
