"""Stability against its definition: scores of a resample are `attribute` on it, agreement is counted edge by edge."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
from toys import FOUR, id_task, wrapped

import circuitfind as cf
from circuitfind.attribution import by_example
from circuitfind.attribution.methods import method_of, request_of
from circuitfind.cli import tables
from circuitfind.cli.output import Output
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import FileError, ScoreError, TaskError
from circuitfind.evaluation.variants import like, variants
from circuitfind.scores import By
from circuitfind.statistics import rank_correlation
from circuitfind.tasks.bound import BoundTask

TASK = id_task((7, 5, 6, 7, 4), seed=1)


def in_order(scores: cf.Scores) -> np.ndarray:
    """`[edges]` as `example_effects` lists them."""
    return np.array(list(scores.to_dict().values()))


# -------------------------------------------------------------------- example by example
def example_effects(model: cf.Model, bound: cf.Task, method: str = "eap-ig-inputs", **asked: object) -> np.ndarray:
    chosen = method_of(method)
    request, setting = request_of(chosen, "edge", None, asked)
    return by_example.example_effects(Experiment.of(model, bound, setting), chosen, request)


@pytest.mark.parametrize("name", FOUR)
def test_each_example_is_scored_as_if_alone(name: str) -> None:
    model = wrapped(name)
    bound = TASK.on(model)
    effects = example_effects(model, bound, steps=3, batch_size=2)
    assert effects.shape == (5, model.graph.n_edges) and effects.dtype == np.float32
    for row, found in enumerate(effects):
        alone = in_order(cf.attribute(model, bound.subset([row]), steps=3))
        np.testing.assert_allclose(found, alone, atol=2e-5 * np.abs(alone).max())


@pytest.mark.parametrize(
    "given",
    [
        {"method": "eap"},
        {"method": "eap", "direction": "denoising"},
        {"method": "eap", "ablation": "zero"},
        {"method": "eap", "ablation": "mean"},
        {"method": "eap", "ablation": "resample", "seed": 3},
        {"method": "eap-ig-inputs", "steps": 2, "rule": "midpoint"},
        {"method": "clean-corrupted"},
        {"method": "exact"},
    ],
    ids=str,
)
def test_the_mean_of_the_examples_is_attribute(given: dict) -> None:
    model = wrapped("llama")
    bound = (id_task((6,) * 5, seed=1) if given.get("ablation") == "resample" else TASK).on(model)
    whole = in_order(cf.attribute(model, bound, **given))
    effects = example_effects(model, bound, **given)
    np.testing.assert_allclose(effects.mean(0), whole, atol=2e-5 * np.abs(whole).max())
    assert np.ptp(effects, axis=0).max() > np.abs(whole).max() / 10, "examples differ, else this says little"


def test_metrics_that_compare_with_the_clean_run() -> None:
    model = wrapped("gpt2")
    bound = TASK.on(model).with_metric("kl")
    whole = in_order(cf.attribute(model, bound))
    np.testing.assert_allclose(example_effects(model, bound).mean(0), whole, atol=2e-5 * np.abs(whole).max())
    with pytest.raises(ScoreError, match="flat at the clean run"):
        example_effects(model, bound, method="eap")


# -------------------------------------------------------------------- resamples
@pytest.mark.parametrize("by", ["absolute", "signed"])
def test_a_resample_s_circuit_is_that_of_attribute_on_it(by: By) -> None:
    model = wrapped("llama")
    bound = TASK.on(model)
    found = cf.stability(model, bound, n_edges=25, by=by, resamples=6, sizes=[2, 5], seed=4)
    rng = np.random.default_rng(4)
    scores = [cf.attribute(model, bound.subset(rng.integers(5, size=5).tolist())) for _ in range(6)]
    circuits = [one.top(25, by) for one in scores]
    assert [circuit.edges for circuit in found.circuits] == [circuit.edges for circuit in circuits]
    assert found.sizes == (5,) * 6 and len(found.labels) == 6
    jaccards = [a.jaccard(b) for a, b in combinations(circuits, 2)]
    assert found.jaccard == pytest.approx(np.mean(jaccards)) and 0 < found.jaccard < 1
    assert found.interval == pytest.approx(np.quantile(jaccards, [0.025, 0.975]))
    np.testing.assert_array_equal(np.diag(found.jaccards), 1)
    assert found.jaccards[1, 4] == pytest.approx(circuits[1].jaccard(circuits[4]))
    ranked = [in_order(one) if by == "signed" else np.abs(in_order(one)) for one in scores]
    rhos = [rank_correlation(a, b) for a, b in combinations(ranked, 2)]
    assert found.rank_correlation == pytest.approx(np.mean(rhos), abs=1e-3)

    assert [point.n_pairs for point in found.curve] == [2, 5]
    assert (found.curve[1].jaccard, found.curve[1].interval) == (found.jaccard, found.interval)
    small = [cf.attribute(model, bound.subset(rng.integers(5, size=2).tolist())).top(25, by) for _ in range(6)]
    assert found.curve[0].jaccard == pytest.approx(np.mean([a.jaccard(b) for a, b in combinations(small, 2)]))


def test_frequencies_are_counts() -> None:
    model = wrapped("gpt2")
    found = cf.stability(model, TASK, n_edges=30, resamples=10, sizes=[])
    lists = [circuit.edges for circuit in found.circuits]
    counts = {name: sum(name in edges for edges in lists) for name in model.graph.names(model.graph.real)}
    for name, times in counts.items():
        assert found.frequency[model.graph.edge(name)] == times / 10
    assert dict(found.stable) == {name: times / 10 for name, times in counts.items() if times >= 9}
    assert [share for _, share in found.stable] == sorted((share for _, share in found.stable), reverse=True)
    assert found.core(0.5).edges == [name for name, times in counts.items() if times >= 5]
    assert 0 < len(found.stable) < len(found.core(0.1)) and found.curve == ()
    again = cf.stability(model, TASK, n_edges=30, resamples=10, sizes=[])
    assert again.to_dict() == found.to_dict()
    assert cf.stability(model, TASK, n_edges=30, resamples=10, sizes=[], seed=1).jaccard != found.jaccard
    assert "NaN" not in json.dumps(found.to_dict()) and found.record.settings["n_edges"] == 30


def test_more_pairs_agree_more() -> None:
    model = cf.load("tiny", check=False)
    found = cf.stability(model, cf.task("ioi", model, n=16), method="eap", n_edges=60, resamples=20)
    assert [point.n_pairs for point in found.curve] == [4, 8, 16]
    agreement = [point.jaccard for point in found.curve]
    assert agreement == sorted(agreement) and agreement[0] < 0.9 * agreement[-1]
    assert all(point.interval.low <= point.jaccard <= point.interval.high for point in found.curve)


# -------------------------------------------------------------------- several tasks
def test_tasks_that_differ_agree_less_than_their_pairs_shuffled(capsys: pytest.CaptureFixture[str]) -> None:
    model = cf.load("tiny", check=False)
    parts = {name: cf.task(name, model, n=6) for name in ("ioi", "induction", "gendered-pronoun")}
    found = cf.stability(model, parts, method="eap", n_edges=50, resamples=12)
    assert found.labels == tuple(parts) and found.sizes == (6, 6, 6) and found.curve == ()
    for circuit, task in zip(found.circuits, parts.values(), strict=True):
        assert circuit.edges == cf.attribute(model, task, "eap").top(50).edges
    assert found.shuffled is not None and found.jaccard < 0.8 * found.shuffled

    same = cf.by_seed("ioi", model, range(3), n=8)
    drawn = cf.stability(model, same, method="eap", n_edges=50, resamples=30)
    assert drawn.labels == ("seed 0", "seed 1", "seed 2")
    assert drawn.shuffled == pytest.approx(drawn.jaccard, abs=0.1), "draws of one generator are as alike as any"
    tables.show(found, Output(False, ["circuitfind"]))
    assert "divided at random" in capsys.readouterr().out


def test_a_behaviour_by_template_and_by_seed() -> None:
    model = cf.load("tiny", check=False)
    forms = cf.by_template("gendered-pronoun", model, n=4)
    assert len(forms) > 2
    assert all(
        task.clean == cf.task("gendered-pronoun", model, n=4, template=name).clean for name, task in forms.items()
    )
    with pytest.raises(TaskError, match="'greater-than' has fewer than two templates"):
        cf.by_template("greater-than", model)
    assert cf.by_seed("ioi", model, [7], n=3)["seed 7"].clean == cf.task("ioi", model, n=3, seed=7).clean


# -------------------------------------------------------------------- searches
def test_a_search_runs_on_each_sample() -> None:
    model = wrapped("gpt2")
    seen: list[BoundTask] = []

    def search(task: BoundTask) -> cf.Circuit:
        seen.append(task)
        return cf.attribute(model, task, "eap").top(20)

    searched = cf.stability(model, TASK, search=search, resamples=4, seed=2)
    scored = cf.stability(model, TASK, method="eap", n_edges=20, resamples=4, seed=2)
    assert [a.edges for a in searched.circuits] == [a.edges for a in scored.circuits]
    assert searched.jaccard == scored.jaccard and len(seen) == 4 and searched.curve == ()
    assert searched.rank_correlations is None and np.isnan(searched.rank_correlation)
    assert searched.record.method == "search"
    rng = np.random.default_rng(2)
    prompts = TASK.on(model).prompts
    assert [task.prompts for task in seen] == [tuple(prompts[i] for i in rng.integers(5, size=5)) for _ in range(4)]

    seen.clear()
    both = {"a": TASK, "b": id_task((6, 6, 6), seed=9)}
    found = cf.stability(model, both, search=search, resamples=2)
    assert [task.prompts for task in seen] == [task.on(model).prompts for task in both.values()]
    assert found.shuffled is None and found.sizes == (5, 3)
    assert len(cf.stability(model, TASK, search=search, resamples=2, sizes=[3]).curve) == 1


# -------------------------------------------------------------------- the command line's part
def test_tables_and_document(capsys: pytest.CaptureFixture[str]) -> None:
    model = cf.load("tiny", check=False)
    bound = cf.task("ioi", model, n=8).on(model)
    circuit = cf.attribute(model, bound, "eap").top(40, "signed")
    out = Output(False, ["circuitfind"])
    found = cf.stability(model, bound, **like(circuit, resamples=5))
    tables.show(found, out)
    content = found.to_dict()
    json.dumps(content, allow_nan=False)
    made = content["record"]
    assert (made["method"], made["settings"]["n_edges"], made["settings"]["by"]) == ("eap", len(circuit), "signed")
    assert [point["n_pairs"] for point in content["curve"]] == [4, 8]
    said = capsys.readouterr().out
    assert "Agreement by number of pairs" in said and "in at least 90% of the circuits" in said

    zeroed = cf.stability(model, bound, **like(circuit, resamples=2, ablation="zero")).record
    assert (zeroed.method, zeroed.ablation) == ("eap", "zero")
    by_hand = cf.Circuit.of(model.graph, circuit.edges)
    assert cf.stability(model, bound, **like(by_hand, resamples=2, ablation="zero")).record.ablation == "zero"


def test_what_stability_is_measured_over() -> None:
    model = cf.load("tiny", check=False)
    bound = cf.task("ioi", model, n=8).on(model)
    some = variants(model, bound, "seeds", "ioi", n=4, template="abba")
    only = cf.task("ioi", model, n=4, seed=1, template="abba").on(model).prompts
    assert some["seed 1"].on(model).prompts == only != cf.task("ioi", model, n=4, seed=1).on(model).prompts
    with pytest.raises(TaskError, match=r"leave out template="):
        variants(model, bound, "templates", "ioi", n=4, template="abba")
    assert variants(model, bound, "pairs", "ioi", seed=3, n=4) is bound
    assert list(variants(model, bound, "seeds", "ioi", seed=3, n=4)) == [f"seed {k}" for k in range(3, 8)]
    assert len(variants(model, bound, "templates", "ioi", seed=3, n=4)) > 4
    with pytest.raises(TaskError, match="'ioi' comes from a file"):
        variants(model, bound, "seeds", None)
    with pytest.raises(TaskError, match="did you mean 'seeds'"):
        variants(model, bound, "seed", "ioi")


# -------------------------------------------------------------------- what cannot be asked
@pytest.mark.parametrize(
    ("wrong", "kind", "said"),
    [
        ({"method": "acdc"}, ScoreError, "method 'acdc' is unknown"),
        ({"method": "weights"}, ScoreError, "give search="),
        ({"ablation": "zero"}, ScoreError, "needs ablation='corrupted'"),
        ({"method": "eap", "ablation": "zero", "direction": "denoising"}, ScoreError, "denoising"),
        ({"n_edges": -1}, ScoreError, "n=-1"),
        ({"by": "size"}, ScoreError, "by='size'"),
        ({"resamples": 1}, ScoreError, "resamples=1: give a whole number, 2 or more"),
        ({"sizes": [6]}, ScoreError, "sizes=6: give a whole number, 1 to 5"),
        ({"sizes": [0]}, ScoreError, "sizes=0"),
        ({"task": TASK.__class__(TASK.clean[:1], TASK.corrupted[:1], TASK.answers[:1], TASK.wrong_answers[:1])},
         TaskError, "a single pair cannot be resampled"),
        ({"task": {"a": TASK}}, TaskError, "1 tasks cannot be compared"),
        ({"task": {"a": TASK, "b": TASK}, "sizes": [2]}, ScoreError, "leave out sizes"),
        ({"search": lambda task: cf.Circuit.empty(wrapped("llama").graph)}, FileError, "belongs to another model"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(wrong: dict, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        cf.stability(wrapped("gpt2"), **{"task": TASK, "resamples": 3, **wrong})


def test_too_much_for_memory_is_refused_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("gpt2")
    monkeypatch.setattr(by_example, "BY_EXAMPLE", 4 * model.graph.n_edges * 3)
    with pytest.raises(ScoreError, match="give at most 3 pairs"):
        cf.stability(model, TASK)
