"""Estimated against exact effects, a point for each edge or place, coloured by kind; and where approximations fail.

1. On the dashed line y = x an estimate is right. The solid line is exact = slope x estimate through the origin, the
   slope of `circuitfind.verify` (1 = unbiased, above 1 = underestimated).
2. Points whose estimate has the wrong sign are crosses. Exact effects have 95% intervals if these are known.
3. The caption gives Pearson's r, the slope and the number of wrong signs. Points with a value that is not finite are
   left out.

Approximations:

4. There is a subplot for each kind of place, coloured by layer. Crosses are the places that matter
   (`evaluation/approximation_fit.py`) and have the wrong sign. Sentences below the title say where the estimates fail.
5. By layer, a cell is Pearson's r, grey if undefined. Its hover text gives the slope, the error and the size of the
   change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from circuitfind.errors import ScoreError
from circuitfind.evaluation.approximation_fit import wrong_signs
from circuitfind.plots import style
from circuitfind.plots.charts import colour_bar, heat
from circuitfind.plots.style import Caption, Side, Subplot, caption, figure, graph_objects, safe, unit
from circuitfind.scores import NodeScores, Scores
from circuitfind.statistics import correlation

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from circuitfind.circuit import Circuit
    from circuitfind.evaluation.approximation import Approximation
    from circuitfind.evaluation.approximation_fit import Fit
    from circuitfind.evaluation.check import Checks
    from circuitfind.evaluation.verify import Verification
    from circuitfind.patching.sweep import Sweep

NAN = float("nan")
MOST_INTERVALS = 400  # error bars; more hide the points
WIDE, HIGH, SPACE, MOST_TICKS = (
    400,
    320,
    (90, 120),
    12,
)  # pixels of a subplot and between subplots; most ticks of layers
DEPTHS = ["#440154", "#3b528b", "#21918c", "#5ec962", "#d8a31a"]  # from the first layer to the last
KINDS = {  # of a reader or a component, by its name
    "queries": r".*<q>",
    "keys": r".*<k>",
    "values": r".*<v>",
    "patterns": r".*<pattern>",
    "heads": r"a\d+\.h\d+",
    "attention": r"a\d+",
    "neurons": r"m\d+\.n\d+",
    "MLPs": r"m\d+",
    "residual stream": r"resid(-mid)?\d+",
    "logits": r"logits",
    "input": r"input",
}


class EffectPair(NamedTuple):
    """The estimated and the exact effect of an edge or place, and the 95% interval of the exact effect."""

    name: str
    estimate: float
    exact: float
    low: float = NAN
    high: float = NAN

    @property
    def kind(self) -> str:
        """The kind of an edge's reader, or of a place."""
        name = self.name.partition(" at ")[0].rpartition("->")[2]
        return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name)), "others")

    @property
    def wrong_sign(self) -> bool:
        return self.estimate * self.exact < 0


def of_checks(found: Verification) -> Figure:
    """Return the scatter plot of the edges that a verification measured."""
    points = [EffectPair(*edge, *ends) for edge, ends in zip(found.edges, found.intervals, strict=True)]
    record = replace(found.evaluation.record, direction="")
    return scatter(points, caption("Edges, estimated and exact", record), unit(record))


def of_estimates(found: Checks) -> Figure:
    """Return the scatter plot of the strongest estimates and their exact effects."""
    points = [EffectPair(row.name, row.estimate, row.exact, *row.interval) for row in found.checked]
    words = caption("The strongest estimates, and exact effects", found.record)
    return scatter(points, words, unit(found.record), style.made_by(found.record))


def both_known(circuit: Circuit) -> bool:
    """Whether at least two of a circuit's edges have both effects."""
    return sum(row.estimate is not None and row.exact is not None for row in circuit.rows()) > 1


def of_circuit(circuit: Circuit) -> Figure:
    """Return the scatter plot of a circuit's edges with both effects."""
    points = [
        EffectPair(circuit.graph.edge_name(row.writer, row.reader), row.estimate, row.exact)
        for row in circuit.rows()
        if row.estimate is not None and row.exact is not None
    ]
    words = caption("The circuit's edges, estimated and exact", circuit.record)
    return scatter(points, words, unit(circuit.record), style.made_by(circuit.record))


def of_pair(estimated: Sweep | NodeScores | Scores, exact: Sweep | NodeScores | Scores) -> Figure:
    """Return the scatter plot of two sets of scores of the same edges, nodes or places: usually an estimate and exact
    patching. ScoreError if they are not comparable."""
    if type(estimated) is not type(exact):
        raise ScoreError(f"a {type(estimated).__name__} goes against its like, not a {type(exact).__name__}")
    for name in ("model", "task", "metric", "direction", "ablation"):
        ours, theirs = (getattr(one.record, name) for one in (estimated, exact))
        if ours != theirs:
            raise ScoreError(f"the two are effects of different kinds: {name} '{ours}' and '{theirs}'")
    (names, x), (others, y) = _named(estimated), _named(exact)
    if names != others:
        raise ScoreError("the two are not of the same places: make both with the same what, layers and positions")
    sides = style.made_by(estimated.record), style.made_by(exact.record)
    words = caption(" against ".join(sides).capitalize(), exact.record)
    return scatter([*map(EffectPair, names, x.tolist(), y.tolist())], words, unit(exact.record), *sides)


def scatter(
    points: Sequence[EffectPair], words: Caption, unit: str, estimate: str = "estimate", exact: str = "exact"
) -> Figure:
    """Return the scatter plot of exact effects (y) against estimates (x), both in `unit`; `estimate` and `exact` label
    the axes."""
    known = [point for point in points if np.isfinite([point.estimate, point.exact]).all()]
    if len(known) < 2:
        raise ScoreError(
            f"{len(known)} of {len(points)} have both an estimate and an exact effect: two are needed"
            " (a baseline's scores are not estimates)"
        )
    x, y = (np.array([getattr(point, side) for point in known]) for side in ("estimate", "exact"))
    power = float((x**2).sum())
    slope = float((x * y).sum()) / power if power else NAN
    wrong = sum(point.wrong_sign for point in known)
    said = f"r {correlation(x, y):.3f}, slope {slope:.3f}, {wrong} of {len(known):,} with the wrong sign (crosses)"
    ends = np.array([(point.low, point.high) for point in known]).ravel()
    shown = np.concatenate([y, ends[np.isfinite(ends)]])
    axes, lines = plane(x, shown, f"{estimate}: {unit}", f"{exact}: {unit}", {f"slope {slope:.3f}": slope})
    kinds = [kind for kind in (*KINDS, "others") if any(point.kind == kind for point in known)]
    traces = [_of_kind([p for p in known if p.kind == kind], kind, style.PALETTE[at]) for at, kind in enumerate(kinds)]
    words = words._replace(notes=(*words.notes, said))
    return figure([*lines, *traces], words, 780, 540, xaxis=axes[0], yaxis=axes[1])


def plane(
    x: np.ndarray, y: np.ndarray, across: str, up: str, slopes: Mapping[str, float]
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Return both axes, which include 0 and the values, and lines through the origin: y = x and the named slopes."""
    axes: list[dict[str, Any]] = []
    for values, title in ((x, across), (y, up)):
        low, high = min(values.min(), 0.0), max(values.max(), 0.0)
        margin = 0.06 * (high - low) or 1.0
        span = [float(low - margin), float(high + margin)]
        axes.append({"title": {"text": title}, "range": span, "zerolinecolor": "#ccc"})
    ends = np.array([min(axis["range"][0] for axis in axes), max(axis["range"][1] for axis in axes)])
    lines = []
    for name, slope in {"y = x": 1.0, **slopes}.items():
        look = {"color": "#777", "dash": "dash" if name == "y = x" else "solid", "width": 1}
        trace = graph_objects().Scatter(x=ends, y=slope * ends, mode="lines", name=name, line=look, hoverinfo="skip")
        lines.append(trace)
    return axes, lines


def _of_kind(points: Sequence[EffectPair], kind: str, colour: str) -> Any:
    points = sorted(points, key=lambda point: point.wrong_sign)  # the first one's mark stands in the legend
    crosses = [point.wrong_sign for point in points]
    return effect_marks(points, f"{kind} ({len(points):,})", crosses, {"color": colour}, colour)


def effect_marks(
    points: Sequence[EffectPair], name: str, crosses: Sequence[bool], look: dict[str, Any], bars: str
) -> Any:
    """Return a trace of points, some of them crosses; `look`: their colours; `bars`: the colour of their intervals."""
    x, y = [point.estimate for point in points], np.array([point.exact for point in points])
    texts = [f"<b>{safe(p.name)}</b><br>estimate {p.estimate:+.4g}<br>exact {p.exact:+.4g}" for p in points]
    marker = {"size": 7, "opacity": 0.75, "symbol": ["x" if cross else "circle" for cross in crosses], **look}
    ends = np.array([(point.low, point.high) for point in points])
    arms = style.error_bars(y, ends, thickness=0.7, width=0, color=bars)
    arms["visible"] = arms["visible"] and len(points) <= MOST_INTERVALS
    return style.marks(x, y, texts, name, marker=marker, error_y=arms)


def _named(scores: Sweep | NodeScores | Scores) -> tuple[list[str], np.ndarray]:
    """Names and values, in the same order."""
    if isinstance(scores, Scores):
        return scores.graph.names(scores.graph.real), scores.values.T[scores.graph.real.T]
    if isinstance(scores, NodeScores):
        names, values = list(scores.graph.writer_names), scores.values
        places = list(scores.positions or map(str, range(values.shape[1]))) if values.ndim > 1 else None
    else:
        names, values = scores.names()[:: len(scores.positions)], scores.effects
        places = list(scores.positions) if any(scores.positions) else None
    if places is not None:
        names = [f"{name} at {place}" for name in names for place in places]
    return names, values.ravel()


# -------------------------------------------------------------------- approximations
def approximation_scatter(found: Approximation) -> Figure:
    """Return scatter plots of all places, a subplot for each kind."""
    layers = _layers(found)
    parts: list[Subplot] = []
    for what, group in groupby(found.places(), key=lambda place: place.kind):
        whole, places = found.compared[what].fit(), list(group)
        names = [f"{place.name} at {place.position}" if place.position else place.name for place in places]
        points = [EffectPair(name, *place[4:]) for name, place in zip(names, places, strict=True)]
        look = {**_depths(layers), "color": [place.layer for place in places]}
        look["showscale"] = not parts and len(layers) > 1
        x, y = (np.array([getattr(point, side) for point in points]) for side in ("estimate", "exact"))
        axes, lines = plane(x, y, "estimate", "exact", {"slope": whole.slope} if np.isfinite(whole.slope) else {})
        traces = [*lines, effect_marks(points, what, wrong_signs(x, y).tolist(), look, style.NEUTRAL)]
        parts.append(Subplot(style.heading(f"{what}, {whole.n:,} places", _said(whole)), traces, *axes))
    words = _words(found, f"estimate and exact: {unit(found.record)}", "crosses: the wrong sign where it matters")
    words = words._replace(remarks=found.remarks)
    return style.subplots(parts, words, WIDE, HIGH, SPACE, legend=90, showlegend=False)


def approximation_layers(found: Approximation) -> Figure:
    """Return a heat map of Pearson's r between estimates and exact effects: kinds of place by layer."""
    labels = _layers(found)
    values = np.full((len(found.compared), len(labels)), np.nan)
    texts = [["not measured"] * len(labels) for _ in found.compared]
    for (what, layer), fit in found.by_layer.items():
        row, column = list(found.compared).index(what), labels.index(layer)
        values[row, column] = fit.r
        texts[row][column] = (
            f"<b>{safe(what)}, layer {layer}</b>: {fit.n:,} places<br>{_said(fit)}<br>mean error {fit.error:.0%} of the"
            f" mean effect<br>change {found.compared[what].sizes[layer]:.2g} of what it is part of"
        )
    sides = Side("places", list(found.compared)), Side("layer", list(map(str, labels)))
    return heat(values, *sides, texts, _words(found, "blue: r near 1"), "r", most=1.0)


def _layers(found: Approximation) -> list[int]:
    return sorted({layer for one in found.compared.values() for layer in one.layers})


def _depths(layers: list[int]) -> dict[str, Any]:
    """The colour scale of points by layer."""
    shown = layers[:: -(-len(layers) // MOST_TICKS)]
    bar = {**colour_bar("layer", HIGH), "tickvals": shown, "ticktext": list(map(str, shown))}
    return {"colorscale": DEPTHS, "cmin": layers[0], "cmax": layers[-1], "colorbar": bar}


def _said(fit: Fit) -> str:
    r, slope = ("undefined" if np.isnan(value) else f"{value:.3f}" for value in (fit.r, fit.slope))
    return f"r {r}, slope {slope}, {fit.wrong_signs} of {fit.matter} that matter with the wrong sign"


def _words(found: Approximation, *more: str) -> Caption:
    return caption(f"{style.made_by(found.record)} against exact patching".capitalize(), found.record, *more)
