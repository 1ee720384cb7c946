"""Results come back from their files to the bit; `show` opens what the verbs wrote; other files are named."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_plots import figures_of
from toys import id_task, wrapped

import circuitfind as cf
from circuitfind.cli.app import main
from circuitfind.export.files import plain
from circuitfind.opening import HOMES
from circuitfind.result import Result

TASK = ("tiny", "--task", "greater_than", "--n", "4", "--no-check")


def equal(a: Any, b: Any) -> bool:
    """The same to the bit, NaN being equal to itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)
    if is_dataclass(a) and not isinstance(a, type):
        return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    return bool(a == b or (a != a and b != b))


def made() -> dict[str, Any]:
    """A result of every kind, on a grouped-query model; NaN among the paths and the fits."""
    model, task = wrapped("llama"), id_task((5, 5, 5))
    return {
        "paths": cf.path_patch(model, task, None, ["a1.kv1<k>", "logits"], separate=True),
        "direct": cf.direct_effects(model, task),
        "approximation": cf.approximation(model, task, ["heads", "attn"], by_position=False, ablation="zero"),
        "attention": cf.attention(model, task, "a1.h2", example=1, corrupted=True),
    }


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return made()


KINDS = ("paths", "direct", "approximation", "attention")


@pytest.mark.parametrize("kind", KINDS)
def test_files_come_back_to_the_bit(kind: str, results: dict[str, Any], tmp_path: Path) -> None:
    found = results[kind]
    path = found.save(tmp_path / "new" / "result.json")
    opened = type(found).open(path)
    assert equal(opened, found)
    assert json.dumps(opened.to_dict()) == json.dumps(found.to_dict())
    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert (content["format"], content["version"]) == (f"circuitfind.{kind}", 1)
    assert opened.save(tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_what_tests_equality_can_fail(results: dict[str, Any]) -> None:
    assert np.isnan(results["paths"].per_example).any()
    assert not equal(np.array([1.0, np.nan]), np.array([2.0, np.nan])) and not equal(
        results["paths"], results["direct"]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content | {"format": "circuitfind.other"},
            "holds format 'circuitfind.other', expected 'circuitfind",
        ),
        (lambda content: {k: v for k, v in content.items() if k != "format"}, 'holds no "format" key'),
        (lambda content: content | {"version": 7}, "version 7 of circuitfind"),
        (lambda content: {k: v for k, v in content.items() if k in ("format", "version")}, "KeyError.*write it again"),
        (lambda content: content | {"record": 3}, "write it again"),
    ],
)
def test_other_files_are_refused(
    kind: str, results: dict[str, Any], change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    path = results[kind].save(tmp_path / "result.json")
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))))
    with pytest.raises(cf.FileError, match=rf"result\.json: .*{message}"):
        type(results[kind]).open(path)


def test_shapes_and_endings_are_checked(results: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(cf.FileError, match=r"result\.csv: .* \.json"):
        results["paths"].save(tmp_path / "result.csv")
    path = results["paths"].save(tmp_path / "result.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"receivers": content["receivers"][:1]}))
    with pytest.raises(cf.FileError, match=r"per_example has shape .* write it again"):
        cf.PathEffects.open(path)
    with pytest.raises(cf.FileError, match="no such file"):
        cf.PathEffects.open(tmp_path / "absent.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(cf.FileError, match=r"list\.json: a JSON list"):
        cf.PathEffects.open(tmp_path / "list.json")


# -------------------------------------------------------------------- positions of node scores
def test_node_scores_keep_their_positions(tmp_path: Path) -> None:
    scores = cf.attribute(wrapped("llama"), id_task((4, 4)), level="node", by_position=True)
    assert isinstance(scores, cf.NodeScores) and scores.positions is not None and len(scores.positions) == 4
    path = scores.save(tmp_path / "nodes.safetensors")
    assert equal(cf.NodeScores.open(path), scores)
    header = {"format": "circuitfind.scores", "version": "1", "level": "node"}
    more = {"graph": json.dumps(asdict(scores.graph)), "record": json.dumps(asdict(scores.record))}
    save_file(load_file(path), tmp_path / "old.safetensors", metadata=header | more)
    old = cf.NodeScores.open(tmp_path / "old.safetensors")
    assert old.positions is None and np.array_equal(old.values, scores.values)
    with pytest.raises(cf.ScoreError, match="2 positions for node scores of shape"):
        cf.NodeScores(scores.graph, scores.values, positions=("a", "b"))
    with pytest.raises(cf.ScoreError, match="4 positions for node scores of shape"):
        cf.NodeScores(scores.graph, scores.values.sum(1), positions=scores.positions)


# -------------------------------------------------------------------- circuitfind show
@pytest.mark.parametrize(
    ("kind", "holds", "figures"),
    [
        ("paths", "effects of paths", ["effects", "strongest"]),
        ("direct", "direct effects", ["effects", "components", "strongest"]),
        ("approximation", "approximation", ["scatter", "layers"]),
        ("attention", "attention pattern", ["attention"]),
    ],
)
def test_show_draws_what_the_file_holds(
    kind: str,
    holds: str,
    figures: list[str],
    results: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = results[kind].save(tmp_path / "result.json")
    assert main(["show", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["holds"], said["figures"]) == (holds, figures)
    drawn = [json.loads(cf.plot(results[kind], name).to_json()) for name in figures]
    assert figures_of(tmp_path / "result.html") == drawn
    assert main(["show", str(path), "--what", figures[-1]]) == 0
    first = {
        "paths": lambda: results[kind].top(1)[0].sender,
        "direct": lambda: results[kind].scores.top(1)[0],
        "approximation": lambda: results[kind].remarks[0].split(":")[0],
        "attention": lambda: "a1.h2 on corrupted prompt 1 of ids",
    }[kind]()
    assert first in " ".join(capsys.readouterr().out.split())


def test_verbs_leave_files_that_show_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb, options, name in (
        ("patch", ("--path", "input,m0", "--to", "a2.h1,m3"), "paths.json"),
        ("approximation", ("--what", "heads", "--layers", "1"), "approximation.json"),
        ("attention", ("--head", "a1.h2", "--corrupted"), "attention-a1.h2.json"),
        ("attribute", ("--level", "node", "--method", "direct"), "node-scores.safetensors"),
    ):
        assert main([verb, *TASK, *options, "--out", str(tmp_path)]) == 0
        assert name in "".join(capsys.readouterr().out.split())
        assert main(["show", str(tmp_path / name), "--json"]) == 0, name
        said = json.loads(capsys.readouterr().out)
        assert len(figures_of(Path(said["page"]))) == len(said["figures"])


def test_several_heads_are_a_file_each_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attention", *TASK, "--head", "a0.h1,a1.h2", "--out", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    model = cf.load("tiny", check=False)
    found = cf.attention(model, cf.task("greater_than", model, n=4), ["a0.h1", "a1.h2"])
    for one, path, shown in zip(found, said["files"], said["patterns"], strict=False):
        assert equal(cf.AttentionPattern.open(path), one) and shown["head"] == one.head
    assert [Path(path).name for path in said["files"][2:]] == ["attention.html"]
    assert len(figures_of(tmp_path / "attention.html")[0]["data"]) == 2


@pytest.mark.parametrize(
    ("kind", "command"),
    [("paths", "patch --path"), ("approximation", "approximation"), ("attention", "attention")],
)
def test_files_of_older_versions_are_to_be_made_again(
    kind: str, command: str, results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(plain({"run": {}, **results[kind].to_dict()})))  # as they were: without a format
    assert main(["show", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"written by an older version of circuitfind: make it again with 'circuitfind {command}'" in error
    assert "paths.json" not in error and error.count("\n") == 1


def test_every_format_is_opened_by_the_class_that_writes_it() -> None:
    modules = [name for _, name, _ in pkgutil.walk_packages(cf.__path__, "circuitfind.")]
    for name in modules:
        if "__main__" not in name:
            importlib.import_module(name)
    unread = {"circuitfind.scores", "circuitfind.sweep", ""}  # safetensors, told by their headers
    kinds, written = [Result], {}
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if kind.__module__.startswith("circuitfind."):
            written[kind.FORMAT] = f"{kind.__module__.removeprefix('circuitfind.')}:{kind.__name__}"
    assert {name: home for name, home in written.items() if name not in unread} == HOMES


def test_folders_are_opened(tmp_path: Path) -> None:
    model = cf.load("tiny", check=False)
    task = cf.task("ioi", model, n=8)
    found = cf.find(model, task, max_checks=3, random=2, batch_size=8)
    again = cf.open(found.save(tmp_path / "found"))
    assert again.circuit == found.circuit and again.checks.to_dict() == found.checks.to_dict()
    assert type(cf.open(tmp_path / "found" / "find.json")) is cf.FindResult
    cf.Scores.open(tmp_path / "found" / "scores.safetensors").save(tmp_path / "mib" / "importances.json", "eap-ig")
    np.testing.assert_allclose(cf.open(tmp_path / "mib").values, found.scores.values, rtol=1e-6)
    for n in (20, 5):
        found.scores.top(n).save(tmp_path / "several" / f"{n}.pt", "eap-ig")
    sizes = [len(circuit) for circuit in cf.open(tmp_path / "several")]
    assert sizes == sorted(sizes) and len(sizes) == 2


def test_folders_are_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (".", str(tmp_path)):
        assert main(["show", folder]) == 2
        assert f"{folder}: this is a folder: name a file in it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("old.json", {"run": {}, "sent": ["m0"], "effects": [[1]]}, "holds a JSON object of run, sent, effects,"),
        ("new.json", {"format": "circuitfind.tomorrow"}, "holds 'circuitfind.tomorrow', no result"),
        ("part.safetensors", {"key": "abc"}, "holds the checkpoint of a stopped run, no result"),
        ("model.safetensors", {"format": "pt"}, "holds tensors of something else, no result"),
        ("x.safetensors", {"format": "circuitfind.tomorrow"}, "holds circuitfind.tomorrow, no result"),
    ],
)
def test_show_names_what_it_found(
    name: str, content: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        save_file({"a": np.zeros(2)}, path, metadata=content)
    assert main(["show", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error and name in error and "paths.json" in error and error.count("\n") == 1
