"""Scores of keys and values by query head, against the same model written out with a projection for every head.

`written_out` repeats each key/value head's weights for the query heads that it serves: a model without groups, in the
model's own classes, that computes the same logits. Its graph is that of the field's files, and there the literal twins
(`oracles`, `toys.Twin`) give every head its own copy of the residual stream and differentiate or patch it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from families import IDS, LLAMA, SIZE, build
from test_eap_ig_files import random_scores
from torch import Tensor, nn
from toys import Twin, id_task, off_scores, wrapped

import circuitfind as cf
from circuitfind.attribution.methods import METHODS
from circuitfind.cli.app import main
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import CircuitfindError, FileError, ModelError
from circuitfind.export import mib
from circuitfind.export.foreign import regrouped
from circuitfind.graph import Graph
from circuitfind.models.layer import Layout

CLOSE = 1e-5  # of the largest score
TWINS = ["llama", "qwen3", "gemma3"]  # plain; norms of queries and keys; also post-norms and sliding windows
EAGER = {"attn_implementation": "eager"}  # else Falcon computes past a softmax
OTHERS = ["qwen2", "phi3", "falcon-grouped", "gpt_oss"]  # biases; two fused layouts; sinks
EDGES = [name for name, method in METHODS.items() if "edge" in method.levels]


def grouped(name: str) -> nn.Module:
    if name != "falcon-grouped":
        return build(name)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2}
    model = hf.FalconForCausalLM(hf.FalconConfig(**shape, **IDS, new_decoder_architecture=True, **EAGER)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def written_out(model: nn.Module) -> nn.Module:
    """The same function of the prompt, with a key and a value projection for every query head."""
    config, adapter = copy.deepcopy(model.config), cf.wrap(model, None).adapter
    count = "num_kv_heads" if hasattr(config, "num_kv_heads") else "num_key_value_heads"
    setattr(config, count, adapter.graph.n_heads)
    narrow, family = adapter.layers[0].layout, adapter.family
    wide = Layout(narrow.kind, narrow.n_heads, narrow.n_heads, narrow.d_head)
    weights = model.state_dict()
    for view in adapter.layers:
        for site in family.projections:
            for part in ("weight", "bias"):
                name = f"{view.path}.{getattr(family, site)}.{part}"
                if name not in weights or site == "q":
                    continue
                parts = narrow.parts(site, weights[name].t())  # features last
                repeated = {
                    kind: x if kind == "q" else x.repeat_interleave(adapter.graph.group, dim=-2)
                    for kind, x in parts.items()
                }
                weights[name] = wide.whole(site, repeated).t().contiguous()
    twin = type(model)(config).eval()
    twin.load_state_dict(weights)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(twin(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    return twin


@cache
def pair(name: str) -> tuple[cf.Model, cf.Model]:
    """A grouped model, and the same written out."""
    model = grouped(name)
    return cf.wrap(model, None, name=name), cf.wrap(written_out(model), None, name=name)


# -------------------------------------------------------------------- against literal twins
@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize(
    ("method", "alphas"), [("eap", [1.0]), ("eap-ig-inputs", [0.0, 0.25, 0.5, 0.75]), ("clean-corrupted", [0.0, 1.0])]
)
def test_estimates_equal_autograd_through_each_heads_own_copy(name: str, method: str, alphas: list[float]) -> None:
    model, wide = pair(name)
    task = id_task((9, 6))
    options: dict[str, Any] = {"steps": 4} if method == "eap-ig-inputs" else {}
    scores = cf.attribute(model, task, method, ungrouped=True, **options)
    assert scores.graph == wide.graph == model.graph.ungrouped()
    assert off_scores(scores, Twin(wide, task.on(wide)).estimates(alphas)) < CLOSE


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("name", TWINS)
def test_exact_effects_equal_a_run_with_one_heads_copy_patched(name: str, direction: str) -> None:
    model, wide = pair(name)
    task = id_task((9, 6))
    scores = cf.attribute(model, task, "exact", direction=direction, ungrouped=True)
    assert off_scores(scores, Twin(wide, task.on(wide)).exact(direction)) < CLOSE


@pytest.mark.parametrize("method", EDGES)
@pytest.mark.parametrize("name", [*TWINS, *OTHERS])
def test_every_method_scores_the_model_as_it_is_written_out(name: str, method: str) -> None:
    """Fused projections, biases and attention sinks, too, and under another ablation where a method takes one."""
    model, wide = pair(name)
    if name == "gpt_oss" and method in ("relp", "gim", "weights"):
        pytest.skip("refused for mixtures of experts")
    ablation = "corrupted" if METHODS[method].twin else "mean"
    task = id_task((9, 6))
    scores = cf.attribute(model, task, method, ablation=ablation, ungrouped=True)
    expected = cf.attribute(wide, task, method, ablation=ablation)
    assert scores.record.sign == expected.record.sign
    assert off_scores(scores, torch.from_numpy(expected.values)) < CLOSE


@pytest.mark.parametrize("backend", ["nnsight", "hooks"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_backends_and_precisions(backend: str, dtype: torch.dtype) -> None:
    model = cf.wrap(build("qwen3", dtype=dtype), None, backend=backend, check=dtype == torch.float64)
    scores = cf.attribute(model, id_task((9, 6)), "eap", ungrouped=True)
    close = CLOSE if dtype == torch.float64 else 0.1
    assert off_scores(scores, torch.from_numpy(cf.attribute(pair("qwen3")[1], id_task((9, 6)), "eap").values)) < close


# -------------------------------------------------------------------- sums
@pytest.mark.parametrize("name", [*TWINS, *OTHERS, "gemma2", "olmo2", "glm4", "olmo-clipped"])
def test_estimates_of_a_groups_heads_add_up_to_the_groups(name: str) -> None:
    """Also where one norm takes all keys of a layer (OLMo 2), which has no form that is written out."""
    model, task = pair(name)[0] if name in (*TWINS, *OTHERS) else wrapped(name), id_task((9, 6))
    for method in ("eap", "eap-ig-activations"):
        by_head = cf.attribute(model, task, method, ungrouped=True, **({} if method == "eap" else {"steps": 2}))
        whole = cf.attribute(model, task, method, **({} if method == "eap" else {"steps": 2}))
        assert off_scores(whole, torch.from_numpy(regrouped(model.graph, by_head.values))) < CLOSE
        heads = [by_head[f"m0->a1.h{head}<k>"] for head in (2, 3)]
        assert abs(heads[0] - heads[1]) > 1e-3 * np.abs(whole.values).max()  # neither half of it


def test_exact_effects_do_not_add_up() -> None:
    model, task = pair("llama")[0], id_task((9, 6))
    by_head, whole = (cf.attribute(model, task, "exact", ungrouped=split) for split in (True, False))
    off = np.abs(regrouped(model.graph, by_head.values) - whole.values)
    into_shared = np.array([".kv" in reader for reader in model.graph.reader_names])
    assert off[:, ~into_shared].max() < CLOSE < off[:, into_shared].max()


def test_without_groups_nothing_changes() -> None:
    model, task = wrapped("gpt2"), id_task((6,))
    for method in ("eap", "exact"):
        np.testing.assert_array_equal(*(cf.attribute(model, task, method, ungrouped=u).values for u in (True, False)))


# -------------------------------------------------------------------- checks, and what is refused
def test_estimates_by_head_are_checked_by_exact_effects_by_head() -> None:
    model, task = pair("qwen3")[0], id_task((9, 6))
    scores, exact = (cf.attribute(model, task, method, ungrouped=True) for method in ("eap", "exact"))
    checks = cf.check(model, task, scores, top=len(scores))
    assert len(checks.checked) == model.graph.ungrouped().n_edges
    for row in checks.checked:
        assert row.exact == pytest.approx(exact[row.name], abs=1e-6) and row.estimate == scores[row.name]


def test_a_stopped_run_goes_on_over_its_own_graph_only() -> None:
    experiment = Experiment.of(pair("llama")[0], id_task((6,)))
    assert experiment.key("exact") != experiment.ungrouped().key("exact")


def searched(model: cf.Model, task: cf.Task) -> object:
    return cf.attribute(model, task, cf.Method("mine", "", "", "", ("edge",), score=lambda *_: None), ungrouped=True)


REFUSED: dict[str, tuple[Callable[[cf.Model, cf.Task], object], str]] = {
    "an own method": (searched, r"'mine' does not score keys and values by query head.*eap-ig-inputs.*exact"),
    "nodes": (
        lambda model, task: cf.attribute(model, task, level="node", ungrouped=True),
        "ungrouped=True splits the edges into shared keys and values: leave level='node' out",
    ),
    "a circuit": (
        lambda model, task: cf.evaluate(model, task, random_scores(model.graph.ungrouped()).top(9)),
        r"another model \(2 layers, 4 heads\); this model has .* on 2 key/value heads; it is by query head",
    ),
    "a search": (
        lambda model, task: cf.find(model, task, scores=random_scores(model.graph.ungrouped())),
        r"another graph .*; it is by query head: .* open its EAP-IG file with graph=model\.graph",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_scores_by_query_head_says_so(what: str) -> None:
    call, said = REFUSED[what]
    with pytest.raises(CircuitfindError, match=said):
        call(pair("llama")[0], id_task((6,)))


def test_the_remedy_of_the_refusal_works(tmp_path: Path) -> None:
    model, task = pair("llama")[0], id_task((9, 6))
    path = cf.attribute(model, task, "eap", ungrouped=True).save(tmp_path / "a.json", format="eap-ig")
    scores = cf.Scores.open(path, graph=model.graph)
    assert off_scores(scores, torch.from_numpy(cf.attribute(model, task, "eap").values)) < CLOSE
    cf.evaluate(model, task, scores.top(20), metric="kl")


def test_keys_that_another_layer_uses_too_are_refused() -> None:
    """As in models whose later layers attend to an earlier one's keys and values."""
    model = build("llama")
    seen: list[Tensor] = []
    first, last = model.model.layers
    first.self_attn.v_proj.register_forward_hook(lambda _, __, output: seen.append(output))
    last.self_attn.register_forward_hook(lambda _, __, output: (output[0] + seen[-1].sum(-1, True), *output[1:]))
    loaded = cf.wrap(model, None, check=False)
    with pytest.raises(ModelError, match="layer 0: its values are used outside this layer's attention"):
        cf.attribute(loaded, id_task((9,)), "eap", ungrouped=True)


def test_the_model_is_left_as_it_was() -> None:
    model = pair("gemma3")[0]
    before = model.graph, model.adapter.layers[0].copies, [tuple(m._forward_hooks) for m in model.hf.modules()]
    cf.attribute(model, id_task((6,)), "exact", ungrouped=True)
    after = model.graph, model.adapter.layers[0].copies, [tuple(m._forward_hooks) for m in model.hf.modules()]
    assert before == after and model.graph.group == 2


# -------------------------------------------------------------------- files
@pytest.mark.parametrize("form", ["json", "pt"])
def test_eap_ig_files_hold_the_scores_by_query_head(form: str, tmp_path: Path) -> None:
    model, wide = pair("qwen3")
    task = id_task((9, 6))
    paths = [
        scores.save(tmp_path / f"{at}.{form}", format="eap-ig")
        for at, scores in enumerate([cf.attribute(model, task, "eap", ungrouped=True), cf.attribute(wide, task, "eap")])
    ]
    mine, expected = map(cf.Scores.open, paths)
    assert mine.graph == expected.graph and off_scores(mine, torch.from_numpy(expected.values)) < CLOSE
    if form == "json":
        raw = [json.loads(path.read_text()) for path in paths]
        assert list(raw[0]["edges"]) == list(raw[1]["edges"]) and raw[0]["cfg"] == raw[1]["cfg"]


MIB_SHAPES = {
    "ioi_qwen2.5": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**of_shape(24, 14, 2))),
    "ioi_gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(head_dim=2, **of_shape(26, 8, 4))),
}


def of_shape(layers: int, heads: int, shared: int) -> dict[str, Any]:
    shape = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": shared}
    return {**SIZE, **LLAMA, **shape, "hidden_size": 2 * heads, "intermediate_size": 8}


def test_mibs_check_takes_the_scores_of_grouped_models(tmp_path: Path) -> None:
    for entry, make in MIB_SHAPES.items():
        torch.manual_seed(0)
        model = cf.wrap(make().eval(), None, check=False)
        scores = cf.attribute(model, id_task((6,)), "eap", ungrouped=True).save(tmp_path / f"{entry}.safetensors")
        assert main(["export", str(scores), "--to", "mib", "--entry", entry, "--out", str(tmp_path / "mib")]) == 0
        assert [path.name for path in (tmp_path / "mib" / entry).iterdir()] == ["importances.pt"]
    assert [(one.name, one.holds, one.problem) for one in mib.check(tmp_path / "mib")] == [
        ("ioi_gemma2", "importances", ""),
        ("ioi_qwen2.5", "importances", ""),
        (".", "1 task", "a submission needs at least two tasks"),
    ]


def test_scores_of_shared_heads_say_what_mib_gets_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = random_scores(Graph(26, 8, 4, 16)).save(tmp_path / "a.safetensors")
    assert main(["export", str(path), "--to", "mib", "--entry", "ioi_gemma2", "--out", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Wrote nine circuits instead of scores: 2 query heads share each key and value" in said
    assert "circuitfind attribute --ungrouped" in said
    assert len(list((tmp_path / "ioi_gemma2").iterdir())) == 9
    with pytest.raises(FileError, match=r"2 heads share each key and value here.*--ungrouped.*scores\.top"):
        cf.Scores.open(path).save(tmp_path / "a.json", format="eap-ig")


def test_the_command_line_scores_by_query_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = cf.load("tiny", check=False).tokenizer
    tokenizer.save_pretrained(tmp_path / "llama")
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**LLAMA, "vocab_size": len(tokenizer)}))
    model.save_pretrained(tmp_path / "llama")
    words = ["attribute", str(tmp_path / "llama"), "--task", "ioi", "--n", "4", "--out", str(tmp_path)]
    assert main([*words, "--method", "eap", "--ungrouped"]) == 0
    scores = cf.Scores.open(tmp_path / "scores.safetensors")
    assert scores.graph == pair("llama")[0].graph.ungrouped()
    assert len(json.loads((tmp_path / "checks.json").read_text())["checked"]) == 10
    assert main([*words, "--level", "node", "--ungrouped"]) != 0
    capsys.readouterr()
    found = ["find", *words[1:], "--scores", str(tmp_path / "scores.safetensors")]
    assert main(found) != 0 and "it is by query head: score without" in " ".join(capsys.readouterr().err.split())
    exported = scores.top(40).save(tmp_path / "circuit-by-head.json", format="eap-ig")
    assert main(["evaluate", *words[1:6], "--metric", "kl", "--circuit", str(exported)]) == 0  # of the shared heads


@pytest.mark.parametrize("name", ["deepseek_v3", "lfm2"])
def test_latents_and_mixers_have_no_copies(name: str) -> None:
    with pytest.raises(ModelError, match="no copies by query head; leave ungrouped=True out"):
        cf.attribute(wrapped(name), id_task((6, 6)), ungrouped=True)
