"""Figures of path patching: a table of senders or of receivers, or of both, and the strongest paths with intervals.

1. A few paths are bars. Of more, into one receiver (or several together), a table has the senders: layers by heads with
   the MLPs beside them; of one sender into receivers apart, the receivers: layers by q, k, v and MLP.
2. Several senders into receivers apart are senders by receivers. Where there are too many, those of largest effect
   are shown, in the model's order, and the caption says so. Cells without a path are grey.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from circuitfind.plots.bars import bars
from circuitfind.plots.by_layer import Value, by_layer
from circuitfind.plots.heat import heat
from circuitfind.plots.style import Caption, Side, caption, colours, unit
from circuitfind.statistics import bootstrap_mean

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from circuitfind.patching.path_effects import PathEffects

ROWS, BARS, FEW = 200, 30, 12


def effects(found: PathEffects, *, rows: int = ROWS) -> Figure:
    """Every path.

    Args:
        rows: how many senders, and how many receivers, are shown at most where each has a row or column.
    """
    values = found.effects
    if not many(found):
        return strongest(found, n=FEW)
    if len(found.receivers) == 1:
        return _table(found, found.senders, found.per_example[:, 0])
    if len(found.senders) == 1:
        return _table(found, found.receivers, found.per_example[0])
    sizes = np.nan_to_num(np.abs(values))
    down, across = (_largest(sizes.max(axis=side), rows) for side in (1, 0))
    few = [
        f"the strongest {len(kept)} of {len(names):,} {what}"
        for kept, names, what in ((down, found.senders, "senders"), (across, found.receivers, "receivers"))
        if len(kept) < len(names)
    ]
    hover = [[Value(values[u, r]).said(f"{found.senders[u]} -> {found.receivers[r]}") for r in across] for u in down]
    sides = Side("sender", [found.senders[u] for u in down]), Side("receiver", [found.receivers[r] for r in across])
    return heat(values[np.ix_(down, across)], *sides, hover, _words(found, *few), unit(found.record))


def many(found: PathEffects) -> bool:
    """Whether there are enough paths for a table."""
    return bool(np.isfinite(found.effects).sum() > FEW)


def strongest(found: PathEffects, *, n: int = BARS, by: str = "absolute") -> Figure:
    """The n paths of largest (or, by="signed", most positive) effect, with 95% intervals."""
    rows, total = found.top(n, by), int(np.isfinite(found.effects).sum())
    names = [f"{row.sender} -> {_short(row.receiver)}" for row in rows]
    few = [f"the strongest {len(rows)} of {total:,}"] if len(rows) < total else []
    ends = [(row.low, row.high) for row in rows]
    words = _words(found, *few)
    return bars(names, [row.effect for row in rows], words, unit(found.record), intervals=ends)


def _table(found: PathEffects, names: tuple[str, ...], per_example: np.ndarray) -> Figure:
    ends = bootstrap_mean(per_example)
    cells = zip(names, per_example.mean(axis=-1).tolist(), ends.tolist(), strict=True)
    values = {name: Value(value, *between) for name, value, between in cells}
    return by_layer(values, _words(found), unit(found.record))


def _largest(sizes: np.ndarray, count: int) -> np.ndarray:
    """The largest ones, in their order."""
    return np.sort(np.argsort(-sizes, kind="stable")[:count])


def _short(receivers: str) -> str:
    """Receivers that were patched together, where they are many."""
    names = receivers.split(" + ")
    return receivers if len(names) <= 3 else f"{names[0]} and {len(names) - 1} others"


def _words(found: PathEffects, *more: str) -> Caption:
    what = f" from {found.senders[0]}" if len(found.senders) == 1 else ""
    what += f" into {_short(found.receivers[0])}" if len(found.receivers) == 1 else ""
    ends = f"{found.full.mean():.3g} in full, {found.empty.mean():.3g} ablated"
    return caption(f"Path patching{what}", found.record, ends, *more, colours(found.record))
