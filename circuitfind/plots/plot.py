"""`plot`: the figures of a result, by its type.

`FIGURES` maps the name of a result's type to its figures by name, the default first. To add a figure, write a function
of the result (and of options) and list it here; from outside the package, set `FIGURES["MyResult"] = {"layers": draw}`.
Keys are names, not types, because importing some of the types would import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from circuitfind.errors import ScoreError
from circuitfind.plots import faithfulness, patching, scatter, scores
from circuitfind.plots.scores import Edges
from circuitfind.plots.style import Caption

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Drawing = Callable[..., "Figure"]


class If(NamedTuple):
    """A figure of only those results of a type for which `holds` is true."""

    holds: Callable[[Any], bool]
    draw: Drawing


EDGES: dict[str, Drawing | If] = {
    "layers": lambda found: scores.edge_layers(Edges.of(found)),
    "strongest": If(
        lambda found: Edges.of(found).known, lambda found, **options: scores.strongest_edges(Edges.of(found), **options)
    ),
}


def _curves(found: Mapping[str, Any]) -> Figure:
    """Return the figure of several curves, or lists of their points, by name."""
    points = {name: getattr(one, "points", one) for name, one in found.items()}
    for name, one in points.items():
        if not isinstance(one, Sequence) or not all(hasattr(point, "faithfulness") for point in one):
            remedy = "give curves (circuitfind.curve) or their points by name"
            raise ScoreError(f"'{name}' is a {type(one).__name__}: {remedy}")
    record = getattr(next(iter(found.values())), "record", None)
    what = "Faithfulness by size"
    return faithfulness.curves(points, Caption(what) if record is None else faithfulness.measured(what, record))


FIGURES: dict[str, Mapping[str, Drawing | If]] = {
    "Sweep": {"effects": patching.sweep_effects, "strongest": patching.strongest_places},
    "NodeScores": {
        "effects": scores.node_effects,
        "strongest": scores.strongest_nodes,
        "components": If(lambda found: found.record.method == "direct", scores.components),
    },
    "Scores": {**EDGES, "nodes": lambda found, **options: scores.node_effects(found.of_nodes(), **options)},
    "Circuit": {**EDGES, "scatter": If(scatter.both_known, scatter.of_circuit)},
    "Verification": {"scatter": scatter.of_checks},
    "Checks": {"scatter": scatter.of_estimates},
    "Curve": {"faithfulness": lambda found: _curves({"faithfulness": found})},
    "Mib": {
        "faithfulness": lambda mib: _curves({"highest signed score": mib.signed, "highest magnitude": mib.absolute})
    },
    "FindResult": {
        "faithfulness": lambda found: faithfulness.search(found.curve, found.circuit),
        "scatter": lambda found: scatter.of_checks(found.checks),
        **EDGES,
    },
    "PathEffects": {"effects": patching.path_effects, "strongest": If(patching.many_paths, patching.strongest_paths)},
    "DirectEffects": {
        "effects": scores.direct_effects,
        "components": scores.components,
        "strongest": scores.strongest_direct,
    },
    "Approximation": {"scatter": scatter.approximation_scatter, "layers": scatter.approximation_layers},
    "AttentionPattern": {"attention": patching.attention},
    "several attention patterns": {"attention": patching.attention},
    "curves by name": {"faithfulness": _curves},
    "estimated and exact": {"scatter": lambda found: scatter.of_pair(*found)},
}
PAIRED = ("Sweep", "NodeScores", "Scores")


def plot(found: Any, what: str | None = None, **options: Any) -> Figure:
    """Return a figure of a result. A notebook displays it; elsewhere, `figure.show()` opens it.

    Colours: white is 0, blue is positive (supports the behaviour), red is negative (opposes it).

    | result | figures, the default first |
    |---|---|
    | `Sweep` | effects, strongest |
    | `NodeScores` | effects, strongest; of direct logit attribution components, too |
    | `Scores` | layers, strongest, nodes |
    | `Circuit` | layers, strongest, scatter |
    | `Verification`, `Checks` | scatter |
    | `Curve`, `Mib`, `{name: Curve or points}` | faithfulness |
    | `FindResult` | faithfulness, scatter, layers, strongest |
    | two `Sweep`, `NodeScores` or `Scores`: (estimated, exact) | scatter |
    | `PathEffects` | effects; of many paths strongest, too |
    | `DirectEffects` | effects, components, strongest |
    | `Approximation` | scatter, layers |
    | one or several `AttentionPattern` | attention |

    Args:
        found: a result of circuitfind; `{name: curve}` for several methods; `(estimated, exact)` for two sweeps or two
            sets of scores of the same places.
        what: which of its figures; by default the first.
        options: of that figure: `normalised=`, `rows=` of a sweep's effects; `tokens=`, `rows=` of node scores;
            `n=` of the strongest.

    Raises:
        ScoreError: there is no such figure, or nothing to show in it.
        FileError: plotly is not installed.
    """
    known = drawings(found)
    if what is not None and what not in known:
        raise ScoreError(f"what={what!r}: the figures of this {type(found).__name__} are {', '.join(known)}")
    return known[what or next(iter(known))](**options)


def drawings(found: Any) -> dict[str, Drawing]:
    """Return functions that draw a result's figures, by name, the default first; a ScoreError if it has none."""
    name = _kind(found)
    if name is None:
        raise ScoreError(
            f"nothing of type {type(found).__name__} can be drawn: give a sweep, scores, a circuit, effects of paths,"
            " direct effects, an approximation, a verification, a curve, what find found, attention patterns,"
            " {name: curve}, or (estimated, exact)"
        )
    known = {what: one for what, one in FIGURES[name].items() if not isinstance(one, If) or one.holds(found)}
    return {what: partial(one.draw if isinstance(one, If) else one, found) for what, one in known.items()}


def _kind(found: Any) -> str | None:
    """The key in `FIGURES` of a result, a dictionary, a pair or several results; None if there is none."""
    kinds = [kind.__name__ for kind in type(found).__mro__]
    if known := next((name for name in kinds if name in FIGURES), None):
        return known
    if isinstance(found, Mapping) and found:
        return "curves by name"
    if not isinstance(found, (list, tuple)) or not found:
        return None
    inside = {_kind(one) for one in found}
    if inside == {"AttentionPattern"}:
        return "several attention patterns"
    paired = isinstance(found, tuple) and len(found) == 2 and _kind(found[0]) in PAIRED
    return "estimated and exact" if paired else None
