"""Choose pairs for an evaluation: pairs not used in the search, or variants of a built-in task by template or seed."""

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
    """A built-in task with each of its templates, for `stability`. Keywords as for `circuitfind.task`. Raises a
    TaskError if there is only one template."""
    templates = builder_of(name).templates
    if len(templates) < 2:
        raise TaskError(f"'{name}' has fewer than two templates: there is nothing to compare")
    return {template: task(name, model, template=template, **keywords) for template in templates}


def by_seed(name: str, model: Model, seeds: Iterable[int] = range(5), **keywords: Any) -> dict[str, Task]:
    """A built-in task with several random seeds, for `stability`. Keywords as for `circuitfind.task`."""
    return {f"seed {seed}": task(name, model, seed=seed, **keywords) for seed in seeds}


def variants(
    model: Model, bound: BoundTask, over: str, name: str | None, *, seed: int = 0, **keywords: Any
) -> BoundTask | dict[str, Task]:
    """Tasks for `stability`: over "pairs", the pairs themselves; over "templates" or "seeds", the built-in task `name`
    with each template or with five seeds from `seed` on.

    Raises:
        TaskError: `name` is None (pairs of a file), or there is only one template.
    """
    if over not in OVER:
        raise TaskError(unknown("over", over, OVER))
    if over == "pairs":
        return bound
    if name is None:
        remedy = f"needs a built-in task, whose pairs can be drawn again: '{bound.name}' comes from a file"
        raise TaskError(f"stability over {over} {remedy}")
    if over == "templates":
        if keywords.get("template") is not None:
            raise TaskError("stability over templates uses every template: leave out template= (--template)")
        return by_template(name, model, seed=seed, **keywords)
    return by_seed(name, model, range(seed, seed + 5), **keywords)


def like(circuit: Circuit, **asked: Any) -> dict[str, Any]:
    """Keywords for `stability` with the size, ranking and method of this circuit, updated with `asked`."""
    made = circuit.record
    own: dict[str, Any] = {"n_edges": max(1, len(circuit)), "by": made.settings.get("by", "absolute")}
    method = METHODS.get(made.method)
    if method is not None and method.by_example:
        steps: dict[str, Any] = {name: made.settings[name] for name in ("steps", "rule") if name in made.settings}
        own |= {"method": made.method, "direction": made.direction, **steps}
    elif asked.get("ablation", "corrupted") != "corrupted":
        own["method"] = "eap"  # the default method needs the ablation corrupted
    return {**own, **asked}


def unseen(model: Model, task: Task | BoundTask, found: Circuit | Scores | NodeScores) -> BoundTask:
    """The task without the pairs that `found` was made on, which are recognised by their prompts.

    Raises:
        TaskError: all pairs were used, or `found` does not say which (files of early versions, circuits made by hand).
    """
    bound, seen = bind(model, task), found.record.each_pair()
    if not seen:
        raise TaskError(
            f"this {type(found).__name__} does not say which pairs it was made on, so they cannot be left out"
        )
    rows = [row for row, pair in enumerate(fingerprints(bound.prompts, bound.corrupted_prompts)) if pair not in seen]
    if not rows:
        used = f"all {len(bound)} pairs were used to find this {type(found).__name__.lower()}"
        raise TaskError(f"{used}: evaluate it on others (another seed, more pairs)")
    return bound.subset(rows)
