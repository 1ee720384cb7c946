"""The pairs of a task that a circuit or scores were not found on: what they may be judged with."""

from __future__ import annotations

from circuitfind.circuit import Circuit
from circuitfind.engine.experiment import bind
from circuitfind.errors import TaskError
from circuitfind.models.load import Model
from circuitfind.record import fingerprints
from circuitfind.scores import NodeScores, Scores
from circuitfind.tasks.task import BoundTask, Task


def unseen(model: Model, task: Task | BoundTask, found: Circuit | Scores | NodeScores) -> BoundTask:
    """The task without the pairs that `found` was found on, known by their prompts' texts.

    Raises:
        TaskError: all pairs were seen, or `found` does not say which (files of early versions, circuits made by hand).
    """
    bound, seen = bind(model, task), found.record.each_pair()
    if not seen:
        raise TaskError(f"this {type(found).__name__} does not say which pairs it was found on: none can be left out")
    now = fingerprints(bound.prompts, bound.corrupted_prompts)
    rows = [row for row, pair in enumerate(now) if pair not in seen]
    if not rows:
        raise TaskError(
            f"all {len(bound)} pairs were used to find this {type(found).__name__}: judge it with others (another seed,"
            " more pairs)"
        )
    return bound.subset(rows)
