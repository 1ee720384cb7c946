"""`circuitfind patch` end to end on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import circuitfind as cf
from circuitfind.cli.app import main

TASK = ("tiny", "--task", "greater_than", "--n", "6", "--no-check")


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["patch", *TASK, *map(str, arguments)])
    return code, *capsys.readouterr()


def test_heads_are_tabled_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "--out", tmp_path, "--direction", "denoising", "--show", 4)
    assert code == 0
    sweep = cf.Sweep.open(tmp_path / "patch-heads.safetensors")
    expected = cf.patch(
        cf.load("tiny", check=False),
        cf.task("greater_than", cf.load("tiny", check=False), n=6),
        direction="denoising",
    )
    np.testing.assert_array_equal(sweep.per_example, expected.per_example)
    strongest, heat = out.split("Strongest of")[1].split("Effects by")
    rows = [line.split()[0] for line in strongest.splitlines() if line.strip().startswith("a")]
    assert rows == [row.name for row in sweep.top(4)]
    cells = [line.split() for line in heat.splitlines() if line.strip()[:1].isdigit()]
    np.testing.assert_allclose([[float(x) for x in row[1:]] for row in cells], 100 * sweep.normalised, atol=0.51)


def test_json_holds_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "--out", tmp_path, "--what", "resid", "--layers", "1,3", "--json")
    assert code == 0
    found = json.loads(out)
    sweep = cf.Sweep.open(found["files"][0])
    assert found["sweep"]["axes"][0] == {"name": "layer", "labels": ["1", "3"]}
    np.testing.assert_allclose(found["sweep"]["effects"], sweep.effects)
    assert found["sweep"]["axes"][1]["labels"] == list(sweep.axes[1].labels)
    assert found["strongest"][0]["effect"] == sweep.top(1)[0].effect


@pytest.mark.parametrize("what", ["heads", "neurons"])
def test_many_units(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    position = "--all-positions" if what == "neurons" else "--by-position"
    code, out, _ = said(capsys, "--out", tmp_path, "--what", what, "--layers", "3", "--n", 2, position)
    assert code == 0 and f"of {512 if what == 'neurons' else 8 * 12} places" in out
    assert ("each at its strongest position" in out) == (what == "heads")


@pytest.mark.parametrize(
    ("words", "by_itself"),
    [
        ("patch --what mlp", True),
        ("attribute --level node --what mlp --max-checks 0", True),
        ("approximation --what mlp,heads", True),
        ("patch --what mlp --by-span", False),
        ("patch --what mlp --template abba-3", False),
        ("patch --what heads --layers 0", False),
    ],
)
def test_places_that_go_by_span_unasked_are_said(
    words: str, by_itself: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words.split(), "--n", "4", "--no-check", "--out", str(tmp_path)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert ("places mlp by named span (IO, S1, S2), not by position: the prompts have 1" in told) == by_itself


def test_one_line_for_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--layers", "first"), "--layers first"),
        (("--what", "neurons"), "name a layer, such as layers=0 (--layers 0)"),
        (("--task", "ioi", "--n", "8", "--by-position"), "one length"),
        (("--task", "ioi", "--n", "8", "--by-position"), "together (by_position=False, --all-positions)"),
        (("--task", "ioi", "--n", "8", "--by-position"), "one template of the task (template=, --template)"),
        (("--seed", "-1"), "--seed"),
    ):
        code, _, err = said(capsys, "--out", tmp_path, *arguments)
        assert code == 2 and message in " ".join(err.split())
        assert not list(tmp_path.glob("*.safetensors"))
