"""Random scores: what any method must beat. Uniform in [0, 1), the same for the same seed on every machine."""

from __future__ import annotations

import numpy as np

from circuitfind.attribution.method import Method, Request, Scored
from circuitfind.engine.experiment import Experiment
from circuitfind.record import NO_EFFECT

SIGN = f"{NO_EFFECT}random numbers, uniform in 0 to 1, in no unit"


def uniform(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Float32 numbers of this shape."""
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def score(experiment: Experiment, request: Request) -> Scored:
    """Edges or nodes."""
    graph = experiment.graph
    return uniform(graph.real.shape if request.level == "edge" else (graph.n_writers,), experiment.setting.seed)


METHOD = Method(
    "random", "a random ranking", "", "none", ("edge", "node"), score=score, sign=lambda level, options: SIGN
)
