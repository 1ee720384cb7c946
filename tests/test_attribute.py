"""Every attribution method against its slow, literal twin, its identities, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from helpers import off
from toys import FOUR, Twin, id_task, linear, off_scores, wrapped

import circuitfind as cf
from circuitfind.attribution import eap, gradients
from circuitfind.attribution.method import Point
from circuitfind.attribution.methods import names
from circuitfind.engine.ablation import resampled
from circuitfind.engine.capture import capture
from circuitfind.engine.edge_effects import edge_effects
from circuitfind.engine.reader_gradients import capture_gradients
from circuitfind.engine.restart import Restart
from circuitfind.engine.writers import Writers
from circuitfind.errors import FileError, ScoreError, TaskError
from circuitfind.record import SIGN, library_versions

CLOSE = 1e-5  # of the largest score

# method, what it takes, and the points of the line from the corrupted (0) to the clean (1) embedding that it averages
ESTIMATES: list[tuple[str, dict[str, Any], list[float]]] = [
    ("eap", {}, [1]),
    ("eap", {"direction": "denoising"}, [0]),
    ("eap-ig-inputs", {"steps": 1}, [0]),
    ("eap-ig-inputs", {"steps": 3}, [0, 1 / 3, 2 / 3]),
    ("eap-ig-inputs", {"steps": 3, "rule": "right"}, [1 / 3, 2 / 3, 1]),
    ("eap-ig-inputs", {"steps": 3, "rule": "midpoint"}, [1 / 6, 3 / 6, 5 / 6]),
    ("clean-corrupted", {}, [0, 1]),
]


def identifier(value: object) -> str | None:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else None


# -------------------------------------------------------------------- against the twins
@pytest.mark.parametrize(("method", "options", "alphas"), ESTIMATES, ids=identifier)
@pytest.mark.parametrize("name", FOUR)
def test_estimates_equal_autograd_through_split_readers(
    name: str, method: str, options: dict[str, Any], alphas: list[float]
) -> None:
    model = wrapped(name)
    bound = id_task((7, 5, 6)).on(model)
    scores = cf.attribute(model, bound, method, **options)
    expected = Twin(model, bound).estimates(alphas)
    assert expected.abs().max() > 1e-3 and off_scores(scores, expected) < CLOSE
    assert scores.values.dtype == np.float32 and not scores.values[~model.graph.real].any()


@pytest.mark.parametrize("name", FOUR)
def test_exact_effects_equal_one_forward_pass_an_edge(name: str) -> None:
    model = wrapped(name)
    bound = id_task((6, 4)).on(model)
    twin = Twin(model, bound)
    for direction in ("noising", "denoising"):
        assert off_scores(cf.attribute(model, bound, "exact", direction=direction), twin.exact(direction)) < CLOSE


@pytest.mark.parametrize("metric", ["kl", "logprob", "prob_diff"])
def test_other_metrics_equal_their_twins(metric: str) -> None:
    model = wrapped("llama")
    bound = id_task((6, 5), metric=metric).on(model)
    twin = Twin(model, bound)
    for method, options, expected in (
        ("eap-ig-inputs", {"steps": 2}, twin.estimates([0, 0.5])),
        ("clean-corrupted", {}, twin.estimates([0, 1])),
        ("exact", {}, twin.exact()),
    ):
        assert off_scores(cf.attribute(model, bound, method, **options), expected) < CLOSE, method


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-position", "resample"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_ablations_equal_their_twins(name: str, ablation: str) -> None:
    model = wrapped(name)
    bound = id_task((6, 4, 5) if ablation in ("zero", "mean") else (6, 6, 6)).on(model)
    dealt = resampled(bound.batch, 3).corrupted if ablation == "resample" else None
    twin = Twin(model, bound, ablation, dealt)
    for method, expected in (("eap", twin.estimates([1])), ("exact", twin.exact())):
        scores = cf.attribute(model, bound, method, ablation=ablation, seed=3, batch_size=2)
        assert off_scores(scores, expected) < CLOSE, method


def test_several_read_positions_are_averaged() -> None:
    model = wrapped("gpt2")
    by_read = {"positions": [[5, 3], [4, 5]], "answers": [[9, 8], [7, 6]], "wrong_answers": [[5, 4], [3, 9]]}
    bound = dataclasses.replace(id_task((6, 6)), **by_read).on(model)
    assert bound.batch.answers.shape == (2, 2, 1)
    twin = Twin(model, bound)
    logits = torch.tensor([[9, 8], [7, 6]]), torch.tensor([[5, 4], [3, 9]])
    right, wrong = (twin.clean.logits.gather(-1, ids.unsqueeze(-1)).mean((1, 2)) for ids in logits)
    assert off(twin.metric(twin.clean.logits), right - wrong) < 1e-5
    assert off_scores(cf.attribute(model, bound, "eap"), twin.estimates([1])) < CLOSE
    assert off_scores(cf.attribute(model, bound, "exact"), twin.exact()) < CLOSE


# -------------------------------------------------------------------- identities
@pytest.mark.parametrize("name", FOUR)
def test_integrated_gradients_are_complete(name: str) -> None:
    model = wrapped(name, torch.float64)
    bound = id_task().on(model)
    twin = Twin(model, bound)
    total = float((twin.metric(twin.clean.logits) - twin.metric(twin.corrupted.logits)).mean())

    def error(steps: int, rule: str) -> float:
        scores = cf.attribute(model, bound, "eap-ig-inputs", steps=steps, rule=rule)
        return abs(float(scores.values[0].astype(np.float64).sum()) - total)

    steps = 64 if name == "gemma2" else 16  # its caps bend the line most
    at_half, at_all = error(steps // 2, "left"), error(steps, "left")
    assert 1.7 < at_half / at_all < 2.3  # O(1/steps)
    assert error(steps, "midpoint") < at_all / 10


@pytest.mark.parametrize("method", ["eap-ig-inputs", "eap-ig-activations", "clean-corrupted"])
@pytest.mark.parametrize("name", FOUR)
def test_averaged_estimates_do_not_depend_on_the_direction(name: str, method: str) -> None:
    model, task = wrapped(name, heads=2), id_task((7, 5))
    there, back = (cf.attribute(model, task, method, direction=d) for d in ("noising", "denoising"))
    np.testing.assert_array_equal(there.values, back.values)
    assert (there.record.direction, back.record.direction) == ("noising", "denoising")


@pytest.mark.parametrize("name", FOUR)
def test_node_scores_are_the_sums_of_their_edges(name: str) -> None:
    model, task = wrapped(name), id_task((7, 5, 6))
    for method, of_edges, options in (
        ("atp", "eap", {}),
        ("atp", "eap", {"direction": "denoising"}),
        ("atp", "eap", {"ablation": "zero"}),
        ("eap-ig-inputs", "eap-ig-inputs", {"steps": 2, "rule": "midpoint"}),
        ("eap-ig-activations", "eap-ig-activations", {"steps": 2}),
        ("clean-corrupted", "clean-corrupted", {}),
    ):
        nodes = cf.attribute(model, task, method, level="node", **options)
        edges = cf.attribute(model, task, of_edges, **options)
        assert isinstance(nodes, cf.NodeScores)
        expected = torch.from_numpy(edges.values.sum(1))
        assert off(torch.from_numpy(nodes.values), expected) < CLOSE, method
        assert off(torch.from_numpy(edges.of_nodes().values), expected) < 1e-6


@pytest.mark.parametrize("name", FOUR)
def test_positions_add_up(name: str) -> None:
    model, task = wrapped(name), id_task((6, 6))
    for method in ("atp", "eap-ig-inputs"):
        total = cf.attribute(model, task, method, level="node")
        apart = cf.attribute(model, task, method, level="node", by_position=True)
        assert apart.values.shape == (model.graph.n_writers, 6)
        assert off(torch.from_numpy(apart.values.sum(1)), torch.from_numpy(total.values)) < CLOSE
        assert apart.heads().shape == (model.graph.n_layers, model.graph.n_heads, 6)


def test_on_a_linear_model_every_estimate_is_exact() -> None:
    model, task = linear(), id_task((7, 5, 6))
    exact = cf.attribute(model, task, "exact")
    expected = torch.from_numpy(exact.values)
    assert expected.abs().max() > 0.01
    estimates = [cf.attribute(model, task, method, **options) for method, options, _ in ESTIMATES]
    for scores in (*estimates, cf.attribute(model, task, "exact", direction="denoising")):
        assert off_scores(scores, expected) < CLOSE
    for ablation in ("zero", "mean"):
        measured, estimated = (cf.attribute(model, task, m, ablation=ablation) for m in ("exact", "eap"))
        assert off_scores(estimated, torch.from_numpy(measured.values)) < CLOSE
    graph = model.graph
    mlps = [graph.mlp(layer) for layer in range(graph.n_layers)]
    queries = [r for layer in range(graph.n_layers) for r in range(graph.n_readers)[graph.readers(layer, "q")]]
    for dead in (exact.values[mlps], exact.values[:, queries]):
        assert np.abs(dead).max() < 1e-6  # of the metric: replaying rounds


# -------------------------------------------------------------------- batching
@pytest.mark.parametrize("name", FOUR)
def test_a_padded_batch_scores_as_its_rows_one_by_one(name: str) -> None:
    model = wrapped(name, heads=2)
    bound = id_task((7, 4, 6)).on(model)
    rows = [bound.subset([row]) for row in range(len(bound))]
    assert [row.batch.clean.ids.shape[1] for row in rows] == [7, 4, 6]
    for method in ("eap", "eap-ig-inputs", "exact"):
        alone = [cf.attribute(model, row, method).values for row in rows]
        together = cf.attribute(model, bound, method)
        assert off_scores(together, torch.from_numpy(np.mean(alone, axis=0))) < CLOSE, method


@pytest.mark.parametrize("name", FOUR)
def test_the_batch_size_changes_nothing(name: str) -> None:
    model = wrapped(name, heads=2)
    bound = id_task((7, 4, 6)).on(model)
    for method, ablation in (("eap", "mean"), ("eap-ig-inputs", "corrupted"), ("exact", "corrupted")):
        whole = torch.from_numpy(cf.attribute(model, bound, method, ablation=ablation).values)
        for size in (1, 2, 3):
            scores = cf.attribute(model, bound, method, ablation=ablation, batch_size=size)
            assert off_scores(scores, whole) < CLOSE, (method, size)


def test_running_out_of_memory_costs_a_warning_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = wrapped("gpt2"), id_task((6,) * 4)
    expected = torch.from_numpy(cf.attribute(model, task, "eap").values)
    sizes: list[int] = []

    def starved(adapter: Any, inputs: Any, *args: Any, **keywords: Any) -> Any:
        sizes.append(len(inputs.ids))
        if len(inputs.ids) > 1:
            raise torch.OutOfMemoryError("no")
        return capture_gradients(adapter, inputs, *args, **keywords)

    monkeypatch.setattr(gradients, "capture_gradients", starved)
    with pytest.warns(UserWarning) as warned:
        scores = cf.attribute(model, task, "eap")
    assert [str(w.message) for w in warned] == [f"out of memory: trying again with batches of {n}" for n in (2, 1)]
    assert sizes == [4, 2, 1, 1, 1, 1] and off_scores(scores, expected) < CLOSE
    with pytest.warns(UserWarning), pytest.raises(cf.ModelError, match="out of memory on cpu with a batch of 1 pair"):
        monkeypatch.setattr(gradients, "capture_gradients", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        cf.attribute(model, task, "eap")


def test_a_stopped_exact_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task, file = wrapped("gpt2"), id_task((6, 5)), tmp_path / "run" / "exact.part"
    measured: list[int] = []
    original = Restart.edges

    def stopping(self: Restart, reader: int, writers: list[int], change: Writers) -> torch.Tensor:
        if len(measured) == 40:
            raise KeyboardInterrupt
        measured.append(len(writers))
        return original(self, reader, writers, change)

    whole = cf.attribute(model, task, "exact", batch_size=1)
    monkeypatch.setattr(Restart, "edges", stopping)
    with pytest.raises(KeyboardInterrupt):
        cf.attribute(model, task, "exact", batch_size=1, checkpoint=file)
    assert file.is_file()
    for other in ({"direction": "denoising"}, {"metric": "kl"}, {"ablation": "zero"}):
        with pytest.raises(FileError, match=r"exact\.part is the checkpoint of another run .*remove it"):
            cf.attribute(model, task, "exact", batch_size=1, checkpoint=file, **other)
    with pytest.raises(FileError, match="another run"):
        cf.attribute(model, id_task((6, 5), seed=1), "exact", checkpoint=file)

    before = sum(measured)
    monkeypatch.setattr(Restart, "edges", lambda *args: measured.append(len(args[2])) or original(*args))
    resumed = cf.attribute(model, task, "exact", batch_size=1, checkpoint=file)
    np.testing.assert_array_equal(resumed.values, whole.values)
    assert 0 < before < sum(measured) == 2 * model.graph.n_edges, "every edge of both examples is measured once"
    assert not file.exists() and not list(file.parent.iterdir())

    file.write_text("something else")
    with pytest.raises(FileError, match="is no checkpoint of circuitfind"):
        cf.attribute(model, task, "exact", checkpoint=file)
    assert file.read_text() == "something else"


# -------------------------------------------------------------------- precision
def test_half_precision_accumulates_in_float32() -> None:
    model = wrapped("llama", torch.bfloat16)
    bound = id_task((7,)).on(model)
    one = cf.attribute(model, bound, "eap", batch_size=1)
    many = cf.attribute(model, bound.subset([0] * 40), "eap", batch_size=1)
    # equal addends: a bfloat16 sum of 40 would be off by percents
    assert one.values.dtype == np.float32 and off_scores(many, torch.from_numpy(one.values)) < 1e-6
    full = wrapped("llama")
    assert off_scores(one, torch.from_numpy(cf.attribute(full, bound, "eap").values)) < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FOUR)
def test_half_precision_contracts_in_float32(name: str, dtype: torch.dtype) -> None:
    adapter = wrapped(name, dtype).adapter
    batch = id_task((7, 5)).on(wrapped(name, dtype)).batch
    run = capture_gradients(adapter, batch.clean, lambda logits: logits[:, 0, 5].float())
    delta = run.run.writers.minus(capture(adapter, batch.corrupted).writers)
    scores = edge_effects(adapter, delta, run.run, run.at)
    # the same captured values contracted in float64: what is left is the contraction's own rounding
    double = cf.wrap(build(name, dtype=dtype).to(torch.float64), None).adapter
    expected = edge_effects(double, delta.map(torch.Tensor.double), run.run, run.at)
    assert scores.dtype == torch.float32 and expected.dtype == torch.float64
    assert off(scores, expected) < CLOSE


def test_small_gradients_survive_float16() -> None:
    """They go through the model at a size that half precision holds, and come back at their own."""
    adapter = wrapped("gpt2", torch.float16).adapter
    clean = id_task((7, 5)).on(wrapped("gpt2", torch.float16)).batch.clean
    plain, small = (
        capture_gradients(adapter, clean, lambda logits, size=size: size * logits[:, 0, 5].float()).at
        for size in (1.0, 2.0**-20)
    )
    assert plain.final.any() and torch.equal(small.final, plain.final * 2.0**-20)
    assert torch.equal(small.mlp[0], plain.mlp[0] * 2.0**-20)


# -------------------------------------------------------------------- refusals
def test_flat_metrics_are_refused_where_they_are_flat() -> None:
    model, task = wrapped("gpt2"), id_task(metric="kl")
    for method, level in (("eap", "edge"), ("atp", "node")):
        with pytest.raises(ScoreError, match=r"'kl' is flat at the clean run .*'eap-ig-inputs'.*'denoising'"):
            cf.attribute(model, task, method, level=level)
        assert np.any(cf.attribute(model, task, method, level=level, direction="denoising").values)
    for method in ("eap-ig-inputs", "eap-ig-activations", "clean-corrupted", "exact"):
        assert np.any(cf.attribute(model, task, method).values)
    with pytest.raises(ScoreError, match="metric 'kl' is flat"):
        cf.attribute(model, id_task(), "eap", metric="kl")


def own_metric(function: Callable) -> cf.Task:
    return dataclasses.replace(id_task(), answers=None, wrong_answers=None, metric=function)


def test_metrics_of_the_user_that_cannot_be_scored() -> None:
    model = wrapped("gpt2")
    steady = own_metric(lambda logits, batch: (logits.log_softmax(-1) - logits.log_softmax(-1).detach()).sum(-1) + 3)
    for method in ("eap", "clean-corrupted"):
        with pytest.raises(ScoreError, match=r"gradient of metric '<lambda>' vanishes.*eap-ig-inputs"):
            cf.attribute(model, own_metric(lambda logits, batch: logits.sum(-1) * 0 + 3), method)
    assert np.any(cf.attribute(model, steady, "eap").values)

    hits = own_metric(lambda logits, batch: logits.argmax(-1) == 5)
    with pytest.raises(ScoreError, match=r"differentiable way.*exact patching"):
        cf.attribute(model, hits, "eap")
    assert cf.attribute(model, hits, "exact").values.shape == model.graph.real.shape  # booleans count as 0 and 1

    for wrong, what in ((lambda logits, batch: logits, r"shape \[3, 128\]"), (lambda logits, batch: 1.0, "a float")):
        with pytest.raises(TaskError, match=f"returned {what}: one number per example is needed, a tensor"):
            cf.attribute(model, own_metric(wrong), "eap")

    nan = own_metric(lambda logits, batch: logits[:, 0] * float("nan"))
    with pytest.raises(ScoreError, match=r"score of input->a0.h0<q> is NaN"):
        cf.attribute(model, nan, "eap")
    with pytest.raises(ScoreError, match=r"effect of input->a0.h0<q> is NaN"):
        cf.attribute(model, nan, "exact")


def test_nan_in_the_logits_is_named() -> None:
    broken = build("gpt2")
    with torch.no_grad():
        broken.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    model = cf.wrap(broken, None, check=False)
    for method in ("eap", "eap-ig-inputs", "exact"):
        with pytest.raises(ScoreError, match="is NaN"):
            cf.attribute(model, id_task(), method)
    with pytest.raises(ScoreError, match="is NaN"):
        cf.attribute(model, id_task(), level="node")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "saliency"}, "method 'saliency' is unknown. Known: eap, eap-ig-inputs"),
        ({"method": "eap_ig"}, "method 'eap_ig' is unknown: did you mean 'eap-ig-inputs'"),
        ({"method": "eap", "steps": 5}, "steps=5 is an option of eap-ig-inputs, eap-ig-activations: method 'eap' has"),
        ({"method": "eap", "level": "node"}, "'eap' does not score nodes: use one of atp, .* level='edge' for its"),
        ({"method": "atp"}, "'atp' does not score edges: .*, or level='node' for its scores of nodes"),
        ({"level": "layer"}, "level 'layer' is unknown: use 'edge' or 'node'"),
        ({"rule": "trapezoid"}, "rule 'trapezoid' is unknown. Known: left, midpoint, right"),
        ({"steps": 0}, "steps=0: give a whole number, 1 to 100,000"),
        ({"direction": "up"}, "direction 'up' is unknown: use 'noising' or 'denoising'"),
        ({"ablation": "noise", "method": "eap"}, "ablation 'noise' is unknown. Known: corrupted, zero"),
        ({"ablation": "zero"}, "'eap-ig-inputs' interpolates between the clean and the corrupted run"),
        (
            {"ablation": "mean", "method": "exact", "direction": "denoising"},
            "'denoising' starts from the corrupted run: it needs",
        ),
        ({"by_position": True, "method": "ifr"}, "'ifr' has no scores of edges by position: use one of eap, "),
        ({"batch_size": -1}, "batch_size must be at least 1, not -1"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_unknown_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ScoreError, TaskError), match=message):
        cf.attribute(wrapped("gpt2"), id_task(), **options)


def test_positions_of_unequal_prompts_do_not_correspond() -> None:
    model, task = wrapped("gpt2"), id_task((6, 5))
    with pytest.raises(ScoreError, match="by_position=True needs prompts of one length"):
        cf.attribute(model, task, level="node", by_position=True)
    with pytest.raises(ScoreError, match="by_position=True needs prompts of one length"):
        cf.attribute(model, task, by_position=True)
    for ablation in ("mean-position", "resample"):
        with pytest.raises(TaskError, match="needs prompts of one length"):
            cf.attribute(model, task, "eap", ablation=ablation)


def test_the_points_of_integrated_gradients() -> None:
    def points(steps: int, rule: str) -> list[Point]:
        return eap.between_embeddings("noising", 2, {"steps": steps, "rule": rule})

    for rule, alphas in (("left", [0, 0.25, 0.5, 0.75]), ("right", [0.25, 0.5, 0.75, 1])):
        assert [tuple(p) for p in points(4, rule)] == [(0.25, alpha, None, None) for alpha in alphas]
    assert [p.alpha for p in points(2, "midpoint")] == [0.25, 0.75]


# -------------------------------------------------------------------- records, and the model as it was found
def test_a_result_says_how_it_was_made() -> None:
    model, task = wrapped("llama"), id_task((6, 5))
    record = cf.attribute(model, task, steps=3, rule="right", seed=4).record
    assert (record.model, record.task, record.n_examples) == ("llama", "ids", 2)
    assert (record.metric, record.method, record.ablation) == ("logit_diff", "eap-ig-inputs", "corrupted")
    assert (record.direction, record.sign, record.seed, record.bos) == ("noising", SIGN, 4, "ids given")
    assert record.settings == {"level": "edge", "steps": 3, "rule": "right", "notes": []}
    assert record.versions == library_versions() and record.versions["torch"].startswith(torch.__version__[:3])
    other = cf.attribute(model, task, "atp", level="node", metric="logprob", ablation="zero", by_position=False).record
    assert (other.method, other.metric, other.ablation) == ("atp", "logprob", "zero")
    assert other.settings == {"level": "node", "notes": []}


def test_scores_survive_a_file(tmp_path: Path) -> None:
    model = wrapped("llama")
    scores = cf.attribute(model, id_task((6, 5)), "eap")
    back = cf.Scores.open(scores.save(tmp_path / "scores.safetensors"))
    np.testing.assert_array_equal(back.values, scores.values)
    assert back.record == scores.record and back.graph == scores.graph


@pytest.mark.parametrize("backend", ["nnsight", "hooks"])
def test_the_model_is_left_as_it_was_found(backend: str) -> None:
    hf = build("gemma2").train()
    hf.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in hf.state_dict().items()}

    def state() -> list[object]:
        trains = [p.requires_grad for p in hf.parameters()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules()]
        return [trains, hooks, [m.training for m in hf.modules()], hf.config._attn_implementation]

    found = state()
    model = cf.wrap(hf, None, backend=backend)
    for method in names("edge"):
        cf.attribute(model, id_task(), method)
    for method in names("node"):
        cf.attribute(model, id_task(), method, level="node")
    with pytest.raises(ScoreError):
        cf.attribute(model, own_metric(lambda logits, batch: logits.argmax(-1)), "eap")
    assert state() == found and all(p.grad is None for p in hf.parameters())
    assert all(torch.equal(value, before[name]) for name, value in hf.state_dict().items())


def test_both_backends_give_the_same_bits() -> None:
    hf = build("gpt_neox")
    by_backend = [cf.wrap(hf, None, backend=backend) for backend in ("nnsight", "hooks")]
    for method in names("edge"):
        first, second = (cf.attribute(model, id_task((6, 5)), method) for model in by_backend)
        np.testing.assert_array_equal(first.values, second.values)
