"""Estimates against exact effects, in numbers.

Only places that matter can have a wrong sign: those whose exact effect is at least a twentieth of the largest one. The
rest of a sweep is mostly rounding noise around zero, and its signs mean nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from circuitfind.statistics import correlation

MATTERS = 0.05
NAN = float("nan")


class Fit(NamedTuple):
    """How estimates agree with exact effects.

    n: places. r: Pearson's correlation. slope: of exact effects on estimates through the origin (1 = unbiased, above 1
    = underestimated). free_slope, intercept: of the least-squares line. error: mean |estimate - exact| / mean |exact|.
    matter: places with at least `MATTERS` of the largest |exact|; wrong_signs: how many of these are estimated with the
    wrong sign. What is undefined (no spread, no effect at all) is NaN.
    """

    n: int
    r: float
    slope: float
    free_slope: float
    intercept: float
    error: float
    matter: int
    wrong_signs: int


def fit(estimates: np.ndarray, exact: np.ndarray) -> Fit:
    """Of two arrays of one shape."""
    x, y = (np.asarray(values, dtype=np.float64).ravel() for values in (estimates, exact))
    power, spread, size = float(x @ x), float(x.var()), float(np.abs(y).mean())
    free = float(np.mean((x - x.mean()) * (y - y.mean()))) / spread if spread else NAN
    return Fit(
        n=len(x),
        r=correlation(x, y),
        slope=float(x @ y) / power if power else NAN,
        free_slope=free,
        intercept=float(y.mean() - free * x.mean()),
        error=float(np.abs(x - y).mean()) / size if size else NAN,
        matter=int(matters(y).sum()),
        wrong_signs=int(wrong_signs(x, y).sum()),
    )


def matters(exact: np.ndarray) -> np.ndarray:
    """Which places are large enough for their sign to mean something."""
    return (np.abs(exact) >= MATTERS * np.abs(exact).max()) & (exact != 0)


def wrong_signs(estimates: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Which places that matter are estimated with the wrong sign."""
    return (estimates * exact < 0) & matters(exact)
