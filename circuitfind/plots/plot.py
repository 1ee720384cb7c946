"""`plot`: the figures that belong to a result, by its type.

| result | figures, the default first |
|---|---|
| `Sweep` | effects, strongest |
| `NodeScores` | effects, strongest; of direct logit attribution components, too |
| `Scores` | layers, strongest, nodes |
| `Circuit` | layers, strongest, scatter |
| `Verification` | scatter |
| `Curve`, `Mib`, `{name: Curve or points}` | faithfulness |
| what `find` found | faithfulness, scatter, layers, strongest |
| two `Sweep`, `NodeScores` or `Scores`: (estimated, exact) | scatter |
| `PathEffects` | effects; of many paths strongest, too |
| `DirectEffects` | effects, components, strongest |
| `Approximation` | scatter, layers |
| one or several `AttentionPattern` | attention |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from circuitfind.circuit import Circuit
from circuitfind.errors import ScoreError
from circuitfind.node_scores import NodeScores
from circuitfind.plots import direct, edges, faithfulness, nodes
from circuitfind.plots.edges import Edges
from circuitfind.plots.style import Caption
from circuitfind.scores import Scores

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Drawing = Callable[..., "Figure"]


@runtime_checkable
class Found(Protocol):
    """What a search found (`circuitfind.search` lies above this room)."""

    circuit: Circuit
    checks: Any
    curve: Any


def plot(found: Any, what: str | None = None, **options: Any) -> Figure:
    """The figure of a result; it shows itself in a notebook, `figure.show()` opens it elsewhere.

    Colours: white is 0, blue is positive (supports the behaviour), red is negative (opposes it).

    Args:
        found: a result of circuitfind; `{name: curve}` for several methods; `(estimated, exact)` for two sweeps or two
            sets of scores of the same places.
        what: which of its figures (see the table in `circuitfind/plots/plot.py`); by default the first.
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
    """A result's figures by name, the default first, each drawn when it is called.

    Raises:
        ScoreError: this is nothing that can be drawn.
    """
    if isinstance(found, NodeScores):
        known = {"effects": partial(nodes.effects, found), "strongest": partial(nodes.strongest, found)}
        adds_up = found.record.method == "direct"
        return {**known, **({"components": partial(direct.components, found)} if adds_up else {})}
    if isinstance(found, Scores):
        summed = partial(nodes.effects, found.of_nodes())
        return {**_of_edges(Edges.of_scores(found)), "nodes": summed}
    if isinstance(found, Circuit):
        return _of_circuit(found)
    if isinstance(found, Mapping) and found:
        return {"faithfulness": partial(_curves, found)}
    return _of_measurement(found)


def _of_measurement(found: Any) -> dict[str, Drawing]:
    """Of results whose types bring torch with them, which reading scores does not wait for."""
    from circuitfind.attribution.direct import DirectEffects
    from circuitfind.evaluation.approximation import Approximation
    from circuitfind.evaluation.curve import Curve
    from circuitfind.evaluation.mib import Mib
    from circuitfind.evaluation.verify import Verification
    from circuitfind.patching.attention import AttentionPattern
    from circuitfind.patching.path_effects import PathEffects
    from circuitfind.patching.sweep import Sweep
    from circuitfind.plots import approximation, paths, scatter, sweeps
    from circuitfind.plots.attention import attention

    if isinstance(found, Sweep):
        return {"effects": partial(sweeps.effects, found), "strongest": partial(sweeps.strongest, found)}
    if isinstance(found, Verification):
        return {"scatter": partial(scatter.of_checks, found)}
    if isinstance(found, Curve):
        return {"faithfulness": partial(_curves, {"faithfulness": found})}
    if isinstance(found, Mib):
        both = {"highest signed score": found.signed, "highest magnitude": found.absolute}
        return {"faithfulness": partial(_curves, both)}
    if isinstance(found, PathEffects):
        best = {"strongest": partial(paths.strongest, found)} if paths.many(found) else {}
        return {"effects": partial(paths.effects, found), **best}
    if isinstance(found, DirectEffects):
        return {name: partial(getattr(direct, name), found) for name in ("effects", "components", "strongest")}
    if isinstance(found, Approximation):
        return {"scatter": partial(approximation.scatter, found), "layers": partial(approximation.layers, found)}
    several = found if isinstance(found, (list, tuple)) else [found]
    if several and all(isinstance(one, AttentionPattern) for one in several):
        return {"attention": partial(attention, several)}
    if isinstance(found, Found):
        search = partial(faithfulness.search, found.curve, found.circuit)
        checks = partial(scatter.of_checks, found.checks)
        return {"faithfulness": search, "scatter": checks, **_of_edges(Edges.of_circuit(found.circuit))}
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], (Sweep, NodeScores, Scores)):
        return {"scatter": partial(scatter.of_pair, *found)}
    raise ScoreError(
        f"nothing of type {type(found).__name__} can be drawn: give a sweep, scores, a circuit, effects of paths,"
        " direct effects, an approximation, a verification, a curve, what find found, attention patterns,"
        " {name: curve}, or (estimated, exact)"
    )


def _of_edges(given: Edges) -> dict[str, Drawing]:
    return {
        "layers": partial(edges.layers, given),
        **({"strongest": partial(edges.strongest, given)} if given.known else {}),
    }


def _of_circuit(circuit: Circuit) -> dict[str, Drawing]:
    from circuitfind.plots import scatter

    both = sum(row.estimate is not None and row.exact is not None for row in circuit.rows())
    checks = {"scatter": partial(scatter.of_circuit, circuit)} if both > 1 else {}
    return {**_of_edges(Edges.of_circuit(circuit)), **checks}


def _curves(found: Mapping[str, Any]) -> Figure:
    """Of curves, or of their points, by name."""
    points = {name: getattr(one, "points", one) for name, one in found.items()}
    for name, one in points.items():
        if not isinstance(one, Sequence) or not all(hasattr(point, "faithfulness") for point in one):
            raise ScoreError(
                f"'{name}' is a {type(one).__name__}: give curves (circuitfind.curve) or their points by name"
            )
    record = getattr(next(iter(found.values())), "record", None)
    words = Caption("Faithfulness by size") if record is None else faithfulness.measured("Faithfulness by size", record)
    return faithfulness.curves(points, words)
