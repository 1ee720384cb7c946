"""Hypothesis tests of a circuit (Shi et al. 2024, "Hypothesis Testing the Circuit Hypothesis in LLMs").

1. Each test asked for is made with exact runs on one prepared set of pairs (`hypotheses_tests.py` states them).
2. Minimality tests every edge of the circuit: its p-values are corrected over the edges, and the smallest is the
   p-value of "every edge counts".
3. The tests' p-values are corrected over the tests that were made (Holm by default), and compared with alpha.
4. Each row says what was found in words, and where the experiment was too small to reject anything.

A null that is kept is not proven: equivalence and independence are kept on few pairs whatever the circuit. And a
dependence may have another cause than the behaviour: an ablated model still reads a corrupted prompt that shares words
with the clean one, so that under `ablation="corrupted"` independence is often rejected even of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Unpack

import numpy as np

from circuitfind.circuit import Circuit, as_circuit
from circuitfind.errors import ScoreError, check_count
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.evaluation.hypotheses_rows import STATEMENTS, EdgeTest, HypothesisTest, HypothesisTests, Statement
from circuitfind.evaluation.hypotheses_tests import TESTS, Finding, Trial
from circuitfind.models.load import Model
from circuitfind.remote.call import remotable
from circuitfind.setting import JudgeKeywords
from circuitfind.statistics import adjusted
from circuitfind.tasks.task import BoundTask, Task


@remotable
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
    """Tests what a circuit is hypothesised to be: as good as the model, all there is, minimal, better than chance.

    Runs as many circuits as the circuit has edges, and four times `references`.

    Args:
        circuit: a `Circuit`, or names of edges.
        tests: of "equivalence", "independence", "minimality", "sufficiency", "partial-necessity".
        epsilon: of equivalence, how far from 1/2 the chance to outperform may be; 0.1 is the paper's.
        alpha: bound on the chance of any false rejection, over all tests.
        permutations: of independence.
        references: random circuits, or random additions, to compare with.
        reference_size: edges of the random circuits; by default as many as the circuit has.
        quantile: the share of the references that the circuit, or an edge, is to exceed.
        correction: for several tests, and for the edges: "holm", "bonferroni" or "none" (then any one edge's p-value
            below alpha is enough to call the circuit not minimal).
        asked: metric, ablation (by default the circuit's own), batch_size, seed (of permutations and random circuits,
            too); see `circuitfind.setting`.

    Raises:
        ScoreError: a test, correction or number that makes no sense.
    """
    _check(tests, epsilon, alpha, permutations, references, reference_size, quantile)
    adjusted(np.empty(0), correction)  # an unknown one is refused before anything runs
    circuit = as_circuit(model.graph, circuit)
    evaluator = Evaluator.of(model, task, circuit.record, **asked)
    return hypotheses_of(
        evaluator,
        circuit,
        tests=tests,
        epsilon=epsilon,
        alpha=alpha,
        permutations=permutations,
        references=references,
        reference_size=reference_size,
        quantile=quantile,
        correction=correction,
    )


def hypotheses_of(
    evaluator: Evaluator,
    circuit: Circuit,
    *,
    tests: Sequence[str] = tuple(TESTS),
    epsilon: float = 0.1,
    alpha: float = 0.05,
    permutations: int = 1000,
    references: int = 100,
    reference_size: int | None = None,
    quantile: float = 0.9,
    correction: str = "holm",
) -> HypothesisTests:
    """`hypotheses` on pairs that are prepared already; the seed is the evaluator's."""
    _check(tests, epsilon, alpha, permutations, references, reference_size, quantile)
    size = len(circuit) if reference_size is None else reference_size
    trial = Trial(evaluator, circuit, epsilon, permutations, references, size, quantile)
    found = {name: TESTS[name](trial) for name in tests}
    settings = {"epsilon": epsilon, "quantile": quantile, "alpha": alpha, "correction": correction}
    settings |= {"permutations": permutations, "references": references, "reference_size": size}
    within = [adjusted(finding.p_values, correction) for finding in found.values()]  # over the edges of minimality
    across = adjusted(np.array([values.min() for values in within]), correction)
    rows = []
    for (name, finding), inner, outer in zip(found.items(), within, across, strict=True):
        rejected = bool(outer <= alpha)
        others = 1 if correction == "none" else len(inner) * int((~np.isnan(across)).sum())
        rows.append(
            HypothesisTest(
                name,
                STATEMENTS[name].null.format(epsilon=epsilon, quantile=quantile),
                finding.statistic,
                float(inner.min()),
                float(outer),
                rejected,
                None if np.isnan(outer) else rejected != STATEMENTS[name].ideal,
                _reading(STATEMENTS[name], finding, rejected, too_small=finding.smallest * others > alpha),
                _edges(circuit, finding, inner, rejected & (inner <= alpha)),
            )
        )
    return HypothesisTests(tuple(rows), len(circuit), evaluator.record.with_settings(**settings))


def _reading(statement: Statement, finding: Finding, rejected: bool, too_small: bool) -> str:
    if np.isnan(finding.p_values).all():
        return finding.said
    outcome = statement.rejected if rejected else statement.kept
    warning = f"; too few to reject anything: p cannot fall below {finding.smallest:.2g}" if too_small else ""
    return f"{outcome} ({finding.said}{warning})"


def _edges(circuit: Circuit, finding: Finding, corrected: np.ndarray, rejected: np.ndarray) -> tuple[EdgeTest, ...]:
    """One row an edge; none is rejected where the hypothesis that all are needed is kept."""
    if not len(finding.effects):
        return ()
    columns = (finding.effects, finding.shares, finding.p_values, corrected, rejected)
    return tuple(map(EdgeTest._make, zip(circuit.edges, *(column.tolist() for column in columns), strict=True)))


def _check(
    tests: Sequence[str],
    epsilon: float,
    alpha: float,
    permutations: int,
    references: int,
    reference_size: int | None,
    quantile: float,
) -> None:
    unknown = [name for name in tests if name not in TESTS]
    if isinstance(tests, str) or unknown or not tests or len(set(tests)) < len(tests):
        raise ScoreError(f"tests={tests!r}: give a list of some of {', '.join(TESTS)}, each once")
    for name, value, low, high in (("epsilon", epsilon, 0, 0.5), ("alpha", alpha, 0, 1), ("quantile", quantile, 0, 1)):
        if not isinstance(value, Real) or not low < value < high:
            raise ScoreError(f"{name}={value!r}: give a number between {low} and {high}")
    check_count("permutations", permutations, 1)
    check_count("references", references, 1)
    if reference_size is not None:
        check_count("reference_size", reference_size, 1)
