"""Hypothesis tests against their definitions: exact binomials, HSIC as loops, rates under the null, known cases."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
from oracles import run_circuit
from test_conformance import induction
from toys import Twin, id_task, wrapped

import circuitfind as cf
from circuitfind.circuit import connected
from circuitfind.cli import tables
from circuitfind.cli.output import Output
from circuitfind.errors import ScoreError
from circuitfind.evaluation import hypotheses_tests as tests
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.evaluation.hypotheses import hypotheses_of
from circuitfind.evaluation.hypotheses_tests import equivalence_p_values, independence
from circuitfind.evaluation.random_circuits import inflated, random_circuit, random_path
from circuitfind.graph import Graph
from circuitfind.statistics import adjusted, at_least

GRAPHS = [Graph(2, 4, 4, 32), Graph(3, 4, 2, 32), Graph(2, 2, 1, 8, parallel=True)]
TEXTBOOK = ["input->a0.h0<v>", "a0.h0->a1.h0<k>", "a1.h0->logits"]


def chance(n: int, p: Fraction, k: int) -> Fraction:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


# -------------------------------------------------------------------- statistics
@pytest.mark.parametrize("n", [1, 2, 7, 100, 400])
@pytest.mark.parametrize("p", [Fraction(6, 10), Fraction(9, 10), Fraction(1, 50)])
def test_binomial_tails_equal_exact_fractions(n: int, p: Fraction) -> None:
    exact = [float(tail) for tail in accumulate(chance(n, p, k) for k in range(n, -1, -1))][::-1]
    np.testing.assert_allclose(at_least(np.arange(n + 1), n, float(p)), exact, rtol=1e-10)


def test_corrections_equal_the_textbook() -> None:
    p = np.array([0.01, 0.04, 0.03, 0.005])
    assert adjusted(p, "holm") == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjusted(p, "bonferroni") == pytest.approx([0.04, 0.16, 0.12, 0.02])
    assert adjusted(p, "none") == pytest.approx(p)
    with_gap = adjusted(np.array([0.01, np.nan, 0.02]), "holm")
    assert with_gap[[0, 2]] == pytest.approx([0.02, 0.02]) and np.isnan(with_gap[1])
    assert adjusted(np.array([0.6, 0.7]), "holm") == pytest.approx([1, 1])


def test_holm_rejects_what_stepping_down_rejects() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        p, alpha = rng.beta(0.3, 2, size=rng.integers(1, 9)), 0.1
        rejected = set()
        for step, index in enumerate(np.argsort(p)):
            if p[index] > alpha / (len(p) - step):
                break
            rejected.add(int(index))
        assert set(np.flatnonzero(adjusted(p, "holm") <= alpha)) == rejected


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    return independence(x, y, 1).statistic


def literal_hsic(x: list[float], y: list[float]) -> float:
    """trace(K H L H) / n^2, entry by entry."""
    n = len(x)

    def kernel(values: list[float]) -> list[list[float]]:
        gaps = sorted(abs(a - b) for a in values for b in values if a != b)
        middle = len(gaps) // 2
        width = gaps[middle] if len(gaps) % 2 else (gaps[middle - 1] + gaps[middle]) / 2
        return [[math.exp(-((a - b) ** 2) / (2 * width**2)) for b in values] for a in values]

    def times(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
        return [[sum(a[i][k] * b[k][j] for k in range(n)) for j in range(n)] for i in range(n)]

    h = [[(i == j) - 1 / n for j in range(n)] for i in range(n)]
    product = times(times(kernel(x), h), times(kernel(y), h))
    return sum(product[i][i] for i in range(n)) / n**2


def test_hsic_equals_its_definition() -> None:
    rng = np.random.default_rng(1)
    for n in (2, 5, 12):
        x, y = rng.normal(size=(2, n)) * [[1], [40]]
        assert hsic(x, y) == pytest.approx(literal_hsic(x.tolist(), y.tolist()), rel=1e-9)
        assert hsic(3 * x + 7, y) == pytest.approx(hsic(x, y)), "units do not matter"


def test_independence_holds_its_rate_and_finds_what_correlation_misses() -> None:
    rng = np.random.default_rng(2)
    p_values = np.array([independence(*rng.normal(size=(2, 15)), permutations=39, seed=k).p_value for k in range(400)])
    for alpha in (0.05, 0.25, 0.5):  # exact levels of 39 permutations: the rate is alpha, give or take four errors
        assert abs((p_values <= alpha + 1e-9).mean() - alpha) < 4 * math.sqrt(alpha * (1 - alpha) / 400)
    x = rng.normal(size=60)
    curved = independence(x, x**2 + 0.1 * rng.normal(size=60), permutations=199)
    assert curved.p_value == 1 / 200 and curved.statistic > 0
    assert independence(x, np.ones(60), permutations=50).p_value == 1
    assert independence(x, x**2, permutations=99, seed=1) == independence(x, x**2, permutations=99, seed=1)


# -------------------------------------------------------------------- equivalence
@pytest.mark.parametrize("n", [1, 2, 9, 30])
def test_equivalence_p_values_are_the_tail_at_the_edge_of_the_null(n: int) -> None:
    edge = Fraction(6, 10)
    found = equivalence_p_values(n, 0.1)
    for d in range(n + 1):
        tail = sum(
            chance(n, edge, k) for k in range(n + 1) if abs(Fraction(k, n) - Fraction(1, 2)) >= Fraction(d, 2 * n)
        )
        assert found[d] == pytest.approx(float(tail), rel=1e-10), d


class Additive:
    """A stand-in for an evaluator: an example's score is the sum of what its circuit's edges are worth to it."""

    def __init__(self, graph: Graph, worth: np.ndarray, seed: int = 0) -> None:
        self.graph, self.worth, self.seed = graph, worth, seed  # [examples, writers, readers]
        self.bound = SimpleNamespace(metric=SimpleNamespace(reference=False))
        self.full, self.empty = self.of(graph.real), np.zeros(len(worth))
        self.record = cf.Record()

    def of(self, mask: np.ndarray) -> np.ndarray:
        return (self.worth * mask).sum((1, 2))

    def rounding(self, mask: np.ndarray) -> np.ndarray:
        return 8 * np.finfo(np.float64).eps * np.abs(self.worth).sum((1, 2))

    def run(self, masks: np.ndarray) -> SimpleNamespace:
        return SimpleNamespace(metric=np.stack([self.of(mask) for mask in masks]))

    metrics = Evaluator.metrics


def of_scores(circuit: np.ndarray, model: np.ndarray) -> SimpleNamespace:
    """A trial in which circuit and model score this on each example."""
    rounding = 1e-13 * np.abs(model)
    return SimpleNamespace(
        of_circuit=circuit, of_model=model, epsilon=0.1, rounding_of_model=rounding, compares_with_model=False
    )


def test_equivalence_holds_its_rate_at_the_edge_and_finds_more() -> None:
    rng, n, draws = np.random.default_rng(3), 50, 600

    def rate(better: float, ties: float) -> float:
        hits = 0
        for _ in range(draws):
            sign = rng.choice([1, -1, 0], p=[better - ties / 2, 1 - better - ties / 2, ties], size=n)
            hits += tests.equivalence(of_scores(5 + sign * rng.random(n), np.full(n, 5.0))).p_values[0] <= 0.05
        return hits / draws

    bound = 0.05 + 4 * math.sqrt(0.05 * 0.95 / draws)
    for better, ties in ((0.6, 0), (0.4, 0), (0.5, 0), (0.6, 0.3), (0.5, 0.8)):
        assert rate(better, ties) <= bound, (better, ties)
    assert rate(0.85, 0) > 0.9 and rate(0.15, 0) > 0.9 and rate(0.8, 0.2) > 0.8


def test_equivalence_counts_ties_half_and_ignores_rounding() -> None:
    model = np.full(20, 100.0)
    change = np.array([1.0] * 12 + [-1.0] * 3 + [1e-14] * 5)
    found = tests.equivalence(of_scores(model + change, model))
    assert found.statistic == pytest.approx((12 + 5 / 2) / 20) and "12 times, below 3 times" in found.said
    # 12 against 3 is a distance of 9; with 20 examples only even ones occur, and 8 is the smaller
    assert found.p_values[0] == pytest.approx(equivalence_p_values(20, 0.1)[8])
    assert tests.equivalence(of_scores(model, model)).p_values[0] == pytest.approx(1)


# -------------------------------------------------------------------- minimality, sufficiency, necessity
@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_an_inflated_circuit_has_one_more_path(graph: Graph) -> None:
    rng = np.random.default_rng(4)
    for size in (0, 5, graph.n_edges - 1):
        mask = random_circuit(graph, size, rng).mask
        for _ in range(20):
            larger, smaller = inflated(graph, mask, rng)
            added = larger & ~mask
            assert (larger & mask == mask).all() and (smaller & mask == mask).all() and added.any()
            assert (larger & ~smaller).sum() == 1 and (larger & ~smaller & mask).sum() == 0
    through = set()
    for cell in np.argwhere(graph.real):
        path = random_path(graph, cell, rng)
        assert path[tuple(cell)] and (connected(graph, path) == path).all() and not (path & ~graph.real).any()
        assert path[:, -1].sum() == 1 and path[0].sum() == 1, "one way in, one way out"
        through.add(tuple(cell))
    assert len(through) == graph.n_edges


def test_tests_of_an_additive_model_equal_their_statements() -> None:
    """Where scores are sums, each effect is known without a run."""
    graph, rng = GRAPHS[1], np.random.default_rng(9)
    worth = rng.normal(size=(6, graph.n_writers, graph.n_readers)) * graph.real
    model = Additive(graph, worth, seed=8)
    circuit = random_circuit(graph, 12, rng)
    found = hypotheses_of(model, circuit, references=30, quantile=0.6, permutations=50, alpha=0.2)

    draws = np.random.default_rng([8, 1])
    pairs = [inflated(graph, circuit.mask, draws) for _ in range(30)]
    added = [np.abs(worth[:, larger & ~smaller]).mean() for larger, smaller in pairs]
    p_values = []
    for edge in found["minimality"].edges:
        writer, reader = graph.edge(edge.name)
        effect = np.abs(worth[:, writer, reader]).mean()
        exceeded = sum(effect > other for other in added)
        assert edge.effect == pytest.approx(effect) and edge.share == exceeded / 30
        p_values.append(float(sum(chance(30, Fraction(6, 10), k) for k in range(exceeded + 1))))
        assert edge.p_value == pytest.approx(p_values[-1])
    assert [edge.name for edge in found["minimality"].edges] == circuit.edges
    np.testing.assert_allclose([edge.adjusted for edge in found["minimality"].edges], adjusted(np.array(p_values)))
    assert found["minimality"].p_value == pytest.approx(min(1, 12 * min(p_values)))

    draws = np.random.default_rng([8, 0])
    others = [random_circuit(graph, 12, draws).mask for _ in range(30)]
    outside = [np.abs((worth * (graph.real & ~mask)).sum((1, 2))).mean() for mask in (circuit.mask, *others)]
    inside = [np.abs((worth * mask).sum((1, 2))).mean() for mask in (circuit.mask, *others)]
    for name, wins in (
        ("sufficiency", sum(outside[0] < other for other in outside[1:])),
        ("partial-necessity", sum(inside[0] > other for other in inside[1:])),
    ):
        tail = float(sum(chance(30, Fraction(6, 10), k) for k in range(wins, 31)))
        assert found[name].statistic == wins / 30 and found[name].p_value == pytest.approx(tail)
        assert 0 < wins < 30, "else this says little"
    rows = np.array([row.p_value for row in found.tests])
    np.testing.assert_allclose([row.adjusted for row in found.tests], adjusted(rows))
    assert [row.rejected for row in found.tests] == [bool(row.adjusted <= 0.2) for row in found.tests]


@pytest.mark.parametrize("name", ["minimality", "sufficiency", "partial-necessity"])
def test_differences_within_rounding_beat_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Additive, "rounding", lambda self, mask: np.full(len(self.worth), 1e-9))
    graph = GRAPHS[1]
    model = Additive(graph, np.zeros((6, graph.n_writers, graph.n_readers)))
    circuit = random_circuit(graph, 12, np.random.default_rng(0))
    trial = tests.Trial(model, circuit, 0.1, permutations=10, references=20, reference_size=12, quantile=0.5)
    assert tests.TESTS[name].made(trial).statistic == 0


@pytest.mark.parametrize(("n", "quantile"), [(100, Fraction(9, 10)), (30, Fraction(1, 2))])
def test_comparisons_with_references_hold_their_rate(n: int, quantile: Fraction) -> None:
    """At the null's edge the number of references exceeded is binomial: the rate of small p-values is a finite sum."""
    trial = SimpleNamespace(references=n, quantile=float(quantile), reference_size=1)
    found = [tests._against_random(trial, np.arange(n) < wins, "").p_values[0] for wins in range(n + 1)]
    assert found == sorted(found, reverse=True) and found[0] == pytest.approx(1)
    for alpha in (0.01, 0.05, 0.2):
        rate = float(sum(chance(n, quantile, k) for k in range(n + 1) if found[k] <= alpha))
        assert 0 < rate <= alpha
    assert found[n] == pytest.approx(float(quantile) ** n)


@pytest.mark.parametrize("ablation", ["corrupted", "zero"])
def test_a_model_s_effects_equal_literal_runs(ablation: str) -> None:
    """Grouped queries, padding."""
    model = wrapped("llama")
    bound = id_task((7, 5, 6), seed=1).on(model)
    twin = Twin(model, bound, ablation)

    def literally(mask: np.ndarray) -> np.ndarray:
        kept = {tuple(edge.split("->")) for edge in model.graph.names(mask)}
        return twin.metric(run_circuit(twin.literal, twin.batch.clean, kept, twin.carried)).double().numpy()

    circuit = random_circuit(model.graph, 4, np.random.default_rng(6))
    found = cf.hypotheses(model, bound, circuit, references=4, permutations=9, ablation=ablation, seed=2)
    whole = literally(circuit.mask)
    for edge, cell in zip(found["minimality"].edges, np.argwhere(circuit.mask.T)[:, ::-1], strict=True):
        without = circuit.mask.copy()
        without[tuple(cell)] = False
        assert edge.effect == pytest.approx(np.abs(literally(without) - whole).mean(), rel=1e-3, abs=1e-4)
    draws, full = np.random.default_rng([2, 0]), literally(model.graph.real)
    others = [random_circuit(model.graph, 4, draws).mask for _ in range(4)]
    loss, *losses = (np.abs(literally(mask) - full).mean() for mask in (circuit.mask, *others))
    assert found["sufficiency"].statistic == np.mean(np.array(losses) > loss)
    rest = literally(model.graph.real & ~circuit.mask)
    assert found["independence"].statistic == pytest.approx(literal_hsic(rest.tolist(), full.tolist()), abs=1e-3)
    assert found["equivalence"].statistic == np.mean(whole > full)


# -------------------------------------------------------------------- what is known
def test_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    model = cf.load("tiny", check=False)
    bound = cf.task("ioi", model, n=10).on(model)
    graph = model.graph
    asked = ("equivalence", "sufficiency", "partial-necessity")
    evaluator = Evaluator.of(model, bound)
    best = cf.attribute(model, bound).top(40)
    good = hypotheses_of(evaluator, best, tests=asked, references=40)
    assert good["sufficiency"].rejected and good["sufficiency"].supports
    assert good["partial-necessity"].supports
    empty = hypotheses_of(evaluator, cf.Circuit.empty(graph), references=5, permutations=9)
    assert [empty[name].supports for name in asked] == [False] * 3
    assert empty["minimality"].supports is None and "no edges" in empty["minimality"].reading
    full = hypotheses_of(evaluator, cf.Circuit.full(graph), tests=(*asked, "minimality"), references=5)
    assert full["equivalence"].p_value == pytest.approx(1) and full["equivalence"].supports
    assert not full["sufficiency"].rejected and "every edge" in full["minimality"].reading

    shown = cf.hypotheses(model, bound, best, references=5, quantile=0.1)
    tables.show(shown, Output(False, ["circuitfind"]))
    content = shown.to_dict()
    json.dumps(content, allow_nan=False)
    said = capsys.readouterr().out
    assert "partial-necessity" in said and "for the circuit" in said
    edges = {row["name"]: row["edges"] for row in content["tests"]}
    assert [edge["name"] for edge in edges["minimality"]] == best.edges and not edges["sufficiency"]


@pytest.mark.shared
def test_the_textbook_circuit_passes(shared) -> None:
    model, task = cf.load(str(shared / "models/induction_2x1"), check=False), induction(24)
    asked = ("equivalence", "minimality", "sufficiency")
    found = cf.hypotheses(model, task, TEXTBOOK, tests=asked, references=50)
    passed = {row.name: row.supports for row in found.tests}
    assert passed == dict.fromkeys(asked, True)
    assert [edge.share for edge in found["minimality"].edges] == [1, 1, 1]
    padded = cf.hypotheses(model, task, [*TEXTBOOK, "input->m0"], tests=["minimality"], references=30)
    assert [edge.name for edge in padded["minimality"].edges if edge.rejected] == ["input->m0"]
    assert padded["minimality"].supports is False
    broken = cf.hypotheses(model, task, TEXTBOOK[1:], tests=["equivalence", "sufficiency"], references=30)
    assert [row.supports for row in broken.tests] == [False, False]


# -------------------------------------------------------------------- edges of what can be asked
def test_experiments_too_small_say_so() -> None:
    model = wrapped("gpt2")
    circuit = random_circuit(model.graph, 5, np.random.default_rng(0))
    found = cf.hypotheses(model, id_task((6,) * 4), circuit, references=5, permutations=10)
    assert not any(row.rejected for row in found.tests if row.name != "minimality")
    for name in ("equivalence", "independence", "sufficiency", "partial-necessity"):
        assert "too few to reject anything" in found[name].reading, name
    again = cf.hypotheses(model, id_task((6,) * 4), circuit, references=5, permutations=10)
    assert again.tests == found.tests
    other = cf.hypotheses(model, id_task((6,) * 4), circuit, references=5, permutations=10, seed=1)
    assert other["minimality"] != found["minimality"]
    larger = cf.hypotheses(model, id_task((6,) * 4), circuit, references=5, reference_size=30, tests=["sufficiency"])
    assert "random circuits of 30 edges" in larger["sufficiency"].reading


def test_against_the_clean_run_the_model_has_no_scores_of_its_own() -> None:
    model = wrapped("gpt2")
    circuit = random_circuit(model.graph, 5, np.random.default_rng(0))
    found = cf.hypotheses(model, id_task((6,) * 4), circuit, metric="kl", references=5, permutations=10)
    assert found["equivalence"].supports is None and found["independence"].supports is None
    assert np.isnan(found["equivalence"].adjusted) and not found["equivalence"].rejected
    assert found["sufficiency"].supports is not None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tests": ["equivalance"]}, "give a list of some of equivalence"),
        ({"tests": "equivalence"}, "give a list"),
        ({"tests": []}, "give a list"),
        ({"tests": ["sufficiency"] * 2}, "each once"),
        ({"epsilon": 0.5}, "epsilon"),
        ({"alpha": 0}, "alpha"),
        ({"quantile": 1.0}, "quantile"),
        ({"permutations": 0}, "permutations"),
        ({"references": 2.5}, "references"),
        ({"reference_size": 0}, "reference_size"),
        ({"correction": "bonferoni"}, "correction 'bonferoni' is unknown"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict, said: str) -> None:
    with pytest.raises(ScoreError, match=said):
        cf.hypotheses(wrapped("gpt2"), id_task(), [], **wrong)


def test_a_test_that_was_not_made() -> None:
    found = hypotheses_of(
        Additive(GRAPHS[0], np.ones((3, *GRAPHS[0].real.shape))), cf.Circuit.empty(GRAPHS[0]), references=2
    )
    with pytest.raises(ScoreError, match="no test 'faithfulness'"):
        found["faithfulness"]
