"""Activation patching by its definition: one full run of the plain model for each place, with one hook.

The runs of a layer's places are rows of one batch: side by side, and none knows of the others.

Nothing of circuitfind takes part but the name table, and `oracles.Literal` for a model's inputs and feature order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import numpy as np
import torch
from oracles import Literal
from torch import Tensor, nn
from toys import FOUR

import circuitfind as cf
from circuitfind.batch import Inputs
from circuitfind.patching.places import KINDS
from circuitfind.tasks.bound import BoundTask

# gpt_neox's blocks are parallel: there is no stream between attention and MLP
EVERY = [(name, what) for name in FOUR for what in KINDS if (name, what) != ("gpt_neox", "resid-mid")]
Edit = Callable[
    [Tensor], Tensor
]  # of a place's tensor `[batch, pos, features]`, or a pattern `[batch, head, query, key]`


class PatchingTwin:
    """A model and a bound task; `effects` is what a sweep should find."""

    def __init__(self, model: cf.Model, bound: BoundTask, dealt: Inputs | None = None) -> None:
        self.model, self.bound, self.literal = model, bound, Literal(model.hf)
        self.corrupted = bound.batch.corrupted if dealt is None else dealt
        self.batch = bound.batch.with_reference(self._logits(bound.batch.clean))

    def effects(
        self,
        what: str,
        by_position: bool | list[list[list[int]]],
        direction: str = "noising",
        ablation: str = "corrupted",
        layers: tuple[int, ...] = (0, 1),
        each: int = 1,
    ) -> np.ndarray:
        """`[layers, units, positions, examples]`, one unit in `each`; in place of positions, lists of each row's."""
        clean, corrupted = self.batch.clean, self.corrupted
        base, source, sign = (clean, corrupted, 1) if direction == "noising" else (corrupted, clean, -1)
        before = self._metric(self._logits(base))
        places: list[list[list[int]]] = by_position if isinstance(by_position, list) else []
        if not places:
            rows, length = clean.ids.shape
            places = [[[at]] * rows for at in range(length)] if by_position else [[[*range(length)]] * rows]
        found = []
        for layer in layers:
            other = self._carried(what, layer, source, ablation)
            pairs = product(range(0, self._units(what, other), each), places)
            edits = [self._replacement(what, unit, place, other) for unit, place in pairs]

            def edit(value: Tensor, edits: list[Edit] = edits) -> Tensor:
                return torch.cat([one(rows) for one, rows in zip(edits, value.chunk(len(edits)), strict=True)])

            with self._hooked(what, layer, edit):
                logits = self._logits(base.repeat(len(edits)))
            found += [sign * (before - self._metric(rows)) for rows in logits.chunk(len(edits))]
        return torch.stack(found).view(len(layers), -1, len(places), len(self.bound)).double().numpy()

    # ---------------------------------------------------------------- one place
    def _replacement(self, what: str, unit: int, places: list[list[int]], other: Tensor) -> Edit:
        def edit(value: Tensor) -> Tensor:
            new, features = value.clone(), self._features(what, unit, value)
            for row, positions in enumerate(places):
                for at in positions:
                    if what == "pattern":
                        new[row, unit, at] = other[row, unit, at]
                    else:
                        new[row, at, features] = self._like(other, value)[row, at, features]
            return new

        return edit

    def _like(self, other: Tensor, value: Tensor) -> Tensor:
        """Keys of latent attention lie in the outputs of two modules: `_carried` has both, one after the other."""
        if other.shape[-1] != value.shape[-1]:
            down = self.model.hf.config.kv_lora_rank + self.model.hf.config.qk_rope_head_dim
            other = other[..., :down] if value.shape[-1] == down else other[..., down:]
        return other.reshape(value.shape)

    def _features(self, what: str, unit: int, value: Tensor) -> list[int]:
        d_head = self.literal.d_head
        if what in ("k", "v") and self.literal.family.kv:
            config = self.model.hf.config
            if value.shape[-1] == config.kv_lora_rank + config.qk_rope_head_dim:
                return list(range(config.kv_lora_rank, value.shape[-1]))
            by_head = torch.arange(value.shape[-1]).view(self.literal.n_heads, -1)
            plain = config.qk_nope_head_dim
            return (by_head[:, :plain] if what == "k" else by_head[:, plain:]).flatten().tolist()
        if what == "heads":
            return list(range(unit * d_head, (unit + 1) * d_head))
        if what in ("q", "k", "v"):
            return self.literal._features(what, unit)
        return [unit] if what == "neurons" else list(range(value.shape[-1]))

    def _units(self, what: str, value: Tensor) -> int:
        if what in ("k", "v"):
            return self.literal.n_kv_heads
        if what == "neurons":
            return value.shape[-1]
        return self.literal.n_heads if what in ("heads", "q", "pattern") else 1

    def _carried(self, what: str, layer: int, source: Inputs, ablation: str) -> Tensor:
        seen: list[Tensor] = []

        def note(value: Tensor) -> Tensor:
            seen.append(value.clone())
            return value

        with self._hooked(what, layer, note):
            self._logits(source)
        value = torch.cat([one.view(*self.batch.clean.ids.shape, -1) for one in seen], dim=-1)
        if what == "pattern":
            value = seen[0]
        if ablation == "zero":
            return torch.zeros_like(value) + self._kept(what, layer)
        if ablation == "mean":
            return value[source.mask].mean(0).expand_as(value)
        return value.mean(0).expand_as(value) if ablation == "mean-position" else value

    def _kept(self, what: str, layer: int) -> Tensor | float:
        """What stays when nothing is written: the output bias (there is none under a post-norm)."""
        family = self.literal.rows[layer]
        name = {"attn": family.o, "mlp": family.down}.get(what)
        bias = getattr(self.literal.blocks[layer].get_submodule(name), "bias", None) if name else None
        return 0.0 if bias is None else bias

    # ---------------------------------------------------------------- the model
    @contextmanager
    def _hooked(self, what: str, layer: int, edit: Edit) -> Iterator[None]:
        if what in ("pattern", "resid-mid"):
            with self._softened(layer, edit) if what == "pattern" else self._between(layer, edit):
                yield
            return
        family, block = self.literal.rows[layer], self.literal.blocks[layer]
        names = {"resid": "", "heads": family.o, "neurons": family.down}
        names |= {"attn": family.post_attn_norm or family.o, "mlp": family.post_mlp_norm or family.mlp_out}
        names |= {"attn-out": family.o, "mlp-out": family.mlp_out}
        name = names[what] if what in names else (family.qkv or getattr(family, what))
        paths = [name]
        if what in ("k", "v") and family.kv:
            paths = [family.kv_latent, family.kv] if what == "k" else [family.kv]
        length = self.batch.clean.ids.shape[1]

        def shaped(value: Tensor) -> Tensor:  # some models flatten batch and position
            return edit(value.view(-1, length, value.shape[-1])).view(value.shape)

        def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (shaped(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": shaped(kwargs["hidden_states"])}

        def after(_: nn.Module, __: tuple, output: Tensor | tuple) -> Tensor | tuple:
            return (shaped(output[0]), *output[1:]) if isinstance(output, tuple) else shaped(output)

        handles = []
        for module in map(block.get_submodule, paths):
            if what in ("resid", "heads", "neurons"):
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _between(self, layer: int, edit: Edit) -> Iterator[None]:
        """What stands between attention and MLP is what entered the block and what attention wrote: the latter is set
        so that the sum is what it should be."""
        family, block, times = self.literal.rows[layer], self.literal.blocks[layer], self.literal.multiplier
        entered: list[Tensor] = []

        def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
            entered.append(args[0] if args else kwargs["hidden_states"])

        def written(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
            return (edit(entered[-1] + times * output) - entered[-1]) / times

        last = block.get_submodule(family.post_attn_norm or family.o)
        handles = [block.register_forward_pre_hook(enter, with_kwargs=True), last.register_forward_hook(written)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _softened(self, layer: int, edit: Edit) -> Iterator[None]:
        """Eager attention passes its probabilities through dropout right before they meet the values."""
        dropout, calls = nn.functional.dropout, []

        def edited(value: Tensor, *args: object, **kwargs: object) -> Tensor:
            if value.ndim != 4:
                return dropout(value, *args, **kwargs)
            calls.append(value)
            return edit(value) if len(calls) == layer + 1 else value

        before = self.model.hf.config._attn_implementation
        self.model.hf.set_attn_implementation("eager")
        nn.functional.dropout = edited
        try:
            yield
        finally:
            nn.functional.dropout = dropout
            self.model.hf.set_attn_implementation(before)
            assert len(calls) == len(self.literal.blocks), "every layer's attention was seen once"

    @torch.no_grad()
    def _logits(self, inputs: Inputs) -> Tensor:
        return self.literal._plain_logits(inputs)

    def _metric(self, logits: Tensor) -> Tensor:
        return self.bound.metric(logits, self.batch)
