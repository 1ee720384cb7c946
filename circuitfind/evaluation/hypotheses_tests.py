"""The five tests of the circuit hypothesis, each from its statement (Shi et al. 2024).

With s the metric of an example, M the model, C the circuit, M - C the model with C's edges ablated, and K a random
number of successes:

* equivalence. With D = s(C) - s(M), the null is `|P(D > 0) + P(D = 0)/2 - 1/2| < epsilon`: neither is better much more
  often. Statistic: fraction of examples with D > 0, ties counting half. p: the chance that K ~ Binomial(n, 1/2 +
  epsilon), at the boundary of the null, is at least as far from n/2 as observed.
* independence. Null: s(M - C) is independent of s(M). HSIC with a permutation test (Gretton et al. 2007, "A Kernel
  Statistical Test of Independence"): Gaussian kernels `K_ij = exp(-(x_i - x_j)^2 / (2 w^2))`, and `L` for y, with w the
  median distance of two different values of each side. `HSIC = trace(K H L H) / n^2` with `H = 1 - 1/n` tends to 0 for
  independent x and y, and only for them. Under independence all pairings of x with y are equally likely: y is permuted,
  and `p = (1 + permutations with at least this HSIC) / (1 + permutations)` is valid whatever the sample size.
* minimality, of each edge e of C. The effect of an edge is the mean |change of s| when it is ablated. C is inflated by
  a random path, and a random new edge f of it is ablated again. Null: `P(effect(e) > effect(f)) >= quantile`.
  p: the chance of K ~ Binomial(references, quantile) at most as large as observed.
* sufficiency. Null: `P(mean |s(C) - s(M)| < mean |s(R) - s(M)|) <= quantile` for a random connected circuit R of the
  same size. p: the chance of K ~ Binomial(references, quantile) at least as large as observed.
* partial necessity. Null: `P(mean |s(M - C) - s(M)| > mean |s(M - R) - s(M)|) <= quantile`. p as for sufficiency.

The first three nulls hold for an ideal circuit (rejection is evidence against C), the last two for a random one
(rejection is evidence for C). Differences within rounding are ties, which never count as successes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from circuitfind.circuit import Circuit
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.evaluation.random_circuits import inflated, random_circuit, without_each
from circuitfind.statistics import at_least

ROUNDING = 1e-12  # of HSIC, whose kernels lie between 0 and 1: nearer permutations count as equal


class Finding(NamedTuple):
    """Outcome of a test.

    p_values: one, or one for each edge; NaN if there was nothing to test.
    smallest: the smallest p-value that an experiment of this size can give.
    said: the measurement in words.
    effects, shares: for each edge, mean |change of the metric| and fraction of references that it exceeds.
    """

    statistic: float
    p_values: np.ndarray
    smallest: float
    said: str
    effects: np.ndarray = np.empty(0)
    shares: np.ndarray = np.empty(0)


def untested(why: str) -> Finding:
    return Finding(float("nan"), np.array([np.nan]), 0.0, f"not tested: {why}")


@dataclass(frozen=True)
class Trial:
    """A circuit to be tested. Each quantity is measured once."""

    evaluator: Evaluator
    circuit: Circuit
    epsilon: float
    permutations: int
    references: int
    reference_size: int
    quantile: float

    @property
    def of_model(self) -> np.ndarray:
        """`[examples]`: s(M)."""
        return np.asarray(self.evaluator.full)

    @cached_property
    def of_circuit(self) -> np.ndarray:
        """`[examples]`: s(C)."""
        return np.asarray(self.evaluator.metrics([self.circuit.mask], 1, "the circuit")[0])

    @cached_property
    def of_rest(self) -> np.ndarray:
        """`[examples]`: s(M - C)."""
        return np.asarray(self.evaluator.metrics([self.circuit.complement().mask], 1, "the circuit's complement")[0])

    @cached_property
    def random(self) -> np.ndarray:
        """`[references, writers, readers]`: random connected circuits, shared by the two tests that need them."""
        rng, graph = np.random.default_rng([self.evaluator.seed, 0]), self.circuit.graph
        return np.stack([random_circuit(graph, self.reference_size, rng).mask for _ in range(self.references)])

    @cached_property
    def rounding_of_model(self) -> np.ndarray:
        """`[examples]`: rounding of s(M)."""
        return self.evaluator.rounding(self.circuit.graph.real)

    def rounding(self, mask: np.ndarray) -> float:
        """Bound on the mean |change of s| between this circuit and an equivalent one, due to rounding."""
        return float(self.evaluator.rounding(mask).mean())

    @property
    def compares_with_model(self) -> bool:
        """Whether the metric is a distance from the model, so that s(M) is the same on every example."""
        return self.evaluator.bound.metric.reference


def equivalence(trial: Trial) -> Finding:
    if trial.compares_with_model:
        return untested("under this metric, the model has the best score on every example by definition")
    change = trial.of_circuit - trial.of_model
    above, below = (int((side > trial.rounding_of_model).sum()) for side in (change, -change))
    n, better = len(change), (above + len(change) - below) / 2
    said = f"on {n} pairs the circuit scores above the model {above} times, below {below} times"
    chances = equivalence_p_values(n, trial.epsilon)
    distance = abs(above - below)
    distance -= (n - distance) % 2 if distance else 0  # an odd number of ties: one cannot be halved, nor count for
    return Finding(better / n, chances[[distance]], float(chances[-1]), said)


def equivalence_p_values(n: int, epsilon: float) -> np.ndarray:
    """`[n + 1]`: by `d = |times above - times below|`, the chance of at least this d at the null's edge."""
    above, below = (at_least((n + np.arange(n + 1) + 1) // 2, n, 0.5 + side) for side in (epsilon, -epsilon))
    return np.asarray(np.minimum(above + below, 1))


def independent(trial: Trial) -> Finding:
    if np.ptp(trial.of_model) <= trial.rounding_of_model.max():
        return untested("the model scores the same on every example")
    found = independence(trial.of_rest, trial.of_model, trial.permutations, trial.evaluator.seed)
    said = f"HSIC of {len(trial.of_model)} pairs against {trial.permutations} permutations"
    return Finding(found.statistic, np.array([found.p_value]), 1 / (1 + trial.permutations), said)


def minimality(trial: Trial) -> Finding:
    mask, graph = trial.circuit.mask, trial.circuit.graph
    if not mask.any():
        return untested("the circuit has no edges")
    if (mask == graph.real).all():
        return untested("every edge of the model is in the circuit, there is none to compare with")
    masks, metrics = without_each(mask, np.argwhere(mask.T)[:, ::-1]), trial.evaluator.metrics  # as `Circuit.edges`
    effects = np.abs(metrics(masks, len(trial.circuit), "the circuit without an edge") - trial.of_circuit).mean(-1)
    rng = np.random.default_rng([trial.evaluator.seed, 1])
    circuits = (one for _ in range(trial.references) for one in inflated(graph, mask, rng))
    scores = metrics(circuits, 2 * trial.references, "inflated circuits, and without an added edge")
    added = np.abs(scores[0::2] - scores[1::2]).mean(-1)
    exceeded = (effects[:, None] > added + trial.rounding(mask)).sum(-1)
    # at most k of these successes are at least n - k failures
    chances = at_least(np.arange(trial.references, -1, -1), trial.references, 1 - trial.quantile)
    shares = exceeded / trial.references
    said = f"{len(effects)} edges against {trial.references} random additions"
    return Finding(float(shares.min()), chances[exceeded], float(chances[0]), said, effects, shares)


def sufficiency(trial: Trial) -> Finding:
    of_random = trial.evaluator.metrics(trial.random, trial.references, "random circuits")
    losses = np.abs(of_random - trial.of_model).mean(-1)
    loss = np.abs(trial.of_circuit - trial.of_model).mean()
    return _against_random(trial, losses > loss + trial.rounding(trial.circuit.mask), "nearer to the model than")


def partial_necessity(trial: Trial) -> Finding:
    rest = trial.circuit.graph.real & ~trial.random
    of_random = trial.evaluator.metrics(rest, trial.references, "random circuits ablated")
    losses = np.abs(of_random - trial.of_model).mean(-1)
    loss, rounding = np.abs(trial.of_rest - trial.of_model).mean(), trial.rounding(trial.circuit.complement().mask)
    return _against_random(trial, loss > losses + rounding, "a greater loss when ablated than")


def _against_random(trial: Trial, beaten: np.ndarray, how: str) -> Finding:
    chances = at_least(np.arange(trial.references + 1), trial.references, trial.quantile)
    count, edges = int(beaten.sum()), f"{trial.reference_size} edge{'' if trial.reference_size == 1 else 's'}"
    said = f"{how} {count} of {trial.references} random circuits of {edges}"
    return Finding(count / trial.references, chances[[count]], float(chances[-1]), said)


class Test(NamedTuple):
    """How a test is made, its null hypothesis, whether that holds for an ideal circuit, and the meaning of rejecting or
    keeping it."""

    made: Callable[[Trial], Finding]
    null: str
    ideal: bool
    rejected: str
    kept: str


TESTS = {
    "equivalence": Test(
        equivalence,
        "|P(s(C) > s(M)) + P(s(C) = s(M))/2 - 1/2| < {epsilon:g}",
        True,
        "the circuit does not perform like the model",
        "no evidence that circuit and model differ in performance",
    ),
    "independence": Test(
        independent,
        "s(M - C) is independent of s(M)",
        True,
        "without the circuit, scores still depend on the model's",
        "no evidence that scores without the circuit depend on the model's",
    ),
    "minimality": Test(
        minimality,
        "for every edge e of C: P(effect of e > effect of a random added edge) >= {quantile:g}",
        True,
        "the circuit has edges that matter no more than random ones",
        "no edge is shown to be unnecessary",
    ),
    "sufficiency": Test(
        sufficiency,
        "P(C is nearer to M than a random circuit) <= {quantile:g}",
        False,
        "the circuit does the task better than random circuits",
        "not shown to be better than random circuits",
    ),
    "partial-necessity": Test(
        partial_necessity,
        "P(M loses more without C than without a random circuit) <= {quantile:g}",
        False,
        "the model needs the circuit more than random circuits",
        "not shown to be needed more than random circuits",
    ),
}


# -------------------------------------------------------------------- independence
class Independence(NamedTuple):
    """HSIC (the biased estimate) and its p-value under independence."""

    statistic: float
    p_value: float


def independence(x: np.ndarray, y: np.ndarray, permutations: int = 1000, seed: int = 0) -> Independence:
    """Test whether x and y, both `[examples]`, are independent. If one is constant, the p-value is 1."""
    centred, kernel, rng = _centred(gaussian_kernel(x)), gaussian_kernel(y), np.random.default_rng(seed)
    seen = float((centred * kernel).mean())
    orders = (rng.permutation(len(y)) for _ in range(permutations))
    reached = sum(float((centred * kernel[np.ix_(order, order)]).mean()) >= seen - ROUNDING for order in orders)
    return Independence(seen, (1 + reached) / (1 + permutations))


def gaussian_kernel(values: np.ndarray) -> np.ndarray:
    """`[examples, examples]`; all ones for a constant."""
    distance = np.abs(np.subtract.outer(values, values))
    different = distance[distance > 0]
    width = float(np.median(different)) if len(different) else 1.0
    return np.asarray(np.exp(-0.5 * (distance / width) ** 2))


def _centred(kernel: np.ndarray) -> np.ndarray:
    """`H K H`."""
    return np.asarray(kernel - kernel.mean(0) - kernel.mean(1, keepdims=True) + kernel.mean())
