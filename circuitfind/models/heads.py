"""A test of whether a layer's readers are those that the graph names.

The other identities of `circuitfind.engine.identities` can hold even if the features of a projection are in another
order, or the layer reads the stream in some other way. So this test changes q, k, v and the stream in the model itself,
in one pass over a batch that repeats one prompt. At every layer, each row gets the stream of row 0, and then:

1. One row per query head negates its query at the first two of four tokens. Its head may change there, nothing else.
2. One row per key head negates its key there. Only heads of its group may change (also at later tokens).
3. One row per value head sets its value to zero. The heads of its group must be zero, and no other may change.
4. The last row gets another stream, but the queries, keys, values and MLP input of row 0. No head may change, and
   neither may the MLP's output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from circuitfind.batch import Inputs
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import STOP, Stop, through_hooks, undisturbed
from circuitfind.models.layer import PROJECTIONS

LENGTH, CHANGED = 4, 2
LEAST = 1e-5  # unless they are small, queries and keys must change some head by this fraction of the largest value
HEADS = "q, k and v act through their own heads"
READERS = "nothing but q, k, v and MLP reads the stream"


def reader_errors(adapter: Adapter, seed: int = 0) -> dict[str, float]:
    """Return the error of each statement, `HEADS` and `READERS`: the largest change where none is allowed, relative to
    the largest value. `HEADS` also gets error 1 if queries and keys are not zero but changing them changes nothing."""
    probe = _Probe(adapter)
    vocabulary = adapter.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, probe.length), generator=torch.Generator().manual_seed(seed)).to(adapter.device)
    ids = ids.expand(probe.rows, -1)
    inputs = Inputs(ids, torch.ones_like(ids, dtype=torch.bool), torch.full_like(ids[:, :1], probe.length - 1))
    with torch.no_grad(), undisturbed(adapter.model):
        through_hooks(adapter, inputs, probe)
    errors = {name: float(torch.stack(found).max()) for name, found in probe.errors.items()}
    if probe.uses_patterns and probe.least_reach < LEAST * min(1.0, probe.largest_product):
        errors[HEADS] = max(errors[HEADS], 1.0)
    return errors


class _Probe:
    """The visitor of the pass. Rows: the unchanged one, one per query head, key head and value head, and the one with
    another stream."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter, self.heads = adapter, adapter.graph.n_heads
        groups = adapter.graph.n_kv_heads
        self.starts = {"q": 1, "k": 1 + self.heads, "v": 1 + self.heads + groups}
        self.rows = self.starts["v"] + groups + 1
        self.length = adapter.at_most(LENGTH)
        # `[rows, pos, heads]`: which heads may change
        self.own = torch.zeros(self.rows, self.length, self.heads, dtype=torch.bool, device=adapter.device)
        for head in range(self.heads):
            self.own[self.starts["q"] + head, :CHANGED, head] = True
            for kind in "kv":
                self.own[self.starts[kind] + head * groups // self.heads, :, head] = True
        self.errors: dict[str, list[Tensor]] = {HEADS: [], READERS: []}
        self.reach: dict[str, list[Tensor]] = {"q": [], "k": []}
        self.sizes: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}

    @property
    def uses_patterns(self) -> bool:
        """Whether queries and keys are not all zero; if they are, attention is uniform."""
        return all(float(torch.stack(self.sizes[kind]).max()) > 0 for kind in "qk" if self.sizes[kind])

    @property
    def largest_product(self) -> float:
        """The largest entry of a query times the largest of a key. In a newly initialised model it is so small that
        attention is nearly uniform."""
        return math.prod(float(torch.stack(self.sizes[kind]).max()) for kind in "qk" if self.sizes[kind])

    @property
    def least_reach(self) -> float:
        return min(float(torch.stack(reached).max()) for reached in self.reach.values())

    def __call__(self, site: str, layer: int, value: Tensor) -> Tensor | Stop | None:
        if site == "final":
            return STOP
        by_row = value.reshape(self.rows, self.length, -1)
        if site == "resid":
            new = by_row[:1].repeat(self.rows, 1, 1)
            new[-1] = by_row[0].roll(1, -1)
            return new.view_as(value)
        if site == "mixer":
            return by_row[:1].repeat(self.rows, 1, 1).view_as(value)
        if site in PROJECTIONS:
            layout = self.adapter.layers[layer].layout
            parts = {kind: self._changed(kind, part) for kind, part in layout.parts(site, by_row).items()}
            return layout.whole(site, parts, by_row).view_as(value)
        if site == "z":
            if layer in self.adapter.graph.mixers:
                self._note_reads(by_row)
            else:
                self._note_heads(by_row.unflatten(-1, (self.heads, -1)).float())
        elif site == "mlp_in":
            return by_row[:1].repeat(self.rows, 1, 1).view_as(value)
        elif site == "mlp_out":
            self._note_reads(by_row)
        return None

    def _note_reads(self, by_row: Tensor) -> None:
        self.errors[READERS].append((by_row[-1] - by_row[0]).abs().max() / by_row[0].abs().max().clamp_min(1e-30))

    def _changed(self, kind: str, heads: Tensor) -> Tensor:
        new = heads[:1].repeat(self.rows, 1, 1, 1)
        self.sizes[kind].append(heads[0].abs().max())
        for head in range(heads.shape[-2]):
            row = new[self.starts[kind] + head]
            if kind == "v":
                row[:, head] = 0
            else:
                row[:CHANGED, head] *= -1
        return new

    def _note_heads(self, z: Tensor) -> None:
        scale, keys, values = z[0].abs().max().clamp_min(1e-30), self.starts["k"], self.starts["v"]
        change, left = ((one.abs().amax(-1) / scale) for one in (z - z[0], z))  # rows pos heads
        self.reach["q"].append(change[1:keys].max())
        self.reach["k"].append(change[keys:values].max())
        beyond, kept = change.masked_fill(self.own, 0), left[values:-1][self.own[values:-1]]
        self.errors[HEADS].append(torch.maximum(beyond[:-1].max(), kept.max()))
        self.errors[READERS].append(beyond[-1].max())
