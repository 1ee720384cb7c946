"""Bootstrap intervals over examples, and correlations that survive constant input."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESAMPLES = 2000


class Interval(NamedTuple):
    """A percentile interval; NaN where there are too few examples for one."""

    low: float
    high: float


UNKNOWN = Interval(float("nan"), float("nan"))


def _resamples(size: int, seed: int) -> np.ndarray:
    """`[resamples, size]` rows drawn with replacement."""
    return np.random.default_rng(seed).integers(size, size=(RESAMPLES, size))


def bootstrap_mean(values: np.ndarray, seed: int = 0, level: float = 0.95) -> np.ndarray:
    """Percentile intervals `[..., 2]` of the mean over the last axis."""
    if values.shape[-1] < 2:
        return np.full((*values.shape[:-1], 2), np.nan)
    rows = _resamples(values.shape[-1], seed)
    counts = np.stack([np.bincount(row, minlength=values.shape[-1]) for row in rows], axis=1) / values.shape[-1]
    tails = [(1 - level) / 2, (1 + level) / 2]
    return np.moveaxis(np.quantile(values @ counts, tails, axis=-1), 0, -1)


def bootstrap_ratio(top: np.ndarray, bottom: np.ndarray, seed: int = 0, level: float = 0.95) -> Interval:
    """Interval of mean(top) / mean(bottom) over paired examples: examples are resampled, the ratio recomputed."""
    if len(top) < 2:
        return UNKNOWN
    rows = _resamples(len(top), seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = top[rows].mean(axis=1) / bottom[rows].mean(axis=1)
    low, high = np.nanquantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r; NaN when either side is constant or shorter than two."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x.astype(np.float64), y.astype(np.float64))[0, 1])


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rho, with average ranks for ties."""
    return correlation(_ranks(x), _ranks(y))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
