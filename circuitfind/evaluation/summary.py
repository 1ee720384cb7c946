"""How well a model does a task at all, before any circuit is looked for.

Is that more than guessing? A model that knows nothing gets a row right with chance 1 / (1 + wrong answers) for one
answer, and for sets of answers where the larger set is the right one; accuracy is compared with it by the binomial
distribution. Without wrong answers the answer has to be the most likely of all tokens: that is no guess.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from circuitfind import errors
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.models.load import Model
from circuitfind.remote.call import remotable
from circuitfind.tasks.task import BoundTask, Task

DOUBT = 0.05  # a result that guessing gives as often as this is no evidence


class TaskSummary(NamedTuple):
    """`accuracy`: share of clean prompts whose answers beat the wrong ones; `lowered`: share of pairs in which the
    corrupted prompt has the lower metric. `clean` and `corrupted` are mean metrics. `failing` are rows answered wrong;
    `chance` is the accuracy of guessing (0 without wrong answers, NaN without answers).
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
    chance: float = math.nan

    def warning(self) -> str | None:
        """One line when the model does not do the task on some pairs; None when it does on all."""
        if not self.failing:
            return None
        rows = ", ".join(map(str, self.failing[:5])) + (", ..." if len(self.failing) > 5 else "")
        failing = f"{len(self.failing)} of {self.n} clean prompts (rows {rows})"
        return f"the model does not prefer the answer on {failing}.{self._doubt()}"

    def _doubt(self) -> str:
        """A second sentence where the accuracy is no better than guessing, or worse."""
        wrong = len(self.failing)
        if math.isnan(self.chance) or at_least(self.n - wrong, self.n, self.chance) <= DOUBT:
            return ""
        than = f"than guessing ({self.chance:.0%}):"
        if self.chance < 1 and at_least(wrong, self.n, 1 - self.chance) <= DOUBT:
            ask = "are answers and wrong answers, or the two sides, exchanged?"
            return f" An accuracy of {self.accuracy:.0%} is worse {than} {ask}"
        return f" An accuracy of {self.accuracy:.0%} is no better {than} the model may not have this behaviour."


@remotable
def summarise(model: Model, task: Task | BoundTask, *, warn: bool = True, batch_size: int | None = None) -> TaskSummary:
    """Runs both sides of a task's pairs once."""
    return summary_of(Evaluator.of(model, task, batch_size=batch_size), warn=warn)


def summary_of(evaluator: Evaluator, warn: bool = True) -> TaskSummary:
    """The summary of pairs that an evaluator has already run."""
    bound = evaluator.bound
    has_answers, has_wrong = (bool(side.shape[-1]) for side in (bound.batch.answers, bound.batch.wrong))
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
        float(chances(bound).mean()) if has_wrong else 0.0 if has_answers else float("nan"),
    )
    if warn and summary.warning():
        errors.warn(str(summary.warning()))
    return summary


def chances(bound: BoundTask) -> np.ndarray:
    """`[pairs]`: how likely a model that knows nothing is to be counted right."""
    right, wrong = ((ids[:, 0] >= 0).sum(-1).double().cpu() for ids in (bound.batch.answers, bound.batch.wrong))
    single = 1 / (1 + wrong)
    return np.where(right == 1, single, (right > wrong).double()) ** bound.batch.answers.shape[1]


def at_least(count: int, size: int, chance: float) -> float:
    """Probability of so many successes or more in `size` tries."""
    if chance in (0.0, 1.0):
        return float(count == 0 or chance == 1)
    ways = (math.lgamma(size + 1) - math.lgamma(k + 1) - math.lgamma(size - k + 1) for k in range(count, size + 1))
    odds = (k * math.log(chance) + (size - k) * math.log1p(-chance) for k in range(count, size + 1))
    return math.fsum(math.exp(way + odd) for way, odd in zip(ways, odds, strict=True))
