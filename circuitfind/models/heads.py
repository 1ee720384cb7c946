"""Whether queries, keys and values belong to the heads that they are counted to.

The identities of `circuitfind.engine.identities` hold whatever the order of a projection's features, so this is asked
of the model itself. One pass of a batch whose rows are one prompt, in which row r changes one head's features at every
layer, and every layer is given the plain row's stream:

1. a query head negated at the first two of four tokens changes its own head there, and nothing else;
2. a key head negated there changes its own group's heads only, at later tokens, too;
3. a value head set to zero leaves its own group's heads at zero, and all others as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitfind.batch import Inputs
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import STOP, Stop, through_hooks, undisturbed
from circuitfind.models.layer import PROJECTIONS

LENGTH, CHANGED = 4, 2
LEAST = 1e-4  # of the largest value: what a change of all heads must make somewhere


def heads_error(adapter: Adapter, seed: int = 0) -> float:
    """The largest value, relative to the largest of its layer, that is where none may be; 1 where a change of queries
    or keys changes nothing."""
    graph = adapter.graph
    vocabulary = adapter.model.get_input_embeddings().weight.shape[0]
    rows = 1 + graph.n_heads + 2 * graph.n_kv_heads
    ids = torch.randint(vocabulary, (1, LENGTH), generator=torch.Generator().manual_seed(seed)).to(adapter.device)
    ids = ids.expand(rows, -1)
    inputs = Inputs(ids, torch.ones_like(ids, dtype=torch.bool), torch.full_like(ids[:, :1], LENGTH - 1))
    starts = {"q": 1, "k": 1 + graph.n_heads, "v": 1 + graph.n_heads + graph.n_kv_heads}
    errors: list[Tensor] = []
    reached = {"q": 0.0, "k": 0.0}

    def changed(kind: str, heads: Tensor) -> Tensor:
        heads = heads.clone()
        for head in range(heads.shape[-2]):
            row = heads[starts[kind] + head]
            if kind == "v":
                row[:, head] = 0
            else:
                row[:CHANGED, head] *= -1
        return heads

    def visit(site: str, layer: int, value: Tensor) -> Tensor | Stop | None:
        layout = adapter.layers[layer].layout if layer < graph.n_layers else None
        if site == "resid":
            return value[:1].expand_as(value).clone()
        if site in PROJECTIONS and layout is not None:
            parts = layout.parts(site, value.reshape(rows, LENGTH, -1))
            return layout.whole(site, {kind: changed(kind, heads) for kind, heads in parts.items()}).view_as(value)
        if site == "z":
            errors.append(_beyond(value.reshape(rows, LENGTH, graph.n_heads, -1).float(), starts, reached))
            return STOP if layer == graph.n_layers - 1 else None
        return None

    with torch.no_grad(), undisturbed(adapter.model):
        through_hooks(adapter, inputs, visit)
    beyond = float(torch.stack(errors).max()) if errors else 1.0
    return beyond if min(reached.values()) > LEAST else max(beyond, 1.0)


def _beyond(z: Tensor, starts: dict[str, int], reached: dict[str, float]) -> Tensor:
    """The largest value of a layer's heads `[rows, pos, heads, d_head]` where none may be; notes what is `reached`."""
    scale, n_heads, last = z[0].abs().max().clamp_min(1e-30), z.shape[2], starts["v"]
    group = n_heads // (last - starts["k"])
    change = (z - z[0]).abs().amax(-1) / scale  # rows pos heads
    own = torch.zeros_like(change, dtype=torch.bool)
    for head in range(n_heads):
        own[starts["q"] + head, :CHANGED, head] = True
        own[starts["k"] + head // group, :, head] = True
        own[last + head // group, :, head] = True
    reached["q"] = max(reached["q"], float(change[starts["q"] : starts["k"]].max()))
    reached["k"] = max(reached["k"], float(change[starts["k"] : last, CHANGED:].max()))
    left = (z[last:].abs().amax(-1) / scale)[own[last:]]
    return torch.maximum(change.masked_fill(own, 0).max(), left.max())
