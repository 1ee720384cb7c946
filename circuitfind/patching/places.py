"""What a sweep patches: kinds of places, as records in a registry, and how one place is replaced in a run.

A *place* is one unit of one layer, at all positions or at one span of them. `attn` and `mlp` are what is written to the
residual stream, as nodes are: after a post-norm, without the output bias, which is never ablated. `mlp` is the node
`m3`, `attn` all heads of a layer together. `attn-out` and `mlp-out` are what the modules put out, bias and all, before
a post-norm: another place wherever the ablated value is not that of one run (`zero`, and `mean` under a post-norm).

Every kind is brought to one of two forms:

* new queries, keys or values of a layer (`q`, `k`, `v`);
* a change of the residual stream where a block begins (all others): a head's or neuron's difference goes through its
  rows of the output projection, then through the post-norm as the model applies it (to the whole attention or MLP
  output, as in a pass with that one replaced); what changes between attention and MLP changes what the MLP writes, too.

A patched `pattern` is a patched head: the other run's pattern times this run's values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from einops import einsum, rearrange
from torch import Tensor

from circuitfind.engine.capture import refuse_aligned
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.restart import Restart
from circuitfind.engine.sites import Values, attended, input_rows
from circuitfind.errors import ModelError, NoFile, ScoreError, entered, unknown
from circuitfind.models.adapter import Adapter
from circuitfind.models.placement import sent

Written = Callable[[Restart, int, Tensor, Tensor], Tensor]
Reached = Callable[[Restart, int, Tensor], Tensor]


@dataclass(frozen=True)
class Kind(NoFile):
    """A kind of place.

    Attributes:
        name: what `circuitfind.patch` is asked for.
        site: where the values are, as for `circuitfind.engine.sites.capture_site`.
        label: how a place is named, from `{layer}`, `{unit}` and `{kv}` ("kv" where key/value heads are shared).
        unit: what a layer's units are called; None: the layer is one unit.
        count: `(adapter, layer) ->` how many units a layer has.
        written: `(restart, layer, change [batch, pos, units, ...], units [units]) -> [units, batch, pos,
            d_model]`, how much more the unit's module puts out; by default the change itself.
        reached: `(restart, layer, written) -> [units, batch, pos, d_model]`, the change of the stream where the block
            after the layer begins. None: the values (of q, k or v) are replaced at their projection.
        entering: the stream is changed where the layer's own block begins.
        in_stream: it is part of no layer's attention or MLP, so GradDrop averages over all layers.
        by_position: whether a sweep goes by position when it is not told.
        parallel: parallel blocks have it; if not, the error names `instead`.
        aligned: it has a corrupted value on the clean prompt's positions; if not, the error names `instead`.
        mean: it has a mean over positions.
        name_layers: a layer has so many that layers must be named.
    """

    name: str
    site: str
    label: str
    unit: str | None = None
    count: Callable[[Adapter, int], int] = lambda adapter, layer: 1
    written: Written = lambda restart, layer, change, units: change
    reached: Reached | None = None
    entering: bool = False
    in_stream: bool = False
    by_position: bool = False
    parallel: bool = True
    aligned: bool = True
    mean: bool = True
    name_layers: bool = False
    instead: str = ""

    def check(self, experiment: Experiment) -> None:
        """Raises ModelError or ScoreError, with the remedy, where model, pairs or ablation have no such places."""
        if not self.aligned:
            refuse_aligned(experiment.bound.batch, f"a corrupted {self.name}", f"patch {self.instead} instead")
        if not self.mean and experiment.ablation.mean == "all":
            raise ScoreError(f"a {self.name} has no mean over positions: use ablation='mean-position' or 'corrupted'")
        if not self.parallel and experiment.graph.parallel:
            raise ModelError(
                f"what='{self.name}': in this model attention and MLP of a block read the same stream (parallel"
                f" blocks), and there is none between them: use {self.instead}"
            )

    def units(self, adapter: Adapter, layer: int) -> tuple[str, list[str]] | None:
        """What the units of a layer are called, and their numbers; None where the layer is one unit."""
        if self.unit is None:
            return None
        count = self.count(adapter, layer)
        shared = self.unit == "head" and count < adapter.graph.n_heads
        return "key/value head" if shared else self.unit, list(map(str, range(count)))


def _heads(adapter: Adapter, layer: int) -> int:
    return adapter.graph.n_heads


def _kv_heads(adapter: Adapter, layer: int) -> int:
    return adapter.graph.n_kv_heads


def _neurons(adapter: Adapter, layer: int) -> int:
    return len(input_rows(adapter, "hidden", layer))


def _projected(restart: Restart, layer: int, change: Tensor, units: Tensor) -> Tensor:
    """Heads through the output projection."""
    weight = input_rows(restart.adapter, "z", layer)
    rows = rearrange(weight, "(h e) d -> h e d", h=restart.adapter.graph.heads_in(layer))[units]
    found: Tensor = einsum(change, rows.to(change), "b t u e, u e d -> u b t d")
    return found


def _attended(restart: Restart, layer: int, change: Tensor, units: Tensor) -> Tensor:
    """Patterns times the base run's values, through the output projection."""
    by_head = restart.adapter.layers[layer].values_by_head(restart.base.qkv[layer].v)
    return _projected(restart, layer, attended(restart.adapter, change, by_head[:, :, units]), units)


def _down(restart: Restart, layer: int, change: Tensor, units: Tensor) -> Tensor:
    """Neurons through the down projection."""
    rows = input_rows(restart.adapter, "hidden", layer)[units]
    found: Tensor = einsum(change, rows.to(change), "b t u, u d -> u b t d")
    return found


def _as_it_is(restart: Restart, layer: int, written: Tensor) -> Tensor:
    return written


def _from_attention(restart: Restart, layer: int, written: Tensor) -> Tensor:
    write, output = restart.adapter.layers[layer].attn_written, restart.base.attn_out[layer]
    return restart.after_mlp(layer, _more(write, output, written))


def _from_mlp(restart: Restart, layer: int, written: Tensor) -> Tensor:
    output = restart.base.mlp_out[layer].view(restart.base.resid[layer].shape)
    return _more(restart.adapter.layers[layer].mlp_written, output, written)


def _more(write: Callable[[Tensor], Tensor], output: Tensor, difference: Tensor) -> Tensor:
    """How much more reaches the stream when a module's output is so much larger."""
    return write(output.to(difference) + difference) - write(output)


_KINDS = (
    Kind("resid", "resid", "resid{layer}", reached=_as_it_is, entering=True, in_stream=True, by_position=True),
    Kind(
        "resid-mid",
        "middle",
        "resid-mid{layer}",
        reached=Restart.after_middle,
        in_stream=True,
        by_position=True,
        parallel=False,
        instead="'resid', 'attn' or 'mlp'",
    ),
    Kind("attn", "attn", "{attn}{layer}", reached=Restart.after_mlp, by_position=True),
    Kind("mlp", "mlp", "m{layer}", reached=_as_it_is, by_position=True),
    Kind("attn-out", "attn_out", "attn-out{layer}", reached=_from_attention, by_position=True),
    Kind("mlp-out", "mlp_out", "mlp-out{layer}", reached=_from_mlp, by_position=True),
    Kind("heads", "z", "a{layer}.h{unit}", "head", _heads, _projected, _from_attention),
    Kind("q", "q", "a{layer}.h{unit}<q>", "head", _heads),
    Kind("k", "k", "a{layer}.{kv}{unit}<k>", "head", _kv_heads),
    Kind("v", "v", "a{layer}.{kv}{unit}<v>", "head", _kv_heads),
    Kind(
        "pattern",
        "pattern",
        "a{layer}.h{unit}<pattern>",
        "head",
        _heads,
        _attended,
        _from_attention,
        aligned=False,
        mean=False,
        instead="'q', 'k' or 'v'",
    ),
    Kind("neurons", "hidden", "m{layer}.n{unit}", "neuron", _neurons, _down, _from_mlp, name_layers=True),
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _KINDS}
SPELLINGS = {  # of other tools, for "did you mean"
    "resid": "resid_pre hook_resid_pre resid_post hook_resid_post residual stream",
    "resid-mid": "resid_mid hook_resid_mid middle",
    "attn": "attn_out hook_attn_out attention self_attn",
    "mlp": "mlp_out hook_mlp_out mlps",
    "heads": "z hook_z head result hook_result head_out",
    "q": "hook_q query queries",
    "k": "hook_k key keys",
    "v": "hook_v value values",
    "pattern": "hook_pattern attn_pattern attention_pattern patterns attn_weights",
    "neurons": "neuron post hook_post mlp_post hidden",
}


def register(kind: Kind) -> Kind:
    """Gives a kind of place its name; raises ScoreError where it is taken."""
    return entered(kind, Kind, KINDS, ScoreError, "kind of place '{}' exists: give yours another name")


def kind_of(what: str) -> Kind:
    """The kind of this name; raises ScoreError where there is none, with the one that may be meant."""
    if isinstance(what, str) and what in KINDS:
        return KINDS[what]
    name = what.rpartition(".")[2] if isinstance(what, str) else what  # "blocks.9.attn.hook_z"
    raise ScoreError(unknown("kind of place", name, KINDS, {kind: names.split() for kind, names in SPELLINGS.items()}))


class Place(NamedTuple):
    """A unit of a layer, at one span of positions or (None) at all."""

    unit: int
    span: int | None


@dataclass(frozen=True, eq=False)
class Patcher:
    """Replaces units of a base run by another run's.

    own, other: the site's values by layer, in the base run and instead; `other` may broadcast over batch and positions.
    numbers: `[batch, pos]` which span each position belongs to; None where all positions go together.
    """

    kind: Kind
    restart: Restart
    own: Values
    other: Values
    numbers: Tensor | None
    _latest: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def logits(self, layer: int, places: list[Place]) -> Tensor:
        """`[places, batch, reads, vocab]`: each place of this layer patched in a run of its own."""
        if self.kind.reached is None:
            values = torch.stack([self._replaced(layer, place) for place in places])
            return self.restart.from_projection(layer, self.kind.site, values)
        self._prepare(layer, list(dict.fromkeys(place.unit for place in places)), self.kind.reached)
        changes = torch.stack([self._placed(layer, place) for place in places])
        return self.restart.from_stream(layer if self.kind.entering else layer + 1, changes)

    def _placed(self, layer: int, place: Place) -> Tensor:
        change, at = self._latest[layer, place.unit], self._at(place)
        return change if at is None else torch.where(at, change, 0)

    def _replaced(self, layer: int, place: Place) -> Tensor:
        """`[batch, pos, heads, d_head]` with one head's values replaced."""
        values, at = self.own[layer].clone(), self._at(place)
        own, other = (side[:, :, place.unit] for side in (values, self.other[layer].expand_as(values).to(values.dtype)))
        values[:, :, place.unit] = other if at is None else torch.where(at, other, own)
        return values

    def _at(self, place: Place) -> Tensor | None:
        """`[batch, pos, 1]` where a place is; None for everywhere."""
        return None if self.numbers is None or place.span is None else (self.numbers == place.span).unsqueeze(-1)

    def _prepare(self, layer: int, units: list[int], reached: Reached) -> None:
        """Computes the changes of these units; those of the last call are kept, because places come unit by unit."""
        for at, unit in list(self._latest):
            if at != layer or unit not in units:
                del self._latest[at, unit]
        if missing := [unit for unit in units if (layer, unit) not in self._latest]:
            changes = reached(self.restart, layer, self._written(layer, missing))
            self._latest.update({(layer, unit): change for unit, change in zip(missing, changes, strict=True)})

    def _written(self, layer: int, units: list[int]) -> Tensor:
        """`[units, batch, pos, d_model]`: how far the output of the unit's module (or the stream) is from the base."""
        own = self.own[layer].to(self.restart.adapter.work)
        other = self.other[layer].to(own).expand_as(own)
        if self.kind.unit is None:
            return (other - own)[None]
        at = sent(np.array(units), own.device)
        return self.kind.written(self.restart, layer, other[:, :, at] - own[:, :, at], at)
