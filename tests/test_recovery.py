"""Methods on known circuits: the complete search recovers them, and each method fails where it must."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import circuitfind as cf
from circuitfind.comparison.recovery import Recovered
from circuitfind.errors import CircuitfindWarning
from circuitfind.export import picture
from circuitfind.search import complete
from circuitfind.search.trials import Deadline, Tried
from circuitfind.testbed import Blueprint, Drawing, Offset
from circuitfind.testbed.distractors import distract

pytestmark = pytest.mark.slow
SEARCHED = ("find", "find-complete")


@pytest.fixture(scope="module")
def table() -> cf.Recovery:
    circuits = ["or", "backup", "saturated", "cancelling"]
    return cf.recovery(circuits, ["exact", "eap", "eap-ig-inputs", "atp", *SEARCHED], n=16)


def row(table: cf.Recovery, circuit: str, method: str) -> Recovered:
    (found,) = (one for one in table.of(method) if one.circuit == circuit)
    return found


def test_a_complete_search_recovers_what_single_effects_do_not_show(table: cf.Recovery) -> None:
    for circuit in table.circuits:
        assert row(table, circuit, "find-complete").exact
    assert row(table, "or", "exact").found == 1  # m1->logits; ablating one head of two changes nothing
    assert row(table, "or", "find").found == 3  # one of the two ways
    assert row(table, "backup", "exact").found == 2


def test_saturated_attention_hides_edges_from_a_gradient_at_one_point(table: cf.Recovery) -> None:
    assert row(table, "saturated", "eap").found < 5
    assert row(table, "saturated", "eap-ig-inputs").exact
    assert row(table, "saturated", "exact").exact


def test_cancelling_effects_hide_a_node_and_what_it_reads(table: cf.Recovery) -> None:
    known = cf.testbed.build("cancelling", n=16)
    plain, dropped = (
        np.abs(cf.attribute(known.model, known.task, level="node", method=method)["a0.h0"])
        for method in ("atp", "atp-star")
    )
    assert plain < 0.01 < 0.1 < dropped
    assert row(table, "cancelling", "eap").found == 7  # not input->a0.h0<v>
    assert row(table, "cancelling", "eap-ig-inputs").exact


def test_a_norm_hides_the_head_that_writes_nearly_all_of_a_trained_models_stream() -> None:
    """It has no gradient along what it scales; `relp` holds the scale."""
    known = cf.testbed.build("induction-trained", n=16)
    exact, held, plain = (
        cf.attribute(known.model, known.task, method=method).to_dict()["a1.h0->logits"]
        for method in ("exact", "relp", "eap")
    )
    assert held == pytest.approx(exact, rel=0.01)
    assert abs(plain) < 0.1 * exact


def test_rows_hold_costs_and_agree_with_the_summary(table: cf.Recovery) -> None:
    for one in table.recovered:
        assert one.passes > 0
        assert math.isnan(one.auroc) == (one.method in SEARCHED)
        assert one.exact == (one.found == one.edges and not one.extra)
    best = table.summary()[0]
    assert best.method == "find-complete"
    assert best.exact == best.circuits == 4
    assert row(table, "or", "eap").passes == pytest.approx(4)  # two forward passes, one backward
    by_name = {one.method: one for one in table.summary()}
    assert by_name["eap"].of_eap == 1
    assert set(by_name["exact"].missed) == {"or", "backup"}


def test_a_result_opens_again(table: cf.Recovery, tmp_path) -> None:
    again = cf.open(table.save(tmp_path / "recovery.json"))
    assert repr(again.summary()) == repr(table.summary())  # NaN is not equal to itself
    assert len(table.save(tmp_path / "recovery.csv").read_text().splitlines()) == 1 + 4 * 6


def test_pictures_hold_a_circuit_against_the_truth(table: cf.Recovery, tmp_path) -> None:
    again = cf.open(table.save(tmp_path / "recovery.json"))
    assert set(row(again, "or", "find").missing) | set(row(again, "or", "exact").missing) > {"a0.h0->m1", "a0.h1->m1"}
    drawn = again.picture("or", "exact")
    lines = {line.partition(" [")[0].strip(): line for line in drawn.splitlines() if " -> " in line}
    assert "style=dashed" in lines['"a0.h0" -> "m1"'] and picture.MARKS[picture.MISSING] in lines['"a0.h0" -> "m1"']
    assert picture.MARKS[picture.FOUND] in lines['"m1" -> "logits"']
    assert "1 true and found" in drawn and "4 missing" in drawn and "0 not true" in drawn
    known = cf.testbed.build("or", n=2)
    one_more = known.truth | cf.Circuit.of(known.model.graph, ["input->m1"])
    assert picture.MARKS[picture.SPURIOUS] in one_more.to_dot(truth=known.truth)
    with pytest.raises(cf.ScoreError, match="circuit and method 'or, acdc' is unknown"):
        again.picture("or", "acdc")


def three_ways() -> Drawing:
    """Three heads of which any will do: the circuit of two cuts deep."""
    plan = Blueprint(["<s>", "a", "b", "c", "yes", "no"], 3)
    seen = [plan.variable(f"seen {number}", 1) for number in range(3)]
    for one in seen:
        plan.head(0, [Offset(1)], {plan.token: plan.select("a")[:, None]}, {one: 1})
    says = 4 * (plan.select("yes") - plan.select("no"))
    takes = torch.ones(1, 2)
    plan.table(1, dict.fromkeys(seen, takes), torch.tensor([0.0, -1.0]), {plan.output: torch.stack([says, -says])})

    def draw(rng: random.Random) -> cf.Pair:
        return cf.Pair(f"a {rng.choice('abc')}", f"{rng.choice('bc')} {rng.choice('abc')}", ("yes",), ("no",))

    pairs = [("a0.h0->m1", "a0.h1->m1"), ("a0.h0->m1", "a0.h2->m1"), ("a0.h1->m1", "a0.h2->m1")]
    return Drawing(plan, draw, ((), *pairs))


def test_a_third_way_is_found_behind_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    known = cf.testbed.build(three_ways(), n=12)
    cf.testbed.prove(known, 6)
    asked = {"max_checks": 0, "random": 0, "knockouts": 0, "complete": True}
    found = cf.find(known.model, known.task, **asked)
    assert found.circuit.edges == known.truth.edges
    monkeypatch.setattr(complete, "STAND_INS", 0)
    assert cf.find(known.model, known.task, **asked).circuit.edges != known.truth.edges


def strong_and_weak(share: float) -> Drawing:
    """Two heads of which an MLP makes the answer, one of them so much of it."""
    plan = Blueprint(["<s>", "a", "b", "c", "u", "v", "yes", "no"], 4)
    says = 5 * (plan.select("yes") - plan.select("no"))[None]
    for word, back, part in (("a", 1, 1 - share), ("u", 2, share)):
        seen = plan.variable(word, 1)
        plan.head(0, [Offset(back)], {plan.token: plan.select(word)[:, None]}, {seen: 1})
        plan.table(1, {seen: torch.ones(1, 1)}, 0.0, {plan.output: part * says})
    distract(plan)

    def draw(rng: random.Random) -> cf.Pair:
        return cf.Pair(f"u a {rng.choice('abc')}", f"v {rng.choice('bc')} {rng.choice('abc')}", ("yes",), ("no",))

    return Drawing(plan, draw, needed=share / 2)


@pytest.mark.parametrize(("share", "found"), [(0.03, 5), (0.01, 3)])
def test_what_matters_less_than_two_percent_is_not_added(share: float, found: int) -> None:
    known = cf.testbed.build(strong_and_weak(share), n=8)
    cf.testbed.prove(known, 6)  # by what this drawing asks of a true edge
    circuit = cf.find(known.model, known.task, complete=True, max_checks=0, random=0, knockouts=0).circuit
    assert len(circuit & known.truth) == len(circuit) == found


def test_a_complete_search_keeps_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step from contexts to confirming: the circuit is that of the search before it with what is confirmed by
    then, and says why."""
    known = cf.testbed.build("or", n=8)
    asked = {"max_checks": 0, "random": 0, "knockouts": 0}
    smallest, left = cf.find(known.model, known.task, **asked).circuit, Deadline.left
    for step in ("_screen", "_confirm", "_stand_ins"):
        with monkeypatch.context() as patch:
            run = getattr(complete.Completion, step)

            def late(self: complete.Completion, *more: Any, run: Any = run, patch: Any = patch) -> Any:
                patch.setattr(Deadline, "left", lambda self, part=1.0: -1.0 if part < 1 else left(self))
                return run(self, *more)

            patch.setattr(complete.Completion, step, late)
            with pytest.warns(CircuitfindWarning, match="it has not finished looking for what stands in"):
                found = cf.find(known.model, known.task, complete=True, time_limit=1000.0, **asked)
        if step == "_stand_ins":
            assert set(smallest.edges) < set(found.circuit.edges) <= {*smallest.edges, *known.truth.edges}
        else:
            assert found.circuit.edges == smallest.edges, step
        assert "stopped" in found.circuit.facts


def test_runs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    known, counts = cf.testbed.build("or", n=8), []
    monkeypatch.setattr(complete, "CONFIRMED", 7)
    run = complete._Tests.run

    def counted(self: complete._Tests, cells: np.ndarray, contexts: np.ndarray) -> None:
        run(self, cells, contexts)
        counts.append(self.left)

    monkeypatch.setattr(complete._Tests, "run", counted)
    cf.find(known.model, known.task, complete=True, max_checks=0, random=0, knockouts=0)
    assert min(counts) >= 0
    assert counts[-1] == 0


def test_wrong_input() -> None:
    with pytest.raises(cf.ScoreError, match="method 'epa' is unknown"):
        cf.recovery(["or"], ["epa"])
    with pytest.raises(cf.ScoreError, match="testbed circuit 'xor'"):
        cf.recovery(["xor"], ["eap"])


def test_what_was_not_run_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    known = cf.testbed.build("or", n=8)
    asked = {"max_checks": 0, "random": 0, "knockouts": 0}
    monkeypatch.setattr(complete, "CONFIRMED", 0)
    found = cf.find(known.model, known.task, complete=True, **asked)
    assert found.circuit.edges == cf.find(known.model, known.task, **asked).circuit.edges


def test_a_circuit_on_target_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each of its edges hardly matters, they are not dropped together."""
    known = cf.testbed.build("ioi", n=8)
    monkeypatch.setattr(complete, "LEFT", 2.0)
    found = cf.find(known.model, known.task, complete=True, max_checks=0, random=0, knockouts=0)
    assert found.circuit.edges == known.truth.edges


def test_a_complete_circuit_that_is_off_target_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    known, completed = cf.testbed.build("or", n=8), complete.Completion.completed

    def off(self: complete.Completion, circuit: Tried) -> Tried:
        monkeypatch.setattr(self.trials, "meets", lambda tried: tried is circuit)
        return completed(self, circuit)

    monkeypatch.setattr(complete.Completion, "completed", off)
    with pytest.warns(CircuitfindWarning, match="off target .faithfulness 1.00 on the search pairs"):
        cf.find(known.model, known.task, complete=True, max_checks=0, random=0, knockouts=0)


def test_weak_edges_bring_a_complete_circuit_back_on_target(monkeypatch: pytest.MonkeyPatch) -> None:
    known, completed = cf.testbed.build("or", n=8), complete.Completion.completed
    asked = {"max_checks": 0, "random": 0, "knockouts": 0}
    whole = cf.find(known.model, known.task, complete=True, **asked).circuit

    def off(self: complete.Completion, circuit: Tried) -> Tried:
        most = 1 + max(len(whole), int((circuit.mask | whole.mask).sum()))
        monkeypatch.setattr(self.trials, "meets", lambda tried: tried is circuit or tried.n_edges > most)
        return completed(self, circuit)

    monkeypatch.setattr(complete.Completion, "completed", off)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CircuitfindWarning)
        found = cf.find(known.model, known.task, complete=True, **asked)
    assert set(whole.edges) < set(found.circuit.edges) and len(found.circuit) < known.model.graph.n_edges
    assert any("edges were added to compensate" in step.text for step in found.steps)


def test_models_without_a_node_are_no_circuits_of_the_search() -> None:
    known = cf.testbed.build("or", n=8)
    found = cf.find(known.model, known.task, complete=True, max_checks=0, random=0, knockouts=0)
    assert sum(tried.stage == "complete" for tried in found.curve) == 1  # the contexts are none


def test_a_complete_circuit_has_no_size() -> None:
    known = cf.testbed.build("or", n=8)
    with pytest.raises(cf.ScoreError, match="leave edges= out"):
        cf.find(known.model, known.task, complete=True, edges=3)
