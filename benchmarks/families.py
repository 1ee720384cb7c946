"""Which causal language models of transformers are covered: `python benchmarks/families.py` prints the page
docs/family-table.md, in two minutes.

Every model type for which `AutoModelForCausalLM` has a class is built small, with random weights that all differ from
their initial values, and wrapped. A type loads if a row fits and all identities hold; else the reason of the refusal is
shown.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import circuitfind as cf
from circuitfind.loading import identities

KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
COMMON: dict[str, Any] = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
EXPERTS = dict(
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "dense_intermediate_size"), 16),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), 1),
)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8)
INDEXED = dict(index_n_heads=2, index_head_dim=8, index_topk=64)
LINEAR = dict(
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_expand=2, mamba_d_ssm=64)
PAGE = """# Every causal language model type of transformers

Made by `python benchmarks/families.py > docs/family-table.md`. Of the {kinds} types for which transformers {version}
has a class behind `AutoModelForCausalLM`, {loads} load. Each was built small and at random, with every weight away
from where it starts. Another form of a type that loads (heads of several sizes, keys shared between layers, an option
of its config) may be refused. [Model families](families.md) says what a row is and how one is inferred.

*Row* is "its own" for a type that has one in the table, else how it was inferred. After *loads* stands the largest
error of the identities, relative to the largest value.

| type | row | verdict |
|---|---|---|
{table}"""
SCALED = dict(residual_multiplier=0.4, embedding_multiplier=3.0, logits_scaling=2.0)
GENERAL = {**SCALED, **COMMON, **EXPERTS, **LATENT, **INDEXED, **LINEAR}
LATENT_HEADS = {**GENERAL, "num_key_value_heads": 4, "head_dim": 4}
LINEAR_FIRST = {**GENERAL, "layer_types": ["linear_attention", "full_attention"]}
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
)
ENCODER = {
    **{name: value for name, value in COMMON.items() if "num_" not in name and name != "head_dim"},
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    "d_model": 32,
}
AS_DECODER = {**COMMON, "is_decoder": True}
LLAMA = {name: value for name, value in COMMON.items() if name != "head_dim"}
GEMMA4 = {
    **COMMON,
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 8,
    "vocab_size_per_layer_input": 128,
    "layer_types": ["sliding_attention", "full_attention"],
}
DRAFT = {
    **GEMMA4,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 0,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {**COMMON, **MAMBA, "mamba_chunk_size": 8, "attn_layer_indices": [1]},
    "blt": {
        **{f"{part}_config": {**LLAMA, "head_dim": 8} for part in ("patcher", "encoder", "decoder", "global")},
        "encoder_hash_byte_group_vocab": 64,
        "vocab_size": 260,
    },
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp"), ENCODER),
    **dict.fromkeys(("pegasus", "plbart", "trocr", "whisper"), ENCODER),
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra"), AS_DECODER),
    **dict.fromkeys(("ernie", "megatron-bert", "roberta", "roberta-prelayernorm", "roformer"), AS_DECODER),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl", "xmod"), AS_DECODER),
    "rembert": {**AS_DECODER, "input_embedding_size": 32, "output_embedding_size": 32},
    "roc_bert": {**AS_DECODER, "pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "codegen": {**COMMON, "rotary_dim": 4, "n_ctx": 64},
    "cohere_compass_text": {
        **COMMON,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "cpmant": {**COMMON, "dim_head": 8, "dim_ff": 48, "prompt_length": 4},
    "ctrl": {**COMMON, "dff": 48},
    "dbrx": {
        **{name: value for name, value in COMMON.items() if "_size" not in name and "num_" not in name},
        "vocab_size": 128,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {**GENERAL, "num_key_value_heads": 4},
    "emu3": {"text_config": COMMON, "vq_config": {"base_channels": 32, "channel_multiplier": [1], "embed_dim": 8}},
    "falcon_h1": {**COMMON, **MAMBA, "mamba_chunk_size": 8},
    "falcon": {name: value for name, value in COMMON.items() if name not in ("head_dim", "num_key_value_heads")},
    "fuyu": {**COMMON, "num_key_value_heads": 4},
    "gemma3": {"text_config": COMMON, "vision_config": VISION},
    "gemma3n_text": {
        **COMMON,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4": {"text_config": GEMMA4},
    "gemma4_unified_assistant": {"text_config": DRAFT, "backbone_hidden_size": 32},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4,
    "git": {**COMMON, "vision_config": VISION},
    "got_ocr2": {
        "text_config": {**COMMON, "model_type": "qwen2"},
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "output_channels": 8,
        },
    },
    "gpt_neo": {**COMMON, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gptj": {**COMMON, "rotary_dim": 4},
    "granitemoehybrid": {
        **GENERAL,
        **MAMBA,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 16,
        "num_local_experts": 0,
    },
    "jamba": {**GENERAL, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), LINEAR_FIRST),
    "recurrent_gemma": {**COMMON, "block_types": ["recurrent", "attention"], "lru_width": 32},
    "kimi_linear": {
        **GENERAL,
        "num_key_value_heads": 4,
        "linear_attn_config": {
            "num_heads": 2,
            "head_dim": 8,
            "short_conv_kernel_size": 2,
            "kda_layers": [1],
            "full_attn_layers": [2],
        },
    },
    "llama4": {"text_config": {**COMMON, **EXPERTS, "intermediate_size_mlp": 48}, "vision_config": VISION},
    "llama4_text": {**COMMON, **EXPERTS, "intermediate_size_mlp": 48},
    "lfm2_moe": {**GENERAL, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {**COMMON, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"), LATENT_HEADS),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), LATENT_HEADS),
    "minicpm3": {**COMMON, **LATENT, "num_key_value_heads": 4, "head_dim": 4},
    "minimax": {**GENERAL, "layer_types": ["full_attention", "linear_attention"]},
    "mllama": {
        "text_config": {**COMMON, "cross_attention_layers": [1]},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
        },
    },
    "moss_transcribe_diarize": {
        "text_config": {**COMMON, "model_type": "qwen3"},
        "audio_config": {
            **ENCODER,
            "d_model": 16,
            "encoder_attention_heads": 2,
            "encoder_layers": 1,
            "num_mel_bins": 8,
        },
    },
    "phi4_multimodal": {
        **COMMON,
        "vision_config": {**VISION, "crop_size": 16},
        "audio_config": {
            "hidden_size": 16,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "nemo_conv_channels": 8,
            "depthwise_separable_out_channel": 16,
            "ext_pw_out_channel": 16,
        },
    },
    "prophetnet": {
        "vocab_size": 128,
        "hidden_size": 32,
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
        "is_decoder": True,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "encoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "ngram": 1,
    },
    "qwen3_5": {"text_config": LINEAR_FIRST, "vision_config": VISION},
    "qwen3_5_moe": {"text_config": LINEAR_FIRST, "vision_config": VISION},
    "qwen4_exp": {"text_config": GENERAL},
    "reformer": {
        **COMMON,
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "axial_pos_embds": False,
        "num_attention_heads": 4,
        "attention_head_size": 8,
        "feed_forward_size": 48,
    },
    "xlnet": {"d_head": 8, **{name: value for name, value in COMMON.items() if name != "max_position_embeddings"}},
    "zamba": {**COMMON, "layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 1},
    "xlstm": COMMON,
    "zaya": {**COMMON, "num_experts": 4, "moe_intermediate_size": 16},
    "zamba2": {**COMMON, **MAMBA, "layers_block_type": ["mamba", "hybrid"]},
}


def config_of(kind: str) -> Any:
    make = transformers.CONFIG_MAPPING[kind]
    return make(**SPECIAL.get(kind, GENERAL))


NOT_BUILT = {
    "dots3_note": "no small one can be built; see dots3_note_text",
    "gemma3n": "its vision tower needs the package timm; see gemma3n_text",
    "gemma4_assistant": "transformers refuses every config of it with few layers; see gemma4_unified_assistant",
    **dict.fromkeys(("musicgen", "musicgen_melody"), "transformers cannot build it from a config of its type"),
    "zamba": "no small one can be built: transformers cannot tie the weights of two layers; see zamba2",
}
"""Types that cannot be built here, and why."""


class Verdict(NamedTuple):
    """Of a type: the row that was taken and the largest error of the identities, or why it is refused."""

    kind: str
    row: str
    error: float | None
    why: str


def build(kind: str) -> nn.Module:
    """A small random model of the type, with weights that make every part of it matter."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config_of(kind)).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(4)
            elif name.endswith("bias") or "sinks" in name:
                weight.normal_(0, 0.3)
            else:
                weight.add_(torch.randn_like(weight) * 0.2)
    return model


def verdict(kind: str) -> Verdict:
    """Wraps a small model of the type."""
    try:
        model = cf.wrap(build(kind))
    except cf.ModelError as refusal:
        return Verdict(kind, "", None, str(refusal))
    return Verdict(kind, model.row or "its own", max(one.error for one in identities(model)), "")


def cells(found: Verdict) -> str:
    """A line of the table."""
    if found.error is None:
        why = found.why.rpartition("is not covered: ")[2].partition("; a pre-norm model")[0]
        return f"| `{found.kind}` | | refused: {why} |"
    return f"| `{found.kind}` | {found.row} | loads; {found.error:.0e} |"


def main() -> None:
    logging.set_verbosity_error()
    kinds = sys.argv[1:] or KINDS
    lines = [
        f"| `{kind}` | | not tried: {NOT_BUILT[kind]} |" if kind in NOT_BUILT else cells(verdict(kind))
        for kind in kinds
    ]
    loads = sum("| loads;" in line for line in lines)
    print(PAGE.format(loads=loads, kinds=len(kinds), version=transformers.__version__, table="\n".join(lines)))


if __name__ == "__main__":
    main()
