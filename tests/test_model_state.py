"""A model that changes between two calls, runs under the user's hooks and contexts, or comes in another wrapping."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from families import LLAMA, STRUCTURES, VOCAB, build
from safetensors.torch import save_file
from torch import nn

import circuitfind as cf
from circuitfind.errors import CircuitfindWarning


@pytest.fixture()
def task() -> cf.Task:
    ids = torch.randint(3, VOCAB, (2, 4, 7), generator=torch.Generator().manual_seed(0))
    return cf.Task(clean=ids[0], corrupted=ids[1], answers=[5, 6, 7, 8], wrong_answers=[9, 10, 11, 12])


def everything(model: cf.Model, task: cf.Task) -> np.ndarray:
    """Scores, a circuit's metric, node effects: what each room computes from the weights."""
    scores = cf.attribute(model, task, "eap")
    evaluation = cf.evaluate(model, task, scores.top(40), metric="kl")
    nodes = cf.patch(model, task, "heads").effects
    return np.concatenate([scores.values[model.graph.real], [evaluation.metric], nodes.ravel()])


# -------------------------------------------------------------------- weights
def trained(model: Any) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        model(torch.arange(3, 10)[None]).logits.square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


def loaded(model: Any) -> None:
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})


def edited(model: Any) -> None:
    for name, weight in model.named_parameters():
        if "norm" in name or "ln_" in name:
            weight.data *= 1.5  # past the version counter


def replaced(model: Any) -> None:
    blocks = next(value for value in model.modules() if isinstance(value, nn.ModuleList))
    blocks[0], blocks[1] = blocks[1], blocks[0]


CHANGES: list[Callable[[Any], Any]] = [trained, loaded, edited, replaced, lambda m: m.double(), lambda m: m.bfloat16()]


@pytest.mark.parametrize("change", CHANGES, ids=["trained", "loaded", "edited", "replaced", "double", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_changed_weights_count(name: str, change: Callable[[Any], Any], task: cf.Task) -> None:
    model = cf.wrap(build(name))
    before = everything(model, task)
    change(model.hf)
    after = everything(model, task)
    np.testing.assert_array_equal(after, everything(cf.wrap(model.hf), task))
    assert not np.array_equal(before, after)


# -------------------------------------------------------------------- hooks
def scaled(_: nn.Module, __: Any, output: Any) -> Any:
    return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2


def shifted(_: nn.Module, __: Any, output: Any) -> Any:
    return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1


@pytest.mark.parametrize(
    ("path", "hook"),
    [
        ("model.layers.0.self_attn", scaled),
        ("model.layers.1", shifted),
        ("model.layers.1.mlp", scaled),
        ("model.layers.0.self_attn.q_proj", scaled),
        ("model.layers.1.input_layernorm", scaled),
    ],
)
def test_a_hook_that_changes_what_a_module_gives_is_refused(path: str, hook: Any, task: cf.Task) -> None:
    model = cf.wrap(build("llama"))
    before = everything(model, task)
    handle = model.hf.get_submodule(path).register_forward_hook(hook)
    for _ in range(2):
        with pytest.raises(cf.ModelError, match=rf"self-check failed: .* Hooks run on {path}: remove"):
            cf.attribute(model, task)
    with pytest.raises(cf.ModelError, match=f"Hooks run on {path}"), cf.only(model, ["input->logits"], task):
        pass
    handle.remove()
    np.testing.assert_array_equal(everything(model, task), before)


def test_a_replaced_forward_is_refused(task: cf.Task) -> None:
    model = cf.wrap(build("llama"))
    cf.attribute(model, task)  # nnsight has its wrapper there, and does not hear of another one's results
    mlp = model.hf.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x) + own(-x)
    with pytest.raises(cf.ModelError, match=r"Hooks run on model.layers.0.mlp"):
        cf.attribute(model, task)


def test_a_forward_replaced_before_wrapping_is_refused_where_it_acts() -> None:
    """nnsight wraps it at the first trace; it acts after the eight tokens of the check on random prompts."""
    hf = build("llama")
    attention = hf.model.layers[0].self_attn
    own = attention.forward
    attention.forward = lambda **given: late(attention, None, own(**given))
    model, ids = cf.wrap(hf), torch.randint(3, VOCAB, (2, 4, 14), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        with pytest.raises(cf.ModelError, match=r"Hooks run on model.layers.0.self_attn"):
            cf.attribute(model, cf.Task(*ids, answers=[5, 6, 7, 8], wrong_answers=[9, 10, 11, 12]))


def test_hooks_that_leave_the_arithmetic_alone_work(task: cf.Task) -> None:
    model, seen = cf.wrap(build("llama")), []
    before = everything(model, task)
    model.hf.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    np.testing.assert_array_equal(everything(model, task), before)
    assert seen
    # a head that a hook silences writes nothing, and no edge from it has an effect
    model.hf.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: (args[0] * (torch.arange(args[0].shape[-1]) >= 8),)
    )
    scores = cf.attribute(model, task)
    assert not scores.values[model.graph.writer("a0.h0")].any() and scores.values[model.graph.writer("a0.h1")].any()


def late(_: nn.Module, __: Any, output: Any) -> Any:
    """Changes what comes after the eight tokens of the check on random prompts."""
    first = (output[0] if isinstance(output, tuple) else output).clone()
    first[:, 8:] *= 2
    return (first, *output[1:]) if isinstance(output, tuple) else first


def in_long_prompts(module: nn.Module, given: Any, output: Any) -> Any:
    first = output[0] if isinstance(output, tuple) else output
    return scaled(module, given, output) if first.shape[1] > 9 else output


@pytest.mark.parametrize("hook", [late, in_long_prompts])
def test_a_hook_that_acts_on_long_prompts_is_refused(hook: Any) -> None:
    model = cf.wrap(build("llama"))
    model.hf.model.layers[0].self_attn.register_forward_hook(hook)
    generator = torch.Generator().manual_seed(0)
    short, long = (torch.randint(3, VOCAB, (2, 3, length), generator=generator) for length in (6, 12))
    cf.attribute(model, cf.Task(short[0], short[1], [5, 6, 7], [9, 10, 11]))
    with pytest.raises(cf.ModelError, match=r"Hooks run on model.layers.0.self_attn"):
        cf.attribute(model, cf.Task(long[0], long[1], [5, 6, 7], [9, 10, 11]))


def stopped(_: nn.Module, __: Any, output: Any) -> Any:
    return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()


def halved(_: nn.Module, __: Any, output: Any) -> Any:
    first = output[0] if isinstance(output, (tuple, hf.utils.ModelOutput)) else output
    if first.requires_grad:
        first.register_hook(lambda gradient: gradient * 0.5)


def late_only(_: nn.Module, __: Any, output: Any) -> Any:
    return torch.cat([output[:, :8], output[:, 8:].detach()], 1)


def backward(_: nn.Module, given: Any, __: Any) -> Any:
    return tuple(None if one is None else one * 0.9 for one in given)


@pytest.mark.parametrize(
    ("path", "hook"),
    [
        ("model.layers.0.self_attn", stopped),
        ("model.layers.1.mlp", halved),
        ("model.layers.1.self_attn.q_proj", stopped),
        ("model.layers.1.mlp.act_fn", stopped),
        ("model.layers.0.input_layernorm", halved),
        ("model.layers.0.self_attn.v_proj", late_only),
        ("model.norm", halved),
        ("model", halved),
        ("model.layers.1", stopped),
        ("lm_head", backward),
    ],
)
@pytest.mark.parametrize("backend", ["nnsight", "hooks"])
def test_a_hook_that_changes_gradients_only_is_refused(path: str, hook: Any, backend: str) -> None:
    model = cf.wrap(build("llama"), backend=backend)
    module = model.hf.get_submodule(path)
    (module.register_full_backward_hook if hook is backward else module.register_forward_hook)(hook)
    ids = torch.randint(3, VOCAB, (2, 3, 12), generator=torch.Generator().manual_seed(0))
    task = cf.Task(clean=ids[0], corrupted=ids[1], answers=[5, 6, 7], wrong_answers=[9, 10, 11])
    with pytest.raises(
        cf.ModelError, match=f"'gradients = what the values change by' is off by .* Hooks run on {path}: "
    ):
        cf.attribute(model, task)


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structures_gradients_are_those_of_its_values(name: str) -> None:
    model = cf.wrap(build(name), None)
    model.hf.register_forward_hook(lambda *_: None)
    ids = torch.randint(3, VOCAB, (2, 2, 12), generator=torch.Generator().manual_seed(0))
    assert len(cf.attribute(model, cf.Task(ids[0], ids[1], [5, 6], [9, 10])))


def test_an_unchecked_model_is_not_proved_later(task: cf.Task) -> None:
    model = cf.wrap(build("llama"), check=False)
    model.hf.model.layers[1].register_forward_hook(shifted)
    assert np.isfinite(cf.attribute(model, task).values).all()


# -------------------------------------------------------------------- contexts
def inference() -> Any:
    return torch.inference_mode()


def half() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("context", [inference, half, torch.no_grad])
def test_contexts_change_nothing(context: Callable[[], Any], task: cf.Task) -> None:
    model = cf.wrap(build("llama"))
    expected = everything(model, task)
    with context():
        bound = task.on(model)
        np.testing.assert_array_equal(everything(model, task), expected)
        np.testing.assert_array_equal(everything(model, bound), expected)
        np.testing.assert_array_equal(everything(cf.wrap(model.hf), task), expected)
        assert cf.load("tiny").graph.n_edges
    np.testing.assert_array_equal(everything(model, bound), expected)


def test_a_default_dtype_changes_nothing(task: cf.Task) -> None:
    model = cf.wrap(build("llama"))
    expected = everything(model, task)
    torch.set_default_dtype(torch.float64)
    try:
        np.testing.assert_array_equal(everything(model, task), expected)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_contexts_without_values_are_refused(task: cf.Task) -> None:
    model = cf.wrap(build("llama"))
    with torch.device("meta"), pytest.raises(cf.ModelError, match="default device is 'meta'"):
        cf.attribute(model, task)
    with torch.device("meta"), pytest.raises(cf.ModelError, match="default device is 'meta'"):
        cf.load("tiny")
    with torch.inference_mode():
        made = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)).eval()
    with pytest.raises(cf.ModelError, match=r"weight 'model.embed_tokens.weight' was made inside torch.inference_mode"):
        cf.wrap(made)


def test_two_threads_get_what_one_gets(task: cf.Task) -> None:
    model = cf.wrap(build("llama"))
    expected = everything(model, task)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: everything(model, task), range(8)):
            np.testing.assert_array_equal(found, expected)


# -------------------------------------------------------------------- wrappings
def test_a_compiled_model_runs_as_the_module_inside(task: cf.Task) -> None:
    plain = build("llama")
    expected = everything(cf.wrap(plain), task)
    whole, inside, block = torch.compile(build("llama")), build("llama"), build("llama")
    inside.compile()
    block.model.layers[0].mlp.compile()
    assert cf.wrap(whole).name == cf.wrap(plain).name
    for model in (whole, inside, block):
        np.testing.assert_array_equal(everything(cf.wrap(model), task), expected)


def test_adapters_are_refused() -> None:
    class PeftModel(nn.Module):  # what peft.get_peft_model returns keeps the model inside, and its configs here
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.peft_config, self.config = build("llama"), {}, None

    with pytest.raises(cf.ModelError, match="carries adapters: merge them first"):
        cf.wrap(PeftModel())


@pytest.mark.parametrize(("width", "seed"), [(3, 0), (3, 10), (15, 0), (17, 0)])
def test_an_odd_width(width: int, seed: int) -> None:
    """New models, too, whose attention is uniform to four digits."""
    torch.manual_seed(seed)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=20, n_positions=8, n_embd=width, n_layer=2, n_head=1)).eval()
    for name, weight in model.named_parameters():
        if "ln_" in name:
            nn.init.normal_(weight, 1)
    assert cf.wrap(model).graph.d_model == width


@pytest.mark.parametrize(
    ("config", "kind", "more"),
    [
        (hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration, {"scale_factor": 1}),
        (hf.Idefics3Config, hf.Idefics3ForConditionalGeneration, {"scale_factor": 1}),
    ],
)
def test_a_text_model_inside_another_class(config: Any, kind: Any, more: dict[str, Any], task: cf.Task) -> None:
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = {"model_type": "llama", **LLAMA}
    whole = kind(config(text_config=text, vision_config=vision, image_token_id=120, **more)).eval()
    alone = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)).eval()
    alone.model.load_state_dict(whole.model.text_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    np.testing.assert_allclose(everything(cf.wrap(whole), task), everything(cf.wrap(alone), task), atol=1e-5)


def test_logits_near_zero_are_no_fault() -> None:
    model = build("llama")
    with torch.no_grad():  # an unembedding that reads a direction in which nothing is written
        direction = torch.zeros(32)
        direction[0] = 1
        model.model.embed_tokens.weight[:, 0] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 1e-9
            layer.mlp.down_proj.weight[0] = 1e-9
        model.lm_head.weight.copy_(torch.randn(VOCAB, 1) * direction)
    assert cf.wrap(model).graph.n_edges
    nn.init.zeros_(model.lm_head.weight)
    assert cf.wrap(model).graph.n_edges


# -------------------------------------------------------------------- checkpoints
@pytest.fixture()
def checkpoint(tmp_path: Path) -> Callable[[dict[str, torch.Tensor | None]], Path]:
    """Writes a folder whose weights differ from a small Llama's by these; None takes one out."""

    def write(changes: dict[str, torch.Tensor | None]) -> Path:
        model = build("llama")
        weights = {**{name: value.contiguous() for name, value in model.state_dict().items()}, **changes}
        model.config.save_pretrained(tmp_path)
        save_file(
            {name: value for name, value in weights.items() if value is not None},
            tmp_path / "model.safetensors",
            metadata={"format": "pt"},
        )
        return tmp_path

    return write


def test_missing_weights_are_refused(checkpoint: Any) -> None:
    folder = checkpoint({f"model.layers.1.mlp.{part}_proj.weight": None for part in ("up", "down", "gate")})
    lacks = "lacks weights, or has them in another shape: model.layers.1.mlp.down_proj.weight, .*gate_proj"
    with pytest.raises(cf.ModelError, match=f"{lacks}.*allow_missing=True"):
        cf.load(folder)
    with pytest.warns(CircuitfindWarning, match="they are random numbers"):
        assert cf.load(folder, allow_missing=True).graph.n_layers == 2


def test_weights_of_another_shape_are_refused(checkpoint: Any) -> None:
    with pytest.raises(cf.ModelError, match=r"another shape: model.norm.weight\. transformers fills in"):
        cf.load(checkpoint({"model.norm.weight": torch.ones(3)}))


def test_unused_weights_are_told(checkpoint: Any) -> None:
    with pytest.warns(CircuitfindWarning, match="holds weights that LlamaForCausalLM does not use: extra.weight"):
        cf.load(checkpoint({"extra.weight": torch.zeros(3)}))
