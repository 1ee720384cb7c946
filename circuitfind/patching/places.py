"""What a sweep can patch: how many units a layer has, and how replacing one changes the run.

A *place* is one unit of one layer, at all positions or at one stretch of them. Every kind is brought to one of two
forms:

* a change of the residual stream where a block begins (`resid`, `resid-mid`, `attn`, `mlp`, `heads`, `pattern`,
  `neurons`): a head's or neuron's difference goes through its rows of the output projection, then through the post-norm
  as the model applies it (the whole attention or MLP output is normed again, as it would be in a pass with that one
  replaced); what changes between attention and MLP changes what the MLP writes, too;
* new queries, keys or values of a layer (`q`, `k`, `v`).

A patched `pattern` is a patched head: the other run's pattern times this run's values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from einops import einsum
from torch import Tensor

from circuitfind.engine.restart import Restart
from circuitfind.engine.sites import Values, attended, input_rows


class Kind(NamedTuple):
    """One row of `KINDS`: the site that holds the values, the name of a layer's units (None: the layer is one unit),
    how one is named, and whether a sweep goes by position when it is not told."""

    site: str
    unit: str | None
    name: str
    by_position: bool = False


KINDS = {
    "resid": Kind("resid", None, "resid{layer}", by_position=True),
    "resid-mid": Kind("middle", None, "resid-mid{layer}", by_position=True),
    "attn": Kind("attn_out", None, "a{layer}", by_position=True),
    "mlp": Kind("mlp_out", None, "m{layer}", by_position=True),
    "heads": Kind("z", "head", "a{layer}.h{unit}"),
    "q": Kind("q", "head", "a{layer}.h{unit}<q>"),
    "k": Kind("k", "head", "a{layer}.{kv}{unit}<k>"),
    "v": Kind("v", "head", "a{layer}.{kv}{unit}<v>"),
    "pattern": Kind("pattern", "head", "a{layer}.h{unit}<pattern>"),
    "neurons": Kind("hidden", "neuron", "m{layer}.n{unit}"),
}


class Place(NamedTuple):
    """A unit of a layer, at one stretch of positions or (None) at all."""

    unit: int
    stretch: int | None


@dataclass(frozen=True, eq=False)
class Patcher:
    """Replaces units of a base run by another run's.

    Attributes:
        own, other: the site's values by layer, in the base run and instead; `other` may broadcast over examples and
            positions.
        numbers: `[batch, pos]` which stretch each position belongs to; None where all positions go together.
    """

    what: str
    restart: Restart
    own: Values
    other: Values
    numbers: Tensor | None
    _latest: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def logits(self, layer: int, places: list[Place]) -> Tensor:
        """`[places, batch, reads, vocab]`: each place of this layer patched in a run of its own."""
        if self.what in ("q", "k", "v"):
            values = torch.stack([self._replaced(layer, place) for place in places])
            return self.restart.from_projection(layer, self.what, values)
        self._prepare(layer, list(dict.fromkeys(place.unit for place in places)))
        changes = torch.stack([self._placed(layer, place) for place in places])
        return self.restart.from_stream(layer if self.what == "resid" else layer + 1, changes)

    def _placed(self, layer: int, place: Place) -> Tensor:
        change = self._latest[layer, place.unit]
        at = self._at(place)
        return change if at is None else torch.where(at.unsqueeze(-1), change, 0)

    def _replaced(self, layer: int, place: Place) -> Tensor:
        """`[batch, pos, heads, d_head]` with one head's values replaced."""
        values, at = self.own[layer].clone(), self._at(place)
        own, other = (side[:, :, place.unit] for side in (values, self.other[layer].expand_as(values).to(values.dtype)))
        values[:, :, place.unit] = other if at is None else torch.where(at.unsqueeze(-1), other, own)
        return values

    def _at(self, place: Place) -> Tensor | None:
        """`[batch, pos]` where a place is; None for everywhere."""
        return None if self.numbers is None or place.stretch is None else self.numbers == place.stretch

    def _prepare(self, layer: int, units: list[int]) -> None:
        """Sees to the changes of these units; those of the last call are kept, because places come unit by unit."""
        known = {key: change for key, change in self._latest.items() if key[0] == layer and key[1] in units}
        missing = [unit for unit in units if (layer, unit) not in known]
        self._latest.clear()
        self._latest.update(known)
        if missing:
            changes = self._changes(layer, missing)
            self._latest.update({(layer, unit): change for unit, change in zip(missing, changes, strict=True)})

    def _changes(self, layer: int, units: list[int]) -> Tensor:
        """`[units, batch, pos, d_model]` where the stream is changed, with each unit replaced at all positions."""
        base, view = self.restart.base, self.restart.adapter.layers[layer]
        difference = self._difference(layer, units)
        if self.what == "resid":
            return difference
        if self.what == "resid-mid":
            return self.restart.after_middle(layer, difference)
        if self.what in ("mlp", "neurons"):
            return _written(view.mlp_written, base.mlp_out[layer].view(base.resid[layer].shape), difference)
        return self.restart.after_mlp(layer, _written(view.attn_written, base.attn_out[layer], difference))

    def _difference(self, layer: int, units: list[int]) -> Tensor:
        """`[units, batch, pos, d_model]`: how far the output of the unit's module (or the stream) is from the base."""
        adapter = self.restart.adapter
        own = self.own[layer].to(adapter.work)
        other = self.other[layer].to(adapter.work).expand_as(own)
        if KINDS[self.what].unit is None:
            return (other - own)[None]
        change = other[:, :, units] - own[:, :, units]
        if self.what == "neurons":
            rows = input_rows(adapter, "hidden", layer)[units]
            return einsum(change, rows.to(change), "b t u, u d -> u b t d")
        if self.what == "pattern":
            change = attended(adapter, change, self.restart.base.qkv[layer].v, units)
        rows = input_rows(adapter, "z", layer).unflatten(0, (adapter.graph.n_heads, -1))[units]
        return einsum(change, rows.to(change), "b t u e, u e d -> u b t d")


def _written(write: Callable[[Tensor], Tensor], output: Tensor, difference: Tensor) -> Tensor:
    """How much more reaches the stream when a module's output is so much larger."""
    return write(output.to(difference) + difference) - write(output)
