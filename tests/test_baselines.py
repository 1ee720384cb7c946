"""The cheap baselines against literal twins, what they refuse, and that none of their scores passes for an effect."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import off
from oracles import Pass
from test_cli import Run, run  # noqa: F401  (a fixture)
from torch import Tensor
from toys import FOUR, Twin, ablated_literally, id_task, off_scores, wrapped

import circuitfind as cf
from circuitfind.attribution.methods import names
from circuitfind.errors import ScoreError, TaskError
from circuitfind.record import SIGN

CLOSE = 1e-5
NO_EFFECTS = [("edge", method) for method in ("ifr", "activation", "weights", "random")] + [
    ("node", method) for method in ("atp-star", "direct", "hisp", "activation", "random")
]
CENTRED = {"gpt2": True, "gpt_neox": True, "llama": False, "gemma2": False}  # LayerNorm or RMSNorm


def nodes_of(model: cf.Model, task: Any, method: str, **options: Any) -> cf.NodeScores:
    scores = cf.attribute(model, task, method, level="node", **options)
    assert isinstance(scores, cf.NodeScores)
    return scores


def off_nodes(scores: cf.NodeScores, expected: Tensor) -> float:
    return off(torch.from_numpy(scores.values), expected)


# -------------------------------------------------------------------- HISP
def mask_gradients(twin: Twin, direction: str) -> Tensor:
    """`[writers, batch]`: the metric's derivative by a factor on what each writer writes, by autograd.

    Factor 1 is the run as it is, factor 0 has the writer's ablated value (Michel et al.'s head masks).
    """
    names = list(twin.clean.writers)
    factors = torch.zeros(len(names), len(twin.batch), requires_grad=True)
    change = {name: value - twin.carried[name] for name, value in twin.clean.writers.items()}

    def see(reader: str, stream: Tensor, so_far: Pass) -> Tensor:
        for name in twin.literal.writers(reader):
            stream = stream + factors[names.index(name)][:, None, None] * change[name]
        return stream

    inputs = twin.batch.clean if direction == "noising" else twin.batch.corrupted
    (found,) = torch.autograd.grad(twin.metric(twin.literal.run(inputs, see).logits).sum(), factors)
    order = [names.index(name) for name in twin.model.graph.writer_names]
    return found[order]


@pytest.mark.parametrize("options", [{}, {"direction": "denoising"}, {"ablation": "zero"}], ids=str)
@pytest.mark.parametrize("name", FOUR)
def test_hisp_is_the_mean_magnitude_of_each_examples_mask_gradient(name: str, options: dict[str, str]) -> None:
    model = wrapped(name)
    bound = id_task((7, 5, 6, 7)).on(model)
    twin = Twin(model, bound, options.get("ablation", "corrupted"))
    gradients = mask_gradients(twin, options.get("direction", "noising"))
    expected = gradients.abs().mean(1)
    for batch_size in (None, 1, 3):
        scores = nodes_of(model, bound, "hisp", batch_size=batch_size, **options)
        assert off_nodes(scores, expected) < CLOSE
    # the magnitude inside the mean is what sets it apart from attribution patching
    assert off_nodes(nodes_of(model, bound, "atp", **options), gradients.mean(1)) < CLOSE
    assert off(gradients.mean(1).abs(), expected) > 0.01


@pytest.mark.parametrize("name", FOUR)
def test_hisp_divides_each_layer_by_its_norm(name: str) -> None:
    model, task = wrapped(name), id_task((6, 5))
    plain, shares = (nodes_of(model, task, "hisp", normalise=normalise) for normalise in (False, True))
    assert shares["input"] == pytest.approx(1)
    for layer in range(model.graph.n_layers):
        names = [f"a{layer}.h{head}" for head in range(model.graph.n_heads)] + [f"m{layer}"]
        norm = sum(plain[node] ** 2 for node in names) ** 0.5
        assert [shares[node] for node in names] == pytest.approx([plain[node] / norm for node in names], rel=1e-5)
    assert (plain.record.settings["normalise"], shares.record.settings["normalise"]) == (False, True)
    assert plain.record.sign != shares.record.sign


# -------------------------------------------------------------------- activation magnitude
def changes(twin: Twin, centred: bool, ablation: str) -> dict[str, Tensor]:
    """By writer `[batch, pos]`: the norm of its change at real tokens."""
    mask = twin.batch.clean.mask
    carried = ablated_literally(twin.corrupted, twin.batch.corrupted.mask, ablation)
    norms = {}
    for name, value in twin.clean.writers.items():
        change = value - carried[name]
        if centred:
            change = change - change.mean(-1, keepdim=True)
        norms[name] = (change**2).sum(-1).sqrt() * mask
    return norms


def scales(twin: Twin, centred: bool) -> dict[str, Tensor]:
    """By reader `[batch, pos]`: what its norm multiplies a token by, its weight aside."""
    found: dict[str, Tensor] = {}

    def see(reader: str, stream: Tensor, so_far: Pass) -> Tensor:
        x = stream - stream.mean(-1, keepdim=True) if centred else stream
        norm = twin.literal.model.get_submodule(twin.literal.family.final_norm)
        eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
        found[reader] = 1 / ((x**2).mean(-1) + eps).sqrt()
        return stream

    with torch.no_grad():
        twin.literal.run(twin.batch.clean, see)
    return found


@pytest.mark.parametrize("ablation", ["corrupted", "zero", "mean"])
@pytest.mark.parametrize("name", FOUR)
def test_activation_magnitude_counts_real_tokens_through_each_readers_norm(name: str, ablation: str) -> None:
    model = wrapped(name)
    bound = id_task((7, 5, 6)).on(model)
    twin, graph = Twin(model, bound), model.graph
    norms, seen = changes(twin, CENTRED[name], ablation), scales(twin, CENTRED[name])
    of_nodes = torch.stack([norms[node].sum() for node in graph.writer_names]) / 3
    of_edges = torch.zeros(graph.real.shape, dtype=torch.float64)
    for writer, reader in twin.literal.edges():
        of_edges[graph.edge(f"{writer}->{reader}")] = float((norms[writer] * seen[reader]).sum()) / 3
    for batch_size in (None, 1):
        options = {"ablation": ablation, "batch_size": batch_size}
        assert off_nodes(nodes_of(model, bound, "activation", **options), of_nodes) < CLOSE
        assert off_scores(cf.attribute(model, bound, "activation", **options), of_edges) < CLOSE


def test_activation_magnitudes_of_positions_add_up() -> None:
    model, task = wrapped("llama"), id_task((6, 6))
    apart, total = (nodes_of(model, task, "activation", by_position=by_position) for by_position in (True, False))
    assert apart.values.shape == (model.graph.n_writers, 6)
    assert off_nodes(total, torch.from_numpy(apart.values.sum(1))) < CLOSE


def test_a_model_without_norms_before_its_readers_has_scale_one() -> None:
    model, bound = wrapped("olmo2"), id_task((6, 5)).on(wrapped("olmo2"))
    scores, nodes = cf.attribute(model, bound, "activation"), nodes_of(model, bound, "activation")
    assert scores["a0.h1->m1"] == pytest.approx(nodes["a0.h1"], rel=1e-5)
    assert scores["a0.h1->logits"] != pytest.approx(nodes["a0.h1"], rel=1e-2)  # there is a final norm


# -------------------------------------------------------------------- random
@pytest.mark.parametrize("level", ["edge", "node"])
def test_random_scores_follow_their_seed_alone(level: str) -> None:
    model = wrapped("gpt2")
    first, again, other = (
        cf.attribute(model, task, "random", level=level, seed=seed).values
        for task, seed in ((id_task(), 1), (id_task((5, 4), seed=9), 1), (id_task(), 2))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    edges = cf.attribute(model, id_task(), "random", seed=1).values[model.graph.real]
    assert 0 <= edges.min() < 0.1 and 0.9 < edges.max() < 1 and 0.4 < edges.mean() < 0.6
    assert len(np.unique(edges)) == model.graph.n_edges


# -------------------------------------------------------------------- what is an effect and what is none
@pytest.mark.parametrize(("level", "method"), NO_EFFECTS)
def test_baselines_say_that_they_are_no_effects(level: str, method: str, tmp_path: Path) -> None:
    model, task = wrapped("llama"), id_task((6, 5))
    scores = cf.attribute(model, task, method, level=level)
    assert not scores.record.is_effect and scores.record.sign.startswith("not an effect: ")
    assert scores.record.method == method and np.any(scores.values)
    back = type(scores).open(scores.save(tmp_path / "scores.safetensors"))
    assert back.record == scores.record and not back.record.is_effect
    older = scores.record.sign.replace("not an effect: ", "no effect: ")
    assert not replace(scores.record, sign=older).is_effect and older != scores.record.sign


def test_all_other_methods_are_effects() -> None:
    model, task = wrapped("gpt2"), id_task((5, 5))
    for level in ("edge", "node"):
        for method in names(level):
            record = cf.attribute(model, task, method, level=level).record
            assert record.is_effect == ((level, method) not in NO_EFFECTS), method
            assert (record.sign == SIGN) == record.is_effect


def test_circuits_and_checks_carry_no_estimates_that_are_none() -> None:
    model = cf.load("tiny", check=False)
    task = cf.task("ioi", model, n=4)
    scores = cf.attribute(model, task, "random", seed=1)
    for circuit in (scores.top(300), scores.greedy(20), scores.threshold(0.5)):
        assert circuit.estimates is None and len(circuit)
        assert all(row.estimate is None and row.effect is None for row in circuit.rows())
        assert circuit.record.sign == scores.record.sign
    checks = cf.verify(model, task, scores, top=5, circuit=scores.top(300), random=1)
    assert [check.name for check in checks.edges[:5]] == [scores.graph.edge_name(*edge) for edge in scores.ranked()[:5]]
    assert all(np.isnan(check.estimate) and np.isfinite(check.exact) for check in checks.edges)
    assert checks.sign_errors == 0 and np.isnan(checks.slope)
    assert checks.edges[0].exact == checks.exact[scores.graph.edge(checks.edges[0].name)] != 0


def test_the_command_line_calls_them_scores(run: Run) -> None:  # noqa: F811
    said = run("attribute", "--n", "2", "--method", "random", "--show", "3", "--json")
    content = json.loads(said.out)
    assert said.code == 0 and content["sign"].startswith("not an effect: random numbers")
    assert "score" in said.err and "estimate" not in said.err and "+0." not in said.err
    said = run("attribute", "--n", "2", "--level", "node", "--method", "hisp", "--normalise", "--show", "3")
    assert said.code == 0 and "by hisp" in said.out and "not an effect: mean over examples" in said.out
    said = run("attribute", "--n", "2", "--method", "eap", "--show", "3")
    assert said.code == 0 and "estimate" in said.out and "not an effect" not in said.out


def test_find_takes_a_baseline(run: Run) -> None:  # noqa: F811
    said = run(
        "find", "--n", "4", "--method", "weights", "--random", "1", "--max-checks", "3", "--tolerance", "0.9", "--json"
    )
    content = json.loads(said.out)
    assert said.code in (0, 1) and {edge["estimate"] for edge in content["checks"]["edges"]} == {None}
    assert content["checks"]["sign_errors"] == 0 and content["checks"]["slope"] is None


# -------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "hisp"}, "'hisp' does not score edges: use one of eap"),
        ({"method": "weights", "level": "node"}, "'weights' does not score nodes: use one of atp"),
        ({"method": "hisp", "level": "node", "by_position": True}, "'hisp' has no scores by position that add up"),
        ({"method": "random", "level": "node", "by_position": True}, "'random' has no scores by position"),
        (
            {"method": "activation", "normalise": True},
            "normalise=True is an option of hisp: method 'activation' has none",
        ),
        ({"method": "random", "ablation": "noise"}, "ablation 'noise' is unknown"),
        ({"method": "weights", "direction": "up"}, "direction 'up' is unknown"),
        ({"method": "activation", "batch_size": 0}, "batch_size must be at least 1"),
        ({"method": "eap-ig-activations", "ablation": "zero"}, "it needs ablation='corrupted'"),
        ({"method": "eap-ig-activations", "steps": 0}, "steps=0: give a whole number, 1 to 100,000"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ScoreError, TaskError), match=message):
        cf.attribute(wrapped("gpt2"), id_task(), **options)


def test_hisp_is_refused_where_the_metric_is_flat() -> None:
    model, task = wrapped("gpt2"), id_task(metric="kl")
    with pytest.raises(ScoreError, match=r"'kl' is flat at the clean run .*so 'hisp' would return noise"):
        cf.attribute(model, task, "hisp", level="node")
    for level, method in NO_EFFECTS:
        options = {"direction": "denoising"} if method in ("hisp", "atp-star") else {}
        assert np.any(cf.attribute(model, task, method, level=level, **options).values)


# -------------------------------------------------------------------- precision, and the model as it was found
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_half_precision_models_are_scored_in_float32(name: str) -> None:
    half, full, task = wrapped(name, torch.bfloat16), wrapped(name), id_task((6, 5))
    for level, method in NO_EFFECTS:
        scores, expected = (cf.attribute(model, task, method, level=level).values for model in (half, full))
        assert scores.dtype == np.float32
        assert off(torch.from_numpy(scores), torch.from_numpy(expected)) < (1e-2 if method == "weights" else 0.2)
