"""How well a model does a task at all, before any circuit is looked for."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.models.load import Model
from circuitfind.remote.call import remotable
from circuitfind.tasks.task import BoundTask, Task


class TaskSummary(NamedTuple):
    """`accuracy`: share of clean prompts whose answers beat the wrong ones; `lowered`: share of pairs in which the
    corrupted prompt has the lower metric. `clean` and `corrupted` are mean metrics. `failing` are rows answered wrong.
    """

    name: str
    n: int
    metric: str
    accuracy: float
    top1: float
    clean: float
    corrupted: float
    lowered: float
    failing: tuple[int, ...]
    notes: tuple[str, ...]

    def warning(self) -> str | None:
        """One line when the model does not do the task on some pairs; None when it does on all."""
        if not self.failing:
            return None
        rows = ", ".join(map(str, self.failing[:5])) + (", ..." if len(self.failing) > 5 else "")
        doubt = " That is near chance: there may be no circuit to find." if self.accuracy < 0.6 else ""
        failing = f"{len(self.failing)} of {self.n} clean prompts (rows {rows})"
        return f"the model does not prefer the answer on {failing}.{doubt}"


@remotable
def summarise(model: Model, task: Task | BoundTask, *, warn: bool = True, batch_size: int | None = None) -> TaskSummary:
    """Runs both sides of a task's pairs once."""
    return summary_of(Evaluator(model, task, batch_size=batch_size), warn=warn)


def summary_of(evaluator: Evaluator, warn: bool = True) -> TaskSummary:
    """The summary of pairs that an evaluator has already run."""
    bound = evaluator.bound
    has_answers = bool(bound.batch.answers.shape[-1])
    right, top1 = evaluator.full_accurate, evaluator.full_top1
    failing = tuple(np.flatnonzero(~right).tolist()) if has_answers else ()
    summary = TaskSummary(
        bound.name,
        len(bound),
        bound.metric.name,
        float(right.mean()) if has_answers else float("nan"),
        float(top1.mean()) if has_answers else float("nan"),
        float(evaluator.full.mean()),
        float(evaluator.empty.mean()),
        float((evaluator.empty < evaluator.full).mean()),
        failing,
        bound.notes,
    )
    if warn and summary.warning():
        warnings.warn(str(summary.warning()), stacklevel=4)
    return summary
