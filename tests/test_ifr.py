"""Information flow routes against the definition, one reader, token and writer at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import build
from helpers import off
from oracles import Literal, Pass
from torch import Tensor
from toys import FOUR, id_task, linear, off_scores, wrapped

import circuitfind as cf
from circuitfind.attribution.ifr import shares_of
from circuitfind.batch import Inputs

CENTRED = ("gpt2", "gpt_neox", "gpt_neox-sequential")  # LayerNorm; the others have RMSNorm


def shares_at(y: Tensor, summands: list[Tensor]) -> list[float]:
    """Of one reader at one token."""
    close = [max(0.0, float(y.abs().sum() - (y - x).abs().sum())) for x in summands]
    return [one / sum(close) for one in close]


def twin(model: cf.Model, inputs: Inputs) -> tuple[Tensor, np.ndarray]:
    """`[writers, readers]` mean shares, and `[readers]` what the biases take."""
    literal, seen, graph = Literal(model.hf), {}, model.graph

    def note(reader: str, stream: Tensor, so_far: Pass) -> Tensor:
        seen[reader] = stream.double()
        return stream

    with torch.no_grad():
        run = literal.run(inputs, note)
    scores, biases = torch.zeros(graph.n_writers, graph.n_readers, dtype=torch.float64), np.zeros(graph.n_readers)

    def centred(x: Tensor) -> Tensor:
        return x - x.mean() if model.name in CENTRED else x

    for column, reader in enumerate(graph.reader_names):
        writers = literal.writers(reader)
        components = {writer.split(".")[0] for writer in writers}
        for row, mask in enumerate(inputs.mask):
            tokens = inputs.read[row].tolist() if reader == "logits" else mask.nonzero().flatten().tolist()
            for at in tokens:
                parts = [run.writers[writer][row, at].double() for writer in writers]
                constant = sum((run.biases[name][row, at].double() for name in run.biases if name in components), 0.0)
                constant = constant + torch.zeros_like(parts[0])
                y = seen[reader][row, at]
                torch.testing.assert_close(sum(parts) + constant, y, rtol=1e-4, atol=1e-4)
                *found, rest = shares_at(centred(y), [*map(centred, parts), centred(constant)])
                weight = 1 / len(tokens) / len(inputs.ids)
                biases[column] += rest * weight
                for writer, share in zip(writers, found, strict=True):
                    scores[graph.writer(writer), column] += share * weight
    return scores, biases


def shares(model: cf.Model, task: Any, **options: Any) -> cf.Scores:
    scores = cf.attribute(model, task, "ifr", **options)
    assert isinstance(scores, cf.Scores)
    return scores


@pytest.mark.parametrize("name", [*FOUR, "olmo2", "granite", "gpt_neox-sequential"])
def test_every_reader_and_token(name: str) -> None:
    model = wrapped(name)
    bound = id_task((4, 3)).on(model)
    expected, biases = twin(model, bound.batch.clean)
    scores, together = (shares(model, bound, batch_size=size) for size in (1, 2))
    assert off_scores(scores, expected) < 1e-4 and off_scores(together, expected) < 1e-4
    assert scores.values.min() >= 0 and scores.values.max() <= 1 + 1e-6
    np.testing.assert_allclose(scores.values.sum(0) + biases, 1, atol=1e-4)
    assert not scores.values[~scores.graph.real].any()
    assert not scores.record.is_effect and scores.record.method == "ifr"
    if name in ("llama", "gemma2", "olmo2"):
        assert biases.max() < 1e-5, "these have no biases"
    else:
        assert biases[1:].max() > 0.001 or name == "granite"


def test_a_single_summand_gets_everything() -> None:
    scores = shares(wrapped("gpt2"), id_task((5, 4)))
    first = scores.graph.readers(0, "qkv")
    np.testing.assert_allclose(scores.values[0, first], 1, atol=1e-6)


def test_shares_of_a_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(4, 3, 6, generator=generator)
    constant = torch.randn(3, 6, generator=generator)
    stream = parts.sum(0) + constant
    found = shares_of(stream, parts)
    for token in range(3):
        expected = shares_at(stream[token], [*parts[:, token], constant[token]])
        assert off(found[:, token], torch.tensor(expected)) < 1e-5
    opposed = shares_of(torch.ones(1, 2), torch.stack([torch.full((1, 2), 3.0), torch.full((1, 2), -2.0)]))
    assert not opposed.any(), "one overshoots, the other turns away: none is close, and there is no NaN"


def test_readers_of_one_stream_tie_and_writers_of_nothing_get_nothing() -> None:
    scores = shares(linear(), id_task((6, 6)))
    graph = scores.graph
    for layer in range(graph.n_layers):
        columns = scores.values[:, graph.readers(layer, "qkv")]
        np.testing.assert_array_equal(columns, np.repeat(columns[:, :1], columns.shape[1], axis=1))
        assert not scores.values[graph.mlp(layer)].any(), "these MLPs write their bias alone"


def test_a_mean_that_no_norm_sees_takes_no_share() -> None:
    """GPT-2's norms take the mean off: adding a constant to what a head writes changes nothing."""
    hf, task = build("gpt2"), id_task((5, 4))
    before = shares(cf.wrap(hf, None), task).values
    with torch.no_grad():
        for block in hf.transformer.h:
            block.attn.c_proj.weight += 3.0
    np.testing.assert_allclose(shares(cf.wrap(hf, None), task).values, before, atol=1e-4)


def test_only_the_clean_prompts_take_part() -> None:
    model = wrapped("llama")
    scores = shares(model, id_task((5, 4)))
    for options in ({"ablation": "zero"}, {"metric": "kl"}, {"direction": "denoising"}):
        np.testing.assert_array_equal(shares(model, id_task((5, 4)), **options).values, scores.values)
    circuit = scores.greedy(12)
    assert 0 < len(circuit) <= 12 and all(row.estimate is None for row in circuit.rows())


def test_both_backends_and_half_precision() -> None:
    hf, task = build("gpt_neox"), id_task((6, 5))
    first, second = (shares(cf.wrap(hf, None, backend=backend), task).values for backend in ("nnsight", "hooks"))
    np.testing.assert_array_equal(first, second)
    half = shares(wrapped("gpt_neox", torch.bfloat16), task).values
    assert off(torch.from_numpy(half), torch.from_numpy(first)) < 0.05
