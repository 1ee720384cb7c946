"""The methods that can be compared: each turns a model and a task into a ranking of edges.

* Attribution methods (`circuitfind.attribute`) give edges effects, or numbers that rank them.
* Methods over nodes rank an edge by the lower of its two ends (`NodeScores.to_edges`).
* ACDC gives an edge the smallest threshold at which it goes (`circuitfind.acdc_scores`).
* Learned masks give an edge the probability with which it stays (`circuitfind.learn_masks`), trained once; Edge
  Pruning, which needs a size to steer to, is given 5% of the edges.

ACDC and learned masks prune by the divergence from the whole model, as in their papers, whatever the task's metric is.
Nodes rank by magnitude.

A method of one's own is any function `(model, task) -> Scores`, or the `Scores` themselves; None stands for the method
of the name that it is given for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from circuitfind.attribution.attribute import attribute
from circuitfind.errors import CircuitfindError, ScoreError
from circuitfind.models.load import Model
from circuitfind.scores import NodeScores, Scores
from circuitfind.search.acdc import acdc_scores
from circuitfind.search.learned.learn import learn_masks
from circuitfind.tasks.task import BoundTask

Asked = Mapping[str, Any]  # ablation, batch_size and seed of a comparison
Given = Scores | Callable[[Model, BoundTask], Scores | NodeScores] | None


class Method(NamedTuple):
    """How a ranking is made, in a few words what it is, and whether its name says all: what is given does not."""

    rank: Callable[[Model, BoundTask, Asked], Scores]
    summary: str
    named: bool = True


def _edges(model: Model, task: BoundTask, asked: Asked, method: str, **settings: Any) -> Scores:
    scores = attribute(model, task, method, **asked, **settings)
    assert isinstance(scores, (Scores, NodeScores)), "no places of a sweep were asked for"
    return _of_edges(scores)


def _acdc(model: Model, task: BoundTask, asked: Asked) -> Scores:
    return acdc_scores(model, task, **asked)


def _learned(model: Model, task: BoundTask, asked: Asked, method: str, **settings: Any) -> Scores:
    return _of_edges(learn_masks(model, task, method, **asked, **settings).scores)


def _of_edges(scores: Scores | NodeScores) -> Scores:
    return scores.to_edges() if isinstance(scores, NodeScores) else scores


def _attributed(method: str, summary: str, **settings: Any) -> Method:
    return Method(partial(_edges, method=method, **settings), summary)


METHODS: dict[str, Method] = {
    "exact": _attributed("exact", "every edge patched on its own"),
    "eap": _attributed("eap", "edge attribution patching"),
    "eap-ig-inputs": _attributed("eap-ig-inputs", "gradients averaged between the prompts' embeddings"),
    "eap-ig-activations": _attributed("eap-ig-activations", "gradients averaged between the nodes' outputs"),
    "relp": _attributed("relp", "edge attribution patching by rules of relevance propagation"),
    "clean-corrupted": _attributed("clean-corrupted", "gradients averaged over both prompts"),
    "acdc": Method(_acdc, "greedy exact pruning at a grid of thresholds"),
    "edge-pruning": Method(
        partial(_learned, method="edge-pruning", sparsity=0.95), "hard-concrete masks with a target size"
    ),
    "subnetwork-probing": Method(partial(_learned, method="subnetwork-probing"), "hard-concrete masks with a penalty"),
    "ugs": Method(partial(_learned, method="ugs"), "uniform gradient sampling of masks"),
    "exact-nodes": _attributed("exact", "every node patched on its own", level="node"),
    "atp": _attributed("atp", "attribution patching of nodes", level="node"),
    "atp-star": _attributed("atp-star", "attribution patching of nodes, each layer's gradient dropped", level="node"),
    "hisp": _attributed("hisp", "head importance scores", level="node"),
    "subnetwork-probing-nodes": Method(
        partial(_learned, method="subnetwork-probing", level="node"), "hard-concrete masks over nodes"
    ),
    "ifr": _attributed("ifr", "information flow routes: shares of what a reader reads"),
    "activation": _attributed("activation", "how far apart clean and corrupted outputs are"),
    "weights": _attributed("weights", "composition of weights, without data"),
    "random": _attributed("random", "a random ranking"),
}


def chosen(methods: Sequence[str] | Mapping[str, Given] | None) -> dict[str, Method]:
    """The methods asked for, by name; all of `METHODS` where None is given.

    Raises:
        ScoreError: an unknown name, none at all, or something that gives no scores.
    """
    if methods is None:
        return METHODS
    if isinstance(methods, Mapping):
        own = {name: _own(name, given) for name, given in methods.items() if given is not None}
    else:
        own, methods = {}, [methods] if isinstance(methods, str) else methods
    unknown = [name for name in methods if name not in METHODS and name not in own]
    if unknown or not methods:
        what = f"method '{unknown[0]}' is unknown" if unknown else "no method is named"
        raise ScoreError(f"{what}: use some of {', '.join(METHODS)}, or {{name: scores or function}}")
    return {name: own.get(name) or METHODS[name] for name in methods}


def _own(name: str, given: Given) -> Method:
    if not isinstance(given, Scores) and not callable(given):
        raise ScoreError(f"method '{name}' is a {type(given).__name__}: give Scores, or a function (model, task)")

    def rank(model: Model, task: BoundTask, _: Asked) -> Scores:
        scores = given if isinstance(given, Scores) else given(model, task)
        if not isinstance(scores, (Scores, NodeScores)):
            raise CircuitfindError(f"method '{name}' returned a {type(scores).__name__}, not Scores or NodeScores")
        if scores.graph != model.graph:
            raise ScoreError(f"its scores belong to another graph ({scores.graph}); this model has {model.graph}")
        return _of_edges(scores)

    return Method(rank, "given", named=False)
