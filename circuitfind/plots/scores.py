"""Figures of scores: edges by layer, nodes by layer or position, direct logit attribution, and the strongest of each.

Edges, from the scores of all edges or from a circuit:

1. Writers are grouped by layer into `input`, heads and MLP; readers into queries, keys, values, MLP, and `logits`.
2. A cell is the sum of its edges' effects, a first-order estimate of their joint effect. Its hover text gives their
   number and the strongest. Cells without edges are grey.
3. The effect of a circuit's edge is the exact one if it was measured, else the estimate. If no edge has either, a cell
   is its number of edges.

Direct logit attribution:

4. `components` are bars in the order of the stream: `input`, then each layer's attention (its heads together) and MLP,
   then the biases. They sum to the logit difference. Each bar's hover text gives the sum of the bars up to it: the
   "accumulated" logit difference of the residual stream there, through the frozen final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from einops import einsum

from circuitfind.circuit import Circuit
from circuitfind.errors import ScoreError, count
from circuitfind.graph import Graph
from circuitfind.plots import style
from circuitfind.plots.charts import bars, by_layer, heat
from circuitfind.plots.style import Caption, Side, caption, hover, safe, unit
from circuitfind.result import strongest
from circuitfind.scores import NodeScores

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from circuitfind.attribution.direct import DirectEffects
    from circuitfind.record import Record

EDGES, NODES, ROWS = 40, 30, 200  # bars of edges and of nodes, rows of nodes by position
Groups = list[tuple[str, slice]]


# -------------------------------------------------------------------- edges
class Edges(NamedTuple):
    """Edges to show: `mask` and `values` `[writers, readers]` (NaN if unknown), and `what`, their name in captions."""

    graph: Graph
    mask: np.ndarray
    values: np.ndarray
    record: Record
    what: str

    @classmethod
    def of(cls, found: Any) -> Edges:
        """The edges of scores, of a circuit, or of the circuit that a search found."""
        found = getattr(found, "circuit", found)
        if isinstance(found, Circuit):
            values = np.full(found.mask.shape, np.nan)
            for row in found.rows():
                values[row.writer, row.reader] = np.nan if row.effect is None else row.effect
            what = f"The circuit's {count(len(found), 'edge')}"
            return cls(found.graph, found.mask, values, found.record, what)
        real, record = found.graph.real, found.record
        values = np.where(real, found.values, np.nan).astype(np.float64)
        return cls(found.graph, real, values, record, f"Edges, {style.made_by(record)}")

    @property
    def known(self) -> bool:
        return bool(np.isfinite(self.values).any())

    def words(self, *more: str) -> Caption:
        return caption(self.what, self.record, *more, *([style.colours(self.record)] if self.known else []))


def edge_layers(edges: Edges) -> Figure:
    """Return a heat map of effects summed by layer and kind: writers down, readers across."""
    graph = edges.graph
    rows, columns = _writers(graph), _readers(graph)
    sizes = ([part.stop - part.start for _, part in groups] for groups in (rows, columns))
    down, across = (np.repeat(np.eye(len(n)), n, axis=0) for n in sizes)  # `[members, groups]`: 1 in one's own
    counts = einsum(down, edges.mask.astype(np.float64), across, "u i, u r, r j -> i j")
    totals = einsum(down, np.nan_to_num(edges.values), across, "u i, u r, r j -> i j")
    values = np.where(counts > 0, totals if edges.known else counts, np.nan)
    cells = zip(rows, counts, totals, strict=True)
    texts = [[_cell(edges, row, *one) for one in zip(columns, *sums, strict=True)] for row, *sums in cells]
    counted = f"sum of {unit(edges.record)}" if edges.known else "edges"
    sides = Side("writers", [name for name, _ in rows]), Side("readers", [name for name, _ in columns])
    return heat(values, *sides, texts, edges.words("summed by layer"), counted, signed=edges.known)


def strongest_edges(edges: Edges, *, n: int = EDGES) -> Figure:
    """Return bars of the n edges of largest magnitude; a ScoreError if no effect is known."""
    if not edges.known:
        raise ScoreError("no effect is known of any of these edges: nothing to rank (verify measures them)")
    cells = np.argwhere(np.isfinite(edges.values).T)[:, ::-1]  # ordered by reader, as everywhere
    found = edges.values[tuple(cells.T)]
    order = strongest(found, n)
    names = [edges.graph.edge_name(*cells[at].tolist()) for at in order]
    words = edges.words(f"the strongest {len(order)} of {int(edges.mask.sum()):,}")
    return bars(names, found[order], words, unit(edges.record))


def _writers(graph: Graph) -> Groups:
    groups = [("input", slice(0, 1))]
    for layer, mlp in enumerate(map(graph.mlp, range(graph.n_layers))):
        groups += [(_attention(graph, layer), graph.heads(layer)), (f"m{layer}", slice(mlp, mlp + 1))]
    return groups


def _readers(graph: Graph) -> Groups:
    groups = []
    for layer in range(graph.n_layers):
        if layer in graph.mixers:
            groups.append((f"s{layer}", graph.readers(layer, "q")))
        else:
            groups += [(f"a{layer}<{kind}>", graph.readers(layer, kind)) for kind in "qkv"]
        groups.append((f"m{layer}", graph.readers(layer, "mlp")))
    return [*groups, ("logits", graph.readers(graph.n_layers, "logits"))]


def _attention(graph: Graph, layer: int) -> str:
    """The name of a layer's heads together, or of its mixer."""
    return f"s{layer}" if layer in graph.mixers else f"a{layer}"


def _cell(edges: Edges, row: tuple[str, slice], column: tuple[str, slice], number: float, total: float) -> str:
    name = f"<b>{safe(f'{row[0]} -> {column[0]}')}</b>"
    if not number:
        return f"{name}<br>no edge"
    text = f"{name}<br>{count(int(number), 'edge')}"
    part = edges.values[row[1], column[1]]
    if not np.isfinite(part).any():
        return text
    u, r = np.unravel_index(np.nanargmax(np.abs(part)), part.shape)
    best = edges.graph.edge_name(row[1].start + int(u), column[1].start + int(r))
    return f"{text}, sum {total:+.4g}<br>strongest {safe(best)} {part[u, r]:+.4g}"


# -------------------------------------------------------------------- nodes
def node_effects(scores: NodeScores, *, tokens: Sequence[str] | None = None, rows: int = ROWS) -> Figure:
    """Every node's score: layers by heads with the MLPs beside them, or nodes by positions, at most `rows` of them.

    `tokens` of one prompt, for scores by position: the positions' labels, instead of those that the scores have.
    """
    record, names = scores.record, scores.graph.writer_names
    if scores.values.ndim == 1:
        if tokens is not None:
            raise ScoreError("tokens label positions, and these scores are not by position: leave tokens out")
        words = caption(f"Nodes, {style.made_by(record)}", record, style.colours(record))
        return by_layer(names, scores.values, words, unit(record))
    values, length = np.asarray(scores.values, dtype=np.float64), scores.values.shape[1]
    if tokens is not None and len(tokens) != length:
        raise ScoreError(f"{len(tokens)} tokens for scores by {length} positions: give those of one prompt of the task")
    labels = list(scores.positions or map(str, range(length))) if tokens is None else style.tokens_at(tokens)
    kept = style.largest(np.abs(values).max(axis=1), rows)
    cells = ((names[at], zip(labels, values[at], strict=True)) for at in kept)
    texts = [[hover(f"{name} at {label}", value) for label, value in row] for name, row in cells]
    few = style.left_out(len(kept), len(values), "rows")
    words = caption(f"Nodes by position, {style.made_by(record)}", record, *few, style.colours(record))
    sides = Side("node", [names[at] for at in kept]), Side("position", labels)
    return heat(values[kept], *sides, texts, words, unit(record))


def strongest_nodes(scores: NodeScores, *, n: int = NODES) -> Figure:
    """Return bars of the n nodes of largest magnitude, summed over positions."""
    record, totals = scores.record, scores.values.reshape(scores.graph.n_writers, -1).sum(axis=1, dtype=np.float64)
    order = strongest(totals, n)
    few = f"the strongest {len(order)} of {len(totals):,}"
    more = ["summed over positions"] if scores.values.ndim > 1 else []
    words = caption(f"Nodes, {style.made_by(record)}", record, few, *more, style.colours(record))
    return bars([scores.graph.writer_names[at] for at in order], totals[order], words, unit(record))


# -------------------------------------------------------------------- direct logit attribution
def direct_effects(found: DirectEffects) -> Figure:
    """Return a heat map of direct effects: layers by heads and MLP."""
    means, ends = found.per_example.mean(axis=-1), found.intervals_of(found.per_example)
    words = _words(found, "Nodes", f"biases {found.constant.mean():+.3g}")
    return by_layer(found.graph.writer_names, means, words, unit(found.record), ends)


def strongest_direct(found: DirectEffects, *, n: int = NODES) -> Figure:
    """Return bars of the n nodes of largest direct effect in magnitude, with 95% intervals."""
    means = found.per_example.mean(axis=-1)
    order = strongest(means, n)
    words = _words(found, "Nodes", f"the strongest {len(order)} of {len(means):,}")
    names = [found.graph.writer_names[at] for at in order]
    return bars(names, means[order], words, unit(found.record), intervals=found.intervals_of(found.per_example[order]))


def components(found: DirectEffects | NodeScores) -> Figure:
    """Return bars of each layer's attention and MLP. Node scores are only means, without biases or intervals."""
    graph = found.graph
    values = found.values[:, None].astype(np.float64) if isinstance(found, NodeScores) else found.per_example
    layers = [(values[graph.heads(layer)].sum(axis=0), values[graph.mlp(layer)]) for layer in range(graph.n_layers)]
    parts = np.stack([values[0], *chain.from_iterable(layers)])
    names = ["input", *chain.from_iterable((_attention(graph, layer), f"m{layer}") for layer in range(graph.n_layers))]
    words = _words(found, "Layers")
    if not isinstance(found, NodeScores):
        names, parts = [*names, "biases"], np.concatenate([parts, found.constant[None]])
    means, ends = parts.mean(axis=-1), None if isinstance(found, NodeScores) else found.intervals_of(parts)
    sums = [f"so far {total:+.4g}" for total in np.cumsum(means)]
    return bars(names, means, words, unit(found.record), intervals=ends, more=sums)


def _words(found: DirectEffects | NodeScores, what: str, *more: str) -> Caption:
    if not isinstance(found, NodeScores):
        more = (f"{found.logit_diff.mean():.3g} in all" + (", soft-capped" if found.capped else ""), *more)
    return caption(f"{what}, direct logit attribution", found.record, *more, style.colours(found.record))
