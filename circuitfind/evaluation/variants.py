"""A built-in behaviour several times over, by sentence pattern or by seed: what `stability` compares."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from circuitfind.errors import TaskError
from circuitfind.loading import task
from circuitfind.models.load import Model
from circuitfind.tasks.builtin import builder_of
from circuitfind.tasks.task import Task


def by_template(name: str, model: Model, **keywords: Any) -> dict[str, Task]:
    """A built-in behaviour in each of its sentence patterns, for `stability`.

    Args:
        keywords: of `circuitfind.task`: n pairs of each, seed, corruption, ...

    Raises:
        TaskError: the behaviour has one pattern only.
    """
    templates = builder_of(name).templates
    if len(templates) < 2:
        raise TaskError(f"'{name}' has {len(templates)} sentence patterns: there is nothing to compare")
    return {template: task(name, model, template=template, **keywords) for template in templates}


def by_seed(name: str, model: Model, seeds: Iterable[int] = range(5), **keywords: Any) -> dict[str, Task]:
    """A built-in behaviour in several draws of its generator, for `stability`.

    Args:
        keywords: of `circuitfind.task`: n pairs of each, corruption, template, ...
    """
    return {f"seed {seed}": task(name, model, seed=seed, **keywords) for seed in seeds}
