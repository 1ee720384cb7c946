"""Figures of direct logit attribution: what each node, or each layer's attention and MLP, adds to the logit difference.

`components` are bars in the order of the stream: `input`, then each layer's attention (its heads together) and MLP,
then what the biases add. They sum to the logit difference, so a sum over the first of them is what the stream up to
there would give through the frozen final norm (the field's "accumulated" logit difference): it is read on hovering.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from circuitfind.node_scores import NodeScores
from circuitfind.plots.bars import bars
from circuitfind.plots.by_layer import Value, by_layer
from circuitfind.plots.style import Caption, caption, colours, unit
from circuitfind.statistics import bootstrap_mean

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from circuitfind.attribution.direct import DirectEffects

BARS = 30


def effects(found: DirectEffects) -> Figure:
    """Layers by heads with the MLPs beside them."""
    ends = bootstrap_mean(found.per_example).tolist()
    cells = zip(found.graph.writer_names, found.per_example.mean(axis=-1).tolist(), ends, strict=True)
    values = {name: Value(value, *between) for name, value, between in cells}
    return by_layer(values, _words(found, "Nodes", f"biases {found.constant.mean():+.3g}"), unit(found.record))


def strongest(found: DirectEffects, *, n: int = BARS) -> Figure:
    """The n nodes that add or take the most, with 95% intervals."""
    means = found.per_example.mean(axis=-1)
    order = np.argsort(-np.abs(means), kind="stable")[:n]
    words = _words(found, "Nodes", f"the strongest {len(order)} of {len(means):,}")
    names = [found.graph.writer_names[at] for at in order]
    return bars(names, means[order], words, unit(found.record), intervals=bootstrap_mean(found.per_example[order]))


def components(found: DirectEffects | NodeScores) -> Figure:
    """Each layer's attention and MLP; of node scores, which have means alone, without biases and intervals."""
    graph = found.graph
    values = found.values[:, None].astype(np.float64) if isinstance(found, NodeScores) else found.per_example
    layers = [(values[graph.heads(layer)].sum(axis=0), values[graph.mlp(layer)]) for layer in range(graph.n_layers)]
    parts = np.stack([values[0], *chain.from_iterable(layers)])
    names = ["input", *chain.from_iterable((f"a{layer}", f"m{layer}") for layer in range(graph.n_layers))]
    what = "Layers"
    if isinstance(found, NodeScores):
        words = caption(f"{what}, direct logit attribution", found.record, colours(found.record))
    else:
        names, parts = [*names, "biases"], np.concatenate([parts, found.constant[None]])
        words = _words(found, what)
    means = parts.mean(axis=-1)
    sums = [f"so far {total:+.4g}" for total in np.cumsum(means)]
    return bars(names, means, words, unit(found.record), intervals=bootstrap_mean(parts), more=sums)


def _words(found: DirectEffects, what: str, *more: str) -> Caption:
    whole = f"{found.logit_diff.mean():.3g} in all" + (", soft-capped" if found.capped else "")
    return caption(f"{what}, direct logit attribution", found.record, whole, *more, colours(found.record))
