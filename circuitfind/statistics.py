"""Bootstrap intervals over examples, correlations that survive constant input, exact binomials, corrected p-values."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from circuitfind.errors import ScoreError

RESAMPLES = 2000
CORRECTIONS = ("holm", "bonferroni", "none")


class Interval(NamedTuple):
    """A percentile interval; NaN where there are too few examples for one."""

    low: float
    high: float


UNKNOWN = Interval(float("nan"), float("nan"))


def _resamples(size: int, seed: int) -> np.ndarray:
    """`[resamples, size]` rows drawn with replacement."""
    return np.random.default_rng(seed).integers(size, size=(RESAMPLES, size))


@lru_cache(maxsize=4)
def _weights(size: int, seed: int) -> np.ndarray:
    """`[size, resamples]`: how much of each resample's mean a value is."""
    return np.stack([np.bincount(row, minlength=size) for row in _resamples(size, seed)], axis=1) / size


def bootstrap_mean(values: np.ndarray, seed: int = 0, level: float = 0.95) -> np.ndarray:
    """Percentile intervals `[..., 2]` of the mean over the last axis; NaN where there are too few examples."""
    rows = values.reshape(-1, values.shape[-1])  # one by one: a sweep can have many places
    ends = [percentiles(resampled_means(row, seed), level) for row in rows]
    return np.array(ends).reshape(*values.shape[:-1], 2)


def resampled_means(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """`[..., resamples]`: means over the last axis of each resample of it, the same resamples for every row.

    NaN where there are too few examples for an interval.
    """
    if values.shape[-1] < 2:
        return np.full((*values.shape[:-1], RESAMPLES), np.nan)
    return np.asarray(values @ _weights(values.shape[-1], seed))


def percentiles(resampled: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Percentile intervals `[..., 2]` of what was computed on each resample, `[..., resamples]`."""
    if np.isnan(resampled).all():
        return np.full((*resampled.shape[:-1], 2), np.nan)
    return np.moveaxis(np.nanquantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=-1), 0, -1)


def intervals_of(resampled: np.ndarray) -> list[Interval]:
    """The 95% interval of each row of `[rows, resamples]`."""
    return [Interval(*ends) for ends in percentiles(resampled).tolist()]


def bootstrap_ratio(top: np.ndarray, bottom: np.ndarray, seed: int = 0, level: float = 0.95) -> Interval:
    """Interval of mean(top) / mean(bottom) over paired examples: examples are resampled, the ratio recomputed."""
    if len(top) < 2:
        return UNKNOWN
    rows = _resamples(len(top), seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = top[rows].mean(axis=1) / bottom[rows].mean(axis=1)
    return Interval(*percentiles(ratios, level).tolist())


def standard_error(values: np.ndarray) -> float:
    """Of the mean over examples; 0 where a single one leaves it unknown. A mean within twice it is noise."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r; NaN when either side is constant or shorter than two."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x.astype(np.float64), y.astype(np.float64))[0, 1])


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rho, with average ranks for ties."""
    return correlation(ranks(x), ranks(y))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 (the smallest), ties sharing their average."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def binomial(n: int, p: float) -> np.ndarray:
    """`[n + 1]`: the probabilities of 0 to n successes in n trials, computed in logarithms (0 < p < 1)."""
    k = np.arange(n + 1)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    choices = factorials[n] - factorials - factorials[::-1]
    return np.asarray(np.exp(choices + k * math.log(p) + (n - k) * math.log1p(-p)))


def adjusted(p_values: np.ndarray, correction: str = "holm") -> np.ndarray:
    """p-values of a family of tests, corrected so that a bound on each is a bound on any false rejection among them.

    Args:
        p_values: `[tests]`; NaN where a test could not be made, which is then no member of the family.
        correction: "bonferroni" multiplies by the number of tests; "holm" (1979) multiplies the smallest by it, the
            next by one less, and so on, never below the one before: it rejects all that Bonferroni does; or "none".
    """
    if correction not in CORRECTIONS:
        raise ScoreError(f"correction '{correction}' is unknown: use one of {', '.join(CORRECTIONS)}")
    p_values = np.asarray(p_values, dtype=np.float64)
    made = np.flatnonzero(~np.isnan(p_values))
    if correction == "none" or not len(made):
        return p_values.copy()
    order = made[np.argsort(p_values[made], kind="stable")]
    factors = len(made) - (np.arange(len(made)) if correction == "holm" else np.zeros(len(made)))
    result = p_values.copy()
    result[order] = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1)
    return result
