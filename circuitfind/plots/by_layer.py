"""Named places as a table, layers down: heads and the MLP across, or the readers of each layer (q, k, v, MLP).

What belongs to no layer (`input`, `logits`) is said below the title. Cells without a place are grey.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from circuitfind.plots.heat import heat
from circuitfind.plots.style import Caption, Side, safe

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PLACE = re.compile(r"m(?P<mlp>\d+)|a(?P<layer>\d+)\.(?P<kind>h|kv)(?P<unit>\d+)(<(?P<slot>[qkv])>)?")
SLOTS = ("", "q", "k", "v", "MLP")  # in the order of their columns


class Value(NamedTuple):
    """A place's value, and the ends of its interval where there is one."""

    value: float
    low: float = float("nan")
    high: float = float("nan")

    def said(self, name: str) -> str:
        """What is read on hovering; a place without a value has no path."""
        if np.isnan(self.value):
            return f"<b>{safe(name)}</b><br>no path"
        ends = f"<br>95% {self.low:.4g} to {self.high:.4g}" if np.isfinite(self.low) else ""
        return f"<b>{safe(name)}</b><br>{self.value:+.4g}{ends}"


class Column(NamedTuple):
    """A column's place in the table."""

    slot: int
    unit: int
    label: str


def by_layer(values: Mapping[str, Value], words: Caption, unit: str) -> Figure:
    """The table of values by name."""
    placed = {name: at for name in values if (at := _place(name)) is not None}
    layers = sorted({layer for layer, _ in placed.values()})
    columns = sorted({column for _, column in placed.values()})
    table = np.full((len(layers), len(columns)), np.nan)
    hover = [[""] * len(columns) for _ in layers]
    for name, (layer, column) in placed.items():
        row, place = layers.index(layer), columns.index(column)
        table[row, place] = values[name].value
        hover[row][place] = values[name].said(name)
    notes = [f"{name} {one.value:+.3g}" for name, one in values.items() if name not in placed]
    across = "reader" if any(SLOTS[column.slot] in ("q", "k", "v") for column in columns) else "head, MLP"
    sides = Side("layer", list(map(str, layers))), Side(across, [column.label for column in columns])
    words = words._replace(notes=(*words.notes[:-1], *notes, *words.notes[-1:]))
    return heat(table, *sides, hover, words, unit)


def _place(name: str) -> tuple[int, Column] | None:
    found = PLACE.fullmatch(name)
    if found is None:
        return None
    if found["mlp"]:
        return int(found["mlp"]), Column(SLOTS.index("MLP"), 0, "MLP")
    slot, shared = found["slot"] or "", "kv" if found["kind"] == "kv" else ""
    return int(found["layer"]), Column(SLOTS.index(slot), int(found["unit"]), f"{slot} {shared}{found['unit']}".strip())
