"""Whether a layer's readers are those that the graph names: what the identities do not see.

The other identities of `circuitfind.engine.identities` may hold whatever the order of a projection's features, and
whatever else a layer reads of the stream. So the model itself is asked, in one pass of a batch of one prompt many
times. Every layer is given the plain row's stream, and each further row changes something at every layer:

1. a query head is negated at the first two of four tokens: its own head changes there, and nothing else;
2. a key head is negated there: its own group's heads change, at later tokens, too, and no others;
3. a value head is zero: its own group's heads are zero, and no others change;
4. in the last row the stream is another one, but all queries, keys, values and the MLP's input are the plain row's: no
   head changes, and neither does what the MLP writes.
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
LEAST = 1e-5  # of the largest value: what a change of queries or keys must make somewhere, unless they are small
HEADS = "q, k and v act through their own heads"
READERS = "nothing but q, k, v and MLP reads the stream"


def reader_errors(adapter: Adapter, seed: int = 0) -> dict[str, float]:
    """For each of the two statements the largest value that is where none may be, relative to the largest there is; 1
    where there are queries and keys, and changing all of them changes nothing."""
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
    """The visitor of the pass. Rows: the plain one, then those of queries, keys, values, and of another stream."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter, self.heads = adapter, adapter.graph.n_heads
        groups = adapter.graph.n_kv_heads
        self.starts = {"q": 1, "k": 1 + self.heads, "v": 1 + self.heads + groups}
        self.rows = self.starts["v"] + groups + 1
        self.length = adapter.at_most(LENGTH)
        # what may change
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
        """Whether there are queries and keys at all: without either, all tokens are attended to alike."""
        return all(float(torch.stack(self.sizes[kind]).max()) > 0 for kind in "qk" if self.sizes[kind])

    @property
    def largest_product(self) -> float:
        """Of a query's and a key's entries: a new model's attention is all but uniform, whatever they are."""
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
