"""`Adapter`: the same view of every model: its graph, its sites, and for each block its weights by head and its norms.

1. The table of families (`families.py`) says where the modules are and how fused projections are laid out. Sizes come
   from the config and the shapes of weights.
2. A *site* is a module boundary: the input of a block, the output of a q, k or v projection, the input and output of
   the output projection and of the MLP, the input of the final norm and of the unembedding. Positional encodings, q/k
   norms, soft-caps, attention sinks and routing lie between sites, so they need no code.
3. Each block is a `LayerView` (`layer.py`).
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import nnsight
import torch
from einops import einsum
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from circuitfind.batch import Inputs
from circuitfind.errors import ModelError
from circuitfind.graph import Graph
from circuitfind.models.families import LATENT_NORMS, NORMS, Family, family_of
from circuitfind.models.gguf_files import marked
from circuitfind.models.latent import LatentView
from circuitfind.models.layer import LayerView, Layout, module_at, shape_of
from circuitfind.models.mixer import MixerView
from circuitfind.models.norms import Norm
from circuitfind.models.placement import device_of, is_shard, is_spread, processes_of, without_weights
from circuitfind.models.state import State

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Site(NamedTuple):
    """A module boundary: the module's `path` from the model's root, and its `side`, "input" or "output"."""

    name: str
    layer: int
    path: str
    side: str


# One lock per model, however often it is wrapped, because hooks are put on the modules themselves.
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


class Adapter:
    """A causal language model of a covered family, seen as a residual stream with writers and readers.

    Attributes:
        graph, layers, final_norm: the graph, one `LayerView` per block, and the norm before the unembedding.
        sites: all sites; `circuitfind.models.backends.observe` puts them in order of execution.
        output_forms: by module path, None if the module returns a tensor, or the tuple that it returns, with None as
            its first entry.
        centred: whether every norm that reads the stream subtracts the mean, so that the stream's mean never matters.
        coupled: whether a norm on the attention's output scales all heads of a layer together.
        backend: "nnsight" or "hooks", the backend of single passes.
        lock: held while a call runs the model, because runs put hooks on its modules.
        state: the model's state when its modules were last read.
        unproven: whether the identities must still be checked; None if the user does not want them checked.
        proven_length: the length of the longest pair on which they were checked under the user's hooks.
        row: how the family's row was found ("inferred as llama"); empty for the row of its model type in the table.
        divided: the length of the longest prompt that gave equal results whole and in two parts; -1 if one did not.
        by_block: whether gradients taken block by block equal those of one backward pass; None until this is checked.
        origin: what the weights were de-quantised from, such as "GGUF Q4_1"; empty if they were stored as floats.
        held_by: the `circuitfind.only` block that currently runs the model as a circuit; no other pass may run then.
        spread: whether weights are on several devices, or loaded when they are needed (`models/placement.py`).
        processes: the process group that the weights are divided among (tensor parallelism); None if they are not.
        work: the precision of circuitfind's own arithmetic: the model's, but at least float32.
    """

    def __init__(self, model: Any, family: Family | str | None = None) -> None:
        config = model.config.get_text_config()
        self.model, self.config = model, config
        self.family = _within(model, family_of(config, family))
        self.head_path = _path_of(model, model.get_output_embeddings())
        _check_paths(model, self.family)
        self._check_weights()
        self.graph = graph_of(model, self.family)
        self._read()
        self.sites = self._sites()
        self.backend = "nnsight"
        self.row = ""
        self.origin = "GGUF" if marked(model) else ""
        self.held_by: object | None = None
        self.output_forms: dict[str, Any] = {}
        self._accepts = set(inspect.signature(model.forward).parameters)
        self.lock = _LOCKS.setdefault(model, threading.RLock())
        self.unproven: bool | None = True
        self.proven_length = 0
        self.divided = 0
        self.by_block: bool | None = None
        self.state = self._state()

    def _read(self) -> None:
        """Set the attributes that depend on modules or weights: the precision, the blocks, the norms as formulas."""
        model, family, graph = self.model, self.family, self.graph
        blocks = module_at(model, family.layers)
        self._check_covered(blocks)
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.work = torch.promote_types(self.dtype, torch.float32)
        self.spread, self.processes = is_spread(model), processes_of(model)
        scale = family.residual_multiplier
        multiplier = float(getattr(self.config, scale, None) or getattr(blocks[0], scale)) if scale else 1.0
        self.layers = [self._view(block, f"{family.layers}.{index}", multiplier) for index, block in enumerate(blocks)]
        self.final_norm = Norm.of(module_at(model, family.final_norm), graph.d_model, family.final_norm, self.device)
        self.centred = self.final_norm.centred and all(
            norm is not None and norm.centred for view in self.layers for norm in (view.attn_norm, view.mlp_norm)
        )
        self.coupled = any(view.post_attn_norm is not None for view in self.layers)

    def _view(self, block: Any, path: str, multiplier: float) -> LayerView:
        family, graph = self.family.of_block(block), self.graph
        d_head = shape_of(module_at(block, family.o))[0] // graph.n_heads
        layout = Layout(family.layout, graph.n_heads, graph.n_kv_heads, d_head)
        attn, mlp, post_attn, post_mlp = (self._norm(block, path, getattr(family, name)) for name in NORMS)
        view = LayerView(
            path, family, layout, block, attn, mlp, post_attn, post_mlp, multiplier, self.work, self.device
        )
        if family.mixer:
            return MixerView.of(view)
        return LatentView.of(view) if family.kv else view

    def _norm(self, block: nn.Module, path: str, name: str | None) -> Norm | None:
        if name is None or isinstance(module_at(block, name), nn.Identity):
            return None
        return Norm.of(module_at(block, name), self.graph.d_model, f"{path}.{name}", self.device)

    def _state(self) -> State:
        norms = [module_at(self.model, self.family.final_norm)]
        for block in module_at(self.model, self.family.layers):
            names = (getattr(self.family.of_block(block), norm) for norm in (*NORMS, *LATENT_NORMS))
            norms += [module_at(block, name) for name in names if name is not None]
        return State.of(self.model, norms)

    def refresh(self) -> bool:
        """Read the model again if it has changed; return whether modules or hooks are new, so that the identities must
        be checked again."""
        before, now = self.state, self._state()
        same_form = now.form == before.form
        if not (same_form and now.same_norms(before)):
            self._read()
        if not same_form:
            for name in ("envoy", "at_sites"):  # cached properties that hold modules
                vars(self).pop(name, None)
            self.divided, self.by_block = 0, None
        self.state = now
        return not same_form or now.adds_hooks_to(before)

    def ungrouped(self) -> Adapter:
        """Return the same model over `Graph.ungrouped()`, where each query head has its own copy of a key and a value.

        It serves edge scores only (`capture_gradients`, `Restart.edges`); circuits run over the model's own graph.
        ModelError if keys and values come from a latent, or a layer has a mixer in place of attention.
        """
        if any(type(view) is not LayerView for view in self.layers):
            raise ModelError(
                f"this {self.kind} model has latent attention, or mixers in place of attention: keys and values have no"
                " copies by query head; leave ungrouped=True out"
            )
        seen, copies = copy.copy(self), self.graph.group
        seen.graph, seen.layers = self.graph.ungrouped(), [replace(view, copies=copies) for view in self.layers]
        return seen

    def at_most(self, length: int) -> int:
        """Return `length`, or the model's maximum number of positions if that is smaller; at least 2."""
        return max(2, min(length, getattr(self.config, "max_position_embeddings", length) or length))

    @property
    def caches(self) -> bool:
        """Whether the model accepts a cache of earlier tokens' keys and values."""
        return "past_key_values" in self._accepts

    @property
    def kind(self) -> str:
        """The config's `model_type`, for messages."""
        return str(getattr(self.config, "model_type", "?"))

    @property
    def inferred(self) -> bool:
        """Whether the family's row was inferred from the modules."""
        return self.row.startswith("inferred")

    @property
    def d_read(self) -> int:
        """The largest `d_read` of any layer."""
        return max(view.d_read for view in self.layers)

    @property
    def device(self) -> torch.device:
        """The device of token ids and of circuitfind's own arithmetic."""
        return device_of(self.model.get_input_embeddings())

    def keywords(self, inputs: Inputs) -> dict[str, Any]:
        """Return the arguments of the model's forward: explicit positions if it takes them, a mask if there is padding,
        and, if the tokens follow others, a new cache with these (the model adds to it)."""
        keywords: dict[str, Any] = {"input_ids": inputs.ids, "use_cache": False}
        if not bool((mask := inputs.whole_mask).all()):
            keywords["attention_mask"] = mask.long()
        if "position_ids" in self._accepts:
            keywords["position_ids"] = inputs.position_ids
        if inputs.past is not None:
            keywords["past_key_values"] = cache = DynamicCache()
            for layer, (keys, values) in enumerate(inputs.past.layers):
                cache.update(keys, values, layer)
        return keywords

    def check_free(self) -> None:
        """Raise ModelError while the model runs as a circuit (`circuitfind.only`)."""
        if self.held_by is not None:
            raise ModelError(
                "inside cf.only the model runs as a circuit, and so would every run of this function: call it outside"
                " the block"
            )

    def head_outputs(self, layer: int, scaled: Tensor) -> Tensor:
        """Return what each head writes, `[heads, batch, pos, d_model]`, from `scaled_heads` `[batch, pos, heads,
        d_head]`."""
        return einsum(scaled, self.layers[layer].output_weight(), "b t h e, h e d -> h b t d")

    def centre(self, x: Tensor) -> Tensor:
        """Subtract the mean over d_model if every norm does so anyway (`centred`); else return x."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def _sites(self) -> list[Site]:
        last = self.graph.n_layers
        return [
            *(
                Site(name, layer, f"{view.path}.{path}".rstrip("."), side)
                for layer, view in enumerate(self.layers)
                for name, path, side in _of_block(view.family)
            ),
            Site("final", last, self.family.final_norm, "input"),
            Site("unembed", last, self.head_path, "input"),
        ]

    @functools.cached_property
    def envoy(self) -> nnsight.NNsight:
        """The model wrapped by nnsight."""
        return nnsight.NNsight(self.model)

    @functools.cached_property
    def at_sites(self) -> dict[str, nn.Module]:
        """The modules with sites, by path."""
        return {site.path: module_at(self.model, site.path) for site in self.sites}

    def _check_weights(self) -> None:
        for name, parameter in self.model.named_parameters():
            plain = (type(parameter) in (nn.Parameter, Tensor) or is_shard(parameter)) and parameter.dtype in PRECISIONS
            if not plain:  # a config may still be marked as quantised when its weights no longer are
                kind = f"a {type(parameter).__name__} of {str(parameter.dtype).removeprefix('torch.')}"
                raise ModelError(
                    f"quantised models are not covered, and weight '{name}' is {kind}: load the model in float32,"
                    " bfloat16 or float16, or de-quantise it: hf = hf.dequantize()"
                )
        if name := without_weights(self.model):
            raise ModelError(f"weight '{name}' is on the meta device: load the weights onto a real device")

    def _check_covered(self, blocks: nn.ModuleList) -> None:
        for block in blocks:
            family = self.family.of_block(block)
            if family.post_attn_norm and module_at(block, family.o).bias is not None:
                raise ModelError("an attention output bias under a post-norm is not covered (attention_bias=True)")
            down = family.down if family.post_mlp_norm else None
            if down and module_at(block, down).bias is not None:
                raise ModelError("an MLP output bias under a post-norm is not covered (mlp_bias=True)")


def graph_of(model: Any, family: Family | str | None = None) -> Graph:
    """Return a model's graph from its config and the shapes of its projections. ModelError if it is not covered."""
    config = model.config.get_text_config()
    family = _within(model, family_of(config, family))
    _check_paths(model, family)
    blocks, n_heads = module_at(model, family.layers), config.num_attention_heads
    rows = [family.of_block(block) for block in blocks]
    sizes = {
        index: _sizes(block, f"{family.layers}.{index}", row, n_heads)
        for index, (block, row) in enumerate(zip(blocks, rows, strict=True))
    }
    mixers = tuple(index for index, row in enumerate(rows) if row.mixer)
    for index in mixers:
        there = {path for path, _ in blocks[index].named_modules()}
        if rows[index].attn != family.attn and family.attn in there:
            raise ModelError(f"'{family.layers}.{index}' has a mixer beside its attention, which is not covered")
    first = next((index for index in sizes if index not in mixers), None)
    if first is None:
        raise ModelError("it has no attention at all: circuits of models with nothing but mixers are not covered")
    for index, size in sizes.items():
        if index not in mixers and size != sizes[first]:
            raise ModelError(
                f"layers with heads of different sizes are not covered: {sizes[first][0]} key/value heads of"
                f" {sizes[first][1]} in layer {first}, {size[0]} of {size[1]} in layer {index}"
            )
    return Graph(len(blocks), n_heads, sizes[first][0], config.hidden_size, family.parallel, mixers)


def _of_block(family: Family) -> list[tuple[str, str, str]]:
    """Return (site name, module path, side) of a block's sites."""
    return [
        ("resid", "", "input"),
        *((name, getattr(family, name), "input" if family.mixer else "output") for name in family.projections),
        ("z", family.o, "input"),
        ("attn_out", family.o, "output"),
        ("mlp_in", family.mlp_in, "input"),
        ("mlp_out", family.mlp_out, "output"),
    ]


def _sizes(block: nn.Module, path: str, family: Family, n_heads: int) -> tuple[int, int]:
    """Return the number of key/value heads and the width of a head. ModelError if the projections do not divide into
    heads."""
    shapes = {}
    for site in ("o", *(() if family.mixer else family.projections), *(("q_latent",) if family.q_latent else ())):
        name = getattr(family, site)
        if not isinstance(module := module_at(block, name), (nn.Linear, Conv1D)):
            raise ModelError(
                f"'{path}.{name}' is a {type(module).__name__}, not a plain linear projection: quantised or"
                " adapter-wrapped weights are not covered"
            )
        shapes[site] = shape_of(module)
    d_head = shapes["o"][0] // n_heads
    if family.kv or family.mixer:
        return 1, d_head
    features = shapes["qkv"][1] if "qkv" in shapes else sum(shapes[site][1] for site in "qkv")
    queries = n_heads * (1 + family.gated)
    n_kv_heads = (features // d_head - queries) // 2 if d_head else 0
    wanted = {"q": queries, "k": n_kv_heads, "v": n_kv_heads, "qkv": n_heads + 2 * n_kv_heads}
    if (
        n_kv_heads < 1
        or n_heads % n_kv_heads
        or any(shapes[site][1] != wanted[site] * d_head for site in shapes if site != "o")
    ):
        told = ", ".join(f"{getattr(family, site)} {shape[0]} to {shape[1]}" for site, shape in shapes.items())
        raise ModelError(f"the projections of '{path}' do not divide into {n_heads} heads of equal width: {told}")
    return n_kv_heads, d_head


def _check_paths(model: nn.Module, family: Family) -> None:
    """Raise ModelError if the model lacks a module that the family names."""

    def check(root: nn.Module, where: str, names: Iterable[str], family: Family = family) -> None:
        for name in names:
            path = getattr(family, name)
            try:
                found = path is None or module_at(root, path)
            except (AttributeError, IndexError, TypeError):
                found = None
            if found is None:
                paths = (other for other, _ in root.named_modules())
                there = [other for other in paths if other and not any(map(str.isdigit, other.split(".")))]
                raise ModelError(f"family: {name}='{path}' is not a module of {where}: there are {', '.join(there)}")

    check(model, f"a {type(model).__name__}", ("layers", "final_norm"))
    others = ("q_latent", *LATENT_NORMS, "o", "attn", *NORMS, "mlp", "mlp_in", "mlp_out", "down")
    for index, block in enumerate(module_at(model, family.layers)):
        row = family.of_block(block)
        check(block, f"block {family.layers}.{index}", (*row.projections, *others), row)


def _within(model: Any, family: Family) -> Family:
    """Return the family with its paths adjusted to a class that holds the text model deeper inside (Gemma 3)."""
    try:
        module_at(model, family.layers)
        return family
    except AttributeError:
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    modules = dict(model.named_modules())
    path = next((path for path, module in modules.items() if module is decoder), "")
    layers, final = (f"{path}.{name.partition('.')[2]}" for name in (family.layers, family.final_norm))
    return replace(family, layers=layers, final_norm=final) if layers in modules else family


def _path_of(model: nn.Module, module: nn.Module | None) -> str:
    for name, candidate in model.named_modules():
        if candidate is module and name:
            return str(name)
    raise ModelError(f"{type(model).__name__} has no language modelling head: load it with AutoModelForCausalLM")
