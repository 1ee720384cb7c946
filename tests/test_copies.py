"""Pairs of the same prompts are one piece of evidence: in splits, intervals, tests and words."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from toys import contrast, some_circuits, wrapped

import circuitfind as cf
from circuitfind.engine.ablation import resampled
from circuitfind.errors import ScoreError, TaskError
from circuitfind.tasks.bound import BoundTask

LENGTHS = (7, 6, 5, 7, 6, 7)


@pytest.fixture(scope="module")
def llama() -> cf.Model:
    return wrapped("llama")


@pytest.fixture(scope="module")
def once(llama: cf.Model) -> BoundTask:
    return contrast(3, LENGTHS).on(llama)


@pytest.fixture(scope="module")
def often(once: BoundTask) -> BoundTask:
    """Every pair three times, the first one five times; not in blocks."""
    return once.subset([0, 1, 2, 3, 4, 5, 0, 0, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 5, 0])


def prompts(bound: BoundTask) -> set[tuple[str, str]]:
    return set(zip(bound.prompts, bound.corrupted_prompts, strict=True))


def test_pairs_of_the_same_prompts_have_one_number(llama: cf.Model, once: BoundTask, often: BoundTask) -> None:
    assert once.copies.tolist() == [0, 1, 2, 3, 4, 5] == once.first.tolist()
    assert often.copies.tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 5, 0]
    assert often.first.tolist() == [0, 1, 2, 3, 4, 5]
    # padded to another length, and asked for other answers; another corrupted prompt makes another pair
    assert often.subset([2, 11, 3]).copies.tolist() == [0, 0, 1]
    batch = once.batch
    swapped = dataclasses.replace(batch.rows(torch.tensor([0, 0])), answers=batch.answers[:2], wrong=batch.wrong[:2])
    assert dataclasses.replace(once, batch=swapped).copies.tolist() == [0, 0]
    other = swapped.corrupted.ids.clone()
    other[1, 0] += 1
    swapped = dataclasses.replace(swapped, corrupted=swapped.corrupted._replace(ids=other))
    assert dataclasses.replace(once, batch=swapped).copies.tolist() == [0, 1]
    assert often.record("m", "zero", "noising", 0).copies.tolist() == often.copies.tolist()
    assert (often.record("m", "zero", "noising", 0).n_distinct, cf.Record(n_examples=4).n_distinct) == (6, 4)


def test_copies_stay_on_one_side_of_a_split(often: BoundTask) -> None:
    for seed in range(20):
        for fraction in (0.1, 0.5, 0.75, 0.9):
            first, second = often.split(fraction, seed)
            assert len(first) + len(second) == 20 and not prompts(first) & prompts(second)
            assert abs(len(first) - 20 * fraction) <= 4
    with pytest.raises(TaskError, match="all 2 pairs have the same prompts: both parts would hold"):
        often.subset([0, 6]).split()


def test_a_split_of_different_pairs_is_as_ever(once: BoundTask) -> None:
    order = torch.randperm(6, generator=torch.Generator().manual_seed(5)).tolist()
    first, second = once.split(0.3, seed=5)
    assert first.prompts == tuple(once.prompts[row] for row in sorted(order[:2])) and len(second) == 4


@pytest.mark.parametrize("times", [2, 5])
def test_intervals_do_not_shrink_with_copies(llama: cf.Model, once: BoundTask, times: int) -> None:
    many, circuit = once.subset([*range(6)] * times), some_circuits(llama.graph)[2]
    scores = cf.attribute(llama, once, "eap")
    for judge in (
        lambda bound: [cf.evaluate(llama, bound, circuit).interval],
        lambda bound: [row.interval for row in cf.minimality(llama, bound, circuit.edges[:6]).edges],
        lambda bound: [cf.completeness(llama, bound, circuit, knockouts=3).mean_gap_interval],
        lambda bound: [(found := cf.curve(llama, bound, scores, sizes=[20, 60])).cpr_interval, found.cmd_interval],
        lambda bound: cf.verify(llama, bound, scores, 5, random=0).intervals,
        lambda bound: [(row.low, row.high) for row in cf.patch(llama, bound, "mlp", by_position=False).rows()],
    ):
        np.testing.assert_allclose(judge(many), judge(once), rtol=1e-3, atol=2e-5)


def test_noise_does_not_shrink_with_copies(llama: cf.Model) -> None:
    """A contrast within the noise of three pairs is refused however often they are given."""
    bound = contrast(2, (7, 6, 7)).on(llama)
    clean, corrupted = bound.batch.clean, bound.batch.corrupted
    turned = torch.tensor([[False], [True], [False]])
    sides = [torch.where(turned, a.ids, b.ids) for a, b in ((corrupted, clean), (clean, corrupted))]
    batch = dataclasses.replace(
        bound.batch, clean=clean._replace(ids=sides[0]), corrupted=corrupted._replace(ids=sides[1])
    )
    bound = dataclasses.replace(bound, batch=batch)
    for pairs in (bound, bound.subset([0, 1, 2] * 20)):
        with pytest.raises(ScoreError, match="within noise"):
            cf.evaluate(llama, pairs, cf.Circuit.full(llama.graph))


def test_tests_take_each_pair_once(llama: cf.Model, once: BoundTask, often: BoundTask) -> None:
    circuit = some_circuits(llama.graph)[2]
    asked = {"tests": ["equivalence", "independence"], "permutations": 99}
    found, expected = (cf.hypotheses(llama, pairs, circuit, **asked) for pairs in (often, once))
    assert [row.p_value for row in found.tests] == pytest.approx([row.p_value for row in expected.tests])
    assert "on 6 pairs" in found["equivalence"].reading and found.record.n_examples == 6


def test_resampling_deals_no_copy_its_own_prompt(once: BoundTask, often: BoundTask) -> None:
    for seed in range(10):
        dealt = resampled(often.batch, seed, often.copies)
        same = (dealt.corrupted.ids == often.batch.corrupted.ids).all(1)
        assert not same.any()
        rows = [*map(tuple, dealt.corrupted.ids.tolist())]
        assert sorted(rows) == sorted(map(tuple, often.batch.corrupted.ids.tolist()))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    assert torch.equal(resampled(once.batch, 3, once.copies).corrupted.ids, once.batch.corrupted.ids[other])
    with pytest.raises(TaskError, match="needs other prompts for each: 3 of 4 pairs are copies"):
        resampled(often.batch.rows(torch.tensor([0, 6, 7, 1])), 0, np.array([0, 0, 0, 1]))


def test_a_diagnosis_counts_copies_once(llama: cf.Model, once: BoundTask, often: BoundTask) -> None:
    found = cf.diagnose(llama, often)
    note = "14 of 20 pairs are copies of others (the same prompts): they count once in intervals and stay on the same"
    assert any(remark.severity == "note" and remark.text.startswith(note) for remark in found.findings)
    assert not any("copies" in remark.text for remark in cf.diagnose(llama, once).findings)
    summary = cf.TaskSummary("t", 32, "logit_diff", 0.75, 0.7, 1.0, 0.0, 1.0, (3, 7, 11, 15, 19, 23, 27, 31), (), 0.5)
    assert "no better than guessing" not in summary.warning()
    four = dataclasses.replace(summary, copies=tuple(range(4, 32)))  # 3 of 4 right
    assert "no better than guessing" in four.warning()


def test_samples_are_of_different_pairs(llama: cf.Model, once: BoundTask, often: BoundTask) -> None:
    found, expected = (cf.stability(llama, pairs, method="eap", n_edges=20, resamples=5) for pairs in (often, once))
    assert found.circuits == expected.circuits and found.sizes == expected.sizes == (6,) * 5
    with pytest.raises(TaskError, match="a single pair cannot be resampled"):
        cf.stability(llama, often.subset([0, 6, 7]), method="eap", n_edges=20, resamples=5)
