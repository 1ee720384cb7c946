"""CPR and CMD by the rules of the benchmark MIB (Mueller et al. 2025).

1. Circuits of ten fractions of all edges (0.1% to 100%), n = int(p x edges), pruned to what is connected.
2. CPR, the area under the faithfulness, takes the edges of highest *signed* score: edges that oppose are left out, and
   it can exceed 1. CMD, the area of |1 - faithfulness|, takes those of highest *magnitude*. Mixing up the two
   selections moves the numbers by a factor, so both curves are kept and each number comes from its own.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

from circuitfind.evaluation.curve import Curve, curve_of
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.models.load import Model
from circuitfind.remote.call import remotable
from circuitfind.scores import Scores
from circuitfind.setting import JudgeKeywords
from circuitfind.tasks.task import BoundTask, Task


class Mib(NamedTuple):
    """Both selections of MIB: its CPR is that of the signed curve, its CMD that of the absolute one."""

    signed: Curve
    absolute: Curve

    @property
    def cpr(self) -> float:
        return self.signed.cpr

    @property
    def cmd(self) -> float:
        return self.absolute.cmd

    def to_dict(self) -> dict[str, object]:
        """JSON values."""
        both = {name: curve.to_dict() for name, curve in self._asdict().items()}
        return {"cpr": self.cpr, "cmd": self.cmd, **both}


@remotable
def mib(
    model: Model,
    task: Task | BoundTask,
    scores: Scores,
    **asked: Unpack[JudgeKeywords],
) -> Mib:
    """CPR and CMD as the benchmark MIB defines them: ten fractions, pruned, signed and absolute selection.

    Args and errors as for `curve`.
    """
    return mib_of(Evaluator.of(model, task, scores.record, "the scores were", **asked), scores)


def mib_of(evaluator: Evaluator, scores: Scores) -> Mib:
    """`mib` on pairs that an evaluator holds ready."""
    return Mib(curve_of(evaluator, scores, by="signed"), curve_of(evaluator, scores, by="absolute"))
