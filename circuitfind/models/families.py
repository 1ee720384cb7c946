"""The table of architecture families: the names of the modules that the adapter needs.

A new family is one row here. From outside the package, pass a `Family` to `circuitfind.wrap` or `circuitfind.load`, or
add it with `register`. Everything else is read from the model's config and modules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from circuitfind.errors import ModelError, NoFile, entered, imported, unknown

ANY = object()
INDEXED = "its indexer reads the stream beside q, k and v, and chooses the tokens that attention sees"


@dataclass(frozen=True)
class Family(NoFile):
    """Module names of one architecture family; the defaults are Llama's.

    Attributes:
        layers, final_norm: paths in the model of the list of blocks and of the norm before the unembedding. All other
            paths start at a block.
        q, k, v: the three projections, unless `qkv` is given.
        qkv: the fused projection. `layout` is the order of its output features: "concat" (all q, all k, all v),
            "per_head" (q, k, v of head 0, then of head 1, ...), "grouped" (for each key/value head its query heads,
            then k, then v) or "four_blocks" (for each quarter of the heads its q, its v, then its k).
        kv, kv_latent, kv_latent_norm: in latent attention (`latent.py`), in place of k and v: the projection from the
            latent to keys and values, the projection from the stream to the latent, and the norm between them.
        q_latent, q_latent_norm: the projection from the stream to q's latent and its norm, if q has a latent.
        o: the attention's output projection; its *input* is the concatenated heads.
        attn, mlp: modules that can be skipped when their result is known; None if they add the residual stream
            themselves or consist of several modules.
        attn_norm, mlp_norm: the norms before attention and MLP, if any.
        post_attn_norm, post_mlp_norm: the norms after attention and MLP, if any (Gemma 2, OLMo 2, GLM 4).
        mlp_in, mlp_out: the module whose input is the MLP's input (after its norm), and the one whose output is the
            MLP's output.
        down: the MLP's output projection, if there is a single one.
        parallel: attention and MLP read the same residual stream.
        residual_multiplier: the attribute of the config (or else of a block) that scales what a layer adds, if any.
        variants: (config attribute, value, changes): changes to this row for models with this value.
        refuse: (config attribute, value, reason): models that are not covered; `ANY` is any value but 0 and None.
        mixer: the module in place of attention (`mixer.py`), whose input is the normed stream. `attn` must name it,
            too, and `o` its output projection.
        gated: the output of `q` holds, for each head, its query and a gate of the head's output.
        forms: (module, changes): changes to this row for blocks that have this module.
    """

    layers: str = "model.layers"
    final_norm: str = "model.norm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str | None = None
    layout: str = "concat"
    kv: str | None = None
    kv_latent: str | None = None
    kv_latent_norm: str | None = None
    q_latent: str | None = None
    q_latent_norm: str | None = None
    o: str = "self_attn.o_proj"
    attn: str | None = "self_attn"
    attn_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    post_attn_norm: str | None = None
    post_mlp_norm: str | None = None
    mlp: str | None = "mlp"
    mlp_in: str = "mlp"
    mlp_out: str = "mlp"
    down: str | None = "mlp.down_proj"
    parallel: bool = False
    residual_multiplier: str | None = None
    variants: tuple[tuple[str, Any, dict[str, Any]], ...] = ()
    refuse: tuple[tuple[str, Any, str], ...] = ()
    mixer: str | None = None
    gated: bool = False
    forms: tuple[tuple[str, dict[str, Any]], ...] = ()

    def of_block(self, block: Any) -> Family:
        """Return the row with the changes for a block, by its modules (`forms`)."""
        there = {path for path, _ in block.named_modules()} if self.forms else set()
        return next((replace(self, **changes) for module, changes in self.forms if module in there), self)

    @property
    def projections(self) -> tuple[str, ...]:
        """The fields that name the sources of q, k and v; each is the name of a site."""
        if self.mixer:
            return ("mixer",)
        if self.kv:
            return ("q", "kv_latent", "kv")
        return ("qkv",) if self.qkv else ("q", "k", "v")


def _qkv(path: str) -> dict[str, Any]:
    """Return the paths of the q, k and v projections; `{}` in the path is the letter."""
    return {kind: path.format(kind) for kind in "qkv"}


def _mlp(path: str) -> dict[str, Any]:
    """Return the fields of an MLP that is one module."""
    return dict.fromkeys(("mlp", "mlp_in", "mlp_out"), path)


LAYOUTS = ("concat", "per_head", "grouped", "four_blocks")
LATENT_NORMS = ("q_latent_norm", "kv_latent_norm")
NORMS = ("attn_norm", "mlp_norm", "post_attn_norm", "post_mlp_norm")  # of a block
LLAMA = Family()
MOE = replace(LLAMA, down=None)  # expert biases depend on the routing: they are part of the MLP, not constants
SANDWICH = replace(
    LLAMA,
    post_attn_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)
OLMO2 = replace(
    LLAMA,
    attn_norm=None,
    mlp_norm=None,
    post_attn_norm="post_attention_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)
LATENT = replace(
    LLAMA,
    q="self_attn.q_b_proj",
    q_latent="self_attn.q_a_proj",
    q_latent_norm="self_attn.q_a_layernorm",
    kv="self_attn.kv_b_proj",
    kv_latent="self_attn.kv_a_proj_with_mqa",
    kv_latent_norm="self_attn.kv_a_layernorm",
    variants=(("q_lora_rank", None, {"q": "self_attn.q_proj", "q_latent": None, "q_latent_norm": None}),),
)
LATENT_MOE = replace(LATENT, down=None)
LFM2 = replace(
    LLAMA,
    final_norm="model.embedding_norm",
    o="self_attn.out_proj",
    attn_norm="operator_norm",
    mlp_norm="ffn_norm",
    **_mlp("feed_forward"),
    down="feed_forward.w2",
    forms=(("conv", {"mixer": "conv", "attn": "conv", "o": "conv.out_proj"}),),
)
_MAMBA = ("mamba", {"mixer": "mamba", "attn": "mamba", "o": "mamba.out_proj"})
_KIMI = {"mixer": "self_attn", **dict.fromkeys(("kv", "kv_latent", "kv_latent_norm", "q_latent", "q_latent_norm"))}
_PRE_NORMED = {name: getattr(LLAMA, name) for name in NORMS}
_DELTA = {"mixer": "linear_attn", "attn": "linear_attn", "o": "linear_attn.out_proj"}
BAMBA = replace(
    LLAMA,
    final_norm="model.final_layernorm",
    mlp_norm="pre_ff_layernorm",
    **_mlp("feed_forward"),
    down="feed_forward.down_proj",
    forms=(_MAMBA,),
)
GPT2 = Family(
    layers="transformer.h",
    final_norm="transformer.ln_f",
    qkv="attn.c_attn",
    o="attn.c_proj",
    attn="attn",
    attn_norm="ln_1",
    mlp_norm="ln_2",
    down="mlp.c_proj",
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo", "smollm3"), LLAMA),
    **dict.fromkeys(("mixtral", "qwen3_moe", "gpt_oss"), MOE),
    **dict.fromkeys(("gemma2", "gemma3_text"), SANDWICH),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "axk1", "mistral4"), LATENT_MOE),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), replace(LATENT_MOE, refuse=(("index_topk", ANY, INDEXED),))),
    "youtu": LATENT,
    "lfm2": LFM2,
    "lfm2_moe": replace(LFM2, down=None),
    "bamba": BAMBA,
    "jamba": replace(BAMBA, down=None),
    "granitemoehybrid": replace(
        LLAMA,
        **_mlp("shared_mlp"),
        down="shared_mlp.output_linear",
        residual_multiplier="residual_multiplier",
        forms=(_MAMBA,),
        refuse=(("num_local_experts", ANY, "experts and a shared MLP are added side by side"),),
    ),
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text"), replace(MOE, gated=True, forms=(("linear_attn", _DELTA),))),
    "qwen3_5_text": replace(LLAMA, gated=True, forms=(("linear_attn", _DELTA),)),
    "kimi_linear": replace(LATENT_MOE, forms=(("self_attn.conv1d", _KIMI),)),
    "olmo_hybrid": replace(OLMO2, forms=(("linear_attn", {**_DELTA, **_PRE_NORMED, "o": "linear_attn.o_proj"}),)),
    "recurrent_gemma": replace(
        LLAMA,
        final_norm="model.final_norm",
        **_qkv("temporal_block.{}_proj"),
        o="temporal_block.o_proj",
        attn="temporal_block",
        attn_norm="temporal_pre_norm",
        mlp_norm="channel_pre_norm",
        **_mlp("mlp_block"),
        down="mlp_block.down_proj",
        forms=(("temporal_block.linear_out", {"mixer": "temporal_block", "o": "temporal_block.linear_out"}),),
    ),
    "minicpm3": replace(LATENT, residual_multiplier="residual_scale"),
    "gpt2": replace(GPT2, refuse=(("add_cross_attention", True, "it has cross-attention"),)),
    "gpt_neo": replace(GPT2, qkv=None, **_qkv("attn.attention.{}_proj"), o="attn.attention.out_proj"),
    "gptj": replace(
        GPT2,
        qkv=None,
        **_qkv("attn.{}_proj"),
        o="attn.out_proj",
        mlp_norm="ln_1",
        down="mlp.fc_out",
        parallel=True,
    ),
    "gpt_neox": Family(
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        qkv="attention.query_key_value",
        layout="per_head",
        o="attention.dense",
        attn="attention",
        down="mlp.dense_4h_to_h",
        variants=(("use_parallel_residual", True, {"parallel": True}),),
    ),
    "opt": Family(
        layers="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        o="self_attn.out_proj",
        attn_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        mlp=None,
        mlp_in="fc1",
        mlp_out="fc2",
        down="fc2",
        refuse=(
            ("do_layer_norm_before", False, "its norms come after the residual addition (post-LN, as OPT-350m)"),
            ("_remove_final_layer_norm", True, "it has no final norm"),
        ),
    ),
    "bloom": Family(
        layers="transformer.h",
        final_norm="transformer.ln_f",
        qkv="self_attention.query_key_value",
        layout="per_head",
        o="self_attention.dense",
        attn=None,
        mlp=None,
        mlp_in="mlp.dense_h_to_4h",
        mlp_out="mlp.dense_4h_to_h",
        down="mlp.dense_4h_to_h",
        refuse=(
            ("apply_residual_connection_post_layernorm", True, "its residual is taken after the norm"),
            ("slow_but_exact", True, "its output projections are split over slices (set slow_but_exact=False)"),
        ),
    ),
    "falcon": Family(
        layers="transformer.h",
        final_norm="transformer.ln_f",
        qkv="self_attention.query_key_value",
        layout="grouped",
        o="self_attention.dense",
        attn="self_attention",
        mlp_norm="input_layernorm",
        down="mlp.dense_4h_to_h",
        parallel=True,
        variants=(
            ("parallel_attn", False, {"parallel": False, "mlp_norm": "post_attention_layernorm"}),
            ("num_ln_in_parallel_attn", 2, {"parallel": True, "attn_norm": "ln_attn", "mlp_norm": "ln_mlp"}),
        ),
    ),
    "phi": replace(
        LLAMA,
        final_norm="model.final_layernorm",
        o="self_attn.dense",
        mlp_norm="input_layernorm",
        down="mlp.fc2",
        parallel=True,
    ),
    "phi3": replace(LLAMA, qkv="self_attn.qkv_proj"),
    "olmo2": OLMO2,
    "granite": replace(LLAMA, residual_multiplier="residual_multiplier"),
    "glm4": replace(LLAMA, post_attn_norm="post_self_attn_layernorm", post_mlp_norm="post_mlp_layernorm"),
    "cohere": replace(LLAMA, mlp_norm="input_layernorm", parallel=True),
    "starcoder2": replace(LLAMA, down="mlp.c_proj"),
    "codegen": replace(
        GPT2,
        qkv="attn.qkv_proj",
        layout="four_blocks",
        o="attn.out_proj",
        mlp_norm="ln_1",
        down="mlp.fc_out",
        parallel=True,
    ),
    "ctrl": Family(
        layers="transformer.h",
        final_norm="transformer.layernorm",
        **_qkv("multi_head_attention.W{}"),
        o="multi_head_attention.dense",
        attn="multi_head_attention",
        attn_norm="layernorm1",
        mlp_norm="layernorm2",
        **_mlp("ffn"),
        down="ffn.2",
    ),
    "dbrx": Family(
        layers="transformer.blocks",
        final_norm="transformer.norm_f",
        qkv="norm_attn_norm.attn.Wqkv",
        o="norm_attn_norm.attn.out_proj",
        attn="norm_attn_norm.attn",
        attn_norm="norm_attn_norm.norm_1",
        mlp_norm="norm_attn_norm.norm_2",
        **_mlp("ffn"),
        down=None,
    ),
    "gpt_bigcode": replace(GPT2, layout="per_head", variants=(("multi_query", True, {"layout": "concat"}),)),
    "granitemoe": replace(MOE, **_mlp("block_sparse_moe"), residual_multiplier="residual_multiplier"),
    "llama4_text": replace(MOE, **_mlp("feed_forward")),
    "modernbert-decoder": replace(
        LLAMA,
        final_norm="model.final_norm",
        **_qkv("attn.{}_proj"),
        o="attn.Wo",
        attn="attn",
        attn_norm="attn_norm",
        mlp_norm="mlp_norm",
        down="mlp.Wo",
    ),
    "moshi": replace(LLAMA, **_qkv("self_attn.{}_proj.linear"), o="self_attn.o_proj.linear", down="mlp.fc2"),
    "mpt": Family(
        layers="transformer.blocks",
        final_norm="transformer.norm_f",
        qkv="attn.Wqkv",
        o="attn.out_proj",
        attn="attn",
        attn_norm="norm_1",
        mlp_norm="norm_2",
        mlp=None,
        mlp_in="ffn.up_proj",
        mlp_out="ffn.down_proj",
        down="ffn.down_proj",
    ),
    "nanochat": replace(LLAMA, down="mlp.fc2"),
    "persimmon": replace(
        LLAMA,
        final_norm="model.final_layernorm",
        qkv="self_attn.query_key_value",
        layout="per_head",
        o="self_attn.dense",
        down="mlp.dense_4h_to_h",
    ),
    "stablelm": replace(
        LLAMA, variants=(("use_parallel_residual", True, {"parallel": True, "mlp_norm": "input_layernorm"}),)
    ),
}
_BUILT_IN = frozenset(FAMILIES)


def register(model_type: str, family: Family) -> Family:
    """Add a family for a config's `model_type`, or replace one that was registered for it. ModelError if it is not a
    `Family`, or the type has a built-in row: then pass yours with `family=`."""
    taken = "family '{}' is built in: pass yours with family= to circuitfind.wrap or load"
    return entered(family, Family, FAMILIES, ModelError, taken, model_type, fixed=_BUILT_IN)


def named(name: str) -> Family:
    """Return the row of a name in the table, or of "package.module:NAME"; ModelError if there is none."""
    if ":" in name:
        return imported("family", name, Family, ModelError)
    if name not in FAMILIES:
        raise ModelError(unknown("family", name, sorted(FAMILIES)))
    return FAMILIES[name]


def family_of(config: Any, family: Family | str | None = None) -> Family:
    """Return the row for a model's config (or `family` in its place) with the config's variants applied. ModelError if
    there is none, or the config is not covered."""
    kind = getattr(config, "model_type", None)
    if family is None:
        if kind not in FAMILIES:
            raise ModelError(
                f"model family '{kind}' has no row of its own, and without its modules none can be inferred: name one"
                f" that fits, family='llama' (--family llama), or describe it with family=circuitfind.Family(...)"
            )
        family = FAMILIES[kind]
    family = named(family) if isinstance(family, str) else family
    if not isinstance(family, Family):
        raise ModelError(f"family={family!r}: give a circuitfind.Family or the name of one")
    for attribute, value, reason in family.refuse:
        if (found := getattr(config, attribute, None)) == value or (value is ANY and found):
            raise ModelError(f"this {kind} model is not covered: {reason} (config.{attribute} = {found})")
    for attribute, value, changes in family.variants:
        if getattr(config, attribute, None) == value:
            family = replace(family, **changes)
    return family
