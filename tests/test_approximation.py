"""Estimates beside exact effects: the numbers by hand, and what is said of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import id_task, linear, wrapped

import circuitfind as cf
from circuitfind.evaluation.approximation_fit import Fit, fit, remarks, well


def test_a_fit_by_hand() -> None:
    estimates, exact = np.array([1.0, 2.0, -1.0, 0.01, 0.0]), np.array([2.0, 3.0, 1.0, -0.1, 0.0])
    found = fit(estimates, exact)
    assert (found.n, found.matter, found.wrong_signs) == (5, 3, 1), "0.1 is below a twentieth of 3"
    np.testing.assert_allclose(found.slope, (2 + 6 - 1 - 0.001) / (1 + 4 + 1 + 0.0001))
    np.testing.assert_allclose(found.error, (1 + 1 + 2 + 0.11 + 0) / (2 + 3 + 1 + 0.1))
    slope, intercept = np.polyfit(estimates, exact, 1)
    np.testing.assert_allclose([found.free_slope, found.intercept], [slope, intercept])
    np.testing.assert_allclose(found.r, np.corrcoef(estimates, exact)[0, 1])
    nothing = fit(np.zeros(3), np.zeros(3))
    assert nothing.matter == 0 and np.isnan([nothing.r, nothing.slope, nothing.error]).all()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"r": 0.89}, False),
        ({"r": float("nan"), "n": 1}, True),
        ({"error": 0.51}, False),
        ({"wrong_signs": 1}, True),
        ({"wrong_signs": 2}, False),
        ({"wrong_signs": 1, "matter": 6}, True),
        ({"wrong_signs": 2, "matter": 20}, True),
        ({"wrong_signs": 1, "matter": 1, "n": 2, "error": 1.2}, False),
    ],
)
def test_what_counts_as_a_good_estimate(changes: dict[str, Any], expected: bool) -> None:
    good = Fit(n=30, r=0.95, slope=1.1, free_slope=1.1, intercept=0.0, error=0.2, matter=10, wrong_signs=0)
    assert well(good._replace(**changes)) is expected


def test_a_linear_model_is_approximated_everywhere() -> None:
    found = cf.approximation(linear(), id_task((6, 6)), ["resid", "heads"], method="atp")
    assert list(found.compared) == ["resid", "heads"] and all("is a good estimate" in said for said in found.remarks)
    for one in found.by_kind.values():
        np.testing.assert_allclose([one.r, one.slope, one.free_slope], 1, atol=1e-3)
        assert one.wrong_signs == 0 and one.error < 1e-3
    np.testing.assert_allclose(found.compared["heads"].other_end, 1, rtol=1e-4)


def test_places_hold_both_effects_by_kind_and_layer() -> None:
    model, task = wrapped("llama"), id_task((5, 5, 5))
    found = cf.approximation(model, task, ("resid", "k"), layers=[1, 0], batch_size=2)
    exact, estimated = cf.patch(model, task, "resid", layers=[1, 0]), found.compared["resid"].estimated
    places = list(found.places())
    assert len(places) == 2 * 5 + 2 * 2
    resid = [place for place in places if place.kind == "resid"]
    assert [place.layer for place in resid] == [1] * 5 + [0] * 5 and resid[7].name == "resid0"
    assert [place.position for place in resid[:5]] == list(exact.axes[-1].labels)
    np.testing.assert_allclose([place.exact for place in resid], exact.effects.ravel(), atol=1e-6)
    np.testing.assert_allclose([place.estimate for place in resid], estimated.effects.ravel())
    assert all(place.low <= place.exact <= place.high for place in places)
    keys = [place for place in places if place.kind == "k" and place.layer == 0]
    assert [place.name for place in keys] == ["a0.kv0<k>", "a0.kv1<k>"] and {place.position for place in keys} == {""}
    assert found.by_layer["k", 0] == fit(*(np.array([getattr(p, s) for p in keys]) for s in ("estimate", "exact")))
    plain = found.to_dict()
    assert plain["kinds"]["k"]["layers"]["0"]["n"] == 2 and len(plain["places"]) == len(places)


def test_the_record_tells_all_kinds(tmp_path: Path) -> None:
    model, task = wrapped("llama"), id_task((4, 4))
    found = cf.approximation(model, task, iter(("heads", "resid", "heads", "mlp")), layers=iter([1]))
    settings = found.record.settings
    assert settings["what"] == ["heads", "resid", "mlp"] and settings["by_position"] == ["resid", "mlp"]
    assert settings["layers"] == [1] and found.compared["mlp"].exact.record.settings["what"] == "mlp"
    assert cf.Approximation.open(found.save(tmp_path / "a.json")).record == found.record


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_sizes_of_changes_by_their_definition(direction: str) -> None:
    """The change beside the stream (or the value) at the tokens that change, straight from the model's own modules."""
    model, task = wrapped("gpt2"), id_task((6, 4))
    found = cf.approximation(model, task, ["resid", "mlp", "v"], by_position=False, direction=direction)
    batch = task.on(model).batch
    block, seen = model.hf.transformer.h[1], {}
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen.__setitem__("resid", args[0])),
        block.mlp.register_forward_hook(lambda _, __, out: seen.__setitem__("mlp", out)),
        block.attn.c_attn.register_forward_hook(lambda _, __, out: seen.__setitem__("v", out[..., 64:])),
        model.hf.transformer.ln_f.register_forward_pre_hook(lambda _, args: seen.__setitem__("end", args[0])),
    ]
    runs = []
    for side in (batch.clean, batch.corrupted):
        with torch.no_grad():
            model.hf(**model.adapter.keywords(side))
        runs.append(dict(seen))
    for hook in hooks:
        hook.remove()
    real = batch.clean.mask
    for what, whole in (("resid", "resid"), ("mlp", "end"), ("v", "v")):
        change = (runs[0][what] - runs[1][what])[real].norm()
        patched = runs[0 if direction == "noising" else 1]  # the run that the change is made to
        expected = float(change / patched[whole][real].norm())
        np.testing.assert_allclose(found.compared[what].sizes[1], expected, rtol=1e-4, err_msg=what)


@pytest.mark.parametrize("name", ["granite", "gemma2"])  # a residual multiplier; a post-norm
def test_sizes_of_neurons_are_those_of_what_reaches_the_stream(name: str) -> None:
    model, task = wrapped(name), id_task((5, 5))
    found = cf.approximation(model, task, "neurons", layers=1)
    batch, mlp, seen = task.on(model).batch, model.hf.model.layers[1].mlp, {}
    norm = getattr(model.hf.model.layers[1], "post_feedforward_layernorm", None)
    hooks = [
        mlp.down_proj.register_forward_hook(lambda _, args, out: seen.update(hidden=args[0], out=out)),
        model.hf.model.norm.register_forward_pre_hook(lambda _, args: seen.update(end=args[0])),
    ]
    with torch.no_grad():
        model.hf(batch.corrupted.ids)
        corrupted = seen["hidden"]
        model.hf(batch.clean.ids)
        for hook in hooks:
            hook.remove()
        added = (seen["hidden"] - corrupted).unsqueeze(-1) * mlp.down_proj.weight.T  # batch pos neurons d_model
        if norm is None:
            added = added * model.hf.config.residual_multiplier
        else:
            added = added * (norm(seen["out"]) / seen["out"]).unsqueeze(2)
    expected = float(added.norm() / (seen["end"].norm() * added.shape[2] ** 0.5))
    np.testing.assert_allclose(found.compared["neurons"].sizes[1], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.2, "is a good estimate"), (0.3, "in order but not in size"), (-1.0, "no reliable")]
)
def test_order_and_size_are_told_apart(factor: float, verdict: str) -> None:
    one = cf.approximation(linear(), id_task((6, 6)), "heads").compared["heads"]
    scaled = dataclasses.replace(one.exact, per_example=one.exact.per_example * factor)
    (said,) = remarks({"heads": one._replace(exact=scaled)}, "atp", "noising")
    assert verdict in said and f"slope {factor:.2f}" in said


@pytest.mark.parametrize(
    ("what", "method", "remedy"),
    [
        ("heads", "atp", "Try method='relp' or method='eap-ig-inputs', or measure with cf.patch"),
        ("k", "atp", "Try method='atp-qk' or method='eap-ig-inputs', or measure with cf.patch"),
        ("heads", "relp", "Try method='eap-ig-inputs', or measure with cf.patch"),
        ("heads", "clean-corrupted", "Measure these with cf.patch"),
    ],
)
def test_a_better_method_is_named(what: str, method: str, remedy: str) -> None:
    one = cf.approximation(linear(), id_task((6, 6)), "heads").compared["heads"]
    opposed = dataclasses.replace(one.exact, per_example=-one.exact.per_example)
    (said,) = remarks({what: one._replace(exact=opposed)}, method, "noising")
    assert said.endswith(remedy)


def test_flatter_gradients_and_large_changes_are_named() -> None:
    """Greater-than on the embedded model: probabilities are near 1 on clean prompts, so the metric is flat there."""
    model = cf.load("tiny", check=False)
    task = cf.task("greater_than", model, n=6)
    noising = cf.approximation(model, task, "resid", method="atp")
    assert noising.compared["resid"].other_end > 2
    (said,) = noising.remarks
    assert said.startswith("The residual stream: 'atp' is no reliable estimate")
    flatter = "the gradient is flatter at the clean run, where it was taken, than at the corrupted run"
    one = noising.compared["resid"]
    assert f"{flatter}, which makes estimates {one.other_end:.2g} times as large, and exact effects are larger" in said
    assert f"(slope {one.fit().slope:.2f})" in said and one.fit().slope > 1
    assert "times the stream it changes" in said and "eap-ig-inputs" in said
    denoising = cf.approximation(model, task, "resid", method="atp", direction="denoising")
    assert "flatter" not in denoising.remarks[0]
    averaged = cf.approximation(model, task, "resid", method="eap-ig-inputs", steps=8)
    assert averaged.compared["resid"].other_end is None and averaged.compared["resid"].fit().r > 0.9
    assert averaged.record.method == "eap-ig-inputs" and averaged.record.settings["steps"] == 8


def test_a_flat_end_is_not_asked_for_a_gradient() -> None:
    found = cf.approximation(wrapped("gpt2"), id_task((5, 5)), "heads", metric="kl", direction="denoising")
    assert found.compared["heads"].other_end is None and np.isfinite(found.by_kind["heads"].r)


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ([], {}, "names no kind of place"),
        (None, {}, "what=None names no kind of place: give one or several, such as resid, "),
        ([["heads"]], {}, "names no kind of place"),
        ("heads", {"method": "exact"}, "compared with"),
        ("heads", {"method": "eap"}, "does not score places"),
        (["heads", "tails"], {}, "kind of place 'tails' is unknown"),
        (["q", "heads"], {"method": "atp-qk"}, "use method='atp' for what='heads'"),
    ],
)
def test_what_is_refused_before_anything_is_measured(
    what: Any, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("score", "swept"):
        monkeypatch.setattr(f"circuitfind.evaluation.approximation.{name}", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(cf.ScoreError, match=message):
        cf.approximation(wrapped("gpt2"), id_task((4, 4)), what, **options)
