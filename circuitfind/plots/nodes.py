"""Figures of node scores: layers by heads with the MLPs beside them, or nodes by positions; and the strongest nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from circuitfind.errors import ScoreError
from circuitfind.plots.bars import bars
from circuitfind.plots.by_layer import Value, by_layer
from circuitfind.plots.heat import heat
from circuitfind.plots.style import Side, caption, colours, made_by, tokens_at, unit

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from circuitfind.node_scores import NodeScores

ROWS, BARS = 200, 30


def effects(scores: NodeScores, *, tokens: Sequence[str] | None = None, rows: int = ROWS) -> Figure:
    """Every node's score.

    Args:
        tokens: of one prompt, for scores by position: the positions' labels, instead of those that the scores have.
        rows: how many nodes are shown at most where each has a row.

    Raises:
        ScoreError: tokens for scores that are not by position, or not one for each position.
    """
    if scores.values.ndim > 1:
        return _by_position(scores, tokens, rows)
    if tokens is not None:
        raise ScoreError("tokens label positions, and these scores are not by position: leave tokens out")
    record = scores.record
    values = {name: Value(float(score)) for name, score in zip(scores.graph.writer_names, scores.values, strict=True)}
    return by_layer(values, caption(f"Nodes, {made_by(record)}", record, colours(record)), unit(record))


def strongest(scores: NodeScores, *, n: int = BARS) -> Figure:
    """The n nodes of largest magnitude; positions are summed."""
    totals = scores.values.reshape(scores.graph.n_writers, -1).sum(axis=1, dtype=np.float64)
    order = np.argsort(-np.abs(totals), kind="stable")[:n]
    more = ["summed over positions"] if scores.values.ndim > 1 else []
    count = f"the strongest {len(order)} of {len(totals):,}"
    words = caption(f"Nodes, {made_by(scores.record)}", scores.record, count, *more, colours(scores.record))
    return bars([scores.graph.writer_names[at] for at in order], totals[order], words, unit(scores.record))


def _by_position(scores: NodeScores, tokens: Sequence[str] | None, rows: int) -> Figure:
    values = np.asarray(scores.values, dtype=np.float64)
    count = values.shape[1]
    if tokens is not None and len(tokens) != count:
        raise ScoreError(f"{len(tokens)} tokens for scores by {count} positions: give those of one prompt of the task")
    labels = list(scores.positions or map(str, range(count))) if tokens is None else tokens_at(tokens)
    kept = np.sort(np.argsort(-np.abs(values).max(axis=1), kind="stable")[:rows])
    names = [scores.graph.writer_names[at] for at in kept]
    hover = [
        [Value(value).said(f"{name} at {label}") for label, value in zip(labels, values[at], strict=True)]
        for name, at in zip(names, kept, strict=True)
    ]
    few = [f"the strongest {len(kept)} of {len(values):,} rows"] if len(kept) < len(values) else []
    words = caption(f"Nodes by position, {made_by(scores.record)}", scores.record, *few, colours(scores.record))
    return heat(values[kept], Side("node", names), Side("position", labels), hover, words, unit(scores.record))
