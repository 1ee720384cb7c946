"""Hypothesis tests of a circuit (Shi et al. 2024, "Hypothesis Testing the Circuit Hypothesis in LLMs").

1. Make each test (defined in `hypotheses_tests.py`) with exact runs on the same pairs.
2. Minimality tests every edge of the circuit. Its p-values are corrected over the edges, and the smallest is used.
3. Correct the p-values over the tests that were made (Holm by default), and compare them with alpha.
4. Each row states the outcome in words, and says if the experiment was too small to reject anything.

A null hypothesis that is not rejected is not proven: on few pairs, equivalence and independence are never rejected. And
independence may be rejected for another reason than the task: the ablated model still reads a corrupted prompt that
shares words with the clean one, so under `ablation="corrupted"` it is often rejected even for the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, Unpack

import numpy as np

from circuitfind.calls import model_call
from circuitfind.circuit import Circuit
from circuitfind.errors import ScoreError, check_count
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.evaluation.hypotheses_tests import TESTS, Finding, Test, Trial
from circuitfind.graph import ends_of
from circuitfind.models.load import Model
from circuitfind.record import Record
from circuitfind.result import Result
from circuitfind.setting import JudgeKeywords
from circuitfind.statistics import adjusted
from circuitfind.tasks.task import BoundTask, Task


class EdgeTest(NamedTuple):
    """Minimality of an edge: mean |effect| on the metric, and fraction of random additions with a smaller effect.

    rejected: the edge matters no more than random additions.
    """

    edge: str
    writer: str
    reader: str
    effect: float
    share: float
    p_value: float
    adjusted: float
    rejected: bool

    @property
    def name(self) -> str:
        return self.edge


class HypothesisTest(NamedTuple):
    """One test.

    Attributes:
        statistic: HSIC, or a fraction of examples (equivalence) or of references (minimality: the smallest over edges).
        p_value, adjusted: NaN if there was nothing to test.
        supports: whether the outcome supports the circuit; None if there was nothing to test.
        reading: the outcome in words.
        edges: for minimality, in the circuit's order.
    """

    name: str
    null: str
    statistic: float
    p_value: float
    adjusted: float
    rejected: bool
    supports: bool | None
    reading: str
    edges: tuple[EdgeTest, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class HypothesisTests(Result):
    """Tests of a circuit, in the order given; rows are the tests."""

    FORMAT, ROWS = "circuitfind.hypotheses", "tests"

    tests: tuple[HypothesisTest, ...]
    n_edges: int
    record: Record

    def __getitem__(self, name: str) -> HypothesisTest:
        made = {row.name: row for row in self.tests}
        if name not in made:
            raise ScoreError(f"no test '{name}' was made; there are {', '.join(made)}")
        return made[name]

    def columns(self) -> dict[str, list[Any]]:
        return {name: values for name, values in super().columns().items() if name != "edges"}

    def shown(self) -> dict[str, Any]:
        verdicts = {True: "for the circuit", False: "against it", None: "not tested"}
        return {"n_edges": self.n_edges, **{row.name.replace("-", "_"): verdicts[row.supports] for row in self.tests}}


@dataclass(frozen=True)
class HypothesisOptions:
    """Options of `hypotheses`, checked."""

    tests: Sequence[str] = tuple(TESTS)
    epsilon: float = 0.1
    alpha: float = 0.05
    permutations: int = 1000
    references: int = 100
    reference_size: int | None = None
    quantile: float = 0.9
    correction: str = "holm"

    def __post_init__(self) -> None:
        tests = self.tests
        if isinstance(tests, str) or not tests or len(set(tests) & set(TESTS)) < len(tests):
            raise ScoreError(f"tests={tests!r}: give a list of some of {', '.join(TESTS)}, each once")
        for name, high in (("epsilon", 0.5), ("alpha", 1), ("quantile", 1)):
            value = getattr(self, name)
            if not (isinstance(value, Real) and 0 < float(value) < high):
                raise ScoreError(f"{name}={value!r}: give a number between 0 and {high}")
        size = 1 if self.reference_size is None else self.reference_size
        counts = {"permutations": self.permutations, "references": self.references, "reference_size": size}
        for name, count in counts.items():
            check_count(name, count, 1)
        adjusted(np.empty(0), self.correction)  # raises for an unknown one


@model_call
def hypotheses(
    model: Model,
    task: Task | BoundTask,
    circuit: Circuit | Iterable[str],
    *,
    tests: Sequence[str] = tuple(TESTS),
    epsilon: float = 0.1,
    alpha: float = 0.05,
    permutations: int = 1000,
    references: int = 100,
    reference_size: int | None = None,
    quantile: float = 0.9,
    correction: str = "holm",
    **asked: Unpack[JudgeKeywords],
) -> HypothesisTests:
    """Test whether a circuit is as good as the model, complete, minimal, and better than chance.

    Runs one circuit per edge, and `references` circuits four times. Copies of a pair are used once.

    Args:
        circuit: a `Circuit`, or names of edges.
        tests: of "equivalence", "independence", "minimality", "sufficiency", "partial-necessity".
        epsilon: for equivalence, how far from 1/2 the chance to outperform may be (0.1 in the paper).
        alpha: bound on the chance of any false rejection, over all tests.
        permutations: number of permutations for independence.
        references: number of random circuits, or random additions, to compare with.
        reference_size: number of edges of the random circuits. Default: that of the circuit.
        quantile: fraction of the references that the circuit, or an edge, has to exceed.
        correction: "holm", "bonferroni" or "none", over the tests and over the edges. With "none", a single edge with a
            p-value below alpha makes the circuit not minimal.
        asked: metric, ablation (default: the circuit's own), batch_size, seed (also of permutations and random
            circuits); see `circuitfind.setting`.

    Raises:
        ScoreError: an unknown test or correction, or a number out of range.
    """
    options = HypothesisOptions(tests, epsilon, alpha, permutations, references, reference_size, quantile, correction)
    evaluator, chosen = Evaluator.judging(model, task, circuit, **asked)
    distinct = evaluator.bound.distinct()  # copies of a pair are not independent trials
    if distinct is not evaluator.bound:
        evaluator = Evaluator(evaluator.experiment.on(distinct))
    return hypotheses_of(evaluator, chosen, **vars(options))


def hypotheses_of(evaluator: Evaluator, circuit: Circuit, **options: Any) -> HypothesisTests:
    """`hypotheses` with an evaluator of the pairs. `options`: fields of `HypothesisOptions`."""
    asked = HypothesisOptions(**options)
    size = len(circuit) if asked.reference_size is None else asked.reference_size
    trial = Trial(evaluator, circuit, asked.epsilon, asked.permutations, asked.references, size, asked.quantile)
    found = {name: TESTS[name].made(trial) for name in asked.tests}
    within = [
        adjusted(finding.p_values, asked.correction) for finding in found.values()
    ]  # over the edges of minimality
    across = adjusted(np.array([values.min() for values in within]), asked.correction)
    rows = []
    for (name, finding), inner, outer in zip(found.items(), within, across, strict=True):
        test, rejected = TESTS[name], bool(outer <= asked.alpha)
        others = 1 if asked.correction == "none" else len(inner) * int((~np.isnan(across)).sum())
        null = test.null.format(epsilon=asked.epsilon, quantile=asked.quantile)
        supports = None if np.isnan(outer) else rejected != test.ideal
        reading = _reading(test, finding, rejected, too_small=finding.smallest * others > asked.alpha)
        edges = _edges(circuit, finding, inner, rejected & (inner <= asked.alpha))
        values = finding.statistic, float(inner.min()), float(outer)
        rows.append(HypothesisTest(name, null, *values, rejected, supports, reading, edges))
    names = ("epsilon", "quantile", "alpha", "correction", "permutations", "references")
    record = evaluator.record.with_settings(**{name: getattr(asked, name) for name in names}, reference_size=size)
    return HypothesisTests(tuple(rows), len(circuit), record)


def _reading(test: Test, finding: Finding, rejected: bool, too_small: bool) -> str:
    if np.isnan(finding.p_values).all():
        return finding.said
    outcome = test.rejected if rejected else test.kept
    warning = f"; too few to reject anything: p cannot be smaller than {finding.smallest:.2g}" if too_small else ""
    return f"{outcome} ({finding.said}{warning})"


def _edges(circuit: Circuit, finding: Finding, corrected: np.ndarray, rejected: np.ndarray) -> tuple[EdgeTest, ...]:
    """A row for each edge. None is rejected unless the hypothesis that all are needed is rejected."""
    if not len(finding.effects):
        return ()
    columns = (finding.effects, finding.shares, finding.p_values, corrected, rejected)
    rows = zip(circuit.edges, *(column.tolist() for column in columns), strict=True)
    return tuple(EdgeTest(name, *ends_of(name), *values) for name, *values in rows)
