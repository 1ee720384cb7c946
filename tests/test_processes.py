"""Two processes do together what one does alone: the same numbers, the same decisions; and what is left of one of them.

The processes are copies of this one (forks), so that nothing is imported again.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from toys import wrapped

import circuitfind as cf
from circuitfind import processes
from circuitfind.checkpoint import Measurements
from circuitfind.cli.app import main
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import CircuitfindWarning, ProcessError, warn
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.processes import Group, alone, division, gathered, same, within

EXACT = ("exact", "sweep of one pair", "paths of one pair", "in batches of one size", "learned in batches of one size")


def pairs(n: int = 6, metric: str = "logit_diff", length: int = 7) -> cf.Task:
    clean, corrupted = torch.randint(3, 128, (2, n, length), generator=torch.Generator().manual_seed(0))
    return cf.Task(clean, corrupted, list(range(3, 3 + n)), list(range(20, 20 + n)), metric=metric)


def calls(folder: Path) -> dict[str, Callable[[], Any]]:
    """By name, what gives numbers (arrays, lists, texts) to be compared."""
    model, task, apart = wrapped("llama"), pairs(), pairs(9, "kl")  # by "kl" a circuit is never like the whole model
    few, bound = pairs(1).on(model), task.on(model)
    estimates = cf.attribute(model, apart, "eap-ig-inputs")
    circuit, masks = estimates.top(40), np.stack([estimates.top(n).mask for n in (5, 9, 60)])

    def compared() -> Any:
        found = cf.compare(model, apart, ["eap", "eap-ig-inputs", "clean-corrupted"], folder=folder / "compared")
        return [(one.method, one.cpr, one.cmd, one.costs.forwards, one.costs.backwards) for one in found.entries]

    def acdc(pairs: Any, **options: Any) -> Any:
        found = cf.acdc(model, pairs, 0.02, metric=None, **options)
        return found.edges, found.exact

    def learned(**options: Any) -> Any:
        return cf.learn_masks(model, task, steps=8, n_edges=40, **options).scores.values

    def find() -> Any:
        tiny = cf.load("tiny")  # its circuit, unlike that of a random model, does not change with float rounding
        found = cf.find(tiny, cf.task("ioi", tiny, n=16), max_checks=5, random=2, knockouts=1)
        return found.circuit.edges, found.checks.faithfulness

    return {
        "eap": lambda: cf.attribute(model, task, "eap").values,
        "eap-ig-inputs": lambda: cf.attribute(model, task, "eap-ig-inputs").values,
        "in batches of one size": lambda: cf.attribute(model, task, "eap-ig-inputs", batch_size=3).values,
        "mean": lambda: cf.attribute(model, task, "atp", level="node", ablation="mean").values,
        "nodes": lambda: cf.attribute(model, task, "atp-star", level="node").values,
        "places": lambda: cf.attribute(model, task, "atp", level="node", what="heads").effects,
        "one pair": lambda: cf.attribute(model, few, "eap").values,
        "evaluate one pair": lambda: cf.evaluate(model, few, circuit).metric,
        "exact": lambda: cf.attribute(model, task, "exact", checkpoint=folder / "exact").values,
        "exact of one pair": lambda: cf.attribute(model, few, "exact").values,
        "sweep": lambda: cf.patch(model, task, "heads", by_position=True).per_example,
        "sweep of one pair": lambda: cf.patch(model, few, "heads", by_position=True).per_example,
        "sweep of means": lambda: cf.patch(model, task, "resid", ablation="mean").per_example,
        "paths": lambda: cf.path_patch(model, task).per_example,
        "paths of one pair": lambda: cf.path_patch(model, few).per_example,
        "verify": lambda: [(row.name, row.exact) for row in cf.verify(model, apart, estimates, top=9).edges],
        "evaluate": lambda: cf.evaluate(model, apart, circuit).per_example.circuit,
        "circuits of one pair": lambda: Evaluator.of(model, few).run(masks).metric,
        "curve": lambda: [point.faithfulness for point in cf.curve(model, apart, estimates).points],
        "acdc": lambda: acdc(task),
        "acdc of one pair": lambda: acdc(few),
        "acdc under zero": lambda: acdc(task, ablation="zero", remove_dangling="tested"),
        "learned": learned,
        "learned in batches of one size": lambda: learned(batch_size=3),
        "compare": compared,
        "find": find,
        "diagnose": lambda: [str(one) for one in cf.diagnose(model, bound).said],
    }


def run(folder: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CircuitfindWarning)
        return {name: call() for name, call in calls(folder).items()}


def start(work: Callable[[], int], folder: Path, port: int, rank: int) -> int:
    """A process that is one of two, a copy of this one; what it says goes to a file."""
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(240)  # it must not outlive the tests
            said = os.open(folder / f"said{rank}", os.O_WRONLY | os.O_CREAT)
            os.dup2(said, 1)
            os.dup2(said, 2)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
            os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in group.items()}})
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.__stdout__, sys.__stderr__):
                stream.flush()
            os._exit(code)
    return child


def both(work: Callable[[], int], folder: Path) -> list[int]:
    """How two processes end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(work, folder, port, rank) for rank in range(2)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.fixture(scope="module")
def found(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], ...]:
    """What one process found, and each of two."""
    folder = tmp_path_factory.mktemp("two")

    def work() -> int:
        processes.join()
        found = run(folder)
        (folder / f"rank{processes.group().rank}").write_bytes(pickle.dumps(found))
        processes.leave()
        return 0

    alone = run(tmp_path_factory.mktemp("one"))
    assert both(work, folder) == [0, 0], "".join((folder / f"said{rank}").read_text() for rank in range(2))
    return (alone, *(pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(2)))


def differ(a: Any, b: Any, tolerance: float) -> bool:
    """Whether numbers differ by more than a part of the largest, or anything else at all."""
    if isinstance(a, (tuple, list)):
        return len(a) != len(b) or any(differ(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, (float, np.ndarray)):
        a, b = np.asarray(a), np.asarray(b)
        size = np.abs(a[np.isfinite(a)]).max(initial=0)
        return not np.allclose(a, b, 0, tolerance * size, equal_nan=True)
    return bool(a != b)


def test_two_processes_equal_one(found) -> None:
    """Scores, effects, evaluations, decisions and passes."""
    alone, first, _ = found
    assert [name for name in alone if differ(alone[name], first[name], 1e-4)] == []


def test_every_process_has_the_same_to_the_bit(found) -> None:
    """What is added up is added up in one order on all of them."""
    _, first, second = found
    assert [name for name in first if differ(first[name], second[name], 0)] == []


def test_the_same_to_the_bit_where_batches_are(found) -> None:
    """Where the places of a sweep are divided, and where a batch size divides each process's pairs."""
    alone, first, _ = found
    assert [name for name in EXACT if differ(alone[name], first[name], 0)] == []


@pytest.mark.slow
def test_a_lost_process_is_named_and_another_goes_on(tmp_path, capfd) -> None:
    """One line, no traceback; one process goes on with what both had measured."""
    command = ["attribute", "tiny", "--method", "exact", "--n", "2", "--out", str(tmp_path / "out")]
    add, done = Measurements.add, []

    def killed(self: Measurements, *measured: Any) -> None:
        add(self, *measured)
        done.append(measured)
        if len(done) == 10:
            self.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> int:
        if os.environ["RANK"] == "1":
            Measurements.add = killed
        return main(command)

    assert both(work, tmp_path) == [1, -signal.SIGKILL]
    *_, last = (tmp_path / "said0").read_text().splitlines()
    kept = tmp_path / "out" / "exact.part.safetensors"
    assert last.startswith(f"error: rank 1 of 2 was lost; what was measured is kept in {kept}; go on with: circuitfind")
    assert "Traceback" not in (tmp_path / "said0").read_text()
    assert (tmp_path / "said1").read_text() == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measurements, "add", lambda self, *measured: (add(self, *measured), done.append(measured)))
        assert main(command) == 0
    assert 0 < sum(places.stop - places.start for places, *_ in done) < 1519
    assert not [*kept.parent.glob("exact.part*")]
    whole = cf.attribute(cf.load("tiny"), cf.task("ioi", cf.load("tiny"), n=2), "exact")
    assert cf.Scores.open(kept.parent / "scores.safetensors").to_dict() == whole.to_dict()


def test_an_error_of_one_is_raised_on_all() -> None:
    """Whoever made it has the original; one that cannot be sent is named."""

    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    def part() -> None:
        if processes.group().rank:
            raise Odd(1, 2)

    sent = by_both(part, Odd)
    with within(Group(0, 2, lambda own: sent)), pytest.raises(RuntimeError, match="1 and 2"):
        gathered(part)


def by_both(part: Callable[[], Any], fails: type[Exception] = ProcessError) -> list[bytes]:
    """What each of two ranks sends of a function; the second one may fail in this way."""
    sent: list[bytes] = []

    def exchange(own: bytes) -> list[bytes]:
        sent.append(own)
        return [sent[0], own]

    for rank in range(2):
        with within(Group(rank, 2, exchange)), suppress(fails):
            gathered(part)
    return sent


def test_calls_that_differ_and_warnings_of_others_are_told() -> None:
    """Results of two calls are never mixed; rank 0 says what another one's part of the pairs gave rise to."""

    def part() -> None:
        if processes.group().rank:
            warn("underflow")

    sent = by_both(part)
    with within(Group(0, 2, lambda own: [own, sent[1]])):
        with pytest.warns(CircuitfindWarning, match="underflow"):
            gathered(part)
        with pytest.raises(ProcessError, match="do not make the same calls"):
            gathered(lambda: None)


def test_ranks_in_step_divide_nothing_and_agree() -> None:
    """What rank 0 read or timed holds on both; each makes all that other ranks would divide."""
    sent: list[bytes] = []

    def exchange(own: bytes) -> list[bytes]:
        sent.append(own)
        return [sent[0], own]

    for rank in range(2):
        with within(Group(rank, 1, exchange, in_step=True)), alone():
            assert same(f"of rank {rank}") == "of rank 0"
            assert gathered(lambda rank=rank: rank) == [rank]
            assert division(9, 9) == processes.Division()
    with within(Group(1, 2, exchange)), alone():
        assert same("its own part") == "its own part"


@pytest.mark.slow
def test_processes_that_divide_a_models_heads_agree_on_the_time(tmp_path) -> None:
    """One whose clock has reached the limit would leave the others waiting in a pass."""
    wrapped("llama").hf.save_pretrained(tmp_path / "model")

    def work() -> int:
        signal.alarm(100)
        processes.join()
        rank, model = processes.group().rank, cf.load(tmp_path / "model", tp_plan="auto")
        with pytest.MonkeyPatch.context() as patch:
            clock = SimpleNamespace(monotonic=lambda: time.monotonic() * 1e6**rank)
            patch.setattr("circuitfind.search.trials.time", clock)
            found = cf.find(model, pairs(9, "kl"), max_checks=0, random=0, knockouts=0, time_limit=60)
        (tmp_path / f"found{rank}").write_text(repr((found.circuit.edges, [step.stage for step in found.steps])))
        processes.leave()
        return 0

    assert both(work, tmp_path) == [0, 0], "".join((tmp_path / f"said{rank}").read_text() for rank in range(2))
    first, second = ((tmp_path / f"found{rank}").read_text() for rank in range(2))
    assert first == second
    assert "stopped" not in first


def test_processes_with_other_pairs_are_refused() -> None:
    """Their parts would be added up to numbers of no task."""
    sent: list[bytes] = []

    def exchange(own: bytes) -> list[bytes]:
        sent.append(own)
        return [own, sent[0]]

    model = wrapped("llama")
    with within(Group(0, 2, exchange)):
        Experiment.of(model, pairs(4)).share()
        with pytest.raises(ProcessError, match="different pairs or models"):
            Experiment.of(model, pairs(5)).share()


def test_work_is_dealt_out_evenly() -> None:
    """Patches of an early layer run more blocks than those of a late one: five dear groups leave one rank more of the
    ten cheap ones."""
    works = [16 * 7] * 5 + [16 * 2] * 10
    ranks = [processes.Division(1, 0, rank, 2).own(works) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == list(range(15))
    assert abs(sum(works[at] for at in ranks[0]) - sum(works[at] for at in ranks[1])) <= 16 * 2


@pytest.mark.parametrize("size", [2, 3, 5, 64])
@pytest.mark.parametrize(("n", "candidates"), [(1, 1), (1, 50), (5, 3), (6, 1519), (64, 30), (1000, 1)])
def test_every_candidate_of_every_pair_is_done_once(size, n, candidates) -> None:
    """However pairs and candidates are divided; and no rank has much more to do than its part."""
    done, most = np.zeros((n, candidates)), 0
    for rank in range(size):
        with within(Group(rank, size)):
            divided, start = division(n, candidates), 0
            mine = np.zeros_like(done)
            while start < n:
                batches = divided.batches(start, n, 7)
                if divided.block < len(batches):
                    mine[batches[divided.block], divided.own([1] * candidates)] += 1
                start = batches[-1].stop
            done, most = done + mine, max(most, int(mine.sum()))
            with alone():
                assert division(n, candidates) == processes.Division()
    assert (done == 1).all()
    assert most <= 2 * max(1, -(-n * candidates // size))
