"""Every covered family: the engine's edge scores against autograd through split readers, identities, both backends."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from families import EVERY_FAMILY, STRUCTURES, build
from helpers import as_matrix, edge_scores, off, random_pairs, surprise
from oracles import Literal, split_reader_scores
from torch import Tensor, nn

from circuitfind.batch import Batch
from circuitfind.engine import edge_effects, memory_plan
from circuitfind.engine.capture import capture
from circuitfind.engine.identities import check_identities, require_identities
from circuitfind.engine.reader_gradients import capture_gradients
from circuitfind.engine.stream_effects import node_effects
from circuitfind.errors import ModelError
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import STOP, through_hooks, through_nnsight
from circuitfind.models.families import FAMILIES

SWITCHABLE = [name for name in EVERY_FAMILY if build(name)._supports_sdpa]  # the others know eager attention only
IN_FLOAT64 = ["gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "falcon-new", "phi", "starcoder2", "stablelm"]
WINDOWED = {**dict.fromkeys(("mistral", "gemma2", "gemma3"), "sliding_window"), "gpt_neo": "window_size"}


def remade(model: nn.Module, attention: str | None = None, **changes: int) -> nn.Module:
    """The same weights under a changed config."""
    config = copy.deepcopy(model.config)
    for key, value in changes.items():
        assert hasattr(config, key)
        setattr(config, key, value)
    other = type(model)._from_config(config, attn_implementation=attention).eval()
    other.load_state_dict(model.state_dict())
    return other


def check_scores(model: nn.Module, adapter: Adapter, batch: Batch, tolerance: float) -> None:
    expected = as_matrix(adapter.graph, split_reader_scores(model, batch, surprise))
    assert off(edge_scores(adapter, batch), expected) < tolerance


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_node_scores_equal_autograd_through_split_readers(
    name: str, adapter_of: Callable[..., Adapter], pairs: Batch
) -> None:
    """At every token: a node's effect is the sum over the edges that leave it."""
    adapter = adapter_of(name)
    corrupted = capture(adapter, pairs.corrupted, stop=True)
    clean = capture_gradients(adapter, pairs.clean, surprise)
    effects = node_effects(adapter, clean.run.writers.minus(corrupted.writers), clean.run, clean.at)
    expected = torch.zeros_like(effects)
    for (writer, _), effect in split_reader_scores(adapter.model, pairs, surprise).items():
        expected[adapter.graph.writer(writer)] += effect
    assert off(effects, expected) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2"])
def test_slices_of_tokens_do_not_matter(
    name: str, adapter_of: Callable[..., Adapter], pairs: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of(name)
    whole = edge_scores(adapter, pairs)
    for held, inner in ((2**20, 3000), (5000, 2**20), (5000, 1000), (1, 1)):  # a few tokens, then one at a time
        monkeypatch.setattr(edge_effects, "HELD", held)
        monkeypatch.setattr(memory_plan, "IN_CACHE", {"cpu": inner})
        assert next(memory_plan.token_slices(27, adapter.graph.n_writers, adapter, held)).stop < 27 or held == 2**20
        assert off(edge_scores(adapter, pairs), whole) < 1e-5


def test_every_row_of_the_name_table_has_a_model() -> None:
    refused = {"deepseek_v32", "glm_moe_dsa"}  # with an indexer; tests/test_hybrids.py
    kinds = {build(name).config.get_text_config().model_type for name in EVERY_FAMILY}
    assert kinds == set(FAMILIES) - refused


def structure(adapter: Adapter) -> tuple[object, ...]:
    """What the engine can tell families apart by: of each block, how q, k and v are read, what is added where, and
    which modules can be skipped and what they return."""
    layers = []
    for view in adapter.layers:
        family, groups = view.family, view.layout.n_heads != view.layout.n_kv_heads
        read = (type(view), family.projections, family.qkv and view.layout.kind, groups, family.gated)
        forms = tuple(adapter.output_forms.get(f"{view.path}.{part}") is None for part in (family.attn, family.mlp))
        layers.append((*read, family.parallel, view.attn_norm is None, family.attn is None, family.mlp is None, forms))
    return (adapter.centred, adapter.coupled, *layers)


def test_each_structure_is_that_of_one_family(adapter_of: Callable[..., Adapter]) -> None:
    of = {name: structure(adapter_of(name)) for name in EVERY_FAMILY}
    listed = [of[name] for name in STRUCTURES]
    assert set(listed) == set(of.values()) and len(listed) == len(set(listed))


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_scores_equal_autograd_through_split_readers(name: str, adapt: Callable, pairs: Batch) -> None:
    model = build(name)
    check_scores(model, adapt(model), pairs, 1e-5)


@pytest.mark.parametrize("name", SWITCHABLE)
def test_scores_with_eager_attention(name: str, adapt: Callable, pairs: Batch) -> None:
    assert build(name).config._attn_implementation == "sdpa"
    model = remade(build(name), attention="eager")
    assert model.config._attn_implementation == "eager"
    check_scores(model, adapt(model), pairs, 1e-5)


@pytest.mark.parametrize("name", IN_FLOAT64)
def test_scores_are_exact_in_double_precision(name: str, adapt: Callable, pairs: Batch) -> None:
    """Only families without float32 inside their norms and attention can show it."""
    model = build(name, dtype=torch.float64)
    check_scores(model, adapt(model), pairs, 1e-11)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_identities_hold(name: str, adapter_of: Callable[..., Adapter]) -> None:
    for identity in require_identities(adapter_of(name)):
        assert identity.error < 1e-5, identity


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "gemma2", "opt"])
def test_identities_hold_in_other_precisions(name: str, dtype: torch.dtype, adapter_of: Callable[..., Adapter]) -> None:
    require_identities(adapter_of(name, dtype=dtype))


@pytest.mark.parametrize("change", [1.0, float("nan")])
def test_identities_name_what_fails(change: float, adapter_of: Callable[..., Adapter]) -> None:
    adapter = adapter_of("gpt2")
    adapter.layers[1].mlp_norm.weight[3] += change  # the formula no longer is the module's
    holds = {identity.name: identity.holds for identity in check_identities(adapter)}
    assert holds["writers + output biases = residual stream"] and not holds["all edges in = clean run"]
    with pytest.raises(ModelError, match="self-check failed: 'all edges in = clean run' is off by"):
        require_identities(adapter)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_both_backends_show_the_same_in_the_same_order(
    name: str, adapter_of: Callable[..., Adapter], pairs: Batch
) -> None:
    adapter = adapter_of(name)
    seen: dict[str, list[tuple[str, int, Tensor]]] = {"nnsight": [], "hooks": []}
    logits = {}
    for backend, through in (("nnsight", through_nnsight), ("hooks", through_hooks)):

        def visit(site: str, layer: int, value: Tensor, log: list = seen[backend]) -> None:
            log.append((site, layer, value.clone()))

        with torch.no_grad():
            logits[backend] = through(adapter, pairs.clean, visit)
    order = [(site.name, site.layer) for site in adapter.sites if site.name != "unembed"]
    assert [entry[:2] for entry in seen["nnsight"]] == [entry[:2] for entry in seen["hooks"]] == order
    assert all(torch.equal(a[2], b[2]) for a, b in zip(*seen.values(), strict=True))
    assert torch.equal(logits["nnsight"], logits["hooks"])
    assert logits["hooks"].shape[:2] == pairs.clean.read.shape


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_both_backends_write_the_same(name: str, adapter_of: Callable[..., Adapter], pairs: Batch) -> None:
    adapter = adapter_of(name)
    with torch.no_grad():
        bare = through_hooks(adapter, pairs.clean, lambda *_: None)
        for site in {site.name for site in adapter.sites} - {"unembed"}:

            def visit(at: str, layer: int, value: Tensor, site: str = site) -> Tensor | None:
                return value.roll(1, -1) if at == site else None  # norms would undo a scale or a shift

            through = [run(adapter, pairs.clean, visit) for run in (through_hooks, through_nnsight)]
            assert torch.equal(*through), site
            assert off(through[0], bare) > 1e-3, f"writing to '{site}' changes nothing"


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_oss"])
def test_a_visitor_can_stop_the_pass(name: str, adapter_of: Callable[..., Adapter], pairs: Batch) -> None:
    adapter = adapter_of(name)
    for through in (through_hooks, through_nnsight):
        seen: list[str] = []

        def visit(site: str, layer: int, value: Tensor, seen: list[str] = seen) -> object:
            seen.append(site)
            return STOP if site == "mlp_in" else None

        assert through(adapter, pairs.clean, visit).numel() == 0
        assert seen[-1] == "mlp_in" and seen.count("mlp_in") == 1


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_writers_are_the_literal_ones(name: str, adapter_of: Callable[..., Adapter], pairs: Batch) -> None:
    """Each writer by itself, at real positions: the sums of the identities could hide a mix-up between writers."""
    adapter = adapter_of(name)
    run = capture(adapter, pairs.clean)
    with torch.no_grad():
        literal = Literal(adapter.model).run(pairs.clean)
    written = {"input": run.writers.embed}
    for layer in range(adapter.graph.n_layers):
        outputs = adapter.head_outputs(layer, run.heads[layer])
        written |= dict(zip(adapter.graph.writer_names[adapter.graph.heads(layer)], outputs, strict=True))
        written[f"m{layer}"] = run.mlps[layer]
    assert list(written) == list(adapter.graph.writer_names) == list(literal.writers)
    real = pairs.clean.mask
    for writer, value in written.items():
        assert off(value[real], literal.writers[writer][real]) < 1e-5, writer


@pytest.mark.parametrize("name", WINDOWED)
def test_sliding_windows_are_shorter_than_the_prompts(name: str, adapter_of: Callable[..., Adapter]) -> None:
    """Else the families with windows would be tested without them."""
    batch, model = random_pairs((0,), (0,)), build(name)
    window = getattr(model.config, WINDOWED[name])
    assert window < batch.clean.ids.shape[1]
    wide = remade(model, attention=model.config._attn_implementation, **{WINDOWED[name]: 64})
    with torch.no_grad():
        narrow, wide = (m(batch.clean.ids).logits[:, -1] for m in (model, wide))
    assert off(wide, narrow) > 1e-3
