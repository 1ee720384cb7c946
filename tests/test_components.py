"""Estimates for every place of a sweep, against autograd at the literal module boundary."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import MODELS, build
from helpers import off
from patching_twin import EVERY, PatchingTwin
from torch import Tensor
from toys import entering, id_task, linear, wrapped
from transformers import Gemma2ForCausalLM

import circuitfind as cf
from circuitfind.batch import Inputs
from circuitfind.engine.ablation import resampled

BOTH = (0, 1)


class GradientTwin(PatchingTwin):
    """The value of a place times its gradient, as torch gives both where the value passes through a module."""

    def estimates(
        self, what: str, layers: tuple[int, ...], points: list[tuple[float, float]], ablation: str = "corrupted"
    ) -> np.ndarray:
        """`[layers, units, positions, examples]` from gradients at points `(weight, alpha)` of the embeddings' line."""
        embeds = [self._value("resid", 0, side) for side in (self.corrupted, self.batch.clean)]
        found = []
        for layer in layers:
            other = self._carried(what, layer, self.corrupted, ablation)
            change = self._value(what, layer, self.batch.clean) - other
            gradient: Tensor | float = 0.0
            for weight, alpha in points:
                gradient = gradient + weight * self._gradient(what, layer, alpha, torch.lerp(*embeds, alpha))
            found.append(self._by_unit(what, change * gradient))
        return torch.stack(found).double().numpy()

    def _value(self, what: str, layer: int, inputs: Inputs) -> Tensor:
        return self._carried(what, layer, inputs, "corrupted")

    def _gradient(self, what: str, layer: int, alpha: float, embed: Tensor) -> Tensor:
        inputs = self.corrupted if alpha == 0 else self.batch.clean
        leaves: list[Tensor] = []

        def root(value: Tensor) -> Tensor:
            leaves.append(value.detach().clone().requires_grad_())
            return leaves[0] + 0

        with torch.enable_grad(), entering(self.literal, embed), self._hooked(what, layer, root):
            logits = self.literal._plain_logits(inputs)
            return torch.autograd.grad(self._metric(logits).sum(), leaves[0])[0]

    def _by_unit(self, what: str, product: Tensor) -> Tensor:
        """`[units, positions, batch]`."""
        if what == "pattern":
            return product.sum(-1).permute(1, 2, 0)
        shape = self.batch.clean.ids.shape
        product = product.view(*shape, -1)
        units = [self._features(what, unit, product) for unit in range(self._units(what, product))]
        return torch.stack([product[..., features].sum(-1).T for features in units])


def _off(sweep: cf.Sweep, expected: np.ndarray) -> float:
    found = sweep.per_example.reshape(expected.shape)
    return off(torch.from_numpy(found), torch.from_numpy(expected))


def _estimate(model: cf.Model, task: Any, what: str, method: str = "atp", **options: Any) -> cf.Sweep:
    sweep = cf.attribute(model, task, method, level="node", what=what, **options)
    assert isinstance(sweep, cf.Sweep)
    return sweep


@pytest.mark.parametrize(("name", "what"), EVERY)
def test_every_place_is_its_difference_times_its_gradient(name: str, what: str) -> None:
    model, layers = wrapped(name), (1,) if what == "neurons" else BOTH
    plain, padded = id_task((5, 5, 5)).on(model), id_task((6, 4, 5)).on(model)
    sweep = _estimate(model, plain, what, by_position=True, layers=layers, batch_size=2)
    assert _off(sweep, GradientTwin(model, plain).estimates(what, layers, [(1, 1)])) < 1e-4
    sweep = _estimate(model, padded, what, by_position=False, layers=layers, direction="denoising")
    expected = GradientTwin(model, padded).estimates(what, layers, [(1, 0)])
    assert _off(sweep, expected.sum(2, keepdims=True)) < 1e-4


@pytest.mark.parametrize("name", ["olmo2", "granite", "bloom", "opt", "falcon", "gptj", "minicpm3"])
def test_other_families(name: str) -> None:
    """Post-norms only, a residual multiplier, residuals added inside, flattened MLPs, parallel blocks."""
    model = wrapped(name)
    bound = id_task((5, 5)).on(model)
    for what in ("resid", "heads", "mlp", "attn", *(() if model.graph.parallel else ("resid-mid",))):
        sweep = _estimate(model, bound, what, by_position=True)
        assert _off(sweep, GradientTwin(model, bound).estimates(what, BOTH, [(1, 1)])) < 1e-4, what


@pytest.mark.parametrize("what", ["q", "v", "heads"])
def test_values_around_a_latent(what: str) -> None:
    model = wrapped("youtu")
    bound = id_task((5, 5)).on(model)
    sweep = _estimate(model, bound, what, by_position=True)
    assert _off(sweep, GradientTwin(model, bound).estimates(what, BOTH, [(1, 1)])) < 1e-4


@pytest.mark.parametrize("what", ["heads", "pattern", "mlp", "k"])
def test_averaged_gradients(what: str) -> None:
    model = wrapped("gemma2")
    bound = id_task((5, 5)).on(model)
    line = [(1 / 3, k / 3) for k in range(3)]
    for method, points, options in (
        ("eap-ig-inputs", line, {"steps": 3}),
        ("clean-corrupted", [(0.5, 0), (0.5, 1)], {}),
    ):
        sweep = _estimate(model, bound, what, method=method, by_position=True, **options)
        assert _off(sweep, GradientTwin(model, bound).estimates(what, BOTH, points)) < 1e-4
        assert sweep.record.method == method


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-position", "resample"])
def test_ablations(ablation: str) -> None:
    model, lengths = wrapped("llama"), (5, 4, 5) if ablation in ("zero", "mean") else (5, 5, 5)
    bound = id_task(lengths).on(model)
    dealt = resampled(bound.batch, 3).corrupted if ablation == "resample" else None
    for what in ("heads", "mlp", "v"):
        sweep = _estimate(model, bound, what, by_position=False, ablation=ablation, seed=3, batch_size=2)
        expected = GradientTwin(model, bound, dealt).estimates(what, BOTH, [(1, 1)], ablation)
        assert _off(sweep, expected.sum(2, keepdims=True)) < 1e-4, what
        measured = cf.patch(model, bound, what, by_position=False, ablation=ablation, seed=3)
        np.testing.assert_allclose([sweep.full, sweep.empty], [measured.full, measured.empty], atol=1e-5)


def test_zero_ablation_under_post_norms_is_estimated_where_it_is_written() -> None:
    """Before a post-norm the gradient stands at a right angle to the output: every estimate would be 0."""
    model, task = wrapped("gemma2"), id_task((6, 6, 5, 6, 4, 6))
    for what, least in (("mlp", 0.75), ("attn", 0.4)):
        sweeps = [_estimate(model, task, what, ablation="zero", by_position=False, method=m) for m in ("atp", "exact")]
        estimate, exact = (sweep.per_example.ravel() for sweep in sweeps)
        assert np.corrcoef(estimate, exact)[0, 1] > least
        assert 0.3 < np.abs(estimate).max() / np.abs(exact).max() < 3


def one_value_head() -> cf.Model:
    config = build("gemma2").config
    config.num_key_value_heads = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "one_value_head", lambda: Gemma2ForCausalLM(config))
        return cf.wrap(build("one_value_head"), None)


@pytest.mark.parametrize(
    ("make", "what", "remedy"),
    [
        (lambda: wrapped("gemma2"), "attn-out", "use what='attn' or method='exact'"),
        (lambda: wrapped("gemma2"), "mlp-out", "use what='mlp' or method='exact'"),
        (one_value_head, "v", "use method='relp' or method='exact'"),
        (lambda: wrapped("qwen3"), "q", "use method='atp-qk' or method='exact'"),
        (lambda: wrapped("gemma3"), "k", "use method='atp-qk' or method='exact'"),
    ],
)
def test_estimates_that_are_rounding_noise_are_refused(make: Any, what: str, remedy: str) -> None:
    """A norm follows that takes off the scale, and zero ablation changes nothing else. Other ablations do."""
    model, task = make(), id_task((6, 4, 5))
    for method in ("atp", "atp-star") if what not in "qk" else ("atp",):
        with pytest.raises(cf.ScoreError, match=f"'{method}' cannot estimate what='{what}' under ablation 'zero'") as e:
            _estimate(model, task, what, ablation="zero", by_position=False, method=method)
        assert remedy in str(e.value)
    better = remedy.split("'")[1]
    options = {"method": better} if "method" in remedy.split(" or ")[0] else {"what": better}
    estimate = _estimate(model, task, **{"what": what, "ablation": "zero", "by_position": False, **options})
    exact = cf.patch(model, task, estimate.what, ablation="zero", by_position=False)
    assert 0.2 < np.abs(estimate.per_example).max() / np.abs(exact.per_example).max() < 5
    assert np.abs(_estimate(model, task, what, by_position=False).effects).max() > 1e-3


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_a_linear_model_is_estimated_exactly(direction: str) -> None:
    for what in ("resid", "heads", "v", "attn"):
        estimated = _estimate(linear(), id_task((6, 6)), what, direction=direction, by_position=True)
        exact = cf.patch(linear(), id_task((6, 6)), what, direction=direction, by_position=True)
        assert _off(estimated, exact.per_example) < 1e-4, what
        assert estimated.axes == exact.axes and estimated.names() == exact.names()
        assert estimated.record.sign == exact.record.sign


def test_writers_without_post_norms_are_places() -> None:
    model, task = wrapped("gpt_neox"), id_task((5, 5, 5))
    nodes = cf.attribute(model, task, "atp", level="node", by_position=True)
    np.testing.assert_allclose(nodes.heads(), _estimate(model, task, "heads", by_position=True).effects, atol=1e-6)
    np.testing.assert_allclose([nodes["m0"], nodes["m1"]], _estimate(model, task, "mlp").effects, atol=1e-6)
    np.testing.assert_allclose(nodes["input"], _estimate(model, task, "resid", layers=0).effects[0], atol=1e-6)


def test_half_precision_is_scored_in_single() -> None:
    task = id_task((5, 5, 5))
    for dtype in (torch.bfloat16, torch.float16):
        half, exact = (_estimate(wrapped("gemma2", kind), task, "heads") for kind in (dtype, torch.float32))
        assert _off(half, exact.per_example) < 0.15
        assert np.abs(half.effects).min() > 0


def test_exact_and_files(tmp_path: Any) -> None:
    model, task = wrapped("gpt2"), id_task((5, 5))
    exact = _estimate(model, task, "heads", method="exact", layers=1)
    np.testing.assert_array_equal(exact.per_example, cf.patch(model, task, "heads", layers=1).per_example)
    sweep = _estimate(model, task, "resid", layers=[1])
    assert [axis.name for axis in sweep.axes] == ["layer", "position"] and sweep.axes[0].labels == ("1",)
    opened = cf.Sweep.open(sweep.save(tmp_path / "sweep.safetensors"))
    assert opened.to_dict() == sweep.to_dict() and opened.record.method == "atp"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": "tails"}, "kind of place 'tails' is unknown"),
        ({"what": "heads", "level": "edge"}, "use level='node'"),
        ({"what": "heads", "method": "eap-ig-activations"}, "does not score places of a sweep"),
        ({"what": "neurons"}, "name a layer"),
        ({"layers": 1}, "give what="),
        ({"what": "heads", "metric": "kl", "method": "atp"}, "flat at the clean run"),
        ({"what": "pattern", "ablation": "mean"}, "mean-position"),
        ({"what": "heads", "metric": lambda logits, _: 0 * logits[:, 0] + 1}, "vanishes"),
        ({"what": "heads", "metric": lambda logits, _: logits[:, 0] / 0}, "estimate of a0.h0 is NaN"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cf.ScoreError, match=message):
        cf.attribute(wrapped("gpt2"), id_task((4, 4)), **{"level": "node", **options})


def test_identical_values_are_estimated_as_zero_not_refused() -> None:
    """Layer 0's values differ only where the prompts do: no gradient has vanished."""
    clean = torch.randint(3, 99, (2, 5), generator=torch.Generator().manual_seed(0))
    corrupted = clean.clone()
    corrupted[:, 3] += 1
    sweep = _estimate(wrapped("gpt2"), cf.Task(clean, corrupted, [5, 6], [7, 8]), "v", layers=0, by_position=True)
    assert not np.delete(sweep.effects, 3, axis=-1).any() and sweep.effects[..., 3].all()
