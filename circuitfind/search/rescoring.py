"""Balanced re-scored pruning: from the strongest edges down to a few, with new gradients at every size.

A ranking that was made at the whole model is a poor guide to a small circuit: what an edge does depends on which others
are left, and the many weak edges that a ranking leaves out are mostly helpful ones. So:

1. **Start** from the strongest `START` edges by |score|. While they are further from the whole model than the
   tolerance, take twice as many.
2. **Re-score**: the gradient of every pair's metric with respect to every edge of the circuit, *at the circuit*, one
   masked run forwards and backwards on half of the search pairs (`engine/masked_run.py`). The halves take turns.
3. **Balance**: choose a part of the edges to drop, so that the predicted metric stays at the whole model's (below).
   Gradients are too hopeful of what is left; the error of the last rounds' predictions is added to what has to be kept.
4. **Run** the smaller circuits exactly: that which balances every pair, and below `BOTH` edges also that which balances
   the mean. The nearer one to the whole model, pair by pair (by KL divergence where that is the criterion), goes on.
5. A round that leaves the target, or no path from `input` to `logits`, is halved once. If the half leaves the target,
   too, the round stands, unless hardly anything is left (`HOPELESS`): further down a circuit may be on target again.
6. From 2, until next to nothing is left, or of what the model does. Where a number of edges is asked for, the rounds go
   on to it in any case: one ends there, and `AFTER` more look for a smaller circuit that is nearer.

Measured on two real models (docs/real-models.md): on SmolLM2-135M's IOI 31 edges meet the target, where the strongest
by score need 1,141; for the same error of single pairs, 272.

Balance: dropping the edges of smallest |gradient| bleeds the metric, because most weak edges help a little, and what
they give adds up. So a round drops helpful and opposing edges together, in the proportion that leaves the metric where
it should be.

Given `G[e, i]`, the gradient of pair i's metric with respect to edge e, and `r[i]`, how much of pair i's metric is to
go (what the circuit has too much, less what it lacks), both as shares of the total effect, n edges are chosen so that
the sum of their G is near r:

* **Mean** (`balanced_mean`). Only means over pairs count. Of the n edges j are the weakest that help and n - j the
  weakest that oppose; prefix sums give the best j at once.
* **Pairs** (`balanced_pairs`). The sum is near r for each pair. Start from the n edges of smallest norm over pairs.
  Then swap, as long as the norm of what is left of r falls: drop the edge that lowers it most (among the 1.6 n weakest)
  and take back the one that costs least.

The pairs are the better balance while edges are many; where no set of a hundred edges can balance every pair, the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from circuitfind.batch import Batch
from circuitfind.circuit import connected
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.masked_run import pair_gradients
from circuitfind.engine.memory_plan import learning_size, sizes_of
from circuitfind.engine.prepare import Prepared, PreparedRuns
from circuitfind.progress import progress
from circuitfind.scores import Scores
from circuitfind.search.trials import Trials, Tried

START = 6000
BOTH = 400
LARGE, PART_OF_LARGE, PART = 1000, 0.5, 0.35  # of the edges, dropped in a round
FEWEST, HOPELESS = 4, 0.5
AFTER = 2
WEAK, SWAPS = 1.6, 3000  # up to how many times the dropped edges a swap may reach; how many swaps at most
MEMORY = 0.5  # of the error of the last prediction, that the next one expects


class Rescoring:
    """The rounds, from the top of some scores downwards."""

    def __init__(self, trials: Trials, scores: Scores, kept: np.ndarray | None = None) -> None:
        """`kept`: a mask of edges that are in every circuit."""
        self.trials, self.scores, self.graph = trials, scores, scores.graph
        self.kept = np.zeros_like(self.graph.real) if kept is None else kept
        evaluator = trials.evaluator
        self.evaluator, experiment, batch = evaluator, evaluator.experiment, evaluator.experiment.batch
        self.contrast = float((evaluator.full - evaluator.empty).mean())
        size = experiment.setting.batch_size or learning_size(experiment.adapter, *sizes_of(experiment.batch))
        self.halves = [(fold, PreparedRuns(experiment, batch.rows(_index(fold, batch)), size)) for fold in trials.folds]
        self.empty = trials.empty()
        self._strength: dict[bytes, np.ndarray] = {}
        self._expected = {"pairs": 0.0, "mean": 0.0}  # errors of prediction, as shares of the total effect

    def start(self) -> Tried:
        """The strongest edges that do the task."""
        n = min(START, self.graph.n_edges)
        while n < self.graph.n_edges:
            tried = self.trials.run(self.scores.top(n).mask | self.kept, "start", n)
            if self.trials.meets(tried):
                self.trials.say("start", f"the strongest {n:,} edges: faithfulness {tried.faithfulness:.3f}")
                return tried
            n *= 2
        return self.trials.whole()

    def run(self, edges: int | None = None) -> None:
        """Tries ever smaller circuits; `edges`: the number that is asked for."""
        with progress("re-scoring", 1 + self._expected_rounds()) as advance:
            start = smallest = self.start()
            advance(1)
            for smaller in self._rounds(start, edges):
                smallest = smaller
                advance(1)
        self.trials.say("re-scored", f"from {start.n_edges:,} to {smallest.n_edges:,} edges")

    def _rounds(self, tried: Tried, edges: int | None) -> Iterator[Tried]:
        number = after = 0
        fewest = min(FEWEST, edges or FEWEST) + int(self.kept.sum())
        while tried.n_edges > fewest and after < AFTER:
            small = edges is None or tried.n_edges <= edges
            after += edges is not None and small
            fold, runs = self.halves[number % len(self.halves)]
            smaller = self._round(tried, fold, runs, fewest if small else edges or fewest)
            if smaller is None or (small and self._lost(smaller)):
                return
            tried, number = smaller, number + 1
            yield tried

    def _expected_rounds(self) -> int:
        """About how many rounds there are."""
        n = min(START, self.graph.n_edges)
        large = math.log(max(n, LARGE) / LARGE) / -math.log(1 - PART_OF_LARGE)
        return math.ceil(large + math.log(max(min(n, LARGE), 10) / 10) / -math.log(1 - PART))

    def strength(self, tried: Tried) -> np.ndarray:
        """`[writers, readers]`: |mean gradient| at the circuit, or at the one that it was cut from; else |score|."""
        known = self._strength.get(tried.mask.tobytes())
        return np.abs(self.scores.values) if known is None else known

    def _lost(self, tried: Tried) -> bool:
        """Whether hardly anything is left of what the model does."""
        return self._error(tried) > HOPELESS * self._error(self.empty)

    def _round(self, tried: Tried, fold: np.ndarray, runs: PreparedRuns, least: int) -> Tried | None:
        gradients = self._gradients(runs, tried.mask) / self.contrast
        strength = np.zeros(tried.mask.shape, dtype=np.float32)
        strength[tried.mask] = np.abs(gradients.mean(axis=1))
        self._strength[tried.mask.tobytes()] = strength
        surplus = ((tried.outcome.metric - self.evaluator.full) / self.contrast)[fold]
        part = PART_OF_LARGE if tried.n_edges > LARGE else PART
        n = max(1, min(int(part * (tried.mask & ~self.kept).sum()), tried.n_edges - least))
        best = self._best(tried, gradients, surplus, fold, n)
        if n > 1 and (best is None or (self.trials.meets(tried) and not self.trials.meets(best))):
            half = self._best(tried, gradients, surplus, fold, n // 2)
            if half is not None and (best is None or self._lost(best) or self.trials.meets(half)):
                best = half
        if best is not None:
            self._strength.setdefault(best.mask.tobytes(), strength * best.mask)
        return best

    def _best(self, tried: Tried, gradients: np.ndarray, surplus: np.ndarray, fold: np.ndarray, n: int) -> Tried | None:
        """The best circuit without n edges of this one; None where nothing is left."""
        free = ~self.kept[tried.mask]
        cells, gradients, found = np.argwhere(tried.mask)[free], gradients[free], []
        for name, balanced in (("pairs", balanced_pairs), ("mean", balanced_mean)):
            if name == "mean" and tried.n_edges > BOTH:
                continue
            drop = balanced(gradients, surplus + self._expected[name], n)
            mask = tried.mask.copy()
            mask[tuple(cells[drop].T)] = False
            mask = connected(self.graph, mask)
            if not mask.any():
                continue
            smaller = self.trials.run(mask, "re-scored")
            predicted = surplus - gradients[drop].sum(axis=0)
            now = ((smaller.outcome.metric - self.evaluator.full) / self.contrast)[fold]
            self._expected[name] = MEMORY * (self._expected[name] + float((now - predicted).mean()))
            found.append(smaller)
        return min(found, key=self._error, default=None)

    def _error(self, tried: Tried) -> float:
        if self.trials.criterion == "kl":
            return float(tried.outcome.kl.mean())
        return float(np.abs(tried.outcome.metric - self.evaluator.full).mean())

    def _gradients(self, runs: PreparedRuns, mask: np.ndarray) -> np.ndarray:
        experiment = self.evaluator.experiment
        ones = torch.from_numpy(mask).to(experiment.adapter.device, experiment.adapter.work)
        return gradients_at(experiment, runs, ones, mask, "re-scoring")


def gradients_at(experiment: Experiment, runs: PreparedRuns, soft: Tensor, mask: np.ndarray, label: str) -> np.ndarray:
    """`[edges, pairs]` of the edges of a mask, in the order of `np.argwhere(mask)`, opened as far as `soft` says."""

    def one(prepared: Prepared) -> np.ndarray:
        return np.asarray(pair_gradients(prepared, soft, experiment.metric, mask).gradient.double().cpu())

    return np.concatenate(list(runs.each(one, label)), axis=1)


def _index(rows: np.ndarray, batch: Batch) -> Tensor:
    return torch.from_numpy(rows).to(batch.answers.device)


# -------------------------------------------------------------------- what a round drops
def balanced_mean(gradients: np.ndarray, residual: np.ndarray, n: int) -> np.ndarray:
    """`[edges]` bool, n of them true: the mean of what goes is near the mean residual.

    Args:
        gradients: `[edges, pairs]`, residual: `[pairs]`, as shares of the total effect.
    """
    effect, wanted = gradients.mean(axis=1), residual.mean()
    order = np.argsort(np.abs(effect), kind="stable")
    helps, opposes = order[effect[order] >= 0], order[effect[order] < 0]
    lost, won = (np.concatenate([[0.0], effect[side].cumsum()]) for side in (helps, opposes))
    counts = np.arange(max(0, n - len(opposes)), min(n, len(helps)) + 1)
    count = int(counts[np.abs(wanted - (lost[counts] + won[n - counts])).argmin()])
    drop = np.zeros(len(gradients), dtype=bool)
    drop[helps[:count]] = drop[opposes[: n - count]] = True
    return drop


def balanced_pairs(gradients: np.ndarray, residual: np.ndarray, n: int) -> np.ndarray:
    """As `balanced_mean`, but what goes is near the residual of every pair."""
    norms = np.linalg.norm(gradients, axis=1)
    order = np.argsort(norms, kind="stable")
    drop = np.zeros(len(gradients), dtype=bool)
    drop[order[:n]] = True
    weak = np.zeros_like(drop)
    weak[order[: round(WEAK * n)]] = True
    left = residual - gradients[drop].sum(axis=0)
    for _ in range(SWAPS):
        goes = int(np.where(weak & ~drop, 2 * gradients @ left - norms**2, -np.inf).argmax())
        without = left - gradients[goes]
        stays = int(np.where(drop, -2 * gradients @ without - norms**2, -np.inf).argmax())
        swapped = without + gradients[stays]
        if drop[goes] or np.linalg.norm(swapped) >= np.linalg.norm(left) - 1e-6:
            break
        drop[goes], drop[stays], left = True, False, swapped
    return drop
