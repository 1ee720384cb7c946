"""Properties that hold for every model, circuit, padding and ablation, on examples that Hypothesis draws.

1. Identities: writers and biases sum to the stream, the full circuit is the clean run, the empty one the corrupted run.
2. A circuit run equals the literal evaluation.
3. Batch and order invariance: pairs in another order, or one at a time, give the same runs and scores.
4. Prefix invariance: tokens after the last read position change nothing.

A few examples of each are drawn, always the same; `pytest tests/test_properties.py --hypothesis-profile long` draws
300 of each, new ones each time.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from families import EVERY_FAMILY, VOCAB, build
from helpers import edge_scores, off, random_pairs
from hypothesis import given, strategies as st
from test_circuit_run import check_against_literal, prepared_for

from circuitfind.batch import Batch, Inputs
from circuitfind.engine.ablation import ablation_of
from circuitfind.engine.circuit_run import run_circuits
from circuitfind.engine.identities import check_identities
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import observe

CLOSE = 2e-5  # of the largest value: rounding of float32

families = st.sampled_from(EVERY_FAMILY)
weights = st.integers(0, 2)
seeds = st.integers(0, 2**31 - 1)
densities = st.sampled_from((0.0, 0.01, 0.1, 0.5, 0.9, 1.0))


@cache
def adapter_of(family: str, seed: int) -> Adapter:
    adapter = Adapter(build(family, seed))
    observe(adapter)
    return adapter


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Two to four pairs, each padded by up to three tokens on one side or both."""
    padding = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=4))
    left, right = zip(*padding, strict=True)
    return random_pairs(left, right, draw(seeds))


def mask_of(adapter: Adapter, density: float, seed: int) -> np.ndarray:
    """`[writers, readers]`: each edge is in with this probability."""
    real = adapter.graph.real
    return real & (np.random.default_rng(seed).random(real.shape) < density)


@given(families, weights, seeds)
def test_identities_hold(family: str, weight: int, seed: int) -> None:
    for identity in check_identities(adapter_of(family, weight), seed):
        assert identity.holds, identity


@given(families, weights, batches(), st.sampled_from(("corrupted", "zero", "mean", "resample")), densities, seeds)
def test_a_circuit_is_what_its_literal_run_says(
    family: str, weight: int, batch: Batch, ablation: str, density: float, seed: int
) -> None:
    if ablation_of(ablation).equal_lengths:
        batch = random_pairs((0,) * len(batch), (0,) * len(batch), seed)
    adapter = adapter_of(family, weight)
    check_against_literal(adapter, batch, ablation, mask_of(adapter, density, seed)[None])


@given(families, weights, batches(), st.sampled_from(("corrupted", "zero")), densities, seeds, st.randoms())
def test_pairs_do_not_know_of_each_other(
    family: str, weight: int, batch: Batch, ablation: str, density: float, seed: int, shuffle
) -> None:
    adapter = adapter_of(family, weight)
    mask = mask_of(adapter, density, seed)[None]
    order = list(range(len(batch)))
    shuffle.shuffle(order)

    def logits(some: Batch) -> torch.Tensor:
        return run_circuits(prepared_for(adapter, some, ablation), mask)[0]

    together = logits(batch)
    assert off(logits(batch.rows(torch.tensor(order))), together[order]) < CLOSE
    alone = torch.cat([logits(batch.rows(slice(row, row + 1)).trimmed()) for row in range(len(batch))])
    assert off(alone, together) < CLOSE
    scores = sum(edge_scores(adapter, batch.rows(slice(row, row + 1)).trimmed()) for row in range(len(batch)))
    assert off(scores, edge_scores(adapter, batch)) < CLOSE


@given(families, weights, batches(), densities, seeds)
def test_what_comes_after_the_last_read_position_changes_nothing(
    family: str, weight: int, batch: Batch, density: float, seed: int
) -> None:
    adapter = adapter_of(family, weight)
    mask = mask_of(adapter, density, seed)[None]
    later = torch.randint(3, VOCAB, (2, len(batch), 3), generator=torch.Generator().manual_seed(seed))

    def longer(side: Inputs, more: torch.Tensor) -> Inputs:
        """The side with three tokens after each prompt's last one, where there was padding or nothing."""
        ids, real = (torch.cat([value, value.new_zeros(len(value), 3)], dim=1) for value in side[:2])
        for row, end in enumerate(side.read.amax(1) + 1):
            ids[row, end : end + 3], real[row, end : end + 3] = more[row], True
        return Inputs(ids, real, side.read)

    extended = Batch(longer(batch.clean, later[0]), longer(batch.corrupted, later[1]), batch.answers, batch.wrong)
    short, long = (run_circuits(prepared_for(adapter, some, "corrupted"), mask)[0] for some in (batch, extended))
    assert off(long, short) < CLOSE
    assert off(edge_scores(adapter, extended), edge_scores(adapter, batch)) < CLOSE
