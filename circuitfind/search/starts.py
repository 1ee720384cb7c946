"""What learned masks start from: gates that are all alike, or that follow scores.

1. A strength for every gate, `log(n / (rank - 1/2))` by |score|: exponential, of mean 1, whatever the units.
2. Gates with a sign (`matryoshka`) start at strength times the score's sign, by default from estimates of the same
   pairs. The others start alike, or from scores at `START - SPREAD + SPREAD strength`, which has the mean of gates that
   are all alike. (The winner of the shared task of 2025 started Edge Pruning from magnitudes of EAP-IG.)
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
START = 2.0  # every gate's first logit: mostly open, and with a gradient
SPREAD = 1.0  # of first logits that follow scores


def first_logits(
    experiment: Experiment, level: str, given: Scores | NodeScores | Circuit | str | None, signed: bool
) -> tuple[Tensor, Record | None]:
    """The first logits `[gates]`, and the record of what they are from; None where they are all alike.

    Args:
        given: scores, a circuit (only its edges have gates), a method's name, or "alike"; None: the default.
        signed: gates are ordered by sign as well as by magnitude, as those of `matryoshka` are.

    Raises:
        ScoreError: scores of another level or graph; no scores at all.
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
