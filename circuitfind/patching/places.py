"""The kinds of places that a sweep patches, as records in a registry, and the replacement of one place in a run.

A *place* is one unit of one layer, at all positions or at one span of them. `attn` and `mlp` are the outputs that the
layer adds to the residual stream, like nodes: after a post-norm, without the output bias, which is never ablated. `mlp`
is the node `m3`, `attn` all heads of a layer together. `attn-out` and `mlp-out` are the modules' outputs before a
post-norm, with bias. They have different effects if the ablated value is not that of one run (`zero`; `mean` under a
post-norm).

A patch takes one of two forms:

* new queries, keys or values of a layer (`q`, `k`, `v`);
* a change of the residual stream at the start of a block (all others). The difference of a head or neuron goes through
  its rows of the output projection, and then through the post-norm as the model applies it, to the whole output of
  attention or MLP. A change between attention and MLP also changes the MLP's output.

A patched `pattern` changes its head's output: the other run's pattern times this run's values.
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
        name: the `what` of `circuitfind.patch`.
        site: where the values are, as for `circuitfind.engine.sites.capture_site`.
        label: format string of a place's name, with `{layer}`, `{unit}`, `{kv}` ("kv" if key/value heads are shared,
            else "h") and `{attn}` ("s" for a mixer, else "a").
        unit: name of a layer's units; None: the layer is one unit.
        count: `(adapter, layer) ->` number of units in the layer.
        written: `(restart, layer, change [batch, pos, units, ...], units [units]) -> [units, batch, pos, d_model]`, the
            change of the output of the units' module; by default the change itself.
        reached: `(restart, layer, written) -> [units, batch, pos, d_model]`, the change of the stream at the start of
            the next block. None: the values (of q, k or v) are replaced at their projection.
        entering: the stream is changed at the start of the layer's own block instead.
        in_stream: part of no layer's attention or MLP, so GradDrop averages over all layers.
        by_position: the default of a sweep's `by_position`.
        parallel: exists in parallel blocks; if not, the error names `instead`.
        aligned: the corrupted value can be moved to the clean prompt's positions; if not, the error names `instead`.
        mean: has a mean over positions.
        name_layers: a layer has so many units that the layers must be named.
        instead: what an error says to patch instead.
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
        """Raise a ModelError, TaskError or ScoreError if the model, the pairs or the ablation exclude this kind."""
        if not self.aligned:
            refuse_aligned(experiment.bound.batch, f"a corrupted {self.name}", f"patch {self.instead} instead")
        if not self.mean and experiment.ablation.mean == "all":
            raise ScoreError(f"a {self.name} has no mean over positions: use ablation='mean-position' or 'corrupted'")
        if not self.parallel and experiment.graph.parallel:
            raise ModelError(
                f"what='{self.name}': this model has parallel blocks, in which attention and MLP read the same stream,"
                f" so there is no stream between them: use {self.instead}"
            )

    def units(self, adapter: Adapter, layer: int) -> tuple[str, list[str]] | None:
        """Return the name of the units and their numbers in a layer; None if the layer is one unit."""
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
    """`Kind.written` of heads: through the output projection."""
    weight = input_rows(restart.adapter, "z", layer)
    rows = rearrange(weight, "(h e) d -> h e d", h=restart.adapter.graph.heads_in(layer))[units]
    found: Tensor = einsum(change, rows.to(change), "b t u e, u e d -> u b t d")
    return found


def _attended(restart: Restart, layer: int, change: Tensor, units: Tensor) -> Tensor:
    """`Kind.written` of patterns: times the base run's values, through the output projection."""
    by_head = restart.adapter.layers[layer].values_by_head(restart.base.qkv[layer].v)
    return _projected(restart, layer, attended(restart.adapter, change, by_head[:, :, units]), units)


def _down(restart: Restart, layer: int, change: Tensor, units: Tensor) -> Tensor:
    """`Kind.written` of neurons: through the down projection."""
    rows = input_rows(restart.adapter, "hidden", layer)[units]
    found: Tensor = einsum(change, rows.to(change), "b t u, u d -> u b t d")
    return found


def _unchanged(restart: Restart, layer: int, written: Tensor) -> Tensor:
    return written


def _from_attention(restart: Restart, layer: int, written: Tensor) -> Tensor:
    write, output = restart.adapter.layers[layer].attn_written, restart.base.attn_out[layer]
    return restart.after_mlp(layer, _stream_change(write, output, written))


def _from_mlp(restart: Restart, layer: int, written: Tensor) -> Tensor:
    output = restart.base.mlp_out[layer].view(restart.base.resid[layer].shape)
    return _stream_change(restart.adapter.layers[layer].mlp_written, output, written)


def _stream_change(write: Callable[[Tensor], Tensor], output: Tensor, difference: Tensor) -> Tensor:
    """Return the change of the stream if a module's output changes by `difference`; `write`: its post-norm."""
    return write(output.to(difference) + difference) - write(output)


_KINDS = (
    Kind("resid", "resid", "resid{layer}", reached=_unchanged, entering=True, in_stream=True, by_position=True),
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
    Kind("mlp", "mlp", "m{layer}", reached=_unchanged, by_position=True),
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
SPELLINGS = {  # names in other tools, for "did you mean"
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
    """Register a kind of place under its name. ScoreError if the name is taken."""
    return entered(kind, Kind, KINDS, ScoreError, "kind of place '{}' exists: give yours another name")


def kind_of(what: str) -> Kind:
    """Return the kind of this name. ScoreError if there is none, with the name that may be meant."""
    if isinstance(what, str) and what in KINDS:
        return KINDS[what]
    name = what.rpartition(".")[2] if isinstance(what, str) else what  # "blocks.9.attn.hook_z"
    raise ScoreError(unknown("kind of place", name, KINDS, {kind: names.split() for kind, names in SPELLINGS.items()}))


class Place(NamedTuple):
    """A unit of a layer, at one span of positions (None: at all positions)."""

    unit: int
    span: int | None


@dataclass(frozen=True, eq=False)
class Patcher:
    """Replaces the values of units in a base run.

    own, other: the site's values by layer, in the base run and to replace them; `other` may broadcast over batch and
        positions.
    numbers: the span of each position, `[batch, pos]`; None if all positions are patched together.
    """

    kind: Kind
    restart: Restart
    own: Values
    other: Values
    numbers: Tensor | None
    _latest: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def logits(self, layer: int, places: list[Place]) -> Tensor:
        """Return logits `[places, batch, reads, vocab]`, with one place of this layer patched in each run."""
        if self.kind.reached is None:
            values = torch.stack([self._replaced(layer, place) for place in places])
            return self.restart.from_projection(layer, self.kind.site, values)
        self._prepare(layer, list(dict.fromkeys(place.unit for place in places)), self.kind.reached)
        changes = torch.stack([self._placed(layer, place) for place in places])
        return self.restart.from_stream(layer if self.kind.entering else layer + 1, changes)

    def _placed(self, layer: int, place: Place) -> Tensor:
        """Return the stream's change for one place, `[batch, pos, d_model]`."""
        change, at = self._latest[layer, place.unit], self._at(place)
        return change if at is None else torch.where(at, change, 0)

    def _replaced(self, layer: int, place: Place) -> Tensor:
        """Return the layer's values `[batch, pos, heads, d_head]` with one head's replaced."""
        values, at = self.own[layer].clone(), self._at(place)
        own, other = (side[:, :, place.unit] for side in (values, self.other[layer].expand_as(values).to(values.dtype)))
        values[:, :, place.unit] = other if at is None else torch.where(at, other, own)
        return values

    def _at(self, place: Place) -> Tensor | None:
        """Return where a place is, `[batch, pos, 1]` bool; None: at all positions."""
        return None if self.numbers is None or place.span is None else (self.numbers == place.span).unsqueeze(-1)

    def _prepare(self, layer: int, units: list[int], reached: Reached) -> None:
        """Compute the stream's changes for these units. Those of the last call are kept: places come unit by unit."""
        for at, unit in list(self._latest):
            if at != layer or unit not in units:
                del self._latest[at, unit]
        if missing := [unit for unit in units if (layer, unit) not in self._latest]:
            changes = reached(self.restart, layer, self._written(layer, missing))
            self._latest.update({(layer, unit): change for unit, change in zip(missing, changes, strict=True)})

    def _written(self, layer: int, units: list[int]) -> Tensor:
        """Return the change of the output of the units' module (or of the stream), `[units, batch, pos, d_model]`."""
        own = self.own[layer].to(self.restart.adapter.work)
        other = self.other[layer].to(own).expand_as(own)
        if self.kind.unit is None:
            return (other - own)[None]
        at = sent(np.array(units), own.device)
        return self.kind.written(self.restart, layer, other[:, :, at] - own[:, :, at], at)
