"""One test for each way in which earlier attempts at this engine went wrong without saying so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from families import EVERY_FAMILY, FALCON, GPT, IDS, LLAMA, build, swept
from helpers import as_matrix, edge_scores, off, random_pairs, run_circuits_traced, surprise
from oracles import split_reader_scores
from torch import Tensor, nn

from circuitfind.batch import Batch, Inputs
from circuitfind.engine.capture import capture
from circuitfind.engine.circuit_run import run_circuits
from circuitfind.engine.edge_effects import edge_effects
from circuitfind.engine.identities import check_identities
from circuitfind.engine.prepare import prepare
from circuitfind.engine.reader_gradients import capture_gradients
from circuitfind.engine.restart import Restart
from circuitfind.engine.writers import Writers
from circuitfind.errors import ModelError, ScoreError
from circuitfind.graph import Graph
from circuitfind.loading import wrap
from circuitfind.models import backends
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import through_hooks

AdapterOf = Callable[..., Adapter]
BACKENDS = pytest.mark.parametrize("backend", ["nnsight", "hooks"])


# -------------------------------------------------------------------- the user's model is left as found
def footprint(model: nn.Module) -> dict[str, Any]:
    """All that a run could leave behind on a model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    state: dict[str, Any] = {"attention": model.config._attn_implementation}
    for name, module in model.named_modules():
        state[name] = [list(getattr(module, kind).items()) for kind in hooks], module.training
        state[f"{name} own"] = module.__dict__.get("forward")
    for name, parameter in model.named_parameters():
        state[f"{name} weight"] = parameter.requires_grad, parameter.grad, parameter._version, id(parameter)
    return state


def everything(adapter: Adapter, batch: Batch) -> None:
    """Runs all that the engine can do to a model."""
    edge_scores(adapter, batch)
    check_identities(adapter)
    prepared = prepare(adapter, batch, "zero")
    mask = adapter.graph.mask(["input->logits", "input->m0", "m0->logits"])[None]
    for sparse in (True, False):
        run_circuits(prepared, mask, sparse)
        run_circuits_traced(prepared, mask, sparse)
    restart = Restart(adapter, batch.clean, prepared.clean)
    restart.edges(adapter.graph.n_readers - 2, [0], prepared.clean.writers)


@BACKENDS
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "falcon"])
def test_the_model_is_left_as_found(name: str, backend: str, adapt: Callable, pairs: Batch) -> None:
    model = build(name).train()
    parameters = list(model.parameters())
    for parameter in parameters[::2]:
        parameter.requires_grad_(False)
    list(model.modules())[3].eval()  # modes differ between modules
    model.get_input_embeddings().register_forward_hook(lambda *_: None)  # the user's own
    if backend == "nnsight":  # nnsight itself puts a forward of its own on each module, once and for all
        _ = adapt(model).envoy
    before = footprint(model)
    adapter = adapt(model)
    adapter.backend = backend
    everything(adapter, pairs)
    assert footprint(model) == before
    assert all(parameter.grad is None for parameter in parameters)


def test_training_mode_does_not_reach_the_scores(adapt: Callable, pairs: Batch) -> None:
    """Dropout would: the modes are switched for the run and back."""
    model = build("gpt2")
    expected = edge_scores(adapt(model), pairs)
    model.train()
    assert model.transformer.drop.p > 0
    assert torch.equal(edge_scores(adapt(model), pairs), expected)


class Oops(Exception):
    pass


@BACKENDS
@pytest.mark.parametrize("site", ["resid", "z", "mlp_out", "final"])
def test_a_visitor_that_raises_leaves_the_model_usable(
    site: str, backend: str, adapter_of: AdapterOf, pairs: Batch
) -> None:
    adapter = adapter_of("llama")
    adapter.backend = backend
    expected = edge_scores(adapter, pairs)
    before = footprint(adapter.model)

    def visit(at: str, layer: int, value: Tensor) -> None:
        if at == site:
            raise Oops(f"at {site}")

    with pytest.raises(Oops, match=f"at {site}"), torch.no_grad(), backends.undisturbed(adapter.model):
        backends.through(adapter, pairs.clean, visit)
    assert footprint(adapter.model) == before
    assert torch.equal(edge_scores(adapter, pairs), expected)


@BACKENDS
def test_a_metric_that_raises_leaves_the_model_usable(backend: str, adapter_of: AdapterOf, pairs: Batch) -> None:
    adapter = adapter_of("llama")
    adapter.backend = backend
    expected = edge_scores(adapter, pairs)
    before = footprint(adapter.model)

    def metric(logits: Tensor) -> Tensor:
        raise Oops

    with pytest.raises(Oops):
        capture_gradients(adapter, pairs.clean, metric)
    assert footprint(adapter.model) == before
    assert torch.equal(edge_scores(adapter, pairs), expected)


def test_an_error_in_a_run_with_skips_restores_the_skipped(adapter_of: AdapterOf, pairs: Batch) -> None:
    adapter = adapter_of("gpt2")
    before = footprint(adapter.model)

    def visit(site: str, layer: int, value: Tensor) -> None:
        raise Oops

    skips = {f"transformer.h.{layer}": torch.zeros(3, 9, 32) for layer in range(2)}
    with pytest.raises(Oops):
        through_hooks(adapter, pairs.clean, visit, skips=skips)
    assert footprint(adapter.model) == before


def test_a_metric_without_a_gradient_is_refused(adapter_of: AdapterOf, pairs: Batch) -> None:
    adapter = adapter_of("gpt2")
    with pytest.raises(ScoreError, match="does not depend on the logits in a differentiable way"):
        capture_gradients(adapter, pairs.clean, lambda logits: logits.argmax(-1).sum(-1).float())


def test_gradients_are_found_under_no_grad(adapter_of: AdapterOf, pairs: Batch) -> None:
    adapter = adapter_of("llama")
    expected = edge_scores(adapter, pairs)
    with torch.no_grad():
        assert torch.equal(edge_scores(adapter, pairs), expected)


# -------------------------------------------------------------------- forms of single families
@pytest.mark.parametrize("name", ["gptj", "phi", "falcon", "cohere", "stablelm-parallel"])
def test_a_norm_shared_by_attention_and_mlp_counts_each_once(name: str, adapt: Callable, pairs: Batch) -> None:
    """Without a node of its own, the MLP's gradient would hold the attention's, too: the test measures how wrong."""
    model = build(name)
    adapter = adapt(model)
    view, graph = adapter.layers[0], adapter.graph
    assert view.family.mlp_norm == view.family.attn_norm
    gradients = capture_gradients(adapter, pairs.clean, surprise).at.mlp[0]
    normed: list[Tensor] = []
    view.module(view.family.mlp_norm).register_forward_hook(lambda _, __, output: normed.append(output))
    logits = model(**adapter.keywords(pairs.clean)).logits
    read = logits[torch.arange(len(pairs))[:, None], pairs.clean.read]
    both = torch.autograd.grad(surprise(read).sum(), normed[0])[0]
    assert off(both, gradients) > 0.1
    expected = as_matrix(graph, split_reader_scores(build(name), pairs, surprise))
    mlps = [graph.readers(layer, "mlp").start for layer in range(graph.n_layers)]
    assert off(edge_scores(adapter, pairs)[:, mlps], expected[:, mlps]) < 1e-5


@pytest.mark.parametrize("name", [name for name in EVERY_FAMILY if name.startswith("falcon")])
def test_falcon_adds_into_the_mlps_output_in_place(name: str, adapter_of: AdapterOf, pairs: Batch) -> None:
    adapter = adapter_of(name)
    prepared = prepare(adapter, pairs)
    run = prepared.clean
    for layer, view in enumerate(adapter.layers):
        with torch.no_grad():
            assert off(run.mlp_out[layer], view.module("mlp")(run.mlp_in[layer])) < 1e-6
    remembered = [value.clone() for value in (*prepared.empty.mlp_out, *prepared.empty.attn_out)]
    for sparse in (True, False):
        run_circuits(prepared, adapter.graph.mask(["input->a1.h1<q>", "a1.h1->logits"])[None], sparse)
    after = (*prepared.empty.mlp_out, *prepared.empty.attn_out)
    assert all(torch.equal(a, b) for a, b in zip(after, remembered, strict=True))  # skipped modules hand out copies


def test_blooms_modules_add_the_residual_inside(adapter_of: AdapterOf, pairs: Batch) -> None:
    adapter = adapter_of("bloom")
    outputs: list[Tensor] = []
    adapter.model.transformer.h[0].mlp.register_forward_hook(lambda _, __, output: outputs.append(output))
    run = capture(adapter, pairs.clean)
    bias = adapter.model.transformer.h[0].mlp.dense_4h_to_h.bias
    assert off(run.middle[0] + run.mlps[0] + bias, outputs[0]) < 1e-6
    assert off(run.mlps[0], outputs[0]) > 0.1


def test_mlps_that_return_tuples_keep_their_form(adapter_of: AdapterOf, pairs: Batch) -> None:
    adapter = adapter_of("gpt_oss")
    assert isinstance(adapter.output_forms["model.layers.0.mlp"], tuple)
    run = capture(adapter, pairs.clean)
    assert run.mlps[0].shape == run.resid[0].shape
    returned: list[Any] = []
    adapter.model.model.layers[1].mlp.register_forward_hook(lambda _, __, output: returned.append(output))
    with torch.no_grad():
        logits = through_hooks(adapter, pairs.clean, lambda *_: None, skips={"model.layers.1.mlp": run.mlp_out[1]})
    assert isinstance(returned[0], tuple) and torch.equal(logits, run.logits)


@pytest.mark.parametrize("name", swept(EVERY_FAMILY))
def test_skipping_a_module_with_its_own_result_changes_nothing(name: str, adapter_of: AdapterOf, pairs: Batch) -> None:
    adapter = adapter_of(name)
    run = capture(adapter, pairs.clean)
    for layer, view in enumerate(adapter.layers):
        parts = {"": run.resid[layer + 1]}
        if view.family.attn:
            parts[f".{view.family.attn}"] = run.attn_out[layer]
        if view.family.mlp:
            parts[f".{view.family.mlp}"] = run.mlp_out[layer]
        for part, value in parts.items():
            with torch.no_grad():
                logits = through_hooks(adapter, pairs.clean, lambda *_: None, skips={view.path + part: value})
            assert off(logits, run.logits) < 1e-6, part or "block"  # rounding: a value at another place in memory


def test_opt_flattens_around_its_mlp(adapter_of: AdapterOf, pairs: Batch) -> None:
    adapter = adapter_of("opt")
    run = capture(adapter, pairs.clean)
    assert run.mlp_out[0].ndim == 2, "transformers changed: the test shows nothing any more"
    assert run.mlps[0].shape == run.resid[0].shape
    assert capture_gradients(adapter, pairs.clean, surprise).at.mlp[0].shape == run.resid[0].shape


# -------------------------------------------------------------------- padding
def row_alone(batch: Batch, row: int) -> Batch:
    """One pair without its padding."""
    mask = batch.clean.mask[row]
    start = int(mask.nonzero().min())
    sides = []
    for side in (batch.clean, batch.corrupted):
        ids = side.ids[row, mask][None]
        sides.append(Inputs(ids, torch.ones_like(ids, dtype=torch.bool), side.read[row : row + 1] - start))
    return Batch(*sides, batch.answers[row : row + 1], batch.wrong[row : row + 1])


@pytest.mark.parametrize("name", swept(EVERY_FAMILY))
def test_a_padded_batch_equals_its_rows_run_one_by_one(name: str, adapter_of: AdapterOf, pairs: Batch) -> None:
    adapter = adapter_of(name)
    if name in ("lfm2", "recurrent_gemma"):  # a biased convolution, a recurrence: what stands on the left is a token
        pairs = random_pairs(left=(0, 0, 0), right=(0, 2, 3))
    rows = [row_alone(pairs, row) for row in range(len(pairs))]
    assert [row.clean.ids.shape[1] for row in rows] == [9, 7, 6]
    logits = torch.cat([capture(adapter, row.clean).logits for row in rows])
    assert off(capture(adapter, pairs.clean).logits, logits) < 1e-5
    assert off(edge_scores(adapter, pairs), sum(edge_scores(adapter, row) for row in rows)) < 1e-5


def test_positions_are_given_explicitly(adapter_of: AdapterOf, pairs: Batch) -> None:
    """Plain GPT-2 counts padding on the left as positions unless it is told otherwise."""
    adapter = adapter_of("gpt2")
    assert pairs.clean.position_ids[1].tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6]
    keywords = adapter.keywords(pairs.clean)
    with torch.no_grad():
        told = adapter.model(**keywords).logits[1, -1]
        keywords.pop("position_ids")
        assert off(adapter.model(**keywords).logits[1, -1], told) > 1e-3


def test_what_padding_holds_does_not_matter(adapter_of: AdapterOf, pairs: Batch) -> None:
    adapter = adapter_of("llama")
    other = pairs.clean.ids.where(pairs.clean.mask, torch.tensor(77))
    changed = Batch(pairs.clean._replace(ids=other), pairs.corrupted, pairs.answers, pairs.wrong)
    assert off(edge_scores(adapter, changed), edge_scores(adapter, pairs)) < 1e-5


# -------------------------------------------------------------------- the unembedding
@pytest.mark.parametrize("name", ["gptj", "phi", "gemma2", "cohere", "granite"])
def test_reading_few_positions_keeps_the_heads_bias_caps_and_scales(
    name: str, adapter_of: AdapterOf, pairs: Batch
) -> None:
    adapter = adapter_of(name)
    if name == "gemma2":
        adapter.config.final_logit_softcapping = 0.5  # its usual cap of 30 does not reach logits as small as these
    run = capture(adapter, pairs.clean)
    with torch.no_grad():
        full = adapter.model(**adapter.keywords(pairs.clean)).logits
    expected = torch.stack([full[row, at] for row, at in enumerate(pairs.clean.read)])
    assert off(run.logits, expected) < 1e-5
    norm = adapter.model.get_submodule(adapter.family.final_norm)
    bare = norm(run.resid[-1]) @ adapter.model.get_output_embeddings().weight.T
    bare = torch.stack([bare[row, at] for row, at in enumerate(pairs.clean.read)])
    assert off(bare, expected) > 1e-2, "this model's logits are the plain product: the test shows nothing"


# -------------------------------------------------------------------- precision
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "gemma2", "falcon", "opt"])
def test_half_precision_accumulates_in_float32(
    name: str, dtype: torch.dtype, adapter_of: AdapterOf, pairs: Batch
) -> None:
    adapter = adapter_of(name, dtype=dtype)
    scores = edge_scores(adapter, pairs)
    assert scores.dtype == adapter.work == torch.float32
    expected = edge_scores(adapter_of(name), pairs)
    real = torch.from_numpy(adapter.graph.real)
    assert torch.corrcoef(torch.stack([scores[real], expected[real]]))[0, 1] > 0.99
    # the same captures contracted in float64: what half precision loses, it loses in the model and not in the sums
    clean = capture_gradients(adapter, pairs.clean, surprise)
    delta = clean.run.writers.minus(capture(adapter, pairs.corrupted).writers)
    written = torch.cat([_projected(adapter, delta, layer) for layer in range(adapter.graph.n_layers)])
    written = torch.cat([delta.embed[None].double(), written])
    into_logits = (written * clean.at.final.double()).sum((1, 2, 3))
    assert off(edge_effects(adapter, delta, clean.run, clean.at)[:, -1], into_logits) < 1e-5


def _projected(adapter: Adapter, delta: Writers, layer: int) -> Tensor:
    weight = adapter.layers[layer].output_weight().double()
    heads = torch.einsum("bthe,hed->hbtd", delta.heads[layer].double(), weight)
    return torch.cat([heads, delta.mlps[layer][None].double()])


# -------------------------------------------------------------------- what is not covered is refused with a line
def refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        Adapter(model)
    assert "\n" not in str(caught.value)


class Packed(nn.Parameter):
    """A weight of a class of its own, as torchao's and quanto's are, whose values are not those it stores."""


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float32])
@pytest.mark.parametrize("path", ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj"])
def test_quantised_weights_are_refused(dtype: torch.dtype, path: str) -> None:
    """In integers (bitsandbytes, GGUF blocks), in eight-bit floats, or in a class of its own."""
    model = build("llama")
    linear = model.get_submodule(path)
    kind = Packed if dtype == torch.float32 else nn.Parameter
    linear.weight = kind(linear.weight.detach().to(dtype), requires_grad=False)
    refused(model, rf"quantised .* weight '{path}.weight' is a {kind.__name__} of .* or de-quantise it: .*dequantize")


@pytest.mark.parametrize("method", ["bitsandbytes", "compressed-tensors", "gguf"])
def test_weights_that_were_dequantised_are_taken(method: str) -> None:
    """The config is still marked as quantised."""
    model = build("llama")
    model.config.quantization_config = {"quant_method": method}
    assert wrap(model).graph.n_edges


def test_models_with_adapters_are_refused() -> None:
    model = build("llama")
    model.peft_config = {"default": object()}
    with pytest.raises(ModelError, match="carries adapters: merge them first"):
        wrap(model)


class LowRank(nn.Module):
    """What adapter libraries put in the place of a projection; it shows the base layer's weight as its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.change = base, nn.Linear(base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.change(x)


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_wrapped_projections_are_refused(projection: str) -> None:
    model = build("llama")
    attention = model.model.layers[1].self_attn
    setattr(attention, projection, LowRank(getattr(attention, projection)))
    refused(model, f"'model.layers.1.self_attn.{projection}' is a LowRank, not a plain linear")


def test_weights_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))
    refused(model, "weight '.*' is on the meta device")


def test_models_without_a_head_are_refused() -> None:
    refused(hf.LlamaModel(hf.LlamaConfig(**LLAMA)), "LlamaModel has no language modelling head")


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **IDS)
UNCOVERED = {
    "OPT, norms after the residual": lambda: (
        hf.OPTForCausalLM(hf.OPTConfig(do_layer_norm_before=False, ffn_dim=48, word_embed_proj_dim=32, **SMALL)),
        r"opt model is not covered: .*post-LN.* \(config.do_layer_norm_before = False\)",
    ),
    "Bloom, residual after the norm": lambda: (
        hf.BloomForCausalLM(hf.BloomConfig(apply_residual_connection_post_layernorm=True, **SMALL)),
        "bloom model is not covered: its residual is taken after the norm",
    ),
    "GPT-2 with cross-attention": lambda: (
        hf.GPT2LMHeadModel(hf.GPT2Config(add_cross_attention=True, **GPT)),
        "gpt2 model is not covered: it has cross-attention",
    ),
    "attention bias under a post-norm": lambda: (
        hf.Gemma2ForCausalLM(hf.Gemma2Config(attention_bias=True, head_dim=8, **LLAMA)),
        "an attention output bias under a post-norm is not covered",
    ),
    "BERT": lambda: (
        hf.BertLMHeadModel(hf.BertConfig(is_decoder=True, intermediate_size=48, **SMALL)),
        "model family 'bert' has no row of its own.*family=circuitfind.Family",
    ),
    "Mamba": lambda: (
        hf.MambaForCausalLM(hf.MambaConfig(hidden_size=32, num_hidden_layers=2, **IDS)),
        "model family 'mamba' has no row of its own",
    ),
}


@pytest.mark.parametrize("form", UNCOVERED)
def test_uncovered_forms_are_refused(form: str) -> None:
    model, message = UNCOVERED[form]()
    refused(model, message)


def test_forms_of_a_family_change_its_graph(adapter_of: AdapterOf) -> None:
    """Flags in the config decide it, not the family's name."""
    assert adapter_of("gpt_neox").graph.parallel and not adapter_of("gpt_neox-sequential").graph.parallel
    assert adapter_of("stablelm-parallel").graph.parallel and not adapter_of("stablelm").graph.parallel
    assert adapter_of("falcon-new").family.attn_norm == "ln_attn"
    assert adapter_of("falcon").graph == Graph(2, 4, 1, 32, parallel=True)
    assert adapter_of("falcon-multihead").graph.n_kv_heads == FALCON["num_attention_heads"]
