"""Small random models of every covered family.

Matrices are scaled up and every bias and norm weight is randomised: at default initialisation attention is nearly
uniform and biases are zero, which hides half of all mistakes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

VOCAB = 128
SIZE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
)
IDS = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = {**SIZE, **IDS, "num_key_value_heads": 2}
NEOX = {**SIZE, **IDS}
GPT = dict(n_layer=2, n_head=4, n_embd=32, n_positions=64, **IDS)
FALCON = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **IDS)


LATENT = {**NEOX, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
YARN = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    original_max_position_embeddings=16,
    max_position_embeddings=64,
    llama_4_scaling_beta=0.1,
    partial_rotary_factor=0.4,
)
MIXED, LINEAR = ["conv", "full_attention"], ["linear_attention", "full_attention"]
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_d_conv=3, mamba_chunk_size=4)
DELTA = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=3,
)
Q_LATENT = {**LATENT, "q_lora_rank": 12}


def _moe(**more: Any) -> dict[str, Any]:
    return {**LLAMA, "num_experts_per_tok": 2, **more}


def _latent_moe(**more: Any) -> dict[str, Any]:
    few = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1)
    return {**few, "num_key_value_heads": 4, **more}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT)),
    "gpt_neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
            max_position_embeddings=64,
            **IDS,
        )
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**NEOX)),
    "gpt_neox-sequential": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(use_parallel_residual=False, **NEOX)),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(rotary_dim=4, **GPT)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            **IDS,
        )
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **IDS)),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**FALCON)),
    "falcon-multihead": lambda: hf.FalconForCausalLM(hf.FalconConfig(multi_query=False, **FALCON)),
    "falcon-sequential": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(parallel_attn=False, multi_query=False, bias=True, alibi=True, **FALCON)
    ),
    "falcon-new": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(new_decoder_architecture=True, num_kv_heads=2, **FALCON)
    ),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**LLAMA)),
    "phi-qk-norm": lambda: hf.PhiForCausalLM(hf.PhiConfig(qk_layernorm=True, **LLAMA)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**LLAMA)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
    "llama-biased": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(attention_bias=True, mlp_bias=True, **LLAMA)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(sliding_window=4, **LLAMA)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_moe(num_local_experts=4))),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(head_dim=8, **LLAMA)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(head_dim=8, **_moe(num_experts=4, moe_intermediate_size=16))
    ),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(head_dim=8, **LLAMA)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(head_dim=8, query_pre_attn_scalar=8, sliding_window=4, **LLAMA)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(head_dim=8, query_pre_attn_scalar=8, sliding_window=4, **LLAMA)
    ),
    "olmo": lambda: hf.OlmoForCausalLM(hf.OlmoConfig(**LLAMA)),
    "olmo-clipped": lambda: hf.OlmoForCausalLM(hf.OlmoConfig(clip_qkv=0.5, **LLAMA)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**LLAMA)),
    "granite": lambda: hf.GraniteForCausalLM(
        hf.GraniteConfig(residual_multiplier=0.4, logits_scaling=2.0, embedding_multiplier=3.0, **LLAMA)
    ),
    "granite-biased": lambda: hf.GraniteForCausalLM(
        hf.GraniteConfig(residual_multiplier=0.4, attention_bias=True, mlp_bias=True, **LLAMA)
    ),
    "glm4": lambda: hf.Glm4ForCausalLM(hf.Glm4Config(head_dim=8, **LLAMA)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**LLAMA)),
    "starcoder2": lambda: hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**LLAMA)),
    "stablelm": lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**LLAMA)),
    "stablelm-parallel": lambda: hf.StableLmForCausalLM(hf.StableLmConfig(use_parallel_residual=True, **LLAMA)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**LLAMA)),
    "codegen": lambda: hf.CodeGenForCausalLM(hf.CodeGenConfig(rotary_dim=4, n_ctx=64, **GPT)),
    "ctrl": lambda: hf.CTRLLMHeadModel(hf.CTRLConfig(dff=48, **GPT)),
    "dbrx": lambda: hf.DbrxForCausalLM(
        hf.DbrxConfig(
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            attn_config={"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
            **IDS,
        )
    ),
    "gpt_bigcode": lambda: hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(**GPT)),
    "gpt_bigcode-multihead": lambda: hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(multi_query=False, **GPT)),
    "granitemoe": lambda: hf.GraniteMoeForCausalLM(
        hf.GraniteMoeConfig(residual_multiplier=0.4, **_moe(num_local_experts=4))
    ),
    "llama4_text": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            head_dim=8, intermediate_size_mlp=48, interleave_moe_layer_step=2, **_moe(num_local_experts=4)
        )
    ),
    "modernbert-decoder": lambda: hf.ModernBertDecoderForCausalLM(
        hf.ModernBertDecoderConfig(global_attn_every_n_layers=2, local_attention=8, **NEOX)
    ),
    "moshi": lambda: hf.MoshiForCausalLM(hf.MoshiConfig(ffn_dim=48, head_dim=8, **LLAMA)),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, **IDS)),
    "nanochat": lambda: hf.NanoChatForCausalLM(hf.NanoChatConfig(**LLAMA)),
    "persimmon": lambda: hf.PersimmonForCausalLM(hf.PersimmonConfig(**NEOX)),
    "deepseek_v2": lambda: hf.DeepseekV2ForCausalLM(
        hf.DeepseekV2Config(q_lora_rank=None, first_k_dense_replace=1, **_latent_moe(**LATENT))
    ),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(attention_bias=True, first_k_dense_replace=1, **_latent_moe(**Q_LATENT))
    ),
    "glm4_moe_lite": lambda: hf.Glm4MoeLiteForCausalLM(hf.Glm4MoeLiteConfig(**_latent_moe(**Q_LATENT))),
    "axk1": lambda: hf.AXK1ForCausalLM(hf.AXK1Config(**_latent_moe(**Q_LATENT))),
    "mistral4": lambda: hf.Mistral4ForCausalLM(
        hf.Mistral4Config(rope_parameters=dict(YARN), **_latent_moe(**Q_LATENT))
    ),
    "youtu": lambda: hf.YoutuForCausalLM(hf.YoutuConfig(num_key_value_heads=4, **Q_LATENT)),
    "youtu-direct": lambda: hf.YoutuForCausalLM(hf.YoutuConfig(num_key_value_heads=4, q_lora_rank=None, **LATENT)),
    "minicpm3": lambda: hf.MiniCPM3ForCausalLM(
        hf.MiniCPM3Config(num_key_value_heads=4, scale_depth=1.2, dim_model_base=16, **Q_LATENT)
    ),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(head_dim=8, **_moe(num_local_experts=4))),
}
MODELS |= {  # hybrids
    "lfm2": lambda: hf.Lfm2ForCausalLM(
        hf.Lfm2Config(layer_types=MIXED, block_auto_adjust_ff_dim=False, conv_bias=True, **LLAMA)
    ),
    "lfm2_moe": lambda: hf.Lfm2MoeForCausalLM(
        hf.Lfm2MoeConfig(layer_types=MIXED, num_dense_layers=1, **_moe(num_experts=4, moe_intermediate_size=16))
    ),
    "bamba": lambda: hf.BambaForCausalLM(hf.BambaConfig(attn_layer_indices=[1], **MAMBA, **LLAMA)),
    "granitemoehybrid": lambda: hf.GraniteMoeHybridForCausalLM(
        hf.GraniteMoeHybridConfig(
            layer_types=["mamba", "attention"],
            num_local_experts=0,
            shared_intermediate_size=48,
            residual_multiplier=0.4,
            logits_scaling=2.0,
            **MAMBA,
            **LLAMA,
        )
    ),
    "jamba": lambda: hf.JambaForCausalLM(
        hf.JambaConfig(
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=8,
            mamba_d_conv=3,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
            **_moe(num_experts=4),
        )
    ),
    "olmo_hybrid": lambda: hf.OlmoHybridForCausalLM(hf.OlmoHybridConfig(layer_types=LINEAR, **DELTA, **LLAMA)),
    "qwen3_next": lambda: hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(
            layer_types=LINEAR,
            head_dim=8,
            shared_expert_intermediate_size=16,
            **DELTA,
            **_moe(num_experts=4, moe_intermediate_size=16),
        )
    ),
    "qwen3_5_text": lambda: hf.Qwen3_5ForCausalLM(
        hf.Qwen3_5TextConfig(layer_types=LINEAR, head_dim=8, **DELTA, **LLAMA)
    ),
    "qwen3_5_moe_text": lambda: hf.Qwen3_5MoeForCausalLM(
        hf.Qwen3_5MoeTextConfig(
            layer_types=LINEAR,
            head_dim=8,
            shared_expert_intermediate_size=16,
            **DELTA,
            **_moe(num_experts=4, moe_intermediate_size=16),
        )
    ),
    "kimi_linear": lambda: hf.KimiLinearForCausalLM(
        hf.KimiLinearConfig(
            layer_types=LINEAR,
            linear_head_dim=8,
            linear_num_heads=2,
            linear_conv_kernel_dim=3,
            **_latent_moe(**{**LATENT, "num_local_experts": 4}),
        )
    ),
    "recurrent_gemma": lambda: hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(
            block_types=["recurrent", "attention"],
            lru_width=32,
            conv1d_width=3,
            attention_window_size=4,
            head_dim=8,
            **{key: value for key, value in LLAMA.items() if key != "max_position_embeddings"},
        )
    ),
}
EVERY_FAMILY = sorted(MODELS)
STRUCTURES = ["bloom", "codegen", "ctrl", "dbrx", "deepseek_v3", "falcon-multihead", "falcon-new", "falcon-sequential"]
STRUCTURES += ["gemma2", "gpt2", "gpt_neox", "gpt_neox-sequential", "gpt_oss", "gptj", "kimi_linear", "lfm2", "llama"]
STRUCTURES += ["llama4_text", "modernbert-decoder", "mpt", "olmo", "olmo2", "olmo_hybrid", "opt", "phi", "phi3"]
STRUCTURES += ["qwen3_next", "recurrent_gemma"]
"""One family of each structure (`test_families.structure`): the engine knows no other difference between families, so
what it does with values once they are read is tested on these. Reading and writing them is tested on every family."""
HYBRIDS = ["bamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "olmo_hybrid", "qwen3_5_moe_text"]
HYBRIDS += ["qwen3_5_text", "qwen3_next", "recurrent_gemma"]


def swept(names: Iterable[str]) -> list[Any]:
    """Parameters of a test that meets families only as structures: it is `slow` where another family has the same."""
    return [pytest.param(name, marks=() if name in STRUCTURES else pytest.mark.slow) for name in names]


def build(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str | None = None, heads: int | None = None
) -> nn.Module:
    """A random model of the family, with weights that make every part of it matter.

    `heads`: so many query heads, where the family's model has four: a graph of half as many nodes.
    """
    model = copy.deepcopy(_built(name, seed, heads))  # tests may change theirs; a copy costs a tenth of a new one
    torch.manual_seed(seed)  # what a test draws next does not depend on who built first
    if attention:
        model.set_attn_implementation(attention)
    return model.to(dtype)


@cache
def _built(name: str, seed: int, heads: int | None) -> nn.Module:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MODELS[name]().eval()
        if heads is not None:
            config = copy.deepcopy(model.config)
            shared = getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads)
            config.num_attention_heads = heads
            if shared:
                config.num_key_value_heads = heads // 2
            model = type(model)(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            elif key.endswith("bias") or "sinks" in key:
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
