"""What a circuit or scores were made with is what they are judged with, unless a keyword says otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import contrast, wrapped

import circuitfind as cf

MADE = {"metric": "kl", "ablation": "mean"}
CALLS: dict[str, Callable[..., Any]] = {
    "evaluate": lambda *given, **asked: cf.evaluate(*given, **asked),
    "completeness": lambda *given, **asked: cf.completeness(*given, knockouts=2, **asked),
    "minimality": lambda *given, **asked: cf.minimality(*given, **asked),
    "hypotheses": lambda *given, **asked: cf.hypotheses(*given, tests=["independence"], permutations=9, **asked),
    "curve": lambda *given, **asked: cf.curve(*given, sizes=[10], **asked),
    "curve of circuits": lambda model, task, found, **asked: cf.curve(model, task, [found, found], **asked),
    "mib": lambda *given, **asked: cf.mib(*given, **asked),
    "verify": lambda *given, **asked: cf.verify(*given, top=25, random=1, **asked),
}
OF_SCORES = ("curve", "mib", "verify")


@pytest.fixture(scope="module")
def model() -> cf.Model:
    return wrapped("llama")


@pytest.fixture(scope="module")
def scores(model: cf.Model) -> cf.Scores:
    found = cf.attribute(model, contrast(2), "exact", **MADE)
    assert isinstance(found, cf.Scores)
    return found


def given(call: str, scores: cf.Scores) -> Any:
    return scores if call in OF_SCORES else scores.top(15)


def record_of(found: Any) -> cf.Record:
    found = getattr(found, "signed", found)
    return found.evaluation.record if isinstance(found, cf.Verification) else found.record


@pytest.mark.parametrize("call", CALLS)
def test_judged_as_made_by_default(model: cf.Model, scores: cf.Scores, call: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*judged with.*")
        found = CALLS[call](model, contrast(2), given(call, scores))
        again = CALLS[call](model, contrast(2), given(call, scores), **MADE)
    for one in (found, again):
        assert (record_of(one).metric, record_of(one).ablation) == ("kl", "mean")


@pytest.mark.parametrize("call", CALLS)
def test_other_values_are_warned_of_at_the_line_that_asks(model: cf.Model, scores: cf.Scores, call: str) -> None:
    made = "the scores were" if call in OF_SCORES else "the circuits were" if "of" in call else "the circuit was"
    with pytest.warns(UserWarning) as caught:
        found = CALLS[call](model, contrast(2), given(call, scores), metric="logit_diff", ablation="zero")
    assert (record_of(found).metric, record_of(found).ablation) == ("logit_diff", "zero")
    said = [str(one.message) for one in caught]
    assert f"{made} made with metric='kl' and judged with metric='logit_diff', as asked" in said
    assert f"{made} made with ablation='mean' and judged with ablation='zero', as asked" in said
    assert {Path(one.filename) for one in caught} == {Path(__file__)}


def test_the_number_is_that_of_the_ablation_it_was_found_with(model: cf.Model, scores: cf.Scores) -> None:
    circuit = scores.top(15)
    alone = cf.Circuit(circuit.graph, circuit.mask)  # says nothing of its making
    as_made = cf.evaluate(model, contrast(2), circuit)
    assert as_made.faithfulness == cf.evaluate(model, contrast(2), alone, **MADE).faithfulness
    by_default = cf.evaluate(model, contrast(2), alone)
    assert (by_default.record.metric, by_default.record.ablation) == ("logit_diff", "corrupted")
    assert abs(by_default.faithfulness - as_made.faithfulness) > 1e-3


def test_what_no_run_made_is_judged_as_asked_without_a_word(model: cf.Model, scores: cf.Scores) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*judged with.*")
        found = cf.evaluate(model, contrast(2), scores.top(15).edges, ablation="zero")
    assert found.record.ablation == "zero"


def test_a_model_runs_as_a_circuit_under_the_ablation_of_the_circuit(model: cf.Model, scores: cf.Scores) -> None:
    circuit, task = scores.top(15), contrast(2)
    ran = {}
    for ablation in (None, "mean", "zero"):
        with warnings.catch_warnings(record=True) as caught, cf.only(model, circuit, task, ablation=ablation) as held:
            ran[ablation] = held.hf(**held.inputs()).logits.numpy(force=True)
        assert [Path(one.filename).name for one in caught] == ["test_inherited.py"] * (ablation == "zero")
    np.testing.assert_array_equal(ran[None], ran["mean"])
    assert np.abs(ran["zero"] - ran["mean"]).max() > 1e-3


def test_bos_rules_of_older_records_have_their_names_of_today() -> None:
    old = ("tokenizer's own: none", "tokenizer's own: added", "none", "")
    assert [cf.Record(bos=one).bos for one in old] == ["none", "added by the tokenizer", "none", ""]
