"""Edge scores by position and by span: against autograd through split readers, as sums, pruned and drawn."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build
from helpers import as_matrix
from oracles import split_reader_scores

import circuitfind as cf
from circuitfind.batch import Batch
from circuitfind.cli.app import main
from circuitfind.placed_scores import connected

METHODS = ("eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted", "relp")


@pytest.fixture(scope="module")
def model() -> cf.Model:
    return cf.load("tiny")


@pytest.fixture(scope="module")
def task(model: cf.Model) -> cf.Task:
    return cf.task("ioi", model, n=6, template="abba-1")


def difference(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    right, wrong = (logits[:, 0].gather(1, ids[:, 0]) for ids in (batch.answers, batch.wrong))
    return (right - wrong).squeeze(1)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "olmo2"])
def test_a_position_is_the_difference_there_times_the_gradient_there(name: str) -> None:
    model, ids = cf.wrap(build(name)), torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 4:6] = (other[:, 4:6] + 7) % 120
    task = cf.Task(ids, other, [5, 6], [7, 8])
    found = cf.attribute(model, task, "eap", by_position=True)
    batch = task.on(model).batch
    shares = split_reader_scores(model.hf, batch, lambda logits: difference(logits, batch))
    for position in range(9):
        twin = {edge: share[:, position] for edge, share in shares.items()}
        expected = as_matrix(model.graph, twin).numpy() / 2
        np.testing.assert_allclose(found.values[position], expected, atol=1e-5 * np.abs(found.values).max())
    assert not found.values[:4].any() and found.values[4:].any(axis=(1, 2)).sum() > 2


@pytest.mark.parametrize("method", METHODS)
def test_places_add_up_to_the_scores(method: str, model: cf.Model, task: cf.Task) -> None:
    steps = {"steps": 2} if "-ig-" in method else {}
    expected = cf.attribute(model, task, method, **steps).values
    for ways in ({"by_position": True}, {"by_span": True}, {"by_span": True, "batch_size": 4}):
        found = cf.attribute(model, task, method, **ways, **steps)
        np.testing.assert_allclose(found.total().values, expected, atol=1e-5 * np.abs(expected).max())


def test_spans_of_prompts_of_unequal_length(model: cf.Model) -> None:
    """Padding belongs to no span, and spans stand elsewhere in every prompt."""
    mixed = cf.task("ioi", model, n=8)
    found = cf.attribute(model, mixed, "eap", by_span=True)
    assert {"IO", "S1", "S2", "end"} <= set(found.positions)
    whole = cf.attribute(model, mixed, "eap").values
    np.testing.assert_allclose(found.total().values, whole, atol=1e-5 * np.abs(whole).max())
    bound = mixed.on(model)
    alone = [cf.attribute(model, bound.subset([row]), "eap", by_span=True) for row in range(8)]
    mean = np.mean([one.at("S2").values for one in alone], axis=0)
    np.testing.assert_allclose(found.at("S2").values, mean, atol=1e-5 * np.abs(mean).max())


def test_only_the_last_token_reads_into_the_logits(model: cf.Model, task: cf.Task) -> None:
    found = cf.attribute(model, task, "eap", by_span=True)
    into = found.graph.readers(0, "logits")
    others = [at for at, name in enumerate(found.positions) if name != "end"]
    assert not found.values[others][..., into].any()
    assert found.values[found.positions.index("end")][..., into].any()


def test_pruning_follows_tokens(model: cf.Model) -> None:
    """A head reads a value at one place and writes at another; an MLP writes where it reads."""
    graph = model.graph
    mask = np.zeros((2, *graph.real.shape), dtype=bool)

    def put(place: int, *edges: str) -> None:
        for edge in edges:
            mask[place][graph.edge(edge)] = True

    put(0, "input->a0.h0<v>", "input->m0", "m0->a1.h0<q>", "input->a1.h1<q>")
    put(1, "a0.h0->logits", "m0->logits", "a1.h0->logits", "a1.h1->logits")
    kept = connected(graph, mask)
    assert {name for place in kept for name in graph.names(place)} == {"input->a0.h0<v>", "a0.h0->logits"}
    put(1, "input->m0")
    assert graph.names(connected(graph, mask)[1]) == graph.names(
        graph.mask(["input->m0", "m0->logits", "a0.h0->logits"])
    )


def test_the_strongest_and_files(model: cf.Model, task: cf.Task, tmp_path: Path) -> None:
    found = cf.attribute(model, task, "eap", by_span=True)
    best = found.top(5)
    assert [abs(row.score) for row in best] == sorted((abs(row.score) for row in best), reverse=True)
    assert found[best[0].edge][found.positions.index(best[0].place)] == pytest.approx(best[0].score)
    again = cf.open(found.save(tmp_path / "placed.safetensors"))
    assert type(again) is cf.PlacedScores and again.positions == found.positions and again.record == found.record
    np.testing.assert_array_equal(again.values, found.values)
    with pytest.raises(cf.ScoreError, match="no place 'S9': the places are"):
        found.at("S9")
    with pytest.raises(cf.FileError, match="expected edge scores, this file holds edge by place scores"):
        cf.Scores.open(tmp_path / "placed.safetensors")
    dot = found.to_dot(30)
    assert 'label="S2"' in dot and "style=dotted" in dot and "a0.h" in dot
    if shutil.which("dot"):
        assert found.render(tmp_path / "placed.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("ways", "said"),
    [
        ({"by_position": True, "method": "exact"}, "'exact' has no scores of edges by position: use one of eap, "),
        ({"by_position": True, "by_span": True}, "two ways to divide the prompts"),
        ({"by_span": True, "level": "node"}, "is for edges and for places of a sweep"),
    ],
)
def test_what_cannot_be_placed(ways: dict, said: str, model: cf.Model, task: cf.Task) -> None:
    with pytest.raises(cf.ScoreError, match=said):
        cf.attribute(model, task, **ways)


def test_what_would_not_fit_is_refused(model: cf.Model, task: cf.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circuitfind.attribution.attribute.BY_EXAMPLE", 4 * model.graph.real.size * 6)
    assert len(cf.attribute(model, task, "eap", by_span=True).positions) <= 6
    with pytest.raises(cf.ScoreError, match=r"1,519 edges at \d+ positions take 0 GiB: divide the prompts by named"):
        cf.attribute(model, task, "eap", by_position=True)


def test_totals_are_checked(model: cf.Model, task: cf.Task) -> None:
    found, whole = cf.attribute(model, task, "eap", by_span=True), cf.attribute(model, task, "eap")
    for scores in (found, found.at("end")):
        with pytest.raises(cf.ScoreError, match=r"give it scores\.total\(\)"):
            cf.check(model, task, scores)
    same = [[(row.name, row.exact) for row in cf.check(model, task, one, 3).checked] for one in (found.total(), whole)]
    assert same[0] == same[1]


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["attribute", "tiny", "--n", "4", "--method", "eap", "--by-span"]) == 0
    said = capsys.readouterr().out
    assert "estimate   span" in said and "position" not in said and "S2" in said
    folder = tmp_path / "circuitfind-out"
    assert cf.open(folder / "placed-scores.safetensors").record.method == "eap"
    assert not shutil.which("dot") or (folder / "placed-scores.svg").is_file()
    assert not (folder / "checks.json").exists()
    given = ["export", str(folder / "placed-scores.safetensors"), "--top", "20", "--title", "IOI", "--out"]
    assert main([*given, "placed.dot"]) == 0
    assert (tmp_path / "placed.dot").read_text().count("->") > 10 and 'label="IOI"' in Path("placed.dot").read_text()
    assert "of the 20 strongest" in capsys.readouterr().out
    assert main([*given, "placed.graphml"]) != 0
    drawn = "scores of edges by position or span can only be drawn: use --to dot, svg, png, pdf"
    assert drawn in capsys.readouterr().err
