"""A sweep as tables: the strongest places, and a heat table where it fits the width."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.text import Text

from circuitfind.cli import shown
from circuitfind.cli.output import Output
from circuitfind.cli.words import count, fixed, interval, number
from circuitfind.errors import ScoreError

if TYPE_CHECKING:
    from circuitfind import Sweep

CELL, FIRST = 6, 14  # widths in the heat table


def _parts(found: Sweep) -> np.ndarray | None:
    """Normalised effects; None where they are undefined, or the values are no effects."""
    try:
        return found.normalised if found.record.is_effect else None
    except ScoreError:
        return None


def strongest(found: Sweep, by: str, rows: int, out: Output) -> None:
    best, parts = found.top(rows, by), _parts(found)
    difference = None if parts is None else float(found.full.mean() - found.empty.mean())
    digits = shown.digits_for(row.effect for row in best)
    value, said = ("effect", shown.effect) if found.record.is_effect else ("score", fixed)
    columns = [("place", "left"), (value, "right"), ("95% interval", "right"), ("normalised", "right")]
    table = []
    for row in best:
        part = fixed(row.effect / difference) if difference else fixed(None)
        cells: list[str | Text] = [
            row.name,
            said(row.effect, digits),
            interval((row.low, row.high), digits),
            part,
        ]
        table.append([*cells[:1], row.position, *cells[1:]] if row.position else cells)
    if any(found.positions):
        columns.insert(1, (found.axes[-1].name, "left"))
    by = "" if found.record.method == "patch" else f" by {found.record.method}"
    title = f"Strongest of {count(found.effects.size, 'place')}{by}, {found.record.direction} ({found.record.metric}"
    out.table(f"{title} {number(found.full.mean())} in full, {number(found.empty.mean())} ablated)", columns, table)
    if found.by_position and best:
        shown.positions(out)


def heat(found: Sweep, out: Output) -> None:
    """Layers across and positions or spans down, or layers down and heads across, where it fits the width."""
    parts, effects = _parts(found), found.effects
    values, unit = (effects, "metric") if parts is None else (100 * parts, "% of full - ablated")
    axes, note = list(found.axes), ""
    if values.ndim == 3:  # a head at the position where it is strongest
        where = np.abs(values).argmax(-1)[..., None]
        note = f", each at its strongest {axes[-1].name}"
        values, axes = np.take_along_axis(values, where, -1)[..., 0], axes[:2]
    if values.ndim == 1:
        values, axes = values[:, None], [axes[0], axes[0]._replace(name=found.what, labels=(found.what,))]
    down, across = axes
    if across.name in ("position", "span"):
        values, down, across = values.T, across, down
    if across.name == "neuron" or FIRST + CELL * len(across.labels) > out.text.width:
        return
    digits = 0 if parts is not None else shown.digits_for(values.ravel().tolist())
    strongest = float(np.abs(values).max())
    columns = [(f"{down.name} \\ {across.name}", "left"), *((label, "right") for label in across.labels)]
    rows: list[list[str | Text]] = [
        [label, *(_cell(float(value), strongest, digits) for value in row)]
        for label, row in zip(down.labels, values, strict=True)
    ]
    shows = "Effects" if found.record.is_effect else "Scores"
    out.table(f"{shows} by {down.name} and {across.name} ({unit}){note}", columns, rows)


def _cell(value: float, strongest: float, digits: int) -> Text:
    """Red where it opposes, bold from half of the strongest on, faint below a twentieth."""
    size = abs(value) / strongest if strongest else 0.0
    weight = "bold" if size >= 0.5 else "dim" if size < 0.05 else ""
    return Text(fixed(value, digits), style=f"{weight} {'red' if value < 0 else ''}".strip())
