"""Loading: by name, folder or in memory; what cannot be used is refused with one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from families import LLAMA, build
from torch import nn
from toys import id_task
from transformers import AutoTokenizer

import circuitfind as cf
from circuitfind.engine.experiment import bind
from circuitfind.errors import ModelError, TaskError
from circuitfind.models import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in a folder, without a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "llama"
    build("llama").save_pretrained(path)
    return path


def refused(make: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------- what works
def test_the_embedded_model() -> None:
    model = cf.load("tiny")
    assert (model.name, model.dtype, model.vocabulary) == ("tiny", torch.float32, len(model.tokenizer))
    assert (model.graph.n_layers, model.graph.n_heads) == (model.config.n_layer, model.config.n_head)
    assert not model.hf.training and model.device.type == "cpu"
    assert repr(model).startswith("Model(tiny: gpt2, 4 layers, 8 heads; 1,519 edges, torch.float32")
    assert cf.load(str(tiny.PATH)).graph == model.graph


def test_a_folder_without_tokenizer_takes_ids(folder: Path) -> None:
    model = cf.load(str(folder))
    assert model.tokenizer is None and model.name == str(folder)
    in_memory = cf.wrap(build("llama"))
    scores = [cf.attribute(m, id_task(), "eap").values for m in (model, in_memory)]
    np.testing.assert_array_equal(*scores)
    with pytest.raises(TaskError, match="no tokenizer"):
        cf.Task(["a"], ["b"], metric="kl").on(model)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["models/induction_2x1", "models/sort_3x3", "conformance/gpt2-tiny"])
def test_an_empty_tokenizer_is_none(shared: Path, name: str) -> None:
    assert cf.load(str(shared / name), check=False).tokenizer is None


def test_a_tokenizer_in_the_folder_comes_along(folder: Path, tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny.PATH).save_pretrained(tmp_path)
    assert cf.load(str(tmp_path), check=False).tokenizer("Then")["input_ids"]


def test_a_model_in_memory() -> None:
    inner, tokenizer = build("gpt2"), AutoTokenizer.from_pretrained(tiny.PATH)
    model = cf.wrap(inner, tokenizer)
    assert model.hf is inner and model.tokenizer is tokenizer and model.name == "GPT2LMHeadModel"
    assert cf.wrap(inner, name="mine").name == "mine"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, torch.float32),
        ("auto", torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
        ("float64", torch.float64),
    ],
)
def test_the_precision_is_the_one_asked_for(folder: Path, given: Any, expected: torch.dtype) -> None:
    model = cf.load(str(folder), dtype=given)
    assert model.dtype == expected and {p.dtype for p in model.hf.parameters()} == {expected}


def test_the_stored_precision_is_the_default(tmp_path: Path) -> None:
    build("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert cf.load(str(tmp_path)).dtype == torch.bfloat16
    assert cf.load(str(tmp_path), dtype="float32").dtype == torch.float32


def test_keywords_reach_transformers(folder: Path) -> None:
    assert cf.load(str(folder), attn_implementation="eager").hf.config._attn_implementation == "eager"
    assert cf.load(str(folder), device="cpu", backend="hooks").adapter.backend == "hooks"


# -------------------------------------------------------------------- multimodal classes: their text part
def gemma3_with_images() -> hf.Gemma3ForConditionalGeneration:
    """The class that `AutoModelForCausalLM` hands out for Gemma 3 of 4B and more, with the text weights of `build`."""
    text = hf.Gemma3TextConfig(head_dim=8, query_pre_attn_scalar=8, sliding_window=4, **LLAMA)
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    tokens = dict(mm_tokens_per_image=4, image_token_index=100, boi_token_index=101, eoi_token_index=102)
    model = hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text.to_dict(), vision_config=vision, **tokens)
    )
    plain = build("gemma3")
    model.model.language_model.load_state_dict(plain.model.state_dict())
    model.lm_head.load_state_dict(plain.lm_head.state_dict())
    return model.eval()


@pytest.mark.parametrize("backend", ["nnsight", "hooks"])
def test_the_text_part_of_a_multimodal_model(backend: str, tmp_path: Path) -> None:
    with_images = gemma3_with_images()
    with_images.save_pretrained(tmp_path)
    plain = cf.wrap(build("gemma3"), backend=backend)
    task = id_task((7, 5, 6))
    circuit = cf.attribute(plain, task, "eap").top(20)
    expected = [cf.attribute(plain, task, method).values for method in ("eap", "exact")]
    for model in (cf.wrap(with_images, backend=backend), cf.load(str(tmp_path), backend=backend)):
        assert type(model.hf).__name__ == "Gemma3ForConditionalGeneration" and model.graph == plain.graph
        for method, values in zip(("eap", "exact"), expected, strict=True):
            np.testing.assert_allclose(cf.attribute(model, task, method).values, values, atol=1e-6)
        values = [cf.evaluate(m, task, circuit, metric="kl").metric for m in (model, plain)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


# -------------------------------------------------------------------- what does not
def test_unknown_names_are_one_line_offline() -> None:
    message = "there is no such folder, and the hub was not reached or has no such model .*Embedded models: tiny$"
    refused(lambda: cf.load("somebody/no-such-model"), f"cannot load 'somebody/no-such-model': {message}")
    refused(lambda: cf.load("no such model!"), f"cannot load 'no such model!': {message}")
    refused(lambda: cf.load("tinny"), f"cannot load 'tinny': {message}")


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    refused(lambda: cf.load(str(tmp_path)), f"cannot load a causal language model from the folder '{tmp_path}'")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(lambda: cf.load(str(tmp_path)), "cannot load a causal language model from the folder")


def test_weights_that_are_cut_short(tmp_path: Path) -> None:
    shutil.copytree(tiny.PATH, tmp_path / "cut", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(lambda: cf.load(str(tmp_path / "cut")), "from the folder '.*cut': .*header")
    refused(lambda: cf.load(str(weights)), "it is a file; give a .gguf file, or the folder that holds config.json")


def test_models_of_other_kinds(tmp_path: Path) -> None:
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=30)
    bert = hf.BertModel(hf.BertConfig(**small))
    bert.save_pretrained(tmp_path)
    for make in (lambda: cf.wrap(bert), lambda: cf.load(str(tmp_path))):
        refused(make, "model family 'bert' is not covered: no row .* fits its blocks.*family=circuitfind.Family")
    refused(lambda: cf.wrap(build("gpt2").transformer), "GPT2Model has no language modelling head: load it with Auto")
    refused(lambda: cf.wrap(nn.Linear(2, 2)), "Linear is not a Hugging Face model: it has no config")


def test_options_that_do_not_exist(folder: Path) -> None:
    refused(lambda: cf.load(str(folder), dtype="float31"), "dtype 'float31' is unknown: did you mean 'float32'")
    refused(lambda: cf.load(str(folder), backend="jax"), "backend 'jax' is unknown. Known: nnsight, hooks")
    refused(lambda: cf.load(str(folder), device="nowhere"), "cannot put .* on device 'nowhere'")


# -------------------------------------------------------------------- the self-check
def spoiled() -> nn.Module:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    return model


def test_nan_in_the_weights_fails_the_self_check(tmp_path: Path) -> None:
    message = r"self-check failed: 'writers \+ output biases = residual stream' is off by nan .*weights may hold NaN"
    refused(lambda: cf.wrap(spoiled()), message)
    spoiled().save_pretrained(tmp_path)
    refused(lambda: cf.load(str(tmp_path)), message)
    assert cf.load(str(tmp_path), check=False).graph.n_edges == cf.wrap(spoiled(), check=False).graph.n_edges


def test_modified_code_fails_the_self_check() -> None:
    """A layer that adds something of its own to the stream: no writer accounts for it."""
    model = build("llama")
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda module, args, output: output + 1)
    refused(lambda: cf.wrap(model), "'writers .* residual stream' is off by .*Hooks run on model.layers.0: remove")
    assert cf.wrap(model, check=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "gemma2", "gemma3", "cohere", "glm4"])
def test_every_precision_passes_the_self_check(name: str, dtype: torch.dtype) -> None:
    """float64 too, although RMSNorms compute in float32 there."""
    assert cf.wrap(build(name, dtype=dtype)).dtype == dtype


def test_a_bound_task_follows_its_model_to_another_device() -> None:
    model = cf.load("tiny", check=False)
    bound = cf.task("ioi", model, n=2).on(model)
    assert bind(model, bound) is bound

    class Elsewhere(cf.Model):
        device = torch.device("meta")

    moved = bind(Elsewhere(model.name, model.hf, model.tokenizer, model.adapter), bound)
    sides = (*moved.batch.clean, *moved.batch.corrupted, moved.batch.answers, moved.batch.wrong)
    assert {value.device.type for value in sides if value is not None} == {"meta"}
