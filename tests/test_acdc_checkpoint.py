"""A stopped ACDC run goes on where it was, and ends as if it had not been stopped: to the bit, even after a SIGKILL."""

from __future__ import annotations

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch
from families import build
from helpers import ended_by
from test_acdc import some_pairs, telling

import circuitfind as cf
from circuitfind.checkpoint import CheckpointFile
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.revision import CircuitState
from circuitfind.errors import CircuitfindWarning, FileError
from circuitfind.search import acdc_pruning
from circuitfind.search.acdc import acdc_scores

BETWEEN = 12
OPTIONS = {"metric": None, "order": "shuffled", "seed": 3, "remove_dangling": "tested", "side_by_side": 2}


@pytest.fixture(scope="module")
def model() -> cf.Model:
    return cf.wrap(build("llama"), backend="hooks")


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models have few edges: makes states anew, and so writes, more often than every 128 trials."""
    monkeypatch.setattr(acdc_pruning, "RUNS_BETWEEN_STATES", BETWEEN)


class Stopping:
    """`CircuitState.attempt` that is interrupted at its n-th call, and counts the trials of the others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None = None) -> None:
        self.trials, self.calls, self.at, self.original = 0, 0, at, CircuitState.attempt
        monkeypatch.setattr(CircuitState, "attempt", lambda state, removals: self(state, removals))

    def __call__(self, state: CircuitState, removals: list) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        self.trials += len(removals)
        return self.original(state, removals)


def same(one: cf.Circuit, other: cf.Circuit) -> None:
    assert np.array_equal(one.mask, other.mask)
    np.testing.assert_array_equal(one.exact, other.exact)
    assert one.facts == other.facts and one.record == other.record


def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(model, tmp_path, monkeypatch):
    task, file = some_pairs(), tmp_path / "run" / "acdc.ckpt"
    threshold = telling(model, task)
    with monkeypatch.context() as patch:
        count = Stopping(patch)
        whole = cf.acdc(model, task, threshold, **OPTIONS)
    stops = [count.calls // 3, count.calls // 3, 2 * BETWEEN]
    trials = []
    for at in stops:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stopping = Stopping(patch, at)
            cf.acdc(model, task, threshold, checkpoint=file, **OPTIONS)
        trials.append(stopping.trials)
        assert file.is_file()
        file.with_name("acdc.ckpt.part").write_text("a write that was cut short")
    with monkeypatch.context() as patch:
        last = Stopping(patch)
        resumed = cf.acdc(model, task, threshold, checkpoint=file, **OPTIONS)
    same(resumed, whole)
    assert 0 < len(whole) < model.graph.n_edges and whole.facts["trials_run"] > 4 * BETWEEN
    again = sum(trials) + last.trials - count.trials
    assert 0 <= again <= len(stops) * (BETWEEN + 2), "what is tried again is what came after the last write"
    assert not file.exists()


def test_a_file_of_another_run_is_refused_and_kept(model, tmp_path, monkeypatch):
    task, file = some_pairs(), tmp_path / "acdc.ckpt"
    threshold = telling(model, task)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Stopping(patch, 2 * BETWEEN)
        cf.acdc(model, task, threshold, checkpoint=file, **OPTIONS)
    before = file.read_bytes()
    scores = cf.attribute(model, task, "exact")
    others = [{"absolute": True}, {"seed": 4}, {"metric": "kl"}, {"ablation": "zero"}, {"remove_dangling": "untested"}]
    others += [{"order": "reverse-topological"}, {"screen": 0.1, "scores": scores}]
    for other in others:
        with pytest.raises(FileError, match=r"acdc\.ckpt is the checkpoint of another run .*threshold.*remove it"):
            cf.acdc(model, task, threshold, checkpoint=file, **{**OPTIONS, **other})
    for args in ((model, task, 2 * threshold), (model, some_pairs(1), threshold)):
        with pytest.raises(FileError, match="another run"):
            cf.acdc(*args, checkpoint=file, **OPTIONS)
    with pytest.raises(FileError, match="another run"):
        cf.acdc(cf.wrap(build("llama", seed=1)), task, threshold, checkpoint=file, **OPTIONS)
    assert file.read_bytes() == before
    file.write_text("something else")
    with pytest.raises(FileError, match="is no checkpoint of circuitfind"):
        cf.acdc(model, task, threshold, checkpoint=file, **OPTIONS)
    assert file.read_text() == "something else"
    (tmp_path / "taken").write_text("")
    with pytest.warns(CircuitfindWarning, match=r"taken.* cannot be written: .*; the run goes on without it"):
        CheckpointFile(tmp_path / "taken" / "acdc.ckpt", "key", "model").write({"a": np.zeros(1)})


@pytest.mark.parametrize("field", ["clean", "corrupted", "answers", "wrong_answers"])
def test_the_key_of_a_run_knows_every_pair(model, field):
    """The metric's values on the first pair are in the key, too: only what differs in a later pair needs the rest."""
    task = some_pairs()
    keys = {Experiment.of(model, task, {}).key()}
    values = torch.as_tensor(getattr(task, field)).clone()
    values[-1] = (values[-1] + 1) % 128
    keys.add(Experiment.of(model, dataclasses.replace(task, **{field: values}), {}).key())
    assert len(keys) == 2 and Experiment.of(model, some_pairs(), {}).key() in keys


def test_a_stopped_curve_goes_on_in_the_run_that_was_stopped(model, tmp_path, monkeypatch):
    task, file = some_pairs(), tmp_path / "curve.ckpt"
    grid = [telling(model, task) * factor for factor in (0.5, 1, 2)]
    with monkeypatch.context() as patch:
        count = Stopping(patch)
        whole = acdc_scores(model, task, grid, metric=None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        first = Stopping(patch, 2 * count.calls // 3)
        acdc_scores(model, task, grid, metric=None, checkpoint=file)
    assert {path.name for path in tmp_path.iterdir()} >= {"curve.ckpt.0"}
    with monkeypatch.context() as patch:
        second = Stopping(patch)
        resumed = acdc_scores(model, task, grid, metric=None, checkpoint=file)
    np.testing.assert_array_equal(resumed.values, whole.values)
    assert resumed.record == whole.record and not list(tmp_path.iterdir())
    assert 0 <= first.trials + second.trials - count.trials <= BETWEEN + 4


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_process_leaves_a_run_to_go_on_from(model, tmp_path):
    """The kill strikes inside a trial, with no chance to write anything."""
    file, threshold = tmp_path / "acdc.ckpt", telling(model, some_pairs())
    runs, attempt = [], CircuitState.attempt

    def dying(*args):
        runs.append(1)
        if len(runs) == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return attempt(*args)

    def work():
        CircuitState.attempt = dying
        cf.acdc(model, some_pairs(), threshold, checkpoint=file, **OPTIONS)

    assert ended_by(work) == -signal.SIGKILL
    assert file.is_file()
    resumed = cf.acdc(model, some_pairs(), threshold, checkpoint=file, **OPTIONS)
    same(resumed, cf.acdc(model, some_pairs(), threshold, **OPTIONS))
    assert not file.exists()
