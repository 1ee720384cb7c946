"""A result knows the pairs that it was found on, so that nothing is silently judged on them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toys import contrast, wrapped

import circuitfind as cf
from circuitfind.errors import TaskError
from circuitfind.record import Record, fingerprints
from circuitfind.tasks.bound import BoundTask


@pytest.fixture(scope="module")
def llama() -> cf.Model:
    return wrapped("llama")


@pytest.fixture(scope="module")
def bound(llama: cf.Model) -> BoundTask:
    return contrast(3, (7, 6, 5, 7, 6, 7)).on(llama)


@pytest.fixture(scope="module")
def scores(llama: cf.Model, bound: BoundTask) -> cf.Scores:
    found = cf.attribute(llama, bound.subset([0, 1, 4]), "eap")
    assert isinstance(found, cf.Scores)
    return found


def test_fingerprints_tell_pairs_apart() -> None:
    prompts = [("a b", "c"), ("a", "b c"), ("a b", "d"), ("b", "c"), ("c", "a b"), ("a b", "c")]
    marks = fingerprints(*zip(*prompts, strict=True))
    assert all(len(mark) == 8 and int(mark, 16) >= 0 for mark in marks)
    assert marks[0] == marks[5] and len(set(marks)) == 5
    assert fingerprints(["\ud800"], ["x"])  # half a character, as a tokenizer may leave it


def test_records_count_what_they_share() -> None:
    one, other = (Record(pairs="".join(fingerprints(clean, clean))) for clean in ("aabc", "cddd"))
    assert (one.seen(other), other.seen(one)) == (1, 1)
    assert one.seen(one) == 4 and other.seen(other) == 4  # every row counts
    assert one.seen(Record()) is None is Record().seen(one)
    both = one.seeing(other)
    assert both.seen(one) == 4 == both.seen(other) and one.seen(both) == 3
    assert one.seeing(Record()).pairs == "" == Record().seeing(one).pairs


def test_judges_say_how_many_pairs_were_seen(llama: cf.Model, bound: BoundTask, scores: cf.Scores) -> None:
    circuit = scores.top(40)
    for rows, seen in (((0, 1, 4), 3), ((2, 3, 5), 0), (range(6), 3), ((4, 5, 3), 1)):
        pairs = bound.subset(list(rows))
        assert cf.evaluate(llama, pairs, circuit, metric="kl").seen_pairs == seen
        assert cf.curve(llama, pairs, scores, sizes=[9], metric="kl").seen_pairs == seen
    assert cf.evaluate(llama, bound, circuit.edges).seen_pairs is None
    assert cf.evaluate(llama, bound, circuit.connected() & scores.top(60)).seen_pairs == 3
    assert cf.completeness(llama, bound, circuit, knockouts=1).seen_pairs == 3
    assert cf.minimality(llama, bound, scores.top(6)).seen_pairs == 3
    more = cf.attribute(llama, bound.subset([5]), "eap").top(30)
    assert cf.curve(llama, bound, [circuit, more]).seen_pairs == 4
    assert cf.curve(llama, bound, [circuit, cf.Circuit.full(llama.graph)]).seen_pairs is None
    assert cf.evaluate(llama, bound, circuit).to_dict()["seen_pairs"] == 3


def test_a_search_from_given_scores_has_seen_both(llama: cf.Model, bound: BoundTask, scores: cf.Scores) -> None:
    search, unseen = bound.split(0.5, 1)
    found = cf.find(llama, bound, scores=scores, max_checks=2, random=0, seed=1)
    assert found.circuit.record.seen(cf.evaluate(llama, search, []).record) == len(search)
    already = scores.record.seen(found.checks.evaluation.record)
    assert found.checks.evaluation.seen_pairs == already and 0 < already < len(unseen)
    assert cf.find(llama, bound, method="eap", max_checks=2, random=0).checks.evaluation.seen_pairs == 0


def test_unseen_leaves_the_search_pairs_out(llama: cf.Model, bound: BoundTask, scores: cf.Scores) -> None:
    left = cf.unseen(llama, bound, scores.top(5))
    assert left.prompts == tuple(bound.prompts[row] for row in (2, 3, 5))
    assert cf.unseen(llama, left, scores).prompts == left.prompts
    with pytest.raises(TaskError, match="all 2 pairs were used to find this circuit"):
        cf.unseen(llama, bound.subset([0, 4]), scores.top(5))
    with pytest.raises(TaskError, match="this Circuit does not say which pairs"):
        cf.unseen(llama, bound, cf.Circuit.full(llama.graph))


def test_files_keep_the_pairs_and_older_files_open(scores: cf.Scores, tmp_path: Path) -> None:
    circuit = scores.top(20)
    saved = circuit.save(tmp_path / "circuit.json")
    assert cf.Circuit.open(saved).record.pairs == scores.record.pairs != ""
    content = json.loads(saved.read_text())
    del content["record"]["pairs"]
    saved.write_text(json.dumps(content))
    assert cf.Circuit.open(saved).record == dataclasses.replace(circuit.record, pairs="")

    kept = scores.save(tmp_path / "scores.safetensors")
    assert cf.Scores.open(kept).record.pairs == scores.record.pairs
    record = dataclasses.asdict(scores.record)
    del record["pairs"]
    graph = dataclasses.asdict(scores.graph)
    header = {"format": "circuitfind.scores", "version": "1", "level": "edge", "graph": json.dumps(graph)}
    save_file(load_file(kept), kept, metadata={**header, "record": json.dumps(record)})
    old = cf.Scores.open(kept)
    assert old.record.pairs == "" and np.array_equal(old.values, scores.values)
