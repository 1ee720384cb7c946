"""AtP*'s GradDrop against autograd with one layer's outputs detached by hooks, and what it is there to repair."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from test_baselines import mask_gradients, nodes_of, off_nodes
from test_components import GradientTwin
from test_qk_fix import PatternTwin, each, estimate, off_sweep
from torch import Tensor, nn
from toys import FOUR, Twin, contrast, id_task, wrapped
from transformers import GPT2Config, GPT2LMHeadModel

import circuitfind as cf
from circuitfind.engine.ablation import resampled
from circuitfind.errors import ScoreError
from circuitfind.models.families import family_of


@contextmanager
def detached(model: cf.Model, layer: int) -> Iterator[None]:
    """What a layer's attention and MLP put out is a constant to autograd."""
    family = family_of(model.hf.config)
    block = model.hf.get_submodule(family.layers)[layer]

    def after(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        return output.detach().clone()  # Falcon adds in place

    handles = [block.get_submodule(name).register_forward_hook(after) for name in (family.o, family.mlp_out)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def dropped_nodes(twin: Twin, direction: str = "noising") -> np.ndarray:
    """`[layers, writers, batch]`: first-order effects with each layer detached."""
    found = []
    for layer in range(twin.model.graph.n_layers):
        with detached(twin.model, layer):
            found.append(mask_gradients(twin, direction).double().numpy())
    return np.stack(found)


def magnitudes(effects: np.ndarray, layers: list[int | None]) -> np.ndarray:
    """`[places, batch]`: means of magnitudes over the layers that a place is no part of, one place at a time."""
    rows = [
        np.mean([np.abs(effects[dropped, at]) for dropped in range(len(effects)) if dropped != own], axis=0)
        for at, own in enumerate(layers)
    ]
    return np.stack(rows)


def layers_of(graph: cf.Graph) -> list[int | None]:
    return [None, *(graph.layer_of(writer) for writer in range(1, graph.n_writers))]


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("name", [*FOUR, "falcon"])
def test_nodes_are_mean_magnitudes(name: str, direction: str) -> None:
    model = wrapped(name)
    bound = id_task((6, 4, 5)).on(model)
    scores = nodes_of(model, bound, "atp-star", direction=direction, batch_size=2)
    expected = magnitudes(dropped_nodes(Twin(model, bound), direction), layers_of(model.graph)).mean(-1)
    assert off_nodes(scores, torch.from_numpy(expected)) < 1e-5
    assert not scores.record.is_effect and scores.values.min() >= 0


def test_ablations_and_a_metric_that_needs_the_clean_run() -> None:
    model = wrapped("llama")
    bound = id_task((5, 5, 5)).on(model)
    for ablation in ("zero", "mean", "mean-position", "resample"):
        dealt = resampled(bound.batch, 2).corrupted if ablation == "resample" else None
        twin = Twin(model, bound, "corrupted" if dealt else ablation, dealt)
        scores = nodes_of(model, bound, "atp-star", ablation=ablation, seed=2)
        expected = magnitudes(dropped_nodes(twin), layers_of(model.graph)).mean(-1)
        assert off_nodes(scores, torch.from_numpy(expected)) < 1e-5, ablation
    kl = contrast(0, (5, 5), "kl").on(model)
    scores = nodes_of(model, kl, "atp-star", direction="denoising")
    expected = magnitudes(dropped_nodes(Twin(model, kl), "denoising"), layers_of(model.graph)).mean(-1)
    assert off_nodes(scores, torch.from_numpy(expected)) < 1e-4


@pytest.mark.parametrize(("name", "what"), [("gemma2", "heads"), ("llama", "v"), ("gpt2", "resid"), ("gpt2", "mlp")])
def test_places_of_a_sweep(name: str, what: str) -> None:
    model = wrapped(name)
    bound, expected = id_task((5, 5)).on(model), []
    for layer in (0, 1):
        terms = []
        for dropped in (0, 1) if what == "resid" else (1 - layer,):
            with detached(model, dropped):
                terms.append(np.abs(GradientTwin(model, bound).estimates(what, (layer,), [(1, 1)])))
        expected.append(np.mean(terms, axis=0))
    sweep = estimate(model, bound, what, "atp-star", by_position=True)
    assert off_sweep(sweep, np.concatenate(expected)) < 1e-4
    assert not sweep.record.is_effect and sweep.record.sign == nodes_of(model, bound, "atp-star").record.sign


@pytest.mark.parametrize("what", ["q", "k"])
def test_queries_and_keys_have_the_fix_too(what: str) -> None:
    model = wrapped("llama")
    bound, expected = id_task((5, 5)).on(model), []
    for layer in (0, 1):
        with detached(model, 1 - layer):
            expected.append(np.abs(PatternTwin(model, bound).estimates(what, each(5, 2), layers=(layer,))))
    sweep = estimate(model, bound, what, "atp-star", by_position=True)
    assert off_sweep(sweep, np.concatenate(expected)) < 1e-5


def test_cancelling_paths() -> None:
    """A metric in which a node's direct effect and its effect through later layers cancel to nothing."""
    model = wrapped("gpt2")
    bound = id_task((6,)).on(model)
    node = model.graph.writer("a0.h1")

    def along(a: float, b: float) -> Any:
        return lambda logits, batch: a * logits[:, 5] + b * logits[:, 7]

    def plain(metric: Any) -> np.ndarray:
        return nodes_of(model, bound, "atp", metric=metric).values

    first, second = plain(along(1, 0)), plain(along(0, 1))
    metric = along(1, -float(first[node] / second[node]))
    effects, ranked = plain(metric), nodes_of(model, bound, "atp-star", metric=metric).values
    assert abs(effects[node]) < 1e-3 * np.median(np.abs(effects))
    assert ranked[node] > 0.5 * np.median(ranked)


def test_nothing_is_dropped_after_the_last_layer() -> None:
    """Its nodes act on the logits alone, or on its own MLP: dropping earlier layers changes nothing."""
    model, task = wrapped("gemma2"), id_task((6, 4))
    last = slice(model.graph.head(1), None)
    np.testing.assert_allclose(
        nodes_of(model, task, "atp-star").values[last], nodes_of(model, task, "hisp").values[last], rtol=1e-5
    )


def test_files_backends_and_refusals(tmp_path: Path) -> None:
    hf, task = build("gpt_neox"), id_task((6, 5))
    first, second = (nodes_of(cf.wrap(hf, None, backend=backend), task, "atp-star") for backend in ("nnsight", "hooks"))
    np.testing.assert_array_equal(first.values, second.values)
    again = cf.NodeScores.open(first.save(tmp_path / "nodes.safetensors"))
    assert not again.record.is_effect and again.record.method == "atp-star"
    sweep = estimate(wrapped("gpt2"), task, "q", "atp-star")
    assert not cf.Sweep.open(sweep.save(tmp_path / "sweep.safetensors")).record.is_effect
    model = wrapped("gpt2")
    with pytest.raises(ScoreError, match="no scores by position that add up"):
        nodes_of(model, id_task((5, 5)), "atp-star", by_position=True)
    with pytest.raises(ScoreError, match="is flat at the clean run"):
        nodes_of(model, task, "atp-star", metric="kl")
    with pytest.raises(ScoreError, match="its scores have no sign"):
        cf.approximation(model, task, "heads", method="atp-star")
    torch.manual_seed(0)
    single = cf.wrap(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=128)).eval(), None)
    for what in (None, "heads"):
        with pytest.raises(ScoreError, match="this model has one: use 'atp'"):
            cf.attribute(single, task, "atp-star", level="node", what=what)
