"""The contraction of edge scores: what it leaves out is zero, and many points are contracted as each by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import VOCAB, build
from helpers import as_matrix, edge_scores, off, random_pairs, surprise
from oracles import split_reader_scores
from toys import id_task, wrapped

import circuitfind as cf
from circuitfind.attribution import gradients
from circuitfind.batch import Batch
from circuitfind.engine import memory_plan
from circuitfind.engine.edge_effects import EdgeSum
from circuitfind.engine.experiment import Experiment
from circuitfind.models.adapter import Adapter


def alike_up_to(first: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...]) -> Batch:
    """Random pairs whose sides differ from position `first` of each row on."""
    batch = random_pairs(left, right)
    alike = torch.arange(batch.clean.ids.shape[1]) < torch.tensor(first).unsqueeze(1)
    other = (batch.clean.ids + 1) % VOCAB * batch.clean.mask
    return replace(batch, corrupted=batch.corrupted._replace(ids=torch.where(alike, batch.clean.ids, other)))


@pytest.fixture()
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of tokens that blocks were formed of."""
    found: list[int] = []
    original = EdgeSum._blocks

    def counted(self: EdgeSum, kept: torch.Tensor, buffer: torch.Tensor) -> Any:
        found.append(len(kept))
        return original(self, kept, buffer)

    monkeypatch.setattr(EdgeSum, "_blocks", counted)
    return found


@pytest.mark.parametrize(
    ("first", "left", "right", "tokens"),
    [
        ((0,), (0,), (0,), 9),
        ((8,), (0,), (0,), 1),
        ((5, 7), (0, 0), (0, 1), 4 + 1),  # the padding that follows the last read position reaches no logits
        ((4, 3), (3, 0), (0, 2), 5 + 4),
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "falcon", "youtu"])
def test_only_tokens_that_differ_and_are_read_are_looked_at(
    name: str, first: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...], tokens: int,
    adapter_of: Callable[..., Adapter], looked_at: list[int],
) -> None:  # fmt: skip
    adapter, batch = adapter_of(name), alike_up_to(first, left, right)
    scores = edge_scores(adapter, batch)
    assert sum(looked_at) == tokens
    expected = as_matrix(adapter.graph, split_reader_scores(build(name), batch, surprise))
    assert expected.abs().max() > 1e-3 and off(scores, expected) < 1e-5


def test_before_the_first_difference_other_ablations_change_something(looked_at: list[int]) -> None:
    """Of pairs that differ at their last token only, replaced by nothing or by a mean."""
    model, task = wrapped("llama"), id_task((6,))
    task = replace(task, corrupted=torch.cat([task.clean[:, :-1], task.corrupted[:, -1:]], dim=1))
    for ablation, tokens in (("corrupted", 1), ("zero", 6), ("mean", 6)):
        looked_at.clear()
        cf.attribute(model, task, "eap", ablation=ablation)
        assert sum(looked_at) == tokens, ablation


@pytest.mark.parametrize("together", [1, 2, 8])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "olmo2", "minicpm3"])
def test_many_points_are_the_sum_of_each(name: str, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where more points come than wait for one contraction, and by example."""
    model = wrapped(name)
    bound = id_task((7, 5, 6)).on(model)
    points = [gradients.Point(w, a) for w, a in ((0.5, 0.0), (0.2, 0.3), (-0.7, 0.6), (1.0, 1.0), (0.3, 0.9))]
    experiment = Experiment.of(model, bound)
    monkeypatch.setattr(memory_plan, "POINTS", together)
    alone = [gradients.edges_of(experiment, bound.batch, [point])[0] for point in points]
    whole, _ = gradients.edges_of(experiment, bound.batch, points)
    assert off(whole, torch.stack(alone).sum(0)) < 1e-5
    example = torch.arange(3)[:, None].expand_as(bound.batch.clean.ids)
    apart, _ = gradients.edges_of(experiment, bound.batch, points, example, 3)
    rows = [gradients.edges_of(experiment, bound.batch.rows(slice(row, row + 1)), points)[0] for row in range(3)]
    assert off(apart, torch.cat(rows)) < 1e-5


def test_a_first_point_at_an_end_is_the_run_of_that_side(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task, runs = wrapped("gpt2"), id_task((6, 6)), []

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **keywords: runs.append(args) or original(*args, **keywords)

    for name in ("capture", "capture_corrupted"):
        monkeypatch.setattr(gradients, name, counted(getattr(gradients, name)))
    for method, options, expected in (
        ("eap", {}, 1),
        ("eap", {"direction": "denoising"}, 1),
        ("eap-ig-inputs", {"steps": 2}, 1),
        ("eap-ig-inputs", {"steps": 2, "rule": "midpoint"}, 2),
        ("eap-ig-inputs", {"steps": 2, "metric": "kl"}, 1),  # the clean run, whose logits the metric asks for
        ("eap", {"ablation": "zero"}, 0),
    ):
        runs.clear()
        cf.attribute(model, task, method, **options)
        assert len(runs) == expected, (method, options)
    runs.clear()
    cf.attribute(model, task, level="node", what="heads", method="atp")
    assert not runs, "places have runs of their own"
