"""Balanced re-scored pruning: from the strongest edges down to a few, with new gradients at every size.

A ranking computed at the whole model is a poor guide to a small circuit: an edge's effect depends on which other edges
are left, and most of the many weak edges that a ranking drops are helpful. So:

1. **Start** from the strongest `START` edges by |score|. While they are off target, double their number.
2. **Re-score**: compute the gradient of every pair's metric with respect to every edge of the circuit, *at the
   circuit*, by one masked run forward and backward on half of the search pairs (`engine/masked_run.py`). The halves
   alternate.
3. **Balance**: choose the edges to drop, a fixed fraction of them, so that the predicted metric stays at the whole
   model's (below). Gradients overestimate the metric of the smaller circuit, so the mean error of the last rounds'
   predictions is added to the prediction.
4. **Run** the smaller circuits exactly: the circuit that balances every pair and, from at most `BOTH` edges, also the
   circuit that balances the mean. Continue with the one whose pairs are nearer to the whole model's (by KL divergence
   if that is the criterion).
5. If this leaves the target, or no circuit has a path from `input` to `logits`, try again with half as many edges to
   drop. If that leaves the target, too, the first circuit counts, unless hardly anything of the task is left in it
   (`HOPELESS`): a smaller circuit may be on target again.
6. Repeat from 2, until hardly any edges, or hardly anything of the task, are left. If a number of edges is given,
   rounds go on to exactly that number in any case, and up to `AFTER` further rounds look for a smaller circuit that is
   nearer.

On SmolLM2-135M's IOI, 31 edges found in this way are on target, and the strongest edges by score only from 1,141 edges
on; with a bound on the error of single pairs, it takes 272 (docs/real-models.md).

Balance: dropping the edges of smallest |gradient| lowers the metric, because most weak edges help a little, and their
effects add up. So a round drops helpful and opposing edges together, in the proportion that keeps the metric.

Let `G[e, i]` be the gradient of pair i's metric with respect to edge e, and `r[i]` the surplus of pair i's metric over
the whole model's (negative: a deficit), both as fractions of the total effect. Choose n edges whose G add up to r:

* **Mean** (`balanced_mean`): on average over pairs. Of the n edges, j are the weakest that help and n - j the weakest
  that oppose; cumulative sums give the best j.
* **Pairs** (`balanced_pairs`): for each pair. Start from the n edges of smallest norm over pairs. Then swap edges while
  this lowers the norm of r - (sum of G): drop the edge that lowers it most (among the 1.6 n weakest), and put back the
  dropped edge that raises it least.

Balancing pairs is better while there are many edges; among a hundred edges, none may balance every pair.
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
LARGE, PART_OF_LARGE, PART = 1000, 0.5, 0.35  # fraction of the edges to drop in a round, above and up to LARGE edges
FEWEST, HOPELESS = 4, 0.5  # fewest edges; largest error, relative to that of the empty circuit
AFTER = 2
WEAK, SWAPS = 1.6, 3000  # swaps are among the WEAK * n weakest edges; the most swaps
MEMORY = 0.5  # weight of the last errors of prediction in the next prediction


class Rescoring:
    """The rounds of one search."""

    def __init__(self, trials: Trials, scores: Scores, kept: np.ndarray | None = None) -> None:
        """`scores`: order the edges at the start; `kept`: mask of edges that are never dropped."""
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
        """Return the strongest `START` edges, or 2, 4, 8, ... times as many, on target; else the whole model."""
        n = min(START, self.graph.n_edges)
        while n < self.graph.n_edges:
            tried = self.trials.run(self.scores.top(n).mask | self.kept, "start", n)
            if self.trials.meets(tried):
                self.trials.say("start", f"the strongest {n:,} edges: faithfulness {tried.faithfulness:.3f}")
                return tried
            n *= 2
        return self.trials.whole()

    def run(self, edges: int | None = None) -> None:
        """Run ever smaller circuits. `edges`: the number of edges asked for."""
        with progress("re-scoring", 1 + self._expected_rounds()) as advance:
            start = smallest = self.start()
            advance(1)
            for smaller in self._rounds(start, edges):
                smallest = smaller
                advance(1)
        self.trials.say("re-scored", f"reduced from {start.n_edges:,} to {smallest.n_edges:,} edges")

    def _rounds(self, tried: Tried, edges: int | None) -> Iterator[Tried]:
        """Yield the circuit of each round."""
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
        """Estimate the number of rounds, for the progress bar."""
        n = min(START, self.graph.n_edges)
        large = math.log(max(n, LARGE) / LARGE) / -math.log(1 - PART_OF_LARGE)
        return math.ceil(large + math.log(max(min(n, LARGE), 10) / 10) / -math.log(1 - PART))

    def strength(self, tried: Tried) -> np.ndarray:
        """Return the strength of each edge, `[writers, readers]`: |mean gradient| at this circuit or the circuit that
        it was cut from, if known; else |score|."""
        known = self._strength.get(tried.mask.tobytes())
        return np.abs(self.scores.values) if known is None else known

    def _lost(self, tried: Tried) -> bool:
        """Whether hardly anything is left of the task in a circuit."""
        return self._error(tried) > HOPELESS * self._error(self.empty)

    def _round(self, tried: Tried, fold: np.ndarray, runs: PreparedRuns, least: int) -> Tried | None:
        """Return the next smaller circuit; None if no edges are left. `fold`, `runs`: the pairs on which to re-score;
        `least`: the fewest edges, before pruning to connected edges."""
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
        """Drop n edges, and return the best of the circuits that result; None if none of them has edges."""
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
        """Return the mean KL divergence if that is the criterion, else the mean |circuit - model|."""
        if self.trials.criterion == "kl":
            return float(tried.outcome.kl.mean())
        return float(np.abs(tried.outcome.metric - self.evaluator.full).mean())

    def _gradients(self, runs: PreparedRuns, mask: np.ndarray) -> np.ndarray:
        """Return gradients `[edges, pairs]` at a circuit."""
        experiment = self.evaluator.experiment
        ones = torch.from_numpy(mask).to(experiment.adapter.device, experiment.adapter.work)
        return gradients_at(experiment, runs, ones, mask, "re-scoring")


def gradients_at(experiment: Experiment, runs: PreparedRuns, soft: Tensor, mask: np.ndarray, label: str) -> np.ndarray:
    """Return the gradient of each pair's metric with respect to the edges of a mask, `[edges, pairs]`, in the order of
    `np.argwhere(mask)`.

    `soft`: the mask under which the model runs, `[writers, readers]` between 0 and 1; `label`: for the progress bar.
    """

    def one(prepared: Prepared) -> np.ndarray:
        return np.asarray(pair_gradients(prepared, soft, experiment.metric, mask).gradient.double().cpu())

    return np.concatenate(list(runs.each(one, label)), axis=1)


def _index(rows: np.ndarray, batch: Batch) -> Tensor:
    return torch.from_numpy(rows).to(batch.answers.device)


# -------------------------------------------------------------------- choosing the edges to drop
def balanced_mean(gradients: np.ndarray, residual: np.ndarray, n: int) -> np.ndarray:
    """Choose n edges to drop, `[edges]` bool, so that their mean gradients add up to about the mean surplus.

    Args:
        gradients: `[edges, pairs]`, as fractions of the total effect.
        residual: each pair's surplus over the whole model's metric, `[pairs]`, in the same unit.
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
    """As `balanced_mean`, but the gradients add up to about the surplus of every pair."""
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
