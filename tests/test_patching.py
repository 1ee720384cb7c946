"""Activation-patching sweeps against one plain forward pass a place."""

from __future__ import annotations

import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCAB, build
from helpers import ended_by, off
from patching_twin import EVERY, PatchingTwin
from toys import id_task, wrapped

import circuitfind as cf
from circuitfind import checkpoint
from circuitfind.engine import restart
from circuitfind.engine.ablation import ABLATIONS, resampled
from circuitfind.engine.memory_plan import SideBySide
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.statistics import mean_intervals

BOTH = (0, 1)
OTHERS = ["falcon-new", "falcon-sequential", "opt", "bloom", "olmo2", "gpt_oss", "granite", "gptj"]


def off_sweep(sweep: cf.Sweep, expected: np.ndarray) -> float:
    assert sweep.per_example.size == expected.size
    return off(torch.from_numpy(sweep.per_example).view(expected.shape), torch.from_numpy(expected))


def _units(sweep: cf.Sweep, each: int) -> np.ndarray:
    """`[layers, units, positions, examples]`, one unit in so many."""
    n_positions = len(sweep.axes[-1].labels) if sweep.by_position else 1
    return sweep.per_example.reshape(len(sweep.axes[0].labels), -1, n_positions, len(sweep.full))[:, ::each]


# -------------------------------------------------------------------- the numbers
@pytest.mark.parametrize(("name", "what"), EVERY)
def test_every_place_equals_a_forward_pass_of_its_own(name: str, what: str) -> None:
    model, layers = wrapped(name), (1,) if what == "neurons" else BOTH
    padded, plain = id_task((7, 5, 6)).on(model), id_task((4, 4, 4)).on(model)
    sweep = cf.patch(model, padded, what, by_position=False, layers=layers)
    each = 5 if what == "neurons" else 1
    expected = PatchingTwin(model, padded).effects(what, False, layers=layers, each=each)
    assert off(torch.from_numpy(_units(sweep, each)), torch.from_numpy(expected)) < 1e-4
    sweep = cf.patch(model, plain, what, by_position=True, direction="denoising", batch_size=2, layers=layers)
    expected = PatchingTwin(model, plain).effects(what, True, "denoising", layers=layers, each=each)
    assert off(torch.from_numpy(_units(sweep, each)), torch.from_numpy(expected)) < 1e-4


@pytest.mark.parametrize("what", ["mlp", "heads", "resid-mid"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name: str, what: str) -> None:
    model = wrapped(name)
    if what == "resid-mid" and model.graph.parallel:
        with pytest.raises(cf.ModelError, match="attention and MLP read the same stream"):
            cf.patch(model, id_task((6, 4)), what, by_position=False)
        return
    bound = id_task((6, 4)).on(model)
    sweep = cf.patch(model, bound, what, by_position=False)
    assert off_sweep(sweep, PatchingTwin(model, bound).effects(what, False)) < 1e-4


@pytest.mark.parametrize("what", ["q", "k", "v"])
@pytest.mark.parametrize("name", ["youtu", "deepseek_v2"])
def test_queries_keys_and_values_around_a_latent(name: str, what: str) -> None:
    """One key/value head: its keys and values are those of all heads."""
    model = wrapped(name)
    bound = id_task((6, 6)).on(model)
    sweep = cf.patch(model, bound, what, by_position=True)
    assert len(sweep.axes[1].labels) == (4 if what == "q" else 1)
    assert off_sweep(sweep, PatchingTwin(model, bound).effects(what, True)) < 1e-4


@pytest.mark.parametrize("name", ["gpt_neo", "gptj", "bloom", "opt", "qwen3", "gpt_oss", "youtu"])
def test_patterns_of_other_families(name: str) -> None:
    """Whatever makes a pattern (biases of position, norms, sinks) lies before it."""
    model = wrapped(name)
    bound = id_task((6, 4)).on(model)
    assert off_sweep(cf.patch(model, bound, "pattern"), PatchingTwin(model, bound).effects("pattern", False)) < 1e-4


def test_padding_on_the_left() -> None:
    model, places = wrapped("llama"), torch.arange(7)
    mask = torch.stack([places >= 0, places >= 2])
    clean, corrupted = torch.randint(3, VOCAB, (2, 2, 7), generator=torch.Generator().manual_seed(1)) * mask
    bound = cf.Task(clean, corrupted, [5, 6], [7, 8], attention_mask=mask).on(model)
    for what in ("heads", "k", "pattern", "mlp"):
        sweep = cf.patch(model, bound, what, by_position=False)
        assert off_sweep(sweep, PatchingTwin(model, bound).effects(what, False)) < 1e-4, what


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-position", "resample"])
def test_ablations_equal_their_twins(ablation: str) -> None:
    model = wrapped("gemma2")
    bound = id_task((5, 4, 5) if ablation in ("zero", "mean") else (5, 5, 5)).on(model)
    dealt = resampled(bound.batch, 3).corrupted if ablation == "resample" else None
    twin = PatchingTwin(model, bound, dealt)
    for what in ("heads", "k", "mlp", "attn", "mlp-out", "attn-out", "resid-mid"):
        sweep = cf.patch(model, bound, what, by_position=False, ablation=ablation, seed=3, batch_size=2)
        assert off_sweep(sweep, twin.effects(what, False, ablation=ablation)) < 1e-4, what
    evaluator = Evaluator.of(model, bound, ablation=ablation, seed=3)
    np.testing.assert_allclose(sweep.full, evaluator.full, atol=1e-5)
    np.testing.assert_allclose(sweep.empty, evaluator.empty, atol=1e-5)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt", "falcon", "granite", "olmo2", "minicpm3"])
def test_an_mlp_is_the_node_and_attention_the_heads_of_its_layer(name: str, ablation: str) -> None:
    """Output biases (gpt2, opt, falcon) stay, post-norms (gemma2, olmo2) are part of the writer."""
    model, task = wrapped(name), id_task((5, 5, 5))
    asked = {"ablation": ablation, "seed": 1}
    for method in ("exact", "atp"):
        nodes = cf.attribute(model, task, method, level="node", **asked)
        mlps = cf.attribute(model, task, method, level="node", what="mlp", by_position=False, **asked)
        np.testing.assert_allclose(mlps.effects, [nodes["m0"], nodes["m1"]], rtol=1e-4, atol=1e-5)
    graph = model.graph
    without = np.stack([graph.real, graph.real])
    for layer in BOTH:
        without[layer, graph.heads(layer)] = False
    evaluator = Evaluator.of(model, task, **asked)
    expected = evaluator.full - evaluator.run(without).metric
    np.testing.assert_allclose(
        cf.patch(model, task, "attn", by_position=False, **asked).per_example, expected, rtol=1e-4, atol=1e-5
    )


def test_a_module_with_its_bias_is_another_place() -> None:
    model, task = wrapped("gpt2"), id_task((5, 5))
    written, out = (cf.patch(model, task, what, by_position=False, ablation="zero") for what in ("mlp", "mlp-out"))
    assert np.abs(written.effects - out.effects).min() > 1e-3
    assert (written.names(), out.names()) == (["m0", "m1"], ["mlp-out0", "mlp-out1"])


@pytest.mark.parametrize("metric", ["kl", "prob_diff"])
def test_other_metrics(metric: str) -> None:
    model = wrapped("llama")
    bound = id_task((5, 5)).on(model).with_metric(metric)
    sweep = cf.patch(model, id_task((5, 5)), "mlp", metric=metric)
    assert sweep.record.metric == metric
    assert off_sweep(sweep, PatchingTwin(model, bound).effects("mlp", True)) < 1e-4


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_the_stream_entering_layer_0_carries_everything(direction: str) -> None:
    """Patched as a whole it is the other run; position by position only those where the prompts differ matter."""
    model = wrapped("llama")
    task = id_task((5, 5, 5))
    whole = cf.patch(model, task, "resid", by_position=False, direction=direction)
    np.testing.assert_allclose(whole.per_example[0], whole.full - whole.empty, rtol=1e-4, atol=1e-6)
    clean = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    corrupted = clean.clone()
    corrupted[:, 2] += 1
    parts = cf.patch(model, cf.Task(clean, corrupted, [5, 6], [7, 8]), "resid", direction=direction, layers=0)
    np.testing.assert_array_equal(np.flatnonzero(np.abs(parts.effects[0]) > 1e-6), [2])


def test_a_later_position_than_the_metric_reads_has_no_effect() -> None:
    task = id_task((6, 6), positions=[3, 3])
    effects = cf.patch(wrapped("gpt_neox"), task, "heads", by_position=True).effects
    assert np.abs(effects[..., 4:]).max() < 1e-6 < np.abs(effects[..., 3]).min()
    assert np.abs(effects[-1, :, :3]).max() < 1e-6, "nothing moves between positions after the last attention"


def test_the_number_of_patches_side_by_side_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = wrapped("gemma2"), id_task((5, 5, 5))
    for what in ("heads", "v"):
        together = cf.patch(model, task, what, by_position=True)
        monkeypatch.setattr(restart, "PATCHES", SideBySide(45, 45))  # three at once: units straddle groups
        few = cf.patch(model, task, what, by_position=True)
        monkeypatch.undo()
        assert off_sweep(few, together.per_example) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Rounded once where a run is changed, and nowhere else: unchanged places stay exactly unchanged."""
    clean = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    corrupted = clean.clone()
    corrupted[:, 3] += 1
    task = cf.Task(clean, corrupted, [5, 6], [7, 8])
    for what in ("resid", "resid-mid", "heads", "mlp"):
        half = cf.patch(wrapped("gemma2", dtype), task, what, by_position=True)
        exact = cf.patch(wrapped("gemma2"), task, what, by_position=True)
        assert off_sweep(half, exact.per_example) < 0.1
        before = half.effects[..., :3]
        assert not before.any(), "places before the first difference"


# -------------------------------------------------------------------- how it is done
@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_earlier_layers_are_not_run_again(name: str) -> None:
    model = cf.wrap(build(name), None)
    bound, called = id_task((5, 5)).on(model), []
    for layer, view in enumerate(model.adapter.layers):
        for part in ("qkv", "mlp_out"):
            module = view.module(getattr(view.family, part))
            module.register_forward_hook(lambda *_, key=f"{layer}.{part}": called.append(key))
    cf.patch(model, bound, "mlp", layers=1, by_position=False)  # the identities are proved under new hooks
    everything = ["0.qkv", "0.mlp_out", "1.qkv", "1.mlp_out"]
    last = {"resid": ["1.qkv", "1.mlp_out"], "v": ["1.qkv", "1.mlp_out"], "mlp": [], "heads": ["1.mlp_out"]}
    if name == "falcon":
        last["heads"] = []  # a parallel block's MLP does not read its heads
    for what, expected in last.items():
        called.clear()
        cf.patch(model, bound, what, layers=1, by_position=False)
        assert sorted(called) == sorted(everything * 2 + expected), what  # both runs, and the patched ones


def test_both_backends_give_the_same_bits() -> None:
    task = id_task((5, 5))
    for what in ("heads", "pattern"):
        runs = [
            cf.patch(cf.wrap(build("llama"), None, backend=backend), task, what, layers=BOTH)
            for backend in ("nnsight", "hooks")
        ]
        np.testing.assert_array_equal(runs[0].per_example, runs[1].per_example)


@pytest.mark.parametrize("what", ["heads", "pattern", "neurons"])
def test_the_model_is_left_as_it_was_found(what: str) -> None:
    model = cf.wrap(build("gpt2").train(), None)
    before = model.hf.config._attn_implementation
    weights = {name: value.clone() for name, value in model.hf.state_dict().items()}
    cf.patch(model, id_task((5, 5)), what, layers=0)
    assert model.hf.training
    assert model.hf.config._attn_implementation == before == "sdpa"
    assert all(parameter.requires_grad for parameter in model.hf.parameters())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.hf.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.hf.state_dict().items())


def test_running_out_of_memory_costs_a_warning_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = wrapped("gpt2"), id_task((5, 5, 5, 5))
    expected = cf.patch(model, task, "heads")
    real = restart.Restart.from_stream

    def small(self: restart.Restart, layer: int, changes: torch.Tensor) -> torch.Tensor:
        if len(self.inputs.ids) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, layer, changes)

    monkeypatch.setattr(restart.Restart, "from_stream", small)
    with pytest.warns(UserWarning, match="batches of 2"):
        sweep = cf.patch(model, task, "heads", batch_size=4)
    assert off_sweep(sweep, expected.per_example) < 1e-5


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task, path = wrapped("gpt2"), id_task((5, 5, 5)), tmp_path / "sweep.part"
    expected = cf.patch(model, task, "heads", batch_size=2)
    real, layers = restart.Restart.from_stream, []

    def stopping(self: restart.Restart, layer: int, changes: torch.Tensor) -> torch.Tensor:
        layers.append(layer)
        if len(layers) == 4:
            raise KeyboardInterrupt
        return real(self, layer, changes)

    monkeypatch.setattr(restart.Restart, "from_stream", stopping)
    with pytest.raises(KeyboardInterrupt):
        cf.patch(model, task, "heads", batch_size=2, checkpoint=path)
    for other in ({"what": "attn"}, {"ablation": "zero"}, {"metric": "logprob"}, {"layers": 0}):
        with pytest.raises(cf.FileError, match="another run"):
            cf.patch(model, task, checkpoint=path, **other)
    layers.append(-1)
    resumed = cf.patch(model, task, "heads", batch_size=2, checkpoint=path)
    assert layers == [1, 2, 1, 2, -1, 2]
    np.testing.assert_array_equal(resumed.per_example, expected.per_example)
    assert not path.exists()


def test_what_was_measured_is_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, written = tmp_path / "sweep.part", []
    write = checkpoint.CheckpointFile.write

    def noting(self: checkpoint.CheckpointFile, arrays: dict[str, np.ndarray]) -> None:
        written.append(int(np.isfinite(arrays["values"]).sum()))
        write(self, arrays)

    monkeypatch.setattr(checkpoint.CheckpointFile, "write", noting)
    task = id_task((5, 5, 5))
    cf.patch(wrapped("gpt2"), task, "heads", batch_size=2, checkpoint=path)
    assert not written, "quicker than the time between two writes"
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_WRITES", -1.0)
    cf.patch(wrapped("gpt2"), task, "heads", batch_size=2, checkpoint=path)
    assert written == [8, 16, 20, 24] and not path.exists(), "four heads of two or of one pair at a time"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_process_leaves_a_sweep_to_go_on_from(
    one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill strikes inside the fourth of six patched runs, with no chance to write anything."""
    path, spans = tmp_path / "sweep.part", [{"a": (0, 2)}, {"a": (1, 2)}, {"a": (2, 4)}]
    options: dict[str, Any] = {"what": "heads", "by_span": True, "batch_size": 2}
    task, model = id_task((5, 4, 5), spans=spans), wrapped("llama")
    real, runs = restart.Restart.from_stream, []

    def dying(self: restart.Restart, layer: int, changes: torch.Tensor) -> torch.Tensor:
        runs.append(layer)
        if len(runs) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, layer, changes)

    def work() -> None:
        checkpoint.SECONDS_BETWEEN_WRITES = -1.0
        restart.PATCHES = restart.PATCHES._replace(processor=60)
        restart.Restart.from_stream = dying  # type: ignore[method-assign]
        cf.patch(model, task, checkpoint=path, **options)

    assert ended_by(work) == -signal.SIGKILL
    assert path.is_file()
    monkeypatch.setattr(restart, "PATCHES", SideBySide(60, 60))
    whole = cf.patch(model, task, **options)
    for other in ({"spans": [{"a": (0, 2)}, {"a": (1, 2)}, {"a": (2, 3)}]}, {"seed": 1}):
        with pytest.raises(cf.FileError, match="another run"):
            cf.patch(model, id_task((5, 4, 5), **{"spans": spans, **other}), checkpoint=path, **options)
    with pytest.raises(cf.FileError, match="another run"):
        cf.patch(model, task, "heads", batch_size=2, checkpoint=path)
    runs.clear()

    def counting(self: restart.Restart, layer: int, changes: torch.Tensor) -> torch.Tensor:
        runs.append(len(changes))
        return real(self, layer, changes)

    monkeypatch.setattr(restart.Restart, "from_stream", counting)
    resumed = cf.patch(model, task, checkpoint=path, **options)
    np.testing.assert_array_equal(resumed.per_example, whole.per_example)
    assert not path.exists() and runs, "it went on"
    again = len(runs)
    cf.patch(model, task, **options)
    assert len(runs) - again == again + 3, "three runs were not done again"


# -------------------------------------------------------------------- the result
def test_axes_names_and_the_best() -> None:
    model = wrapped("llama")
    sweep = cf.patch(model, id_task((5, 5, 5)), "k", by_position=True)
    assert [axis.name for axis in sweep.axes] == ["layer", "key/value head", "position"]
    assert sweep.effects.shape == (2, 2, 5) and sweep.per_example.shape == (2, 2, 5, 3)
    assert sweep.names()[::5] == ["a0.kv0<k>", "a0.kv1<k>", "a1.kv0<k>", "a1.kv1<k>"]
    best = sweep.top(3)
    layer, head, place = np.unravel_index(np.abs(sweep.effects).argmax(), sweep.effects.shape)
    assert best[0].name == f"a{layer}.kv{head}<k>"
    assert best[0].position == sweep.axes[2].labels[place] and best[0].position.startswith(f"{place} ")
    assert best[0].effect == sweep.effects[layer, head, place]
    assert [abs(row.effect) for row in best] == sorted(np.abs(sweep.effects).ravel())[:-4:-1]
    assert sweep.top(1, by="signed")[0].effect == sweep.effects.max()
    np.testing.assert_allclose(sweep.intervals(), mean_intervals(sweep.per_example))
    np.testing.assert_allclose([best[0].low, best[0].high], sweep.intervals()[layer, head, place])


def test_normalised_effects_are_parts_of_what_there_is_to_win() -> None:
    sweep = cf.patch(wrapped("llama"), id_task((5, 5, 5)), "heads")
    apart = replace(sweep, full=sweep.empty + np.array([3.0, 4.0, 5.0]))
    np.testing.assert_allclose(apart.normalised, sweep.effects / 4)
    assert apart.to_dict()["normalised"] == apart.normalised.tolist()
    rising = replace(sweep, full=sweep.empty - np.array([3.0, 4.0, 5.0]))
    np.testing.assert_allclose(rising.normalised, -sweep.effects / 4)
    noisy = replace(sweep, full=sweep.empty + np.array([-4.0, 1.0, 5.0]))
    with pytest.raises(cf.ScoreError, match="normalised effect is undefined"):
        _ = noisy.normalised
    assert noisy.to_dict()["normalised"] is None


@pytest.mark.parametrize(
    ("what", "first"),
    [("resid", "resid1"), ("resid-mid", "resid-mid1"), ("attn", "a1"), ("mlp", "m1"), ("heads", "a1.h0"),
     ("pattern", "a1.h0<pattern>"), ("q", "a1.h0<q>"), ("v", "a1.h0<v>"), ("neurons", "m1.n0")],
)  # fmt: skip
def test_names(what: str, first: str) -> None:
    sweep = cf.patch(wrapped("gpt2"), id_task((4, 4)), what, layers=1)
    assert sweep.names()[0] == first
    assert sweep.by_position == (what in ("resid", "resid-mid", "attn", "mlp"))


def test_positions_are_labelled_with_the_first_pairs_tokens() -> None:
    model = cf.load("tiny", check=False)
    bound = cf.task("ioi", model, n=8).on(model)
    lengths = bound.batch.clean.mask.sum(1)
    same = bound.subset(torch.nonzero(lengths == lengths[0]).flatten().tolist())
    labels = cf.patch(model, same, "resid", layers=0).axes[-1].labels
    assert [label.split(" ", 1)[0] for label in labels] == [str(i) for i in range(len(labels))]
    assert [label.split(" ", 1)[1] for label in labels] == [token.strip() for token in same.tokens[0]]


def test_a_sweep_survives_a_file(tmp_path: Path) -> None:
    sweep = cf.patch(wrapped("gpt2"), id_task((4, 4)), "heads", by_position=True, direction="denoising")
    opened = cf.Sweep.open(sweep.save(tmp_path / "sweep.safetensors"))
    np.testing.assert_array_equal(opened.per_example, sweep.per_example)
    assert (opened.what, opened.axes, opened.graph) == (sweep.what, sweep.axes, sweep.graph)
    assert opened.to_dict() == sweep.to_dict()
    assert opened.record.direction == "denoising" and "clean value" in opened.record.sign
    scores = cf.attribute(wrapped("gpt2"), id_task((4, 4)), "atp", level="node").save(tmp_path / "scores.safetensors")
    for path, message in ((scores, "circuitfind.scores"), (tmp_path / "none", "no such file")):
        with pytest.raises(cf.FileError, match=message):
            cf.Sweep.open(path)
    (tmp_path / "text").write_text("no tensors here")
    with pytest.raises(cf.FileError, match="not a sweep"):
        cf.Sweep.open(tmp_path / "text")


# -------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("tails", {}, "kind of place 'tails' is unknown. Known: resid, resid-mid"),
        ("heads", {"direction": "sideways"}, "direction 'sideways'"),
        ("heads", {"direction": "denoising", "ablation": "zero"}, "needs ablation='corrupted'"),
        ("heads", {"layers": 2}, "0 to 1"),
        ("heads", {"layers": [0, 0]}, "each only once"),
        ("heads", {"layers": []}, "0 to 1"),
        ("heads", {"layers": "all"}, "0 to 1"),
        ("heads", {"layers": True}, "layers=True: give layers"),
        ("heads", {"layers": [0, True]}, "each only once"),
        ("heads", {"layers": torch.tensor([0.0, 1.0])}, "0 to 1"),
        (["heads"], {}, r"kind of place \['heads'\] is unknown.* Known: resid, "),
        (None, {}, "kind of place None is unknown"),
        ("heads", {"by_position": "yes"}, "by_position='yes': give True or False"),
        ("heads", {"by_span": "no"}, "by_span='no': give True or False"),
        ("neurons", {}, r"128 neurons: name a layer, such as layers=0 \(--layers 0\)"),
        ("pattern", {"ablation": "mean"}, "mean-position"),
    ],
)
def test_unknown_options_are_refused(what: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(cf.ScoreError, match=message):
        cf.patch(wrapped("gpt2"), id_task((4, 4)), what, **options)


def test_layers_as_tensors_and_arrays() -> None:
    model, task = wrapped("gpt2"), id_task((4, 4))
    expected = cf.patch(model, task, "heads", layers=[1, 0])
    for layers in (torch.tensor([1, 0]), np.array([1, 0]), iter([1, 0]), [np.int64(1), 0]):
        found = cf.patch(model, task, "heads", layers=layers)
        np.testing.assert_array_equal(found.per_example, expected.per_example)
        assert found.record.settings["layers"] == [1, 0]
    for layer in (torch.tensor(1), np.int64(1)):
        assert cf.patch(model, task, "heads", layers=layer).axes[0].labels == ("1",)


@pytest.mark.parametrize("ablation", ["corrupted", "resample"])
@pytest.mark.parametrize("seed", [-1, None, 0.5])
def test_seeds_are_checked(seed: Any, ablation: str) -> None:
    model, task = wrapped("gpt2"), id_task((4, 4))
    with pytest.raises(cf.TaskError, match=f"seed={seed} is no seed"):
        cf.patch(model, task, seed=seed, ablation=ablation)
    with pytest.raises(cf.TaskError, match=f"seed={seed} is no seed"):
        cf.path_patch(model, task, "m0", seed=seed, ablation=ablation)
    for method, level in (("random", "edge"), ("random", "node"), ("eap", "edge")):
        with pytest.raises(cf.TaskError, match=f"seed={seed} is no seed"):
            cf.attribute(model, task, method, level=level, seed=seed, ablation=ablation)


def test_what_prompts_and_models_do_not_allow(tmp_path: Path) -> None:
    with pytest.raises(cf.ScoreError, match=r"3 to 4 tokens.*--template.*by_position=False.*--all-positions"):
        cf.patch(wrapped("gpt2"), id_task((4, 3)), "resid")
    with pytest.raises(cf.TaskError, match="ablation 'half'"):
        cf.patch(wrapped("gpt2"), id_task((4, 4)), ablation="half")
    with pytest.raises(cf.ModelError, match="mixtures of experts"):
        cf.patch(wrapped("mixtral"), id_task((4, 4)), "neurons", layers=0)
    with pytest.raises(cf.ModelError, match="attn_implementation='eager'"):
        cf.patch(wrapped("falcon-new"), id_task((4, 4)), "pattern", checkpoint=tmp_path / "sweep.part")
    assert not list(tmp_path.iterdir()), "nothing was measured, nothing is kept"
    nan = cf.Task(torch.randint(3, 9, (2, 4)), torch.randint(3, 9, (2, 4)), metric=lambda logits, _: logits[:, 0] / 0)
    with pytest.raises(cf.ScoreError, match="layer 0, unit 0 is NaN"):
        cf.patch(wrapped("gpt2"), nan, "heads")


def test_sweeps_over_many_positions_say_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = wrapped("gpt2"), id_task((9,))
    monkeypatch.setattr("circuitfind.patching.patch.COSTLY", 2 * 9 * 9 - 1)
    with pytest.warns(UserWarning, match=r"every pair 18 times, .* 9 positions in each of 2 layers, .*by_span=True"):
        cf.patch(model, task, "resid")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cf.patch(model, task, "resid", layers=[0])
        cf.patch(model, task, "resid", by_position=False)
