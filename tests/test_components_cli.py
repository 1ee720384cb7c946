"""Estimates of a sweep, path patching, the approximation and attention patterns from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import circuitfind as cf
from circuitfind.cli.app import main

TASK = ("tiny", "--task", "greater_than", "--n", "4", "--no-check")


def said(capsys: pytest.CaptureFixture[str], verb: str, *arguments: object) -> tuple[int, str, str]:
    code = main([verb, *TASK, *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def model() -> cf.Model:
    return cf.load("tiny", check=False)


@pytest.fixture(scope="module")
def task(model: cf.Model) -> cf.Task:
    return cf.task("greater_than", model, n=4)


def test_estimates_of_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: cf.Model, task: cf.Task
) -> None:
    options = ("--level", "node", "--what", "resid", "--layers", "1,3", "--direction", "denoising", "--show", 3)
    code, out, _ = said(capsys, "attribute", "--out", tmp_path, *options)
    assert code == 0
    sweep = cf.Sweep.open(tmp_path / "estimates-resid.safetensors")
    expected = cf.attribute(model, task, level="node", what="resid", layers=[1, 3], direction="denoising")
    np.testing.assert_array_equal(sweep.per_example, expected.per_example)
    assert "by eap-ig-inputs, denoising" in out and sweep.top(1)[0].name in out and "Effects by position" in out


def test_positions_are_named_by_the_first_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: cf.Model, task: cf.Task
) -> None:
    note, where = "named by the tokens of the first clean prompt", ("--out", tmp_path)
    code, out, _ = said(capsys, "attribute", *where, "--level", "node", "--by-position", "--show", 3, "--max-checks", 0)
    scores = cf.attribute(model, task, level="node", by_position=True)
    assert isinstance(scores, cf.NodeScores) and scores.positions
    for name in scores.top(3):
        strongest = scores.positions[int(np.abs(scores[name]).argmax())]
        line = next(line.split() for line in out.splitlines() if line.split()[:1] == [name])
        assert line[2:-1] == strongest.split() and len(strongest.split()) == 2, "its number and its token"
    assert code == 0 and note in " ".join(out.split())
    for words, expected in ((("--what", "attn"), True), (("--what", "attn", "--all-positions"), False)):
        code, out, _ = said(capsys, "patch", *where, *words)
        assert code == 0 and (note in " ".join(out.split())) == expected
        assert main(["show", str(tmp_path / "patch-attn.safetensors")]) == 0
        assert (note in " ".join(capsys.readouterr().out.split())) == expected


def test_direct_contributions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: cf.Model, task: cf.Task
) -> None:
    code, out, _ = said(capsys, "attribute", "--out", tmp_path, "--level", "node", "--method", "direct")
    scores = cf.NodeScores.open(tmp_path / "node-scores.safetensors")
    np.testing.assert_array_equal(scores.values, cf.direct_effects(model, task).scores.values)
    assert code == 0 and "frozen final norm" in " ".join(out.split()) and scores.top(1)[0] in out


def test_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: cf.Model, task: cf.Task) -> None:
    names = ("--path", "input,m0", "--to", "a2.h1,m3")
    code, out, _ = said(capsys, "patch", "--out", tmp_path, *names, "--json")
    expected = cf.path_patch(model, task, ["input", "m0"], ["a2.h1", "m3"])
    assert code == 0 and json.loads(out)["effects"] == expected.effects.tolist()
    assert json.loads((tmp_path / "paths.json").read_text())["receivers"] == ["a2.h1 + m3"]
    code, out, _ = said(capsys, "patch", "--out", tmp_path, "--path", "all", "--separate", "--show", 2)
    best = cf.path_patch(model, task, separate=True).top(2)
    rows = [line.split()[:2] for line in out.splitlines() if "logits" in line and " to " in line]
    assert code == 0 and rows == [[path.sender, "logits"] for path in best]


def test_the_approximation(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: cf.Model, task: cf.Task) -> None:
    code, out, _ = said(capsys, "approximation", "--out", tmp_path, "--what", "resid,heads", "--layers", "2,3")
    found = cf.approximation(model, task, ["resid", "heads"], layers=[2, 3])
    assert code == 0 and all(" ".join(remark.split()) in " ".join(out.split()) for remark in found.remarks)
    content = json.loads((tmp_path / "approximation.json").read_text())
    assert content["remarks"] == list(found.remarks)
    assert content["kinds"]["heads"]["layers"]["3"]["r"] == pytest.approx(found.by_layer["heads", 3].r, abs=1e-6)


def test_an_attention_pattern(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: cf.Model, task: cf.Task
) -> None:
    code, out, _ = said(capsys, "attention", "--out", tmp_path, "--head", "a1.h2", "--example", 1)
    found = cf.attention(model, task, "a1.h2", example=1)
    content = json.loads((tmp_path / "attention-a1.h2.json").read_text())
    np.testing.assert_allclose(content["pattern"], found.pattern, atol=1e-6)
    assert code == 0 and content["tokens"] == list(found.tokens)
    last = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()][-1]
    assert last[:2] == [str(len(found.tokens) - 1), found.tokens[-1].strip()]
    assert last[2] == str(int(found.pattern[-1].argmax()))


def test_why_a_head_attends(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: cf.Model, task: cf.Task) -> None:
    asked = ("--head", "a1.h2", "--key", "1", "--against", "0", "--query", "-2")
    code, out, _ = said(capsys, "attention", "--out", tmp_path, *asked)
    found = cf.attention_attribution(model, task, "a1.h2", 1, -2, against=0)
    assert code == 0 and "Why a1.h2 attends from -2 to 1: score" in out and "minus that of 0; they sum to" in out
    again = cf.open(tmp_path / "attention-a1.h2-why.json")
    assert again.top(4) == found.top(4) and again.record.n_examples == len(task)
    first = found.top(1)[0]
    assert f"{first.query_side} x {first.key_side}" in out and found.query_side(1)[0].node in out


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("patch", ("--to", "m3"), "name the senders with --path"),
        ("patch", ("--path", "m3", "--to", "m1"), "sender 'm3' is computed after"),
        ("attribute", ("--what", "heads"), "use level='node'"),
        ("approximation", ("--what", "tails"), "kind of place 'tails' is unknown"),
        ("attention", ("--head", "m3"), "has no head 'm3'"),
        ("attention", ("--head", "a1.h2", "--against", "S1"), "--against needs --key"),
        ("attention", ("--head", "a1.h2", "--key", "nobody"), "--key nobody is no token of the prompt"),
    ],
)
def test_one_line_for_a_mistake(
    verb: str, arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = said(capsys, verb, "--out", tmp_path, *arguments)
    assert code == 2 and message in " ".join(err.split()) and not list(tmp_path.iterdir())
