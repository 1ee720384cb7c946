"""`circuitfind acdc`: what it says of trials, screening and dangling nodes, and how a stopped run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import circuitfind as cf
from circuitfind.cli.app import main
from circuitfind.engine.revision import CircuitState
from circuitfind.search import acdc_pruning

WORDS = ("acdc", "tiny", "--task", "ioi", "--n", "8", "--no-check", "--threshold", "0.05")


@pytest.fixture(scope="module")
def tiny() -> cf.Model:
    return cf.load("tiny", backend="hooks", check=False)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, tiny: cf.Model, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and the model loaded once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cf, "load", lambda *_, **__: tiny)
    return tmp_path / "circuitfind-out"


def test_the_options_reach_the_run_and_its_facts_are_told(place, capsys):
    assert main([*WORDS, "--screen", "0.1", "--remove-dangling", "untested", "--json"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)["circuit"]
    circuit = cf.Circuit.open(place / "acdc.json")
    assert circuit.record.settings["screen"] == 0.1 and circuit.record.settings["remove_dangling"] == "untested"
    screening = told["screening"]
    assert screening["skipped"] == told["without_a_run"]["screened"] > 0
    dangling = told["without_a_run"]["writer left dangling"]  # kept when their turn came: decided a second time
    assert told["trials_run"] + told["decided_without_a_run"] == circuit.graph.n_edges + dangling
    assert f"trials {told['trials_run']}" in " ".join(said.err.split())
    wrong = f"{len(screening['wrong'])} of {screening['checked']} skipped edges measured should have stayed"
    assert wrong in said.err and "for their runs" in said.err


def test_scores_of_a_file_order_and_screen(tiny, place, capsys):
    pairs = cf.task("ioi", tiny, n=8)
    path = cf.attribute(tiny, pairs, "eap-ig-inputs", metric="kl").save(place.with_name("kl.safetensors"))
    assert main([*WORDS, "--order", "scores", "--scores", str(path), "--screen", "0.2"]) == 0
    assert cf.Circuit.open(place / "acdc.json").record.settings["order"] == "scores"
    assert main([*WORDS, "--order", "scores"]) == 2
    assert "needs scores=" in capsys.readouterr().err
    assert main([*WORDS, "--prune-by", "logit_diff", "--scores", str(path), "--screen", "0.2"]) == 2
    assert "with metric 'kl', but acdc tries edges with 'logit_diff'" in capsys.readouterr().err
    assert main([*WORDS, "--ablation", "zero", "--remove-dangling", "untested"]) == 2
    assert "use remove_dangling='tested'" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(place, capsys, monkeypatch):
    monkeypatch.setattr(acdc_pruning, "RUNS_BETWEEN_STATES", 16)
    assert main([*WORDS, "--out", "whole"]) == 0
    trials, attempt = [], CircuitState.attempt

    def stopping(state: CircuitState, removals: list) -> torch.Tensor:
        trials.append(len(removals))
        if sum(trials) > 60:
            raise KeyboardInterrupt
        return attempt(state, removals)

    with monkeypatch.context() as patch:
        patch.setattr(CircuitState, "attempt", stopping)
        assert main([*WORDS]) == 130
    said = capsys.readouterr().err
    assert "what was decided is kept in circuitfind-out/acdc.part.safetensors; go on with: circuitfind acdc" in said
    assert (place / "acdc.part.safetensors").is_file()
    assert main([*WORDS]) == 0
    assert not (place / "acdc.part.safetensors").exists()
    stopped, whole = (cf.Circuit.open(folder / "acdc.json") for folder in (place, place.with_name("whole")))
    assert stopped == whole and stopped.facts == whole.facts and 0 < len(whole) < whole.graph.n_edges
