"""GGUF files: a small one written here, which loads as the weights that it holds; what cannot be loaded is one line.

Files of real models are in `test_real_models.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

import circuitfind as cf
from circuitfind.cli.app import main
from circuitfind.errors import ModelError
from circuitfind.models import gguf_files, tiny

NAMES = {"self_attn.": "attn_", "o_proj": "output", "mlp.": "ffn_", "_proj": "", "input_layernorm": "attn_norm"}
NAMES |= {"post_attention_layernorm": "ffn_norm", "model.layers.": "blk.", "model.norm": "output_norm"}
NAMES |= {"model.embed_tokens": "token_embd"}


def gguf_name(name: str) -> str:
    """What llama.cpp calls a weight of Qwen 2."""
    for own, other in NAMES.items():
        name = name.replace(own, other)
    return name


@pytest.fixture(scope="module")
def qwen() -> nn.Module:
    """A random Qwen 2 in the embedded model's tokens."""
    torch.manual_seed(0)
    tokens = hf.AutoTokenizer.from_pretrained(tiny.PATH)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config = hf.Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=len(tokens), tie_word_embeddings=True)
    model = hf.Qwen2ForCausalLM(config).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2) if weight.ndim > 1 else nn.init.normal_(weight, 1, 0.2)
    return model


@pytest.fixture(scope="module")
def file(qwen: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as llama.cpp's tools write it, its matrices as Q8_0; and in `qwen` what is left of them."""
    gguf = import_module("gguf")
    path, config, kind = tmp_path_factory.mktemp("gguf") / "qwen.gguf", qwen.config, gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("small")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    content = json.loads((tiny.PATH / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = hf.AutoTokenizer.from_pretrained(tiny.PATH)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens.convert_ids_to_tokens(range(len(tokens))))
    writer.add_token_types([3 if index in tokens.all_special_ids else 1 for index in range(len(tokens))])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in content["merges"]])
    writer.add_eos_token_id(tokens.eos_token_id)
    for name, weight in qwen.named_parameters():
        values = weight.detach().numpy()
        if weight.ndim > 1:
            blocks = gguf.quants.quantize(values, kind)
            weight.data = torch.from_numpy(gguf.quants.dequantize(blocks, kind)).clone()
            writer.add_tensor(gguf_name(name), blocks, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture()
def model(file: Path) -> Iterator[cf.Model]:
    yield cf.load(file)


def refused(name: Any, message: str, **keywords: Any) -> None:
    with pytest.raises(ModelError, match=message) as error:
        cf.load(name, **keywords)
    assert "\n" not in str(error.value)


def task(model: cf.Model) -> cf.Task:
    return cf.task("ioi", model, n=3, template="abba-3")


# -------------------------------------------------------------------- what works
def test_a_file_loads_as_the_weights_that_it_holds(model: cf.Model, qwen: nn.Module, tmp_path: Path) -> None:
    assert model.dequantised == "float32 from GGUF Q8_0" and model.dtype == torch.float32
    own = hf.AutoTokenizer.from_pretrained(tiny.PATH)
    text = "Then, Mary and John went to the store."
    assert model.tokenizer(text)["input_ids"] == own(text)["input_ids"]
    assert cf.attention(model, text, "a0.h0").record.settings["weights"] == model.dequantised
    model.hf.save_pretrained(tmp_path)
    expected = cf.attribute(cf.wrap(qwen, own), task(model), "eap")
    for other in (model, cf.wrap(hf.AutoModelForCausalLM.from_pretrained(tmp_path), own), cf.load(tmp_path)):
        other = other if other.tokenizer else cf.wrap(other.hf, own)
        scores = cf.attribute(other, task(model), "eap")
        np.testing.assert_array_equal(scores.values, expected.values)
        assert scores.record.settings.get("weights") == (model.dequantised if other is model else None)


def test_paths_of_every_kind(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(file.parent))
    monkeypatch.chdir(file.parent)
    for name in (file, "qwen.gguf", "./qwen.gguf", "~/qwen.gguf"):
        assert cf.load(name, check=False).name == os.fspath(name)
    given = cf.load(file.parent, gguf_file=file.name, dtype="bfloat16")
    assert given.name == str(file) and given.dequantised == "bfloat16 from GGUF Q8_0"


def test_a_model_that_transformers_read_itself(file: Path) -> None:
    """Its config is marked as quantised, its weights are not."""
    loaded = hf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    assert loaded.config.quantization_config.quant_method == "gguf"
    wrapped = cf.wrap(loaded)
    assert wrapped.dequantised == "float32 from GGUF"
    assert loaded.config.quantization_config.quant_method == "gguf"  # wrapping changes nothing
    ids = torch.tensor([[5, 6, 7]])
    scores = cf.attribute(wrapped, cf.Task(ids, ids + 1, metric="kl"), "exact")
    assert scores.record.settings["weights"] == wrapped.dequantised


def test_library_functions_are_put_back(file: Path) -> None:
    gguf = import_module("gguf")
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    cf.load(file, check=False)
    refused(file, "keyword 'nonsense' is unknown to transformers", nonsense=1)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_the_command_line_says_where_the_weights_come_from(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(file), "--n", "4", "--method", "eap", "--out", str(tmp_path)]
    assert main(["attribute", *words]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "float32 from GGUF Q8_0 on" in said
    assert cf.Scores.open(tmp_path / "scores.safetensors").record.settings["weights"] == "float32 from GGUF Q8_0"
    assert main(["attribute", *words, "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["weights"] == "bfloat16 from GGUF Q8_0"
    assert main(["doctor", str(file)]) == 0
    assert main(["tasks", str(file), "--show", "ioi"]) == 0


# -------------------------------------------------------------------- what does not
def test_files_that_are_not_there(file: Path, tmp_path: Path) -> None:
    refused(tmp_path / "no.gguf", "cannot load '.*no.gguf': there is no such file$")
    refused(file.parent / "no.gguf", f"there is no such file; give one of the GGUF files in that folder: {file}$")
    refused("no.gguf", "cannot load 'no.gguf': there is no such file$")
    refused("owner/name/no.gguf", "cannot load 'owner/name/no.gguf': .* the hub was not reached or has no such model")


def test_a_folder_of_files_asks_for_one(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).touch()
    refused(tmp_path, f"give one of the GGUF files in that folder: {tmp_path}/a.gguf, {tmp_path}/b.gguf$")


@pytest.mark.parametrize("part", [0, 20, 5_000, 0.5])
def test_broken_files(part: float, file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content[: part if part >= 1 else int(part * len(content))])
    refused(broken, "cannot load '.*broken.gguf': transformers cannot read this GGUF file; it may be truncated")
    broken.write_text("a page of the hub, saved as a file")
    refused(broken, "transformers cannot read this GGUF file; .*magic")


def test_files_of_other_models(tmp_path: Path) -> None:
    gguf = import_module("gguf")
    for kind, message in (("mamba", "model family 'mamba' is not covered"), ("abacus", "abacus is not supported")):
        writer = gguf.GGUFWriter(tmp_path / f"{kind}.gguf", kind)
        writer.add_tensor("weight", np.zeros((2, 2), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        refused(tmp_path / f"{kind}.gguf", message)


def test_missing_packages_are_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None)
    install = r"\S*python\S* -m pip install"
    refused(file, f"a GGUF file, which needs gguf and accelerate, which are not installed: {install} gguf accelerate$")
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None if name == "accelerate" else object())
    refused(file, f"needs accelerate, which is not installed: {install} accelerate$")


def test_no_server_has_the_file(file: Path) -> None:
    refused(file, "with remote= the server has the weights, and '.*' is a file here", remote=True)
