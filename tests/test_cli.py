"""The command line end to end on the embedded model: files, JSON, exit codes, one line for every mistake."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import cache
from html import escape
from pathlib import Path
from typing import NamedTuple, get_type_hints

import networkx
import numpy as np
import pytest

import circuitfind as cf
from circuitfind.attribution.methods import DEFAULTS, METHODS, names
from circuitfind.cli import options
from circuitfind.cli.app import VERBS as VERBS_OF_APP, app, main
from circuitfind.cli.output import Output
from circuitfind.engine.ablation import ABLATIONS
from circuitfind.engine.identities import Identity
from circuitfind.engine.restart import Restart
from circuitfind.patching.places import KINDS
from circuitfind.record import NO_EFFECT
from circuitfind.search.acdc import GRID
from circuitfind.search.acdc_rule import ORDERS
from circuitfind.search.find import SEARCHES
from circuitfind.search.learn import LEARNERS
from circuitfind.search.matryoshka import OBJECTIVES
from circuitfind.search.trials import CRITERIA
from circuitfind.setting import DIRECTIONS
from circuitfind.tasks.answers import ALL, FIRST
from circuitfind.tasks.builtin import TASKS
from circuitfind.tasks.spelling import BY_TEXT, SPELLINGS

VERBS = (
    "find",
    "attribute",
    "patch",
    "approximation",
    "attention",
    "verify",
    "evaluate",
    "acdc",
    "learn",
    "compare",
    "export",
    "mib",
    "show",
    "agree",
    "testbed",
    "tasks",
    "models",
    "doctor",
)
SMALL = ("--n", "8", "--max-checks", "5", "--random", "3")
SMALLEST = ("--n", "4", "--method", "eap", "--max-checks", "1", "--random", "1", "--no-prune")
needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz's dot is not installed")


class Said(NamedTuple):
    """How a run ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on standard error."""
        return self.err.strip().splitlines()[-1]


Run = Callable[..., Said]


@pytest.fixture()
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command line in an empty folder; the embedded model is loaded once for all tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(cf, "load", _load)

    def call(*words: str) -> Said:
        capsys.readouterr()
        code = main(words)
        return Said(code, *capsys.readouterr())

    return call


_really_load = cf.load


@cache
def _load(name: str, **keywords: object) -> cf.Model:
    return _really_load(name, **keywords)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a real process leaves, in plain `python -m circuitfind find`."""
    folder = tmp_path_factory.mktemp("found")
    command = [sys.executable, "-m", "circuitfind", "find", *SMALL, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cf.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder / "said.json").write_text(done.stdout)
    (folder / "said.txt").write_text(done.stderr)
    return folder


# -------------------------------------------------------------------- find
def test_find_leaves_files_that_open(found: Path) -> None:
    folder = found / "circuitfind-out"
    circuit, scores = cf.Circuit.open(folder / "circuit.json"), cf.Scores.open(folder / "scores.safetensors")
    assert 0 < len(circuit) < circuit.graph.n_edges == len(scores)
    assert circuit.record.task == "ioi" and scores.record.n_examples == 4
    assert (folder / "circuit.dot").read_text().startswith("digraph")
    assert not list(folder.glob(".*")) and not list(folder.glob("*.part*"))
    if shutil.which("dot"):
        assert ElementTree.parse(folder / "circuit.svg").getroot().tag.endswith("svg")


def test_report_is_complete(found: Path) -> None:
    page = (found / "circuitfind-out" / "report.html").read_text()
    sections = re.findall(r"<h2>(.*?)</h2>", page)
    assert sections == [
        "The circuit",
        "As a whole",
        "Faithfulness by size",
        "Frontier",
        "Estimates against exact patching",
        "Every example",
        "Steps of the search",
        "Record",
    ]
    assert "circuitfind find tiny --n 8 --max-checks 5 --random 3" in page
    said = json.loads((found / "said.json").read_text())
    assert all(escape(step["text"]) in page for step in said["steps"])
    assert "of 3 random circuits" in page


def test_find_json_is_one_document_with_all_fields(found: Path) -> None:
    said = json.loads((found / "said.json").read_text())
    assert set(said) == {"run", "seconds", "files", "circuit", "task", "checks", "curve", "steps", "frontier"}
    assert said["run"]["pairs"] == 8 and said["run"]["model"] == "tiny"
    circuit = cf.Circuit.open(found / "circuitfind-out" / "circuit.json")
    assert said["circuit"]["edges"] == circuit.edges
    assert said["circuit"]["faithfulness"] == circuit.facts["faithfulness"]
    assert len(circuit) in [point["n_edges"] for point in said["curve"]] and len(said["checks"]["random"]) == 3
    assert all((found / file).is_file() for file in said["files"])


def test_find_says_what_it_did(found: Path) -> None:
    text = (found / "said.txt").read_text()
    for part in ("1,519 edges", "batches of 4", "8 pairs: 4 to search, 4 held out", "accuracy 100%"):
        assert part in text, part
    for part in (
        "95% interval",
        "held-out pairs",
        "3 random circuits",
        "correlation",
        "wrong sign",
        "Target",
        "Written",
    ):
        assert part in text, part
    assert not any(part in text for part in ("Loading weights", "Traceback", "BOS token"))
    lines = [line for line in text.splitlines() if not line.startswith("warning: ")]
    assert max(map(len, lines)) <= 80 or "COLUMNS" in os.environ


def test_one_pair_is_named_as_such(run: Run) -> None:
    said = run("find", "--n", "1", "--max-checks", "2", "--random", "1", "--no-prune", "--knockouts", "0")
    assert said.code == 0 and said.err.count("there is only one pair") == 1
    for part in ("1 pair, used both to search and to evaluate", "on the pair itself", "One pair gives no interval"):
        assert part in " ".join(said.out.split()), part
    assert "held-out" not in said.out


def test_search_from_saved_scores_finds_the_same(run: Run, found: Path) -> None:
    scores = found / "circuitfind-out" / "scores.safetensors"
    said = run("find", *SMALL, "--scores", str(scores), "--out", "again")
    assert said.code == 0 and "warning: the scores" not in said.err
    first, again = (cf.Circuit.open(path) for path in (found / "circuitfind-out/circuit.json", "again/circuit.json"))
    assert first == again and first.facts == again.facts


def test_scores_of_other_pairs_are_pointed_out(run: Run, found: Path) -> None:
    scores = str(found / "circuitfind-out" / "scores.safetensors")
    few = ("--top", "3", "--random", "1", "--holdout", "0.9")
    said = run("verify", "--n", "8", *few, "--scores", scores)  # the same draw, of which half was scored on
    judged = cf.task("ioi", _load("tiny"), n=8).on(_load("tiny"))
    scored, unseen = set(judged.split(0.5, 0)[0].prompts), judged.split(1 - 0.9, 0)[1].prompts
    expected = sum(prompt in scored for prompt in unseen)
    assert 0 < expected < len(unseen) == 7
    assert said.code == 0 and f"{expected} of the 7 pairs used for verification were also used to make" in said.err
    said = run("verify", "--n", "6", "--seed", "1", *few, "--scores", scores)  # others, and the file knows it
    assert said.code == 0 and "scored on" not in said.err and "scores were made" not in said.err
    older = cf.Scores.open(scores)
    replace(older, record=replace(older.record, pairs="")).save("older.safetensors")
    said = run("verify", "--n", "6", "--seed", "1", *few, "--scores", "older.safetensors")
    assert said.code == 0 and "these may include some of" in said.err
    said = run("verify", "--n", "4", "--task", "induction", "--holdout", "1", "--top", "3", "--scores", scores)
    assert said.code == 0 and "made with task 'ioi', this run has 'induction'" in said.err
    assert "these may include some of" not in said.err and "held-out" not in said.out


def test_ctrl_c_after_scoring_says_how_to_go_on(run: Run, found: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cf, "find", stopped)
        said = run("find", *SMALL, "--out", "my folder")
    assert said.code == 130 and said.error.startswith("stopped: the scores are kept; go on with: ")
    assert "Traceback" not in said.err
    words = shlex.split(said.error.partition("go on with: ")[2])
    assert words[0] == "circuitfind" and words[-2:] == ["--scores", "my folder/scores.safetensors"]
    assert run(*words[1:]).code == 0
    assert cf.Circuit.open("my folder/circuit.json") == cf.Circuit.open(found / "circuitfind-out/circuit.json")


def test_ctrl_c_before_anything_was_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cf, "attribute", stopped)
    said = run("find", *SMALL, "--json")
    assert said.code == 130 and said.error == "stopped: nothing was written"
    assert json.loads(said.out) == {"stopped": "nothing was written", "exit_code": 130}


def test_stopped_exact_run_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    really, calls = Restart.edges, []

    def counted(*words: object) -> object:
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return really(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(Restart, "edges", counted)
    command = ("attribute", "--method", "exact", "--n", "2", "--out", "x")
    said = run(*command)
    assert said.code == 130 and "kept in x/exact.part.safetensors" in said.error
    command = tuple(shlex.split(said.error.partition("go on with: ")[2])[1:])
    stopped_at = len(calls)
    said = run(*command)
    assert said.code == 0 and not Path("x/exact.part.safetensors").exists()
    whole = len(calls) - stopped_at
    calls.clear()
    calls.extend([0] * 40)
    run("attribute", "--method", "exact", "--n", "2", "--out", "y")
    assert len(calls) - 40 == whole + 39  # the second run measured only what the first had not
    assert np.array_equal(*(cf.Scores.open(f"{place}/scores.safetensors").values for place in "xy"))


def test_nothing_found_exits_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    really_find = cf.find

    def everything(*words: object, **keywords: object) -> cf.FindResult:
        result = really_find(*words, **keywords)  # type: ignore[arg-type]
        return replace(result, circuit=replace(result.circuit, mask=result.circuit.graph.real))

    monkeypatch.setattr(cf, "find", everything)
    said = run("find", *SMALLEST)
    assert said.code == 1 and "no circuit found" in said.err
    assert "1,519 edges, folded by layer" in Path("circuitfind-out/circuit.dot").read_text()


def test_without_graphviz_the_rest_still_works(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    said = run("find", *SMALLEST)
    assert said.code == 0
    assert "'dot' is not on the PATH" in said.err and "svg" not in said.out.partition("Written")[2]
    assert {path.name for path in Path("circuitfind-out").iterdir()} == {
        "circuit.json",
        "scores.safetensors",
        "circuit.dot",
        "find.json",
        "report.html",
    }


# -------------------------------------------------------------------- the other verbs
def test_attribute_edges_and_nodes(run: Run) -> None:
    said = run("attribute", "--n", "4", "--method", "eap", "--json")
    content = json.loads(said.out)
    assert said.code == 0 and len(content["scores"]) == 1519 and content["method"] == "eap"
    saved = cf.Scores.open("circuitfind-out/scores.safetensors")
    assert saved.to_dict() == content["scores"]
    said = run("attribute", "--n", "4", "--task", "greater-than", "--level", "node", "--by-position", "--show", "3")
    assert said.code == 0 and "position" in said.out and "there" in said.out and "3 of" not in said.out
    assert cf.NodeScores.open("circuitfind-out/node-scores.safetensors").values.ndim == 2


def test_verify_writes_what_it_measured(run: Run, found: Path) -> None:
    circuit = str(found / "circuitfind-out" / "circuit.json")
    said = run("verify", "--n", "8", "--top", "5", "--random", "2", "--circuit", circuit, "--json")
    content = json.loads(said.out)
    assert said.code == 0 and content["files"] == ["circuitfind-out/verify.json"]
    assert {"correlation", "slope", "sign_errors", "edges", "circuit", "random"} <= set(content)
    assert {"name", "estimate", "exact", "interval", "wrong_sign"} == set(content["edges"][0])
    # the same split, scores and seed as the search: the same verdict
    assert content["circuit"]["faithfulness"] == cf.Circuit.open(circuit).facts["faithfulness"]
    written = json.loads(Path("circuitfind-out/verify.json").read_text())
    expected = {key: value for key, value in content.items() if key != "files"}
    assert written == {"format": "circuitfind.verification", "version": 1, **expected}
    assert cf.open("circuitfind-out/verify.json").to_dict()["edges"] == content["edges"]


def test_the_metric_that_was_used_is_the_one_that_is_named(run: Run, found: Path) -> None:
    """Given scores bring their metric to another task; --metric overrides it, and both say so everywhere."""
    few = ("--n", "8", "--random", "1", "--scores", str(found / "circuitfind-out" / "scores.safetensors"))
    for words, task, metric in (
        (("--task", "greater-than"), "greater-than", "logit_diff"),
        (("--metric", "logprob"), "ioi", "logprob"),
    ):
        said = run("verify", *few, "--top", "3", *words)
        assert said.code == 0 and f"{task}, {metric}:" in said.out and f"({metric})" in said.out
        assert ("judged with metric='logprob', as asked" in said.err) == (metric == "logprob")
        content = json.loads(Path("circuitfind-out/verify.json").read_text())
        assert content["run"]["metric"] == content["circuit"]["record"]["metric"] == metric
        said = run("find", *few, "--max-checks", "3", *words, "--no-prune", "--json")
        assert said.code == 0 and f"{task}, {metric}:" in said.err and f"({metric})" in said.err
        document = json.loads(said.out)
        assert document["run"]["metric"] == document["task"]["metric"] == metric
        assert document["checks"]["circuit"]["record"]["metric"] == metric
        bound, circuit = cf.task(task, _load("tiny"), n=8), cf.Circuit.open("circuitfind-out/circuit.json")
        held_out = cf.unseen(_load("tiny"), bound, circuit)
        value = cf.evaluate(_load("tiny"), held_out, circuit, metric=metric)
        assert document["circuit"]["faithfulness"] == pytest.approx(value.faithfulness, abs=1e-6)


def test_evaluate_per_example_and_unknown_as_null(run: Run, found: Path) -> None:
    circuit = str(found / "circuitfind-out" / "circuit.json")
    said = run("evaluate", "--circuit", circuit, "--n", "5", "--per-example")
    assert said.code == 0 and "Every example" in said.out and "another --seed" in said.out
    assert max(map(len, said.out.splitlines())) <= 80
    pair = {"clean": "Lily saw a cat", "corrupted": "Lily saw a dog", "answer": "and", "wrong": "the"}
    Path("one.jsonl").write_text(json.dumps(pair) + "\n")
    said = run("evaluate", "--circuit", circuit, "--data", "one.jsonl", "--json")
    if said.code == 0:
        assert json.loads(said.out)["interval"] == [None, None]
    assert "made with task 'ioi', this run has 'one'" in said.err


@needs_dot
@pytest.mark.parametrize("form", ["dot", "svg", "png", "pdf", "html", "graphml", "json"])
def test_export_every_format(run: Run, found: Path, form: str) -> None:
    source = found / "circuitfind-out" / "circuit.json"
    said = run("export", str(source), "--to", form, "--out", "made", "--top", "6")
    assert said.code == 0 and f"Written: made/circuit.{form} (6 edges)" in said.out
    content = Path(f"made/circuit.{form}").read_bytes()
    starts = {"dot": b"digraph", "svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}
    assert content.startswith(starts.get(form, b""))
    if form == "json":
        assert set(cf.Circuit.open("made/circuit.json").edges) < set(cf.Circuit.open(source).edges)
    if form == "graphml":
        assert networkx.read_graphml("made/circuit.graphml").number_of_edges() == 6


def test_export_by_ending_and_never_over_its_source(run: Run, found: Path) -> None:
    source = shutil.copy(found / "circuitfind-out" / "circuit.json", "circuit.json")
    assert run("export", source, "--out", "a.dot", "--title", "Mine").code == 0
    assert "Mine" in Path("a.dot").read_text()
    for words, named in (
        (("--to", "json", "--out", "."), "overwrite"),
        (("--to", "svg", "--out", "a.png"), ".svg"),
        (("--out", "a.bmp"), "'bmp'"),
    ):
        said = run("export", source, *words)
        assert said.code == 2 and named in said.error


def test_tasks_and_models(run: Run) -> None:
    said = run("tasks", "tiny")
    assert said.code == 0 and said.out.count("yes, this tokenizer has the words") == 7
    assert max(map(len, said.out.splitlines())) <= 80
    listed = json.loads(run("tasks", "--json").out)["tasks"]
    assert list(listed) == list(TASKS) and listed["ioi"]["corruptions"] == list(TASKS["ioi"].corruptions)
    assert list(listed["ioi"]["templates"])[::8] == ["abba-1", "baba-1"]
    shown = json.loads(run("tasks", "--show", "ioi", "--json").out)
    assert len(shown["examples"]) == 4
    assert " ".join(shown["examples"][0]["clean"].split()) in " ".join(run("tasks", "--show", "ioi").out.split())
    said = run("models")
    assert said.code == 0 and "gpt_neox" in said.out and max(map(len, said.out.splitlines())) <= 80
    for corruption, one in json.loads(run("models", "--json").out)["embedded"]["tiny"]["behaviours"]["ioi"].items():
        assert re.search(f"{corruption.split()[0]}.* {one['accuracy']:.1%} ", said.out)


def test_doctor(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run("doctor", "--examples", "4", "--length", "10")
    assert said.code == 0 and said.out.count("holds") == 7
    for part in ("1,519 edges", "38 nodes", "float32 on cpu", "sdpa", "4 pairs of 10 tokens", "torch"):
        assert part in said.out, part
    monkeypatch.setattr(
        "circuitfind.loading.check_identities", lambda _: [Identity("one", 0.5, 1e-4), Identity("two", 0, 1)]
    )
    said = run("doctor", "--json")
    assert said.code == 1 and [one["holds"] for one in json.loads(said.out)["identities"]] == [False, True]


# -------------------------------------------------------------------- mistakes
FILES = {
    "missing.csv": "clean,answer\nLily saw a cat,and\n",
    "two_tokens.jsonl": '{"clean": "Then Mary", "corrupted": "Then John", "answer": "xyzzyx", "wrong": "qqq"}\n' * 2,
    "unequal.jsonl": '{"clean": "Mary and John and", "corrupted": "John and", "answer": "Mary", "wrong": "John"}\n' * 2,
    "one.jsonl": '{"clean": "Then Mary and", "corrupted": "Then John and", "answer": "Mary", "wrong": "John"}\n',
    "empty.jsonl": '{"clean": "", "corrupted": "Then John and", "answer": "Mary", "wrong": "John"}\n',
    "corupted.jsonl": '{"clean": "Then Mary", "corupted": "Then John", "answer": "Mary", "wrong": "John"}\n',
    "kind.txt": "x\n",
    "broken.jsonl": "{\n",
}
MISTAKES = {
    "missing file": (("find", "--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
    "missing column": (("find", "--data", "missing.csv"), "line 2: no 'corrupted'"),
    "answer of two tokens": (("find", "--data", "two_tokens.jsonl"), "row 0, 'xyzzyx' is"),
    "unequal lengths": (("find", "--data", "unequal.jsonl"), "unequal.jsonl: row 0: the clean prompt has"),
    "kind of file": (("find", "--data", "kind.txt"), "kind.txt: holds no pairs; jsonl, json and csv"),
    "not JSON": (("find", "--data", "broken.jsonl"), "broken.jsonl, line 1"),
    "unknown model": (("find", "no/such-model"), "'no/such-model'"),
    "unknown task": (("find", "--task", "ioii"), "did you mean 'ioi'"),
    "unknown method": (("find", "--n", "4", "--method", "eapp"), "'eapp'"),
    "unknown metric": (("find", "--metric", "foo"), "'foo'"),
    "unknown corruption": (("find", "--corruption", "abd"), "did you mean 'abc'"),
    "unknown dtype": (("find", "--dtype", "float33"), "'float33'"),
    "unknown device": (("find", "--device", "abacus"), "'abacus'"),
    "unknown backend": (("find", "--backend", "x"), "'x'"),
    "unknown rule": (("find", "--n", "4", "--rule", "top"), "'top'"),
    "unknown direction": (("find", "--n", "4", "--direction", "up"), "'up'"),
    "unknown ranking": (
        ("patch", "--by", "size"),
        "--by 'size' is unknown: did you mean 'signed'? Known: absolute, signed",
    ),
    "unknown place": (
        ("patch", "--what", "headz"),
        "kind of place 'headz' is unknown: did you mean 'heads'? Known: resid, resid-mid,",
    ),
    "another tool's place": (("patch", "--what", "resid_pre"), "did you mean 'resid'?"),
    "another spelling of a method": (("find", "--method", "eap_ig"), "did you mean 'eap-ig"),
    "another spelling of a head": (("attention", "--head", "1.1"), "did you mean 'a1.h1'?"),
    "another spelling of a sender": (("patch", "--n", "4", "--path", "L0H3"), "did you mean 'a0.h3'?"),
    "unknown format": (("export", "x.json", "--to", "foo"), "--to 'foo' is unknown. Known: dot, svg, png"),
    "no number": (("learn", "--lr", "fast"), "--lr fast: give a number"),
    "a behaviour as a model": (("find", "greater_than"), "circuitfind find tiny --task greater-than"),
    "a behaviour to list": (
        ("tasks", "docstring"),
        "'docstring' is a built-in task, not a model: cf.task('docstring', model)",
    ),
    "steps of EAP": (
        ("attribute", "--method", "eap", "--steps", "3"),
        "--steps 3 is an option of eap-ig-inputs, eap-ig-activations: method 'eap' has none",
    ),
    "steps of an estimate": (("approximation", "--steps", "3", "--ablation", "zero"), "method 'atp' has none"),
    "steps of nodes": (("attribute", "--level", "node", "--steps", "3", "--method", "atp"), "method 'atp' has none"),
    "a rule": (("find", "--method", "eap-ig-activations", "--rule", "left"), "method 'eap-ig-activations' has none"),
    "scores with other steps": (
        ("find", "--n", "4", "--scores", "mine.safetensors", "--steps", "3"),
        "steps=None, not 3",
    ),
    "no steps": (("find", "--n", "4", "--steps", "0"), "--steps 0: give a whole number, 1 to 100,000"),
    "a target that is none": (
        ("find", "--tolerance", "99"),
        "--tolerance 99: give the largest distance from the whole model that is on target, in [0, 1)",
    ),
    "a circuit as pairs": (("find", "--data", "other.json"), "other.json: one JSON object, not pairs: give one object"),
    "nothing to start from": (
        ("learn", "--n", "4", "--start", "empty.json"),
        "--start empty.json has no edges, so there is no gate to learn: give a circuit with edges",
    ),
    "a start of another model": (("learn", "--n", "4", "--start", "other.json"), "--start other.json belongs to anoth"),
    "no scores of all edges": (
        ("export", "other.json", "--to", "safetensors"),
        "other.json: a circuit without a score for every edge: give the scores.safetensors that it was cut from",
    ),
    "a threshold that no |effect| is below": (
        ("acdc", "--n", "4", "--absolute", "--threshold", "-1"),
        "--threshold -1: no |effect| is below it",
    ),
    "a part beyond the whole": (("acdc", "--n", "4", "--screen", "5"), "--screen 5 is not a fraction of the threshold"),
    "no edges": (("learn", "--n", "4", "--edges", "0"), "--edges 0: give a whole number, 1 to 1,519"),
    "nothing left": (("learn", "--n", "4", "--sparsity", "1"), "--sparsity 1 leaves none of 1,519 edges"),
    "a seed beyond 63 bits": (("find", "--seed", "9" * 25), f"--seed {'9' * 25} is no seed"),
    "a layer that is none": (
        ("approximation", "--n", "4", "--layers", "9,9"),
        "--layers 9,9: give layers of this model",
    ),
    "an empty prompt": (("find", "--data", "empty.jsonl"), "empty.jsonl, line 1: 'clean' is empty"),
    "a misspelt column": (
        ("find", "--data", "corupted.jsonl"),
        "column 'corupted' is unknown: did you mean 'corrupted'?",
    ),
    "flat metric": (("find", "--n", "4", "--metric", "kl", "--method", "eap"), "metric 'kl' is flat"),
    "negative n": (("find", "--n", "-3"), "--n -3: give a whole number, 1 or more"),
    "n of letters": (("find", "--n", "four"), "--n four: give a whole number, 1 or more"),
    "no batch": (("find", "--batch-size", "0"), "--batch-size 0"),
    "holdout": (("find", "--holdout", "2"), "--holdout 2: give the fraction"),
    "no pairs left": (("find", "--holdout", "1"), "--holdout 1: give the fraction"),
    "task and data": (("find", "--task", "ioi", "--data", "one.jsonl"), "one of the two"),
    "corruption of data": (("find", "--data", "one.jsonl", "--corruption", "abc"), "--corruption abc"),
    "scores of another model": (("find", "--n", "4", "--scores", "other.safetensors"), "scores of another model"),
    "scores by another method": (("find", "--n", "4", "--scores", "mine.safetensors", "--method", "eap"), "not 'eap'"),
    "no scores": (("find", "--n", "4", "--scores", "one.jsonl"), "one.jsonl: not a scores file"),
    "folder": (("find", "--out", "one.jsonl"), "--out one.jsonl"),
    "no circuit": (("evaluate",), "--circuit"),
    "circuit of another model": (("evaluate", "--circuit", "other.json"), "a circuit of another model"),
    "not a circuit": (("export", "missing.csv"), "missing.csv: not JSON"),
    "edges at places, measured": (
        ("attribute", "--n", "4", "--by-span", "--max-checks", "3"),
        "--max-checks measures edges over all tokens",
    ),
    "no file to start from": (
        ("learn", "--n", "4", "--method", "matryoshka", "--start", "none.json"),
        "none.json: no such file",
    ),
    "unknown verb": (("fnid",), "fnid"),
    "unknown option": (("find", "--nn", "3"), "--nn"),
    "option of an earlier version": (("find", "--one-sided"), "--one-sided: give --criterion at-least (see"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_line_that_names_it(run: Run, case: str) -> None:
    for name, text in FILES.items():
        Path(name).write_text(text)
    other = cf.Graph(2, 2, 2, 8)
    cf.Scores(other, np.zeros((other.n_writers, other.n_readers), dtype=np.float32)).save("other.safetensors")
    tiny = _load("tiny", check=True, dtype=None, device=None, backend="nnsight").graph
    zeros = np.zeros((tiny.n_writers, tiny.n_readers), dtype=np.float32)
    cf.Scores(tiny, zeros, cf.Record(method="exact")).save("mine.safetensors")
    cf.Circuit.full(other).save("other.json")
    cf.Circuit.empty(tiny).save("empty.json")
    words, named = MISTAKES[case]
    said = run(*words)
    assert said.code == 2, said.err
    assert said.error.startswith("error: ") and named in said.error
    assert "Traceback" not in said.err and said.err.count("error: ") == 1
    assert not Path("circuitfind-out/circuit.json").exists()


BEFORE_LOADING = (
    ("attribute", "--method", "eapp"),
    ("attribute", "--level", "node", "--what", "resid", "--method", "hisp"),
    ("find", "--method", "atp"),
    ("find", "--rule", "top"),
    ("verify", "--steps", "0"),
    ("attribute", "--method", "eap", "--ablation", "zero", "--direction", "denoising"),
    ("find", "--data", "nowhere.jsonl"),
    ("evaluate", "--circuit", "c.json", "--data", "broken.jsonl"),
    ("attribute", "ioi"),
    ("tasks", "ioi"),
    ("tasks", "ioi", "--measure"),
)
BEFORE_RUNNING = (
    ("patch", "--layers", "9"),
    ("patch", "--layers", "0,0"),
    ("patch", "--what", "neurons"),
    ("patch", "--direction", "up"),
    ("patch", "--by-span", "--by-position"),
    ("attribute", "--level", "node", "--what", "resid", "--layers", "9"),
)


@pytest.mark.parametrize("words", BEFORE_LOADING, ids=" ".join)
def test_what_needs_no_model_is_said_before_one_is_loaded(
    run: Run, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(cf, "load", never)
    monkeypatch.setattr("circuitfind.models.load.fetch_tokenizer", never)
    said = run(*words)
    assert said.code == 2 and "loaded" not in said.error, said.err


@pytest.mark.parametrize("words", BEFORE_RUNNING, ids=" ".join)
def test_what_needs_no_run_is_said_before_one(
    run: Run, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr(cf, "diagnose", never)
    said = run(*words)
    assert said.code == 2 and "it ran" not in said.error, said.err


def test_wrong_values_are_in_the_json_document(run: Run) -> None:
    said = run("patch", "--what", "headz", "--json")
    assert said.code == 2 and json.loads(said.out)["error"].startswith(
        "kind of place 'headz' is unknown: did you mean 'heads'?"
    )


def test_a_folder_of_a_behaviours_name_is_a_model(run: Run) -> None:
    Path("ioi").mkdir()
    assert "not a model" not in run("attribute", "ioi").error


def test_long_waits_are_announced_where_nobody_watches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for patience, expected in ((0.01, "loading a model ...\n"), (60.0, "")):
        monkeypatch.setattr("circuitfind.cli.output.PATIENCE", patience)
        with Output(False, []).waiting("loading a model"):
            time.sleep(0.2)
        assert capsys.readouterr() == ("", expected)


def test_debug_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run("find", "--task", "nope", "--debug")
    assert said.code == 2 and "Traceback" in said.err and said.error.startswith("error: ")
    monkeypatch.setenv("CIRCUITFIND_DEBUG", "1")
    assert "Traceback" in run("find", "--task", "nope").err


def test_unexpected_errors_are_short(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(cf, "task", broken)
    said = run("find", "--json")
    assert said.code == 1 and said.error.endswith(
        "unexpected RuntimeError: first line (this is a bug; --debug shows where)"
    )
    assert json.loads(said.out)["exit_code"] == 1


def test_warnings_are_one_line_each_once(run: Run) -> None:
    rows = [
        {"clean": f"Then, {a} and {b} went to the store. {b} gave a ring to", "answer": b, "wrong": a}
        | {"corrupted": f"Then, {a} and {b} went to the store. {a} gave a ring to"}
        for a, b in (("Luke", "Aaron"), ("Peter", "Jessica"), ("Jane", "Melissa"), ("Olivia", "Erin"))
    ]
    Path("swapped.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    said = run("find", "--data", "swapped.jsonl", *SMALLEST[2:])
    assert said.err.count("the model does not prefer the answer on 2 of 2 clean prompts") == 1

    before = warnings.showwarning
    run("tasks")
    assert warnings.showwarning is before


# -------------------------------------------------------------------- help and start
def example_of(said: Said) -> str:
    """The example that ends a verb's help; the terminal wraps it."""
    return " ".join(said.out.split()).rpartition("Example: ")[2]


def test_help_of_every_verb_ends_with_an_example(run: Run) -> None:
    assert {command.callback.__name__ if not command.name else command.name for command in app.registered_commands} == {
        *VERBS
    }
    for verb in VERBS:
        said = run(verb, "--help")
        assert said.code == 0
        assert example_of(said).startswith(f"circuitfind {verb}")


@pytest.mark.slow
def test_examples_work(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circuitfind.search.acdc.GRID", GRID[::4])  # of the thresholds that `compare` runs ACDC at
    for verb in VERBS:  # in this order: later ones read what `find` leaves
        example = example_of(run(verb, "--help"))
        words = shlex.split(example)[1:]
        if verb == "mib":  # of a model as large as MIB's: test_exchange.py
            continue
        if verb in (
            "find",
            "attribute",
            "patch",
            "approximation",
            "verify",
            "evaluate",
            "acdc",
            "learn",
            "compare",
            "testbed",
        ):
            words += ["--n", "4"]
        if verb == "learn":
            words += ["--steps", "5"]
        said = run(*words)
        assert said.code == 0, (example, said.err)


def test_no_verb_prints_help_and_version_prints_it(run: Run) -> None:
    said = run()
    assert said.code == 0 and all(verb in said.out for verb in VERBS)
    assert run("--version").out.strip() == f"circuitfind {cf.__version__}"


def test_help_and_export_do_not_wait_for_torch(found: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from circuitfind.cli.app import main; codes = [main(words.split('|')) for words in sys.argv[1:]];"
        "assert codes == [0, 0, 0], codes;"
        "print([name for name in ('torch', 'transformers', 'nnsight') if name in sys.modules], file=sys.stderr)"
    )
    export = f"export|{found}/circuitfind-out/circuit.json|--to|dot|--out|{tmp_path}"
    environment = {**os.environ, "PYTHONPATH": str(Path(cf.__file__).parents[1])}
    words = [sys.executable, "-c", script, "--help", "find|--help", export]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "[]"


def test_names_of_the_package_are_all_there() -> None:
    assert set(cf.__all__) <= set(dir(cf))
    assert all(getattr(cf, name) is not None for name in cf.__all__)
    assert {"attribute", "testbed", "processes", "__version__"} <= set(cf.__all__)
    homes = {name: module for name, module in cf._MODULE_OF.items() if module != "circuitfind"}
    assert all(importlib.import_module(home).__dict__[name] is getattr(cf, name) for name, home in homes.items())
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = cf.nonsense  # type: ignore[attr-defined]


# -------------------------------------------------------------------- what help says is what the library does
def test_names_in_help_are_those_of_the_registries() -> None:
    def scored(level: str, effects: bool) -> set[str]:
        found = (METHODS[name] for name in names(level))
        return {one.name for one in found if one.sign(level, one.options).startswith(NO_EFFECT) != effects}

    assert set(options.EFFECTS) == scored("edge", True) and set(options.RANKINGS) == scored("edge", False)
    assert set(options.NODE_EFFECTS) == scored("node", True) and set(options.NODE_RANKINGS) == scored("node", False)
    assert set(options.ESTIMATES) == scored("place", True) - {"exact"}
    firsts = (options.EFFECTS[0], options.NODE_EFFECTS[0], options.ESTIMATES[0])
    assert firsts == tuple(DEFAULTS[kind][0] for kind in ("edge", "node", "place"))
    assert all(name in options.OF_PLACES for kind in DEFAULTS for name in DEFAULTS[kind])
    assert (*SPELLINGS, BY_TEXT) == options.SPELLINGS and (FIRST, ALL) == options.ANSWERS
    assert tuple(ABLATIONS) == options.ABLATIONS and tuple(cf.METRICS) == options.METRICS
    assert CRITERIA == options.CRITERIA and SEARCHES == options.SEARCHES
    assert tuple(KINDS) == options.KINDS and tuple(ORDERS) == options.ORDERS and tuple(LEARNERS) == options.LEARNED
    assert options.DIRECTIONS == DIRECTIONS and tuple(OBJECTIVES) == options.OBJECTIVES


DEFAULT = re.compile(r"Default: ([\w.,-]+)\.$")


@pytest.mark.parametrize(
    ("verb", "function", "renamed"),
    [
        ("find", cf.find, {}),
        ("compare", cf.compare, {}),
        ("approximation", cf.approximation, {}),
        ("acdc", cf.acdc, {}),
        ("learn", cf.learn_masks, {"edges": "n_edges", "nodes": "n_nodes"}),
        ("patch", cf.path_patch, {"to": "receivers"}),
    ],
)
def test_defaults_in_help_are_the_librarys(verb: str, function: Callable, renamed: dict[str, str]) -> None:
    known = inspect.signature(function).parameters
    (called,) = (one for one in VERBS_OF_APP if one.__name__ == verb)
    checked = 0
    for group in get_type_hints(called).values():
        for one in fields(group) if is_dataclass(group) else ():
            name, said = one.name, DEFAULT.search(one.metadata["option"].help)
            keyword = known.get(renamed.get(name, name))
            if said and keyword and keyword.default not in (None, inspect.Parameter.empty):
                default = keyword.default
                default = ",".join(default) if isinstance(default, tuple) else default
                assert said[1] == str(default), (name, said[1], keyword.default)
                checked += 1
    assert checked > 0
