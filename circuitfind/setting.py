"""What a run is asked, said once: the metric, what ablated edges carry, the direction, the batch size and the seed.

Every public call that runs the model takes these five as keywords (`Keywords`). They become one `Setting`, checked when
it is built, and travel with the model and the pairs as one `circuitfind.engine.experiment.Experiment`.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from typing_extensions import TypedDict

from circuitfind.errors import ScoreError, TaskError
from circuitfind.metrics import Function, Metric

DIRECTIONS = ("noising", "denoising")


class JudgeKeywords(TypedDict, total=False):
    """The keywords of a run of circuits, which has no direction.

    metric: overrides the task's metric: a name of `circuitfind.METRICS`, a `Metric`, or a function
        `(logits at the read positions, batch) -> [batch]`.
    ablation: what an ablated edge carries: "corrupted" (the default), "zero", "mean", "mean-position", "resample" or a
        name that you registered; see `circuitfind.engine.ablation`.
    batch_size: pairs that run at a time; by default as many as a memory budget allows.
    seed: of everything that is drawn at random.

    What circuits and scores were made with is inherited: a call that is given one uses the metric, the ablation and
    (where it has one) the direction of its record unless a keyword says otherwise, and then warns.
    """

    metric: str | Metric | Function | None
    ablation: str | None
    batch_size: int | None
    seed: int


class Keywords(JudgeKeywords, total=False):
    """The keywords of a run that measures effects: those of `JudgeKeywords`, and the direction: "noising" (the default:
    the clean run with something ablated) or "denoising" (the corrupted run with something restored)."""

    direction: str | None


@dataclass(frozen=True)
class Setting:
    """The keywords of a run with their defaults filled in, checked."""

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
    """Refuses what some generators take for another seed (-1 for 1, None for the time of day) and others refuse."""
    if not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
        raise TaskError(f"seed={seed!r} is no seed: give a whole number, 0 or more, of at most 63 bits")


def check_batch_size(size: object) -> None:
    """Refuses what is neither None nor a number of pairs."""
    if size is not None and (not isinstance(size, Integral) or isinstance(size, bool)):
        raise TaskError(f"batch_size must be a whole number, not {size!r}")
    if size is not None and int(size) < 1:
        raise TaskError(f"batch_size must be at least 1, not {size}")
