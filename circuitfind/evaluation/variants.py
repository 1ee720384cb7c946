"""Which pairs to judge on: held-out ones, or a built-in task several times over, by sentence pattern or by seed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from circuitfind.attribution.methods import METHODS
from circuitfind.circuit import Circuit
from circuitfind.engine.experiment import bind
from circuitfind.errors import TaskError, unknown
from circuitfind.loading import task
from circuitfind.models.load import Model
from circuitfind.record import fingerprints
from circuitfind.scores import NodeScores, Scores
from circuitfind.tasks.builtin import builder_of
from circuitfind.tasks.task import BoundTask, Task

OVER = ("pairs", "templates", "seeds")


def by_template(name: str, model: Model, **keywords: Any) -> dict[str, Task]:
    """A built-in task in each of its sentence patterns, for `stability`; keywords as for `circuitfind.task`. TaskError
    where it has one pattern only."""
    templates = builder_of(name).templates
    if len(templates) < 2:
        raise TaskError(f"'{name}' has {len(templates)} sentence patterns: there is nothing to compare")
    return {template: task(name, model, template=template, **keywords) for template in templates}


def by_seed(name: str, model: Model, seeds: Iterable[int] = range(5), **keywords: Any) -> dict[str, Task]:
    """A built-in task in several draws of its generator, for `stability`; keywords as for `circuitfind.task`."""
    return {f"seed {seed}": task(name, model, seed=seed, **keywords) for seed in seeds}


def variants(
    model: Model, bound: BoundTask, over: str, name: str | None, *, seed: int = 0, **keywords: Any
) -> BoundTask | dict[str, Task]:
    """What stability is measured over: the "pairs" themselves, or the built-in task `name` (None: a file) in each of
    its "templates" or in five "seeds", `seed` the first. TaskError where the pairs cannot be drawn anew, or there is
    one template."""
    if over not in OVER:
        raise TaskError(unknown("over", over, OVER))
    if over == "pairs":
        return bound
    if name is None:
        remedy = f"needs a built-in task, whose pairs can be drawn anew: '{bound.name}' is a file"
        raise TaskError(f"stability over {over} {remedy}")
    if over == "templates":
        if keywords.get("template") is not None:
            raise TaskError("stability over templates takes every template: leave template (--template) out")
        return by_template(name, model, seed=seed, **keywords)
    return by_seed(name, model, range(seed, seed + 5), **keywords)


def like(circuit: Circuit, **asked: Any) -> dict[str, Any]:
    """Keywords of `stability` for circuits of this one's size, ranking and method, and what is asked for besides."""
    made = circuit.record
    own: dict[str, Any] = {"n_edges": max(1, len(circuit)), "by": made.settings.get("by", "absolute")}
    method = METHODS.get(made.method)
    if method is not None and method.by_example:
        steps: dict[str, Any] = {name: made.settings[name] for name in ("steps", "rule") if name in made.settings}
        own |= {"method": made.method, "direction": made.direction, **steps}
    elif asked.get("ablation", "corrupted") != "corrupted":
        own["method"] = "eap"  # the default one knows no other ablation
    return {**own, **asked}


def unseen(model: Model, task: Task | BoundTask, found: Circuit | Scores | NodeScores) -> BoundTask:
    """The held-out pairs: the task without those that `found` was found on, told by their prompts' texts. TaskError
    where all pairs were seen, or `found` does not say which (files of early versions, circuits made by hand)."""
    bound, seen = bind(model, task), found.record.each_pair()
    if not seen:
        raise TaskError(f"this {type(found).__name__} does not say which pairs it was found on: none can be left out")
    rows = [row for row, pair in enumerate(fingerprints(bound.prompts, bound.corrupted_prompts)) if pair not in seen]
    if not rows:
        used = f"all {len(bound)} pairs were used to find this {type(found).__name__.lower()}"
        raise TaskError(f"{used}: judge it with others (another seed, more pairs)")
    return bound.subset(rows)
