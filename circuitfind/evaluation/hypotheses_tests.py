"""The five tests of the circuit hypothesis, each from its statement (Shi et al. 2024).

With s the metric of an example, M the model, C the circuit, M - C the model with C's edges ablated, and K a random
number of successes:

* equivalence. Let D = s(C) - s(M). Null: `|P(D > 0) + P(D = 0)/2 - 1/2| < epsilon`, neither is better much more often
  than the other. Statistic: the share of examples with D > 0, ties counting half. p: the chance that K ~ Binomial(n,
  1/2 + epsilon), the null's edge, is as far from n/2 as what was seen.
* independence. Null: s(M - C) is independent of s(M), all of the task is in C. HSIC with a permutation test (Gretton et
  al. 2007, "A Kernel Statistical Test of Independence"): Gaussian kernels `K_ij = exp(-(x_i - x_j)^2 / (2 w^2))`,
  likewise `L` for y, where w is the median distance of two different values (the median heuristic), each side its own.
  `HSIC = trace(K H L H) / n^2` with `H = 1 - 1/n`: in the limit 0 for independent x and y, and only for them. Under
  independence every pairing of x with y is as likely as the one seen: y is permuted, and
  `p = (1 + permutations with at least this HSIC) / (1 + permutations)`, which is valid whatever the sample size.
* minimality, of each edge e of C. The effect of an edge is the mean |change of s| when it is ablated. C is inflated by
  a random path, and a random new edge f of it is ablated again. Null: `P(effect(e) > effect(f)) >= quantile`, e counts
  for more than edges that nobody chose. p: the chance of K ~ Binomial(references, quantile) at most as large as seen.
* sufficiency. Null: `P(mean |s(C) - s(M)| < mean |s(R) - s(M)|) <= quantile` for a random connected circuit R of the
  same size. p: the chance of K ~ Binomial(references, quantile) at least as large as seen.
* partial necessity. Null: `P(mean |s(M - C) - s(M)| > mean |s(M - R) - s(M)|) <= quantile`. p as for sufficiency.

The first three nulls say what an ideal circuit is like (rejection speaks against the circuit), the last two what a
random one is like (rejection speaks for it). Differences within rounding are ties, and ties never count as successes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np

from circuitfind.circuit import Circuit
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.evaluation.random_circuits import random_circuit
from circuitfind.graph import Graph
from circuitfind.progress import progress
from circuitfind.statistics import binomial

ROUNDING = 1e-12  # of HSIC, whose kernels lie between 0 and 1: permutations this near are as large
AT_A_TIME = 64  # circuits handed to the evaluator between two reports of progress


@dataclass(frozen=True)
class Finding:
    """What a test measured.

    Attributes:
        p_values: one, or one an edge; NaN where there was nothing to test.
        smallest: no outcome of this size of experiment has a p-value below.
        effects, shares: of each edge, the mean |change of the metric| and the share of references that it exceeds.
    """

    statistic: float
    p_values: np.ndarray
    smallest: float
    said: str
    effects: np.ndarray = field(default_factory=lambda: np.empty(0))
    shares: np.ndarray = field(default_factory=lambda: np.empty(0))


def untested(why: str) -> Finding:
    """There is nothing to test."""
    return Finding(float("nan"), np.array([np.nan]), 0.0, f"not tested: {why}")


@dataclass(frozen=True)
class Trial:
    """A circuit to be tested."""

    evaluator: Evaluator
    circuit: Circuit
    epsilon: float
    permutations: int
    references: int
    reference_size: int
    quantile: float

    def scores(self, masks: Iterable[np.ndarray], count: int, label: str) -> np.ndarray:
        """`[circuits, examples]`: the metric of so many circuits."""
        masks, parts = iter(masks), []
        with progress(label, count) as advance:
            while some := list(islice(masks, AT_A_TIME)):
                parts.append(self.evaluator.run(np.stack(some)).metric)
                advance(len(some))
        return np.concatenate(parts)

    @cached_property
    def of_model(self) -> np.ndarray:
        """`[examples]`: s(M)."""
        return np.asarray(self.evaluator.full)

    @cached_property
    def of_circuit(self) -> np.ndarray:
        """`[examples]`: s(C)."""
        return np.asarray(self.scores([self.circuit.mask], 1, "the circuit")[0])

    @cached_property
    def of_rest(self) -> np.ndarray:
        """`[examples]`: s(M - C)."""
        return np.asarray(self.scores([self.circuit.complement().mask], 1, "the circuit's complement")[0])

    @cached_property
    def random(self) -> np.ndarray:
        """`[references, writers, readers]`: random connected circuits, the same for both tests that need them."""
        rng = np.random.default_rng([self.evaluator.seed, 0])
        graph = self.circuit.graph
        return np.stack([random_circuit(graph, self.reference_size, rng).mask for _ in range(self.references)])

    @cached_property
    def rounding_of_model(self) -> np.ndarray:
        """`[examples]`: s(M) is exact up to here."""
        return self.evaluator.rounding(self.circuit.graph.real)

    def rounding(self, mask: np.ndarray) -> float:
        """Two circuits that do the same as this one differ, in the mean |change of s|, by no more."""
        return float(self.evaluator.rounding(mask).mean())

    @property
    def compares_with_model(self) -> bool:
        """The metric is one of distance from the model: the model's own score is the same on every example."""
        return self.evaluator.bound.metric.reference


def equivalence(trial: Trial) -> Finding:
    if trial.compares_with_model:
        return untested("under this metric the model scores best on every example by definition")
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
    distance = np.abs(2 * np.arange(n + 1) - n)
    chances = np.bincount(distance, weights=binomial(n, 0.5 + epsilon), minlength=n + 1)
    return np.asarray(np.minimum(chances[::-1].cumsum()[::-1], 1))


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
    without = trial.scores(one_less(mask), len(trial.circuit), "the circuit without an edge")
    effects = np.abs(without - trial.of_circuit).mean(-1)
    rng = np.random.default_rng([trial.evaluator.seed, 1])
    circuits = (one for _ in range(trial.references) for one in inflated(graph, mask, rng))
    scores = trial.scores(circuits, 2 * trial.references, "inflated circuits, and without an added edge")
    added = np.abs(scores[0::2] - scores[1::2]).mean(-1)
    exceeded = (effects[:, None] > added + trial.rounding(mask)).sum(-1)
    chances = np.minimum(binomial(trial.references, trial.quantile).cumsum(), 1)
    shares = exceeded / trial.references
    said = f"{len(effects)} edges against {trial.references} random additions"
    return Finding(float(shares.min()), chances[exceeded], float(chances[0]), said, effects, shares)


def sufficiency(trial: Trial) -> Finding:
    of_random = trial.scores(trial.random, trial.references, "random circuits")
    losses = np.abs(of_random - trial.of_model).mean(-1)
    loss = np.abs(trial.of_circuit - trial.of_model).mean()
    return _against_random(trial, losses > loss + trial.rounding(trial.circuit.mask), "nearer to the model than")


def partial_necessity(trial: Trial) -> Finding:
    of_random = trial.scores(
        (trial.circuit.graph.real & ~mask for mask in trial.random), trial.references, "random circuits ablated"
    )
    losses = np.abs(of_random - trial.of_model).mean(-1)
    loss = np.abs(trial.of_rest - trial.of_model).mean()
    return _against_random(
        trial, loss > losses + trial.rounding(trial.circuit.complement().mask), "a greater loss when ablated than"
    )


def _against_random(trial: Trial, beaten: np.ndarray, how: str) -> Finding:
    chances = np.minimum(binomial(trial.references, trial.quantile)[::-1].cumsum()[::-1], 1)
    count, edges = int(beaten.sum()), f"{trial.reference_size} edge{'' if trial.reference_size == 1 else 's'}"
    said = f"{how} {count} of {trial.references} random circuits of {edges}"
    return Finding(count / trial.references, chances[[count]], float(chances[-1]), said)


TESTS: dict[str, Callable[[Trial], Finding]] = {
    "equivalence": equivalence,
    "independence": independent,
    "minimality": minimality,
    "sufficiency": sufficiency,
    "partial-necessity": partial_necessity,
}


# -------------------------------------------------------------------- circuits that are run
def one_less(mask: np.ndarray) -> Iterable[np.ndarray]:
    """The circuit without each of its edges, reader by reader as `Circuit.edges` lists them."""
    for reader, writer in np.argwhere(mask.T):
        smaller = mask.copy()
        smaller[writer, reader] = False
        yield smaller


def inflated(graph: Graph, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The circuit with a random path added, and the same without one random edge of what was added."""
    larger = mask | random_path(graph, rng.choice(np.argwhere(graph.real & ~mask)), rng)
    smaller = larger.copy()
    smaller[tuple(rng.choice(np.argwhere(larger & ~mask)))] = False
    return larger, smaller


def random_path(graph: Graph, through: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random path from `input` to `logits` through an edge (writer, reader), as a `[writers, readers]` mask."""
    path = np.zeros_like(graph.real)
    writer, reader = map(int, through)
    path[writer, reader] = True
    before = writer
    while before:
        into = rng.choice(np.flatnonzero(graph.serves[:, before]))
        before = rng.integers(graph.limits[into])
        path[before, into] = True
    while (after := rng.choice(np.flatnonzero(graph.serves[reader]))) < graph.n_writers:
        reader = rng.choice(np.flatnonzero(graph.real[after]))
        path[after, reader] = True
    return path


# -------------------------------------------------------------------- independence
class Independence(NamedTuple):
    """HSIC and its p-value under independence."""

    statistic: float
    p_value: float


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """The biased estimate of HSIC from `[examples]` each."""
    return float((_centred(gaussian_kernel(x)) * gaussian_kernel(y)).mean())


def independence(x: np.ndarray, y: np.ndarray, permutations: int = 1000, seed: int = 0) -> Independence:
    """Tests `[examples]` against `[examples]`. Where one side is constant the p-value is 1."""
    centred, kernel, rng = _centred(gaussian_kernel(x)), gaussian_kernel(y), np.random.default_rng(seed)
    seen = float((centred * kernel).mean())
    reached = 0
    for _ in range(permutations):
        order = rng.permutation(len(y))
        reached += float((centred * kernel[np.ix_(order, order)]).mean()) >= seen - ROUNDING
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
