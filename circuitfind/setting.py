"""The setting of a run: metric, ablation, direction, batch size and seed.

Every public call that runs the model takes these as keywords (`Keywords`). They become one `Setting`, which is checked
when it is built, and with the model and the pairs one `circuitfind.engine.experiment.Experiment`.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from typing_extensions import TypedDict

from circuitfind.errors import ScoreError, TaskError
from circuitfind.metrics import Function, Metric

DIRECTIONS = ("noising", "denoising")


class JudgeKeywords(TypedDict, total=False):
    """The keywords of calls that run circuits, which have no direction.

    metric: overrides the task's metric: a name in `circuitfind.METRICS`, a `Metric`, or a function
        `(logits at the read positions, batch) -> [batch]`.
    ablation: the value of an edge outside the circuit: "corrupted" (the default), "zero", "mean", "mean-position",
        "resample" or a name that you registered; see `circuitfind.engine.ablation`.
    batch_size: how many pairs run at a time; by default as many as fit a memory budget.
    seed: seeds everything that is drawn at random.

    A call that evaluates a circuit or scores uses the metric, the ablation and (if the call has one) the direction that
    these were made with. A keyword overrides this, with a warning.
    """

    metric: str | Metric | Function | None
    ablation: str | None
    batch_size: int | None
    seed: int


class Keywords(JudgeKeywords, total=False):
    """The keywords of calls that measure effects: those of `JudgeKeywords` and a direction.

    direction: "noising" (the default: the clean run with something ablated) or "denoising" (the corrupted run with
        something restored).
    """

    direction: str | None


@dataclass(frozen=True)
class Setting:
    """The keywords of a run with defaults filled in; ScoreError or TaskError for a value that is not allowed."""

    metric: Metric
    ablation: str = "corrupted"
    direction: str = "noising"
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ScoreError(f"direction '{self.direction}' is unknown: use 'noising' or 'denoising'")
        check_batch_size(self.batch_size)
        check_seed(self.seed)

    @property
    def noising(self) -> bool:
        """Whether runs start from the clean prompts."""
        return self.direction == "noising"


def check_seed(seed: object) -> None:
    """Raise a TaskError unless a seed is an integer from 0 to 2^63 - 1. Some generators take other values for another
    seed (-1 for 1, None for the time of day), others refuse them."""
    if not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
        raise TaskError(f"seed={seed!r} is no seed: give a whole number, 0 or more, of at most 63 bits")


def check_batch_size(size: object) -> None:
    """Raise a TaskError unless a batch size is None or a positive integer."""
    if size is not None and (not isinstance(size, Integral) or isinstance(size, bool)):
        raise TaskError(f"batch_size must be a whole number, not {size!r}")
    if size is not None and int(size) < 1:
        raise TaskError(f"batch_size must be at least 1, not {size}")
