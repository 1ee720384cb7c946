"""Figures of an approximation: estimates against exact effects, a panel a kind of place, and how they agree by layer.

1. On the dashed line an estimate is right; the solid one has the slope of exact effects on estimates. Points are
   coloured by layer; crosses are those that matter (`evaluation/approximation_fit.py`) and have the wrong sign.
2. Each panel has its r, slope and wrong signs; the sentences on where the estimates fail stand below the title.
3. By layer a cell is Pearson's r; on hovering slope, error and size of the change. Grey where r is undefined.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitfind.evaluation.approximation_fit import wrong_signs
from circuitfind.plots.heat import colour_bar, heat
from circuitfind.plots.panels import Panel, heading, panels
from circuitfind.plots.scatter import Point, line, marks, room
from circuitfind.plots.style import NEUTRAL, Caption, Side, caption, made_by, safe, unit

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from circuitfind.evaluation.approximation import Approximation
    from circuitfind.evaluation.approximation_fit import Fit

WIDE, HIGH, GAP, MOST_TICKS = 400, 320, (90, 120), 12
DEPTHS = ["#440154", "#3b528b", "#21918c", "#5ec962", "#d8a31a"]  # from the first layer to the last


def scatter(found: Approximation) -> Figure:
    """Every place, a panel a kind."""
    layers = sorted({layer for one in found.compared.values() for layer in one.layers})
    kinds = [(what, [*places]) for what, places in groupby(found.places(), key=lambda place: place.kind)]
    parts: list[Panel] = []
    for what, places in kinds:
        whole = found.compared[what].fit()
        points = [
            Point(f"{place.name} at {place.position}" if place.position else place.name, *place[4:]) for place in places
        ]
        look = {**_depths(layers), "color": [place.layer for place in places]}
        look["showscale"] = not parts and len(layers) > 1
        x, y = (np.array([getattr(point, side) for point in points]) for side in ("estimate", "exact"))
        crosses, across, up = wrong_signs(x, y).tolist(), room(x), room(y)
        ends = np.array([min(across[0], up[0]), max(across[1], up[1])])
        slope = [line("slope", ends, whole.slope, "solid")] if np.isfinite(whole.slope) else []
        traces = [line("y = x", ends, 1.0, "dash"), *slope, marks(points, what, crosses, look, NEUTRAL)]
        axes = (
            {"title": {"text": name}, "range": span, "zerolinecolor": "#ccc"}
            for name, span in (("estimate", across), ("exact", up))
        )
        parts.append(Panel(heading(f"{what}, {whole.n:,} places", _said(whole)), traces, *axes))
    words = _words(found, f"estimate and exact: {unit(found.record)}", "crosses: the wrong sign where it matters")
    words = words._replace(remarks=found.remarks)
    return panels(parts, words, WIDE, HIGH, GAP, legend=90, showlegend=False)


def layers(found: Approximation) -> Figure:
    """How well each layer of each kind is estimated."""
    labels = sorted({layer for one in found.compared.values() for layer in one.layers})
    values = np.full((len(found.compared), len(labels)), np.nan)
    hover = [["not measured"] * len(labels) for _ in found.compared]
    for (what, layer), fit in found.by_layer.items():
        row, column = list(found.compared).index(what), labels.index(layer)
        values[row, column] = fit.r
        size = found.compared[what].sizes[layer]
        hover[row][column] = (
            f"<b>{safe(what)}, layer {layer}</b>: {fit.n:,} places<br>{_said(fit)}"
            f"<br>mean error {fit.error:.0%} of the mean effect<br>change {size:.2g} of what it is part of"
        )
    sides = Side("places", list(found.compared)), Side("layer", list(map(str, labels)))
    return heat(values, *sides, hover, _words(found, "blue: r near 1"), "r", most=1.0)


def _depths(layers: list[int]) -> dict[str, Any]:
    """Colours of points by layer."""
    shown = layers[:: -(-len(layers) // MOST_TICKS)]
    bar = {**colour_bar("layer", HIGH), "tickvals": shown, "ticktext": list(map(str, shown))}
    return {"colorscale": DEPTHS, "cmin": layers[0], "cmax": layers[-1], "colorbar": bar}


def _said(fit: Fit) -> str:
    r, slope = ("undefined" if np.isnan(value) else f"{value:.3f}" for value in (fit.r, fit.slope))
    return f"r {r}, slope {slope}, {fit.wrong_signs} of {fit.matter} that matter with the wrong sign"


def _words(found: Approximation, *more: str) -> Caption:
    return caption(f"{made_by(found.record)} against exact patching".capitalize(), found.record, *more)
