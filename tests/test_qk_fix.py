"""The QK fix against patching by hand: the model's own attention with one query or key replaced, and autograd."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from families import FALCON, build
from helpers import off
from patching_twin import PatchingTwin
from test_aligned_spans import gathered, unequal_task
from torch import Tensor
from toys import FOUR, id_task, wrapped
from transformers import FalconConfig, FalconForCausalLM

import circuitfind as cf
from circuitfind.attribution import atp_star
from circuitfind.attribution.atp_star import single_keys
from circuitfind.batch import Inputs
from circuitfind.engine.capture import capture
from circuitfind.engine.restart import Restart
from circuitfind.engine.sites import attention_scores
from circuitfind.errors import ModelError, ScoreError

BOTH = (0, 1)
SPANS = [{"who": (0, 2), "what": (3, 4)}, {"who": (1, 3), "what": (4, 5)}]
# sinks, norms over all heads or each, windows, ALiBi, a latent
OTHERS = ["gpt_oss", "olmo2", "qwen3", "mistral", "bloom", "youtu"]


class PatternTwin(PatchingTwin):
    """Patterns before and after one place's queries or keys are replaced, times the gradient at the pattern."""

    def estimates(
        self, what: str, places: list[list[list[int]]], direction: str = "noising", layers: Any = BOTH, **options: Any
    ) -> np.ndarray:
        """`[layers, units, places, examples]`."""
        clean, corrupted = self.batch.clean, self.corrupted
        base, source, sign = (clean, corrupted, 1) if direction == "noising" else (corrupted, clean, -1)
        found = []
        for layer in layers:
            other = self._carried(what, layer, source, options.get("ablation", "corrupted"))
            before, gradient = self._pattern(layer, base), self._at_pattern(layer, base)
            for unit, place in product(range(self._units(what, other)), places):
                with self._hooked(what, layer, self._replacement(what, unit, place, other)):
                    after = self._pattern(layer, base)
                found.append(sign * ((before - after) * gradient).sum((1, 2, 3)))
        return torch.stack(found).view(len(layers), -1, len(places), len(self.bound)).double().numpy()

    def _pattern(self, layer: int, inputs: Inputs) -> Tensor:
        return self._carried("pattern", layer, inputs, "corrupted")

    def _at_pattern(self, layer: int, inputs: Inputs) -> Tensor:
        leaves: list[Tensor] = []

        def root(value: Tensor) -> Tensor:
            leaves.append(value.detach().clone().requires_grad_())
            return leaves[0] + 0

        with torch.enable_grad(), self._hooked("pattern", layer, root):
            return torch.autograd.grad(self._metric(self.literal._plain_logits(inputs)).sum(), leaves[0])[0]


def estimate(model: cf.Model, task: Any, what: str, method: str = "atp-qk", **options: Any) -> cf.Sweep:
    sweep = cf.attribute(model, task, method, level="node", what=what, **options)
    assert isinstance(sweep, cf.Sweep)
    return sweep


def off_sweep(sweep: cf.Sweep, expected: np.ndarray) -> float:
    return off(torch.from_numpy(sweep.per_example.reshape(expected.shape)), torch.from_numpy(expected))


def each(length: int, rows: int) -> list[list[list[int]]]:
    return [[[at]] * rows for at in range(length)]


@pytest.mark.parametrize("what", ["q", "k"])
@pytest.mark.parametrize("name", [*FOUR, *OTHERS])
def test_every_position_is_its_change_of_the_pattern(name: str, what: str) -> None:
    model = wrapped(name)
    bound = id_task((6, 6)).on(model)
    sweep = estimate(model, bound, what, by_position=True)
    assert off_sweep(sweep, PatternTwin(model, bound).estimates(what, each(6, 2))) < 1e-5
    assert sweep.record.method == "atp-qk" and sweep.record.is_effect


@pytest.mark.parametrize("what", ["q", "k"])
@pytest.mark.parametrize("name", FOUR)
def test_all_positions_of_padded_prompts(name: str, what: str) -> None:
    model = wrapped(name)
    bound = id_task((6, 4, 5)).on(model)
    for direction, batch_size in (("noising", 2), ("denoising", None)):
        sweep = estimate(model, bound, what, direction=direction, batch_size=batch_size)
        expected = PatternTwin(model, bound).estimates(what, [[[*range(6)]] * 3], direction)
        assert off_sweep(sweep, expected) < 1e-5


@pytest.mark.parametrize("what", ["q", "k"])
def test_spans_and_ablations(what: str) -> None:
    """A span of several keys takes one softmax, a span of one the closed form."""
    model = wrapped("llama")
    bound = id_task((6, 6), spans=SPANS).on(model)
    sweep = estimate(model, bound, what, by_span=True, ablation="mean")
    places = [[[0, 1], [1, 2]], [[3], [4]], [[5], [5]], [[2, 4], [0, 3]]]  # who, what, end, rest
    assert sweep.axes[-1].labels == ("who", "what", "end", "rest")
    assert off_sweep(sweep, PatternTwin(model, bound).estimates(what, places, ablation="mean")) < 1e-5
    alone = [{"what": row["what"]} for row in SPANS]
    only = estimate(model, id_task((6, 6), spans=alone), what, by_span=True, ablation="mean")
    np.testing.assert_allclose(only.effects[..., 0], sweep.effects[..., 1], atol=1e-5)


class AlignedPatternTwin(PatternTwin):
    """What replaces a query or key is that of the corrupted prompt's counterpart."""

    def _carried(self, what: str, *args: Any) -> Tensor:
        value = super()._carried(what, *args)
        return value if what == "pattern" else gathered(value)


@pytest.mark.parametrize("what", ["q", "k"])
def test_aligned_pairs(what: str) -> None:
    model, bound = wrapped("llama"), unequal_task().on(wrapped("llama"))
    expected = AlignedPatternTwin(model, bound).estimates(what, [[[*range(7)]] * 3])
    assert off_sweep(estimate(model, bound, what), expected) < 1e-5


@pytest.mark.parametrize("method", ["atp-qk", "atp-star"])
def test_one_pattern_at_a_time_where_no_more_may_be_held(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama")
    places = [(what, by) for what in ("q", "k") for by in ("by_position", "by_span")]
    task = id_task((6, 6), spans=SPANS)
    together = [estimate(model, task, what, method, **{by: True}) for what, by in places]
    monkeypatch.setattr(atp_star, "HELD", 1)
    changes, held = atp_star._changes, []

    def noted(kind: str, scores: Tensor, new: Tensor, gradient: Tensor, places: Tensor) -> Tensor:
        held.append((len(new), len(gradient)))
        return changes(kind, scores, new, gradient, places)

    monkeypatch.setattr(atp_star, "_changes", noted)
    for (what, by), expected in zip(places, together, strict=True):
        assert off_sweep(estimate(model, task, what, method, **{by: True}), expected.per_example) < 1e-6
    assert set(held) == {(1, 1)}


def test_saturated_attention() -> None:
    """Heads that look at one token alone: their gradient is lost in the softmax, what replacing a query does is not."""
    hf = build("gpt2")
    with torch.no_grad():
        for block in hf.transformer.h:
            block.attn.c_attn.weight[:, :64] *= 6
    model, task = cf.wrap(hf, None), id_task((6, 6, 6, 6))
    for what in ("q", "k"):
        exact = cf.patch(model, task, what, by_position=True, layers=1).effects
        sizes = np.abs(exact).mean()
        lost, mended = (
            np.abs(estimate(model, task, what, method, by_position=True, layers=1).effects - exact).mean() / sizes
            for method in ("atp", "atp-qk")
        )
        assert lost > 0.5 and mended < 0.02


def test_one_column_of_a_softmax() -> None:
    """The closed form for one key, where float32 has no digits left of 1 - a_it, against float64's softmax."""
    generator = torch.Generator().manual_seed(0)
    for spread in (1, 30, 300):
        scores, new = (torch.randn(n, 3, 2, 5, 7, generator=generator) * spread for n in (1, 4))
        gradient = torch.randn(2, 3, 2, 5, 7, generator=generator)
        found = single_keys(scores[0], new, gradient)
        for t in range(7):
            after = scores.double().expand_as(new).clone()
            after[..., t] = new[..., t].double()
            change = after.softmax(-1) - scores.double().softmax(-1)
            expected = torch.einsum("ubhij,pbhij->pub", change, gradient.double())
            assert off(found[..., t], expected) < 1e-5


def test_what_is_refused() -> None:
    model, task = wrapped("gpt2"), id_task((5, 5))
    with pytest.raises(ScoreError, match="use method='atp' for what='heads'"):
        estimate(model, task, "heads")
    for level in ("node", "edge"):
        with pytest.raises(ScoreError, match=f"'atp-qk' does not score {level}s: .* level='node' and what='q' or 'k'"):
            cf.attribute(model, task, "atp-qk", level=level)
    with pytest.raises(ScoreError, match="is flat at the clean run"):
        estimate(model, task, "q", metric="kl")


def test_falcon_shows_its_scores_where_it_was_loaded_with_eager() -> None:
    """It does not take another implementation of attention."""
    with pytest.raises(ModelError, match="does not show its attention scores"):
        estimate(wrapped("falcon"), id_task((5, 5)), "q")
    torch.manual_seed(0)
    model = cf.wrap(FalconForCausalLM(FalconConfig(attn_implementation="eager", **FALCON)).eval(), None)
    for what in ("q", "k"):
        found = estimate(model, id_task((5, 5)), what, by_position=True)
        exact = cf.patch(model, id_task((5, 5)), what, by_position=True)
        assert off_sweep(found, exact.per_example) < 0.05, "at its small initial weights all else is linear"


def test_scores_are_those_of_the_pass() -> None:
    adapter = wrapped("gpt_neox").adapter
    inputs = id_task((5, 4)).on(wrapped("gpt_neox")).batch.clean
    run, before = capture(adapter, inputs), adapter.config._attn_implementation
    scores = attention_scores(Restart(adapter, inputs, run), 1, "q", run.qkv[1].q[None]).scores
    assert scores.shape == (1, 2, 4, 5, 5) and adapter.config._attn_implementation == before
    future = torch.ones(5, 5).triu(1).bool()
    assert scores.isfinite().all() and scores.softmax(-1)[..., future].max() == 0


def test_both_backends_and_half_precision() -> None:
    hf, task = build("llama"), id_task((5, 5))
    for what in ("q", "k"):
        first, second = (
            estimate(cf.wrap(hf, None, backend=backend), task, what, by_position=True).per_example
            for backend in ("nnsight", "hooks")
        )
        np.testing.assert_array_equal(first, second)
        half, exact = (
            estimate(wrapped("llama", kind), task, what, by_position=True) for kind in (torch.bfloat16, torch.float32)
        )
        assert off_sweep(half, exact.per_example) < 0.05
