"""Methods that can be compared. Each ranks all edges on the pairs of an experiment.

* A name is that of an attribution method (`circuitfind.attribution.methods`) or of a search
  (`circuitfind.search.methods`: ACDC, and learned masks, trained once).
* A method that scores nodes gives an edge the score of the weaker of its two nodes, by magnitude
  (`NodeScores.to_edges`). "NAME-nodes" is method NAME scoring nodes.
* Your own method is a `Method`, "package.module:name" of one, a function `(model, task) -> Scores`, or `Scores`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from circuitfind.attribution import methods as attribution
from circuitfind.attribution.attribute import score
from circuitfind.attribution.method import Method
from circuitfind.attribution.methods import request_of
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import CircuitfindError, ScoreError, unknown
from circuitfind.models.load import Model
from circuitfind.scores import NodeScores, Scores
from circuitfind.search.methods import SEARCHES, method_of
from circuitfind.tasks.task import BoundTask

Given = Method | str | Scores | Callable[[Model, BoundTask], Scores | NodeScores] | None
NODES = "-nodes"


class Entrant(NamedTuple):
    """A method in a comparison.

    Attributes:
        rank: makes the ranking on the pairs of an experiment.
        summary: describes the method in a few words.
        kept: whether the ranking may be kept under the method's name. False for a user's method, whose code can change.
    """

    rank: Callable[[Experiment], Scores]
    summary: str
    kept: bool = False


def _by_method(experiment: Experiment, method: Method, level: str) -> Scores:
    request, _ = request_of(method, level, None, {"ablation": experiment.setting.ablation})
    scores = score(experiment, method, request)
    assert isinstance(scores, (Scores, NodeScores)), "no places of a sweep were asked for"
    return scores.to_edges() if isinstance(scores, NodeScores) else scores


def _as_given(experiment: Experiment, name: str, given: Any) -> Scores:
    scores = given if isinstance(given, Scores) else given(experiment.model, experiment.bound)
    if not isinstance(scores, (Scores, NodeScores)):
        raise CircuitfindError(f"method '{name}' returned a {type(scores).__name__}, not Scores or NodeScores")
    if scores.graph != experiment.graph:
        raise ScoreError(f"its scores belong to another graph {experiment.graph.unlike(scores.graph)}")
    return scores.to_edges() if isinstance(scores, NodeScores) else scores


def _of_method(method: Method, level: str, kept: bool = False) -> Entrant:
    return Entrant(partial(_by_method, method=method, level=level), method.summary, kept)


def _named(name: str) -> Entrant:
    base = name.removesuffix(NODES)
    known = {**attribution.METHODS, **SEARCHES}
    if base not in known and ":" not in base:
        raise ScoreError(f"{unknown('method', name, NAMES)}, or {{name: scores, function or Method}}")
    level = "node" if base != name or (base in known and "edge" not in known[base].levels) else "edge"
    return _of_method(method_of(base, level), level, kept=name in NAMES)


EFFECTS = ("exact", "eap", "eap-ig-inputs", "eap-ig-activations", "relp", "gim", "clean-corrupted")
OF_NODES = ("exact-nodes", "atp", "atp-star", "hisp", "subnetwork-probing-nodes")
WITHOUT_METRIC = ("ifr", "activation", "weights", "random")
NAMES = (*EFFECTS, *SEARCHES, *OF_NODES, *WITHOUT_METRIC)
METHODS: Mapping[str, Entrant] = {name: _named(name) for name in NAMES}


def chosen(methods: Sequence[str | Method] | Mapping[str, Given] | None) -> Mapping[str, Entrant]:
    """The chosen methods by name; None: all of `METHODS`. A ScoreError if none is given, or an unsuitable one."""
    if methods is None:
        return METHODS
    if not isinstance(methods, Mapping):
        several = [methods] if isinstance(methods, (str, Method)) else methods
        methods = {one.name if isinstance(one, Method) else one: one for one in several}
    if not methods:
        raise ScoreError(f"no method given: use some of {', '.join(NAMES)}")
    return {name: _entrant(name, given) for name, given in methods.items()}


def _entrant(name: str, given: Given) -> Entrant:
    if given is None or isinstance(given, str):
        return _named(given or name)
    if isinstance(given, Method):
        return _of_method(given, "edge" if "edge" in given.levels else "node")
    if not isinstance(given, Scores) and not callable(given):
        kind = type(given).__name__
        raise ScoreError(f"method '{name}' is a {kind}: give Scores, a Method, or a function (model, task)")
    return Entrant(partial(_as_given, name=name, given=given), "given")
