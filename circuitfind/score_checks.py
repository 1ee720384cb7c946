"""What scores of edges and of nodes are checked for alike: how they are ranked, how many, and numbers that are numbers.

All raise `ScoreError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np

from circuitfind.errors import ScoreError

By = Literal["absolute", "signed"]


def check_by(by: str) -> None:
    """Refuses an unknown way to rank."""
    if by not in ("absolute", "signed"):
        raise ScoreError(
            f"by='{by}' is unknown: use 'absolute' (ranked by |effect|) or 'signed' (positive effects first)"
        )


def check_count(n: object, what: str = "edges") -> None:
    """Refuses what is no number of edges or nodes."""
    if isinstance(n, bool) or not isinstance(n, Integral) or int(n) < 0:
        raise ScoreError(f"n={n!r} is no number of {what}: give a whole number, 0 or more")


def check_array(values: Any) -> None:
    """Refuses what is no numpy array of numbers."""
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        what = f"an array of {values.dtype}" if isinstance(values, np.ndarray) else f"a {type(values).__name__}"
        raise ScoreError(f"scores are {what}: give a numpy array of numbers, np.asarray(scores, dtype=np.float32)")


def check_effects(effects: np.ndarray, names: Sequence[str]) -> None:
    """Refuses NaN and infinity among measured effects `[places, examples of a batch]`; `names` are those of effects."""
    bad = np.argwhere(~np.isfinite(effects))
    if len(bad):
        place, example = bad[0].tolist()
        found = "NaN" if np.isnan(effects[place, example]) else "infinite"
        raise ScoreError(
            f"{names[place]} is {found} on example {example} of the batch: look for inf or NaN in the logits or in your"
            " metric"
        )


def check_finite(values: np.ndarray, names: list[str]) -> None:
    """Refuses NaN and infinity; `names` are those whose values are so."""
    if names:
        what = "NaN" if np.isnan(values).any() else "infinite"
        raise ScoreError(
            f"the score of {names[0]} is {what} ({len(names)} of {values.size} are): look for inf or NaN in the model's"
            " logits (half precision overflows first: load with dtype='float32') or in a metric of your own"
        )
