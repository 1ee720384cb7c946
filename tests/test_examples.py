"""The examples run as their first lines say, on the embedded model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(*arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / "own_behaviour.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_own_behaviour_runs_on_the_embedded_model() -> None:
    said = run("--n", "6")
    assert "eap-ig-inputs: " in said and "faithfulness" in said


@pytest.mark.shared
def test_own_behaviour_runs_on_a_real_model_and_a_file(shared: Path) -> None:
    said = run("--model", str(shared / "models" / "stories260K"), "--data", str(EXAMPLES / "pronouns.jsonl"))
    assert "1,701 edges" in said
