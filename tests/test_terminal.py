"""The terminal: wide and narrow windows, short headers, how long lists are cut and sorted, links, completion."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import circuitfind as cf
from circuitfind.cli.app import main
from circuitfind.cli.cells import Right
from circuitfind.cli.output import Output
from circuitfind.graph import Graph
from circuitfind.record import Record

GRAPH = Graph(3, 4, 4, 16)


def printed(width: int, terminal: bool, call: Callable[[Output], None]) -> str:
    """What a verb's output looks like in a window."""
    out, text = Output(False, ["circuitfind"]), io.StringIO()
    out.text = Console(file=text, width=width, force_terminal=terminal, highlight=False, markup=False)
    call(out)
    return text.getvalue()


@pytest.mark.parametrize("width", [40, 60, 200])
def test_numbers_of_a_table_are_never_broken(width: int) -> None:
    numbers = [[Right(f"{row}.{column:03}") for column in range(12)] for row in range(2)]
    rows = [["a-method", *numbers[0]], ["another-method", *numbers[1]]]
    text = printed(width, False, lambda out: out.table("Many", ["method", *map(str, range(12))], rows))
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert all(str(number) in text for row in numbers for number in row)
    heads = [line.split() for line in lines if line.split()[:1] == ["method"]]
    assert [column for line in heads for column in line[1:]] == list(map(str, range(12)))
    assert (len(heads) == 1) == (width == 200)
    named = [line for line in lines if "another-method" in line]
    assert len(named) == len(heads), "each part says which row it is of"


def test_a_table_of_words_stays_one() -> None:
    rows = [["ioi", "a long description that goes over more than a line of this window", Right(3)]]
    text = printed(40, False, lambda out: out.table("Tasks", ["name", "what", "n"], rows))
    assert text.count("name") == 1 and max(map(len, text.splitlines())) <= 40


def test_files_are_named_once_and_can_be_clicked_on(tmp_path: Path) -> None:
    files = [tmp_path / "out" / name for name in ("circuit.json", "circuit.svg", "report.html")]
    plain = printed(500, False, lambda out: out.finish({}, files))
    assert plain == f"Written to {tmp_path / 'out'}: circuit.json, circuit.svg\nReport: {files[2]}\n"
    clicked = printed(500, True, lambda out: out.finish({}, files))
    assert all(f";{path.as_uri()}\x1b" in clicked for path in files)
    alone = printed(500, False, lambda out: out.finish({}, files[:1]))
    assert alone == f"Written: {files[0]}\n"


def test_a_runs_header_is_short_and_verbose_says_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["patch", "tiny", "--n", "4", "--out", str(tmp_path), "--top", "2"]
    assert main(words) == 0
    short = capsys.readouterr().out
    assert main([*words, "--verbose"]) == 0
    full = capsys.readouterr().out
    assert "the model  accuracy" in short and "BOS token" not in short
    assert "BOS token" in full and "answers" in full


@pytest.fixture()
def circuit(tmp_path: Path) -> Path:
    values = np.where(GRAPH.real, np.random.default_rng(0).normal(size=GRAPH.real.shape), 0).astype(np.float32)
    return cf.Scores(GRAPH, values, Record(task="ioi")).top(60).save(tmp_path / "circuit.json")


def test_show_cuts_and_sorts(
    circuit: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("circuitfind.cli.show.find_spec", lambda name: None)  # no page to wait for
    found = cf.Circuit.open(circuit)
    best = [name for _, name in sorted((-abs(row.effect or 0), at) for at, row in enumerate(found.rows()))]

    def rows(*words: str) -> list[str]:
        assert main(["show", str(circuit), *words]) == 0
        return [line.split()[0] for line in capsys.readouterr().out.splitlines() if "->" in line]

    assert rows("--top", "4") == [found.edges[at] for at in best[:4]]
    assert rows("--top", "3", "--sort", "estimate") == [found.edges[at] for at in best[:3]]
    assert rows("--sort", "edge", "--top", "5") == sorted(found.edges)[:5]
    assert rows("--edges") == found.edges
    assert rows("--edges", "--top", "4") == [found.edges[at] for at in best[:4]]
    assert main(["show", str(circuit), "--edges", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["edges"] == found.edges
    assert main(["show", str(circuit), "--sort", "size"]) == 2
    said = capsys.readouterr()
    assert "has the columns edge, writer, reader, estimate, exact" in said.err and not said.out


def test_two_circuits_are_compared(circuit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = cf.Circuit.open(circuit)
    second = first.with_mask(first.mask & (np.arange(GRAPH.n_writers) % 2 == 0)[:, None])
    second.save(tmp_path / "second.json")
    assert main(["show", str(circuit), str(tmp_path / "second.json"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["jaccard"] == first.jaccard(second) == len(second) / len(first)
    assert set(told["edges"]["in both"]) == set(second.edges) and not told["edges"]["only in second"]
    assert set(told["edges"]["only in circuit"]) == set((first - second).edges)
    other = cf.Circuit.of(Graph(6, 2, 2, 8), ["input->a0.h1<k>", "a0.h1->m5", "m5->logits"])
    other.save(tmp_path / "other.json")
    assert main(["show", str(circuit), str(tmp_path / "other.json")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert next(line[-1] for line in lines if line[:1] == ["heads"]) == "12"
    assert next(line[-2] for line in lines if line[:4] == ["into", "the", "last", "third"]) == "1"
    assert main(["show", str(circuit), str(tmp_path / "none.json")]) == 2


def test_tasks_are_measured_on_as_many_pairs_as_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "tiny", "--measure", "--n", "2", "--json"]) == 0
    measured = [one["n"] for one in json.loads(capsys.readouterr().out)["tasks"].values() if "n" in one]
    assert measured and set(measured) == {2}


def test_a_shell_can_complete() -> None:
    asked = {"_CIRCUITFIND_COMPLETE": "complete_bash", "COMP_WORDS": "circuitfind att", "COMP_CWORD": "1"}
    words = [sys.executable, "-m", "circuitfind"]
    found = subprocess.run(words, env={**os.environ, **asked}, capture_output=True, text=True, timeout=120)
    assert found.stdout.split() == ["attribute", "attention"]


def test_two_circuits_beside_each_other_have_their_own_effects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    graph, edges = cf.Graph(1, 2, 2, 8), ("input->a0.h0<v>", "input->a0.h1<v>", "input->m0")
    for name, own in (("one", {edges[0]: 1.0, edges[1]: 2.0}), ("two", {edges[1]: 3.0, edges[2]: 4.0})):
        values = np.full(graph.real.shape, np.nan, dtype=np.float32)
        for edge, effect in own.items():
            values[graph.edge(edge)] = effect
        cf.Circuit(graph, np.isfinite(values), estimates=values).save(f"{name}.json")
    assert main(["show", "one.json", "two.json"]) == 0
    shown = [tuple(line.split()) for line in capsys.readouterr().out.splitlines()]
    for row in ((edges[1], "+2.000", "+3.000"), (edges[0], "+1.000", "–"), (edges[2], "–", "+4.000")):
        assert row in shown
