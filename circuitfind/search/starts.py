"""The first logits of learned masks: all equal, or in the order of given scores.

1. Each gate gets a strength, `log(n / (rank - 1/2))`, from its rank by |score|. Strengths are distributed exponentially
   with mean 1, whatever the units of the scores.
2. Gates with a sign (`matryoshka`) start at strength times the sign of the score; the default scores are estimates from
   the same pairs. Other gates start all at `START` by default, or from scores at `START - SPREAD + SPREAD strength`,
   which has the same mean. (The winner of MIB's shared task of 2025 started Edge Pruning from magnitudes of EAP-IG.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitfind.attribution.attribute import attribute
from circuitfind.circuit import Circuit
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import ScoreError
from circuitfind.record import Record
from circuitfind.scores import NodeScores, Scores

ALIKE, BY_DEFAULT = "alike", "eap-ig-inputs"
START = 2.0  # mean first logit: gates are mostly open, but still have a gradient
SPREAD = 1.0  # standard deviation of first logits from scores


def first_logits(
    experiment: Experiment, level: str, given: Scores | NodeScores | Circuit | str | None, signed: bool
) -> tuple[Tensor, Record | None]:
    """Return the first logits `[gates]`, and the record of the scores that they are from; None if from no scores.

    Args:
        given: scores, a circuit (only its edges have gates), the name of an attribution method, or "alike"; None: the
            default.
        signed: whether the gates' scores have a sign, as those of `matryoshka`.

    Raises:
        ScoreError: `given` is of another type, level or graph.
    """
    graph = experiment.graph
    if given is None:
        given = BY_DEFAULT if signed and experiment.ablation.twin else ALIKE
    if isinstance(given, str) and given != ALIKE:
        same: Any = {name: getattr(experiment.setting, name) for name in ("metric", "ablation", "batch_size", "seed")}
        found = attribute(experiment.model, experiment.bound, given, level=level, **same)
        assert isinstance(found, (Scores, NodeScores)), "no places of a sweep were asked for"
        given = found
    if not isinstance(given, str):
        wanted = (Scores, Circuit) if level == "edge" else (NodeScores,)
        if not isinstance(given, wanted):
            kinds = " or ".join(kind.__name__ for kind in wanted)
            raise ScoreError(
                f"start={type(given).__name__} does not fit: at level '{level}' give {kinds}, or a method's name"
            )
        if given.graph != graph:
            raise ScoreError(f"start={type(given).__name__} belongs to another graph {graph.unlike(given.graph)}")
    record = None if isinstance(given, str) else given.record
    edges = given.mask if isinstance(given, Circuit) else graph.real
    known = given.estimates if isinstance(given, Circuit) else None if isinstance(given, str) else given.values
    if known is not None and level == "edge":
        known = known.T[edges.T]
    if known is None or not np.isfinite(known).all():
        count = int(edges.sum()) if level == "edge" else graph.n_writers
        return torch.full((count,), 0.0 if signed else START), record
    values = torch.from_numpy(known)
    rank = values.abs().argsort(descending=True, stable=True).argsort() + 0.5
    strength = (len(values) / rank).log()
    return values.sign() * strength if signed else START + SPREAD * (strength - 1), record
