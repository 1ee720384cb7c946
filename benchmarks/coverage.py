"""How often intervals of 95% hold the true value, by number of pairs: `python benchmarks/coverage.py`.

Pairs are drawn from known distributions; `top` and `bottom` are a pair's metric(circuit) - metric(empty) and
metric(full) - metric(empty). The percentile bootstrap (2,000 resamples) stands beside circuitfind's intervals.
"""

from __future__ import annotations

import numpy as np

from circuitfind.statistics import jackknife, left_out, mean_intervals

Pairs = tuple[np.ndarray, np.ndarray]  # top, bottom
TRIALS, RESAMPLES, SIZES = 1000, 2000, (4, 8, 16, 32, 64)
RNG = np.random.default_rng(0)


def normal(shape: tuple[int, ...]) -> Pairs:
    bottom = RNG.normal(4, 1.5, shape)
    return 0.8 * bottom + RNG.normal(0, 1, shape), bottom


def skewed(shape: tuple[int, ...]) -> Pairs:
    bottom = RNG.lognormal(1, 0.7, shape)
    return 0.8 * bottom + RNG.exponential(1, shape) - 1, bottom


def heavy_tails(shape: tuple[int, ...]) -> Pairs:
    bottom = 3 + RNG.standard_t(4, shape)
    return 0.8 * bottom + 0.5 * RNG.standard_t(4, shape), bottom


def one_in_five_fails(shape: tuple[int, ...]) -> Pairs:
    bottom = RNG.normal(4, 1.5, shape)
    return np.where(RNG.random(shape) < 0.2, -0.5, 1.0) * bottom + RNG.normal(0, 0.3, shape), bottom


def held(ends: np.ndarray, truth: float) -> float:
    """Share of intervals `[trials, 2]` that hold the truth, in percent."""
    return 100 * float(((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean())


def bootstrap(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Percentile intervals `[trials, 2]` of mean(top) / mean(bottom)."""
    size = top.shape[-1]
    rows = RNG.integers(size, size=(RESAMPLES, size))
    weights = np.stack([np.bincount(row, minlength=size) for row in rows], axis=1) / size
    return np.quantile((top @ weights) / (bottom @ weights), [0.025, 0.975], axis=1).T


def main() -> None:
    print("| pairs drawn from | pairs | mean: bootstrap | mean: circuitfind | ratio: bootstrap | ratio: circuitfind |")
    print("|---|---|---|---|---|---|")
    for draw in (normal, skewed, heavy_tails, one_in_five_fails):
        top, bottom = draw((5_000_000,))
        mean, ratio = top.mean(), top.mean() / bottom.mean()
        for size in SIZES:
            top, bottom = draw((TRIALS, size))
            shares = (
                held(bootstrap(top, np.ones_like(top)), mean),
                held(mean_intervals(top), mean),
                held(bootstrap(top, bottom), ratio),
                held(jackknife(top.mean(-1) / bottom.mean(-1), left_out(top) / left_out(bottom)), ratio),
            )
            print(f"| {draw.__name__.replace('_', ' ')} | {size} | {' | '.join(f'{share:.0f}%' for share in shares)} |")


if __name__ == "__main__":
    main()
