"""Slow, literal twins of the engine: every reader really gets its own copy of the residual stream.

`Literal.run` takes a model through one forward pass in which every q, k, v head, every MLP and the unembedding asks a
function what it sees. What a reader sees goes through the model's own norm module and projection; what a head writes is
the model's own output projection of that head alone. Nothing of circuitfind takes part but the name table, and that is
checked, too: splitting the readers must leave the plain model's logits as they are.

1. `split_reader_scores`: what each reader sees is an autograd node of its own; a score is its gradient times the
   writer's difference.
2. `patch_edges`: one full forward pass for each edge.
3. `run_circuit`: every reader sees the sum of its writers, current value inside the circuit and ablated value outside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from circuitfind.batch import Batch, Inputs
from circuitfind.models.families import Family, family_of

See = Callable[[str, Tensor, "Pass"], Tensor]  # (reader, residual stream, pass so far) -> what the reader sees


@dataclass
class Pass:
    """What each writer added, and each output bias (by its MLP's or attention's name); the logits.

    `streams`: the residual stream as each layer's attention and MLP find it, before any norm.
    """

    writers: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    streams: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def unchanged(reader: str, stream: Tensor, so_far: Pass) -> Tensor:
    """Every reader sees the residual stream."""
    return stream


class Literal:
    """A model of a family in the name table, with its readers split.

    `differentiable`: what writers write keeps its gradient, so that what readers see of it has one; `family`: the row
    of a model that has none in the table.
    """

    def __init__(self, model: nn.Module, differentiable: bool = False, family: Family | None = None) -> None:
        self.model, self.family, self.differentiable = model, family_of(model.config, family), differentiable
        self.blocks = list(model.get_submodule(self.family.layers))
        self.n_heads = model.config.num_attention_heads
        self.rows = [self.family.of_block(block) for block in self.blocks]
        self.mixers = [layer for layer, row in enumerate(self.rows) if row.mixer]
        first = next(layer for layer, row in enumerate(self.rows) if not row.mixer)
        out = self._at(first, self.family.o)
        self.d_head = getattr(out, "in_features", out.weight.shape[0]) // self.n_heads
        if self.family.qkv:
            features = self._at(first, self.family.qkv)(torch.zeros(1, model.config.hidden_size).to(out.weight)).shape[
                -1
            ]
            self.n_kv_heads = (features // self.d_head - self.n_heads) // 2
        elif self.family.kv:
            self.n_kv_heads = 1  # keys and values of all heads come from one latent
        else:
            self.n_kv_heads = self._at(first, self.family.k).out_features // self.d_head
        scale = self.family.residual_multiplier or ""
        self.multiplier = getattr(model.config, scale, None) or getattr(self.blocks[0], scale, 1.0)

    # ---------------------------------------------------------------- names
    def readers(self, layer: int, kind: str) -> list[str]:
        if layer in self.mixers:
            return [f"s{layer}"] if kind == "q" else []
        if kind == "q" or self.n_kv_heads == self.n_heads:
            return [f"a{layer}.h{head}<{kind}>" for head in range(self.n_heads)]
        return [f"a{layer}.kv{head}<{kind}>" for head in range(self.n_kv_heads)]

    def writers(self, reader: str) -> list[str]:
        """The writers that a reader sees, in order of computation."""
        layer = len(self.blocks) if reader == "logits" else int(reader.split(".")[0][1:])
        names = ["input"]
        for earlier in range(layer):
            names += [*self._before_mlp(earlier), f"m{earlier}"]
        if reader.startswith("m") and not self.family.parallel:
            names += self._before_mlp(layer)
        return names

    def _before_mlp(self, layer: int) -> list[str]:
        return [f"s{layer}"] if layer in self.mixers else [f"a{layer}.h{head}" for head in range(self.n_heads)]

    def edges(self) -> list[tuple[str, str]]:
        readers = []
        for layer in range(len(self.blocks)):
            readers += [name for kind in "qkv" for name in self.readers(layer, kind)] + [f"m{layer}"]
        return [(writer, reader) for reader in (*readers, "logits") for writer in self.writers(reader)]

    # ---------------------------------------------------------------- one pass
    def run(self, inputs: Inputs, see: See = unchanged) -> Pass:
        """One forward pass; logits `[batch, reads, vocab]`."""
        result = Pass()
        with ExitStack() as hooks:
            for layer in range(len(self.blocks)):
                for handle in self._hook_layer(layer, see, result):
                    hooks.callback(handle.remove)
            final = self.model.get_submodule(self.family.final_norm)

            def enter_final(_: nn.Module, args: tuple) -> tuple | None:
                if f"m{len(self.blocks) - 1}" not in result.writers:  # nanochat norms the embeddings with it, too
                    return None
                return (see("logits", args[0], result), *args[1:])

            handle = final.register_forward_pre_hook(enter_final)
            hooks.callback(handle.remove)
            result.logits = self._plain_logits(inputs)
        return result

    def check_unchanged(self, inputs: Inputs, split: Pass) -> None:
        """Splitting the readers changed nothing: so the name table's norms, layouts and order are the model's own."""
        plain = self._plain_logits(inputs)
        torch.testing.assert_close(split.logits, plain, rtol=1e-4, atol=1e-5 * float(plain.detach().abs().max()))

    def _plain_logits(self, inputs: Inputs) -> Tensor:
        logits = self.model(**self._keywords(inputs)).logits
        return torch.stack([row[at] for row, at in zip(logits, inputs.read, strict=True)])

    def _keywords(self, inputs: Inputs) -> dict:
        keywords = {"input_ids": inputs.ids, "attention_mask": inputs.mask.long(), "use_cache": False}
        positions = torch.zeros_like(inputs.ids)
        for row, mask in zip(positions, inputs.mask, strict=True):
            row[mask] = torch.arange(int(mask.sum()))
            after = torch.arange(len(mask)) > int(mask.nonzero().max())
            row[after] = int(mask.sum()) - 1  # padding on the right: any position will do
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            keywords["position_ids"] = positions
        return keywords

    def _hook_layer(self, layer: int, see: See, result: Pass) -> Iterator[torch.utils.hooks.RemovableHandle]:
        family, streams = self.rows[layer], result.streams
        attn_norm, mlp_norm = self._at(layer, family.attn_norm), self._at(layer, family.mlp_norm)

        def enter_block(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            value = args[0] if args else kwargs["hidden_states"]
            streams[f"a{layer}"] = streams[f"m{layer}"] = value
            if layer:
                return None
            result.writers["input"] = value.detach()
            root = value.detach().requires_grad_(torch.is_grad_enabled())  # leaf: no parameter's gradient is needed
            streams["a0"] = streams["m0"] = root
            return ((root, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": root})

        def enter_mlp_norm(_: nn.Module, args: tuple) -> None:
            streams[f"m{layer}"] = args[0]

        def project(kinds: str) -> Callable:
            def after(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
                new = output.clone()
                for kind in kinds:
                    for head, reader in enumerate(self.readers(layer, kind)):
                        seen = see(reader, streams[f"a{layer}"], result)
                        normed = seen if attn_norm is None else attn_norm.forward(seen)
                        features = self._features(kind, head)
                        new[..., features] = module.forward(normed)[..., features]
                return new

            return after

        def enter_mixer(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            seen = see(f"s{layer}", streams[f"a{layer}"], result)
            new = seen if attn_norm is None else attn_norm.forward(seen)
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        def write_heads(module: nn.Module, args: tuple, output: Tensor) -> None:
            z, out = self._cut(args[0]), self._cut(output)
            bias = module.forward(torch.zeros_like(z))
            if family.mixer:
                result.writers[f"s{layer}"] = self._added(out - bias, out, layer, family.post_attn_norm)
                result.biases[f"s{layer}"] = self._added(bias, out, layer, family.post_attn_norm)
                return
            for head in range(self.n_heads):
                alone = torch.zeros_like(z)
                features = slice(head * self.d_head, (head + 1) * self.d_head)
                alone[..., features] = z[..., features]
                part = module.forward(alone) - bias
                result.writers[f"a{layer}.h{head}"] = self._added(part, out, layer, family.post_attn_norm)
            result.biases[f"a{layer}"] = self._added(bias, out, layer, family.post_attn_norm)

        def enter_mlp(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            value = args[0] if args else kwargs["hidden_states"]
            stream = value if mlp_norm is None else streams[f"m{layer}"]
            shape = result.writers["input"].shape
            seen = see(f"m{layer}", stream.view(shape), result)
            new = (seen if mlp_norm is None else mlp_norm.forward(seen)).view(value.shape)
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        def write_mlp(_: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            out = self._cut(output[0] if isinstance(output, tuple) else output)
            out = out.clone().view(result.writers["input"].shape)
            bias = getattr(self._at(layer, family.down), "bias", None)
            bias = torch.zeros_like(out) if bias is None else bias.detach().expand_as(out)
            result.writers[f"m{layer}"] = self._added(out - bias, out, layer, family.post_mlp_norm)
            result.biases[f"m{layer}"] = self._added(bias, out, layer, family.post_mlp_norm)

        yield self.blocks[layer].register_forward_pre_hook(enter_block, with_kwargs=True)
        if mlp_norm is not None and mlp_norm is not attn_norm:
            yield mlp_norm.register_forward_pre_hook(enter_mlp_norm)
        projections = {family.qkv: "qkv"} if family.qkv else {family.q: "q", family.k: "k", family.v: "v"}
        if family.kv:
            projections = {}
            yield from self._hook_latents(layer, lambda reader: see(reader, streams[f"a{layer}"], result))
        if family.mixer:
            projections = {}
            yield self._at(layer, family.mixer).register_forward_pre_hook(enter_mixer, with_kwargs=True)
        for name, kinds in projections.items():
            yield self._at(layer, name).register_forward_hook(project(kinds))
        yield self._at(layer, family.o).register_forward_hook(write_heads)
        yield self._at(layer, family.mlp_in).register_forward_pre_hook(enter_mlp, with_kwargs=True)
        yield self._at(layer, family.mlp_out).register_forward_hook(write_mlp)

    def _hook_latents(self, layer: int, see: Callable[[str], Tensor]) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Latent attention: each reader sends what it sees through all modules up to q, k or v; others' are left."""
        family, config = self.family, self.model.config
        norm, down, between, up = (
            self._at(layer, name) for name in (family.attn_norm, family.kv_latent, family.kv_latent_norm, family.kv)
        )
        rank, plain, seen = config.kv_lora_rank, config.qk_nope_head_dim, {}

        def normed(reader: str) -> Tensor:
            if reader not in seen:  # a key has features in two places, but sees the stream once
                seen[reader] = norm.forward(see(reader))
            return seen[reader]

        def after_q(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            new = output.clone().unflatten(-1, (self.n_heads, -1))
            for head in range(self.n_heads):
                value = normed(f"a{layer}.h{head}<q>")
                if family.q_latent:
                    value = self._at(layer, family.q_latent).forward(value)
                    value = self._at(layer, family.q_latent_norm).forward(value)
                new[..., head, :] = module.forward(value).unflatten(-1, (self.n_heads, -1))[..., head, :]
            return new.flatten(-2)

        def after_down(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            new = output.clone()
            new[..., rank:] = module.forward(normed(f"a{layer}.kv0<k>"))[..., rank:]
            return new

        def after_up(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            new = output.clone()
            for kind, features in (("k", slice(0, plain)), ("v", slice(plain, None))):
                latent = down.forward(normed(f"a{layer}.kv0<{kind}>"))[..., :rank]
                through = module.forward(between.forward(latent)).view(new.shape)
                for head in torch.arange(new.shape[-1]).view(self.n_heads, -1):
                    new[..., head[features]] = through[..., head[features]]
            return new

        yield self._at(layer, family.q).register_forward_hook(after_q)
        yield down.register_forward_hook(after_down)
        yield up.register_forward_hook(after_up)

    def _at(self, layer: int, name: str | None) -> nn.Module | None:
        return self.blocks[layer].get_submodule(name) if name else None

    def _features(self, kind: str, head: int) -> list[int]:
        """Where a head's features lie in its projection's output, counted out one by one."""
        order = []  # (kind, head) of each run of d_head features
        group = self.n_heads // self.n_kv_heads
        if not self.family.qkv:
            order = [(kind, h) for h in range(self.n_heads if kind == "q" else self.n_kv_heads)]
        elif self.family.layout == "concat":
            order = [(k, h) for k in "qkv" for h in range(len(self.readers(0, k)))]
        elif self.family.layout == "per_head":
            order = [(k, h) for h in range(self.n_heads) for k in "qkv"]
        elif self.family.layout == "four_blocks":
            quarter = self.n_heads // 4
            order = [(k, b * quarter + i) for b in range(4) for k in "qvk" for i in range(quarter)]
        else:
            for g in range(self.n_kv_heads):
                order += [("q", g * group + i) for i in range(group)] + [("k", g), ("v", g)]
        width = self.d_head
        if self.family.kv:
            width = self.model.config.qk_nope_head_dim + self.model.config.qk_rope_head_dim
        if self.family.gated and kind == "q":
            width = 2 * self.d_head
        start = order.index((kind, head)) * width
        return list(range(start, start + width))

    def _added(self, part: Tensor, whole: Tensor, layer: int, post_norm: str | None) -> Tensor:
        """A part's share of what `whole` adds to the stream: a post-norm scales all parts alike."""
        if post_norm is not None:
            scale = self._at(layer, post_norm).forward(whole) / whole.where(whole != 0, 1)
            part = part * scale.where(whole != 0, 0)  # sdpa writes zeros at positions that see nothing
        return self._cut(part * self.multiplier)

    def _cut(self, value: Tensor) -> Tensor:
        return value if self.differentiable else value.detach()


# -------------------------------------------------------------------- the three twins
def split_reader_scores(
    model: nn.Module, batch: Batch, metric: Callable[[Tensor], Tensor]
) -> dict[tuple[str, str], Tensor]:
    """First-order effects of all edges at every token, `[batch, pos]`, by autograd.

    `metric`: from logits `[batch, reads, vocab]` to `[batch]`.
    """
    literal, branches = Literal(model), {}
    with torch.no_grad():
        corrupted = literal.run(batch.corrupted)

    def split(reader: str, stream: Tensor, so_far: Pass) -> Tensor:
        branches[reader] = stream.view_as(stream)
        return branches[reader]

    clean = literal.run(batch.clean, split)
    literal.check_unchanged(batch.clean, clean)
    gradients = torch.autograd.grad(metric(clean.logits).sum(), list(branches.values()))
    at_reader = dict(zip(branches, gradients, strict=True))
    change = {name: value - corrupted.writers[name] for name, value in clean.writers.items()}
    return {(writer, reader): (change[writer] * at_reader[reader]).sum(-1) for writer, reader in literal.edges()}


@torch.no_grad()
def patch_edges(
    literal: Literal, inputs: Inputs, change: dict[str, Tensor], edges: Sequence[tuple[str, str]]
) -> Tensor:
    """Logits `[edges, batch, reads, vocab]`: in each edge's run its reader sees `change[writer]` more.

    The runs are rows of one batch: side by side, and none knows of the others.
    """
    many = inputs.repeat(len(edges))

    def see(name: str, stream: Tensor, so_far: Pass) -> Tensor:
        seen = stream.unflatten(0, (len(edges), -1)).clone()
        for at, (writer, reader) in enumerate(edges):
            if reader == name:
                seen[at] += change[writer]
        return seen.flatten(0, 1)

    return literal.run(many, see).logits.unflatten(0, (len(edges), -1))


@torch.no_grad()
def run_circuit(literal: Literal, inputs: Inputs, kept: set[tuple[str, str]], ablated: dict[str, Tensor]) -> Tensor:
    """Logits of a circuit: each reader sees `sum over writers` plus the output biases that came before it."""

    def see(reader: str, stream: Tensor, so_far: Pass) -> Tensor:
        total = torch.zeros_like(stream)
        writers = literal.writers(reader)
        for writer in writers:
            total = total + (so_far.writers if (writer, reader) in kept else ablated)[writer]
        before = {writer.split(".")[0] for writer in writers}
        for name, bias in so_far.biases.items():
            total = total + bias if name in before else total
        return total

    return literal.run(inputs, see).logits


def by_hand(estimates: Sequence[float], left_out: Any) -> np.ndarray:
    """`[statistics, 2]`: 95% intervals of statistics, from their values with each example left out [examples, ...]."""
    ends = []
    for estimate, values in zip(estimates, np.asarray(left_out).T, strict=True):
        count, middle = len(values), sum(values) / len(values)
        error = ((count - 1) / count * sum((value - middle) ** 2 for value in values)) ** 0.5
        ends.append([estimate + side * stats.t.ppf(0.975, count - 1) * error for side in (-1, 1)])
    return np.array(ends)
