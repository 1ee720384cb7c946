"""Several processes: the speedup of two, and the passes and traffic of each of up to 64.

    python benchmarks/processes.py [--rounds 5] [--pairs 8] [--model FOLDER] [--only NAME ...]
    python benchmarks/processes.py --simulate [--pairs 64] [--only NAME ...]

1. One process of one thread, and two such processes that divide the work, take turns on the same call: exact effects
   of all edges into two readers (the last MLP and a query of the middle layer), ACDC on 100 random edges, a sweep of
   all heads. Pairs of 16 random tokens of a random-weight GPT-2 small, or of the model in a folder. Each turn
   gives a ratio of wall-clock times and, because the machine may be busy, ratios of CPU times and of passes: the one
   process over the busier of the two.
2. `--simulate`: threads stand for processes, each with a copy of the embedded model; they exchange data through
   memory. Passes, exchanges and bytes received are counted for each rank. `limit` is the passes of one process over
   those of the busiest rank: an upper bound on the speedup of N processes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from common import gpt2, pairs

import circuitfind as cf
from circuitfind import costs, processes
from circuitfind.attribution.exact import exact_effects
from circuitfind.engine.experiment import Experiment
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.patching.patch import SweepPlan

CALLS = ("exact", "acdc", "sweep")
SIZES = (1, 8, 64)


# -------------------------------------------------------------------- two processes
def calls(folder: str | None, examples: int) -> dict[str, Callable[[], object]]:
    model = cf.load(folder) if folder else gpt2()
    vocabulary, generator = model.vocabulary, torch.Generator().manual_seed(0)
    task: cf.Task = pairs(examples)
    if folder:
        clean, corrupted = torch.randint(5, vocabulary, (2, examples, 16), generator=generator)
        task = cf.Task(clean, corrupted, [100] * examples, [200] * examples)
    bound, graph = task.on(model), model.graph
    mask = np.zeros_like(graph.real)
    readers = [graph.readers(graph.n_layers - 1, "mlp").start, graph.readers(graph.n_layers // 2, "q").start]
    mask[:, readers] = graph.real[:, readers]
    some = np.random.default_rng(0).permutation(np.argwhere(graph.real))[:100].tolist()
    edges = [graph.edge_name(*edge) for edge in sorted(some, key=lambda edge: -edge[1])]
    return {
        "warm-up": lambda: cf.patch(model, bound, "heads", layers=graph.n_layers - 1),
        "exact": lambda: exact_effects(Experiment.of(model, bound, {}), mask),
        "acdc": lambda: cf.acdc(model, bound, 0.01, order=edges),
        "sweep": lambda: cf.patch(model, bound, "heads"),
    }


def work(folder: str | None, examples: int) -> None:
    """Run the calls whose names are read from standard input, and print what each took."""
    torch.set_num_threads(1)
    processes.join()
    known = calls(folder, examples)
    print("ready", file=sys.stderr, flush=True)
    while name := processes.same(sys.stdin.readline().strip() if processes.first() else ""):
        wall, cpu, counter = time.monotonic(), time.process_time(), costs.Costs()
        costs._counter.set(counter)
        known[name]()
        own = time.process_time() - cpu, counter.forwards
        spent = processes.gathered(lambda own=own: own)
        if processes.first():
            print(json.dumps([time.monotonic() - wall, *map(max, zip(*spent, strict=True))]), flush=True)
    processes.leave()


def group(size: int, port: int, folder: str | None, examples: int) -> list[subprocess.Popen[str]]:
    words = [sys.executable, __file__, "--work", "--pairs", str(examples), *(["--model", folder] if folder else [])]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)} for rank in range(size)]
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(words, env={**os.environ, **shared, **rank}, stdin=pipe, stdout=pipe, text=True)
        for rank in ranks
    ]


def speed(rounds: int, folder: str | None, examples: int, only: list[str]) -> None:
    groups = [group(size, 29500 + size, folder, examples) for size in (1, 2)]

    def timed(ranks: list[subprocess.Popen[str]], name: str) -> np.ndarray:
        """Wall-clock seconds; of the busiest rank the CPU seconds and the passes."""
        first = ranks[0]
        assert first.stdin is not None and first.stdout is not None
        print(name, file=first.stdin, flush=True)
        return np.array(json.loads(first.stdout.readline()))

    for ranks in groups:
        timed(ranks, "warm-up")  # so that one-time work is not timed
    for name in (name for name in CALLS if not only or name in only):
        turns = []
        for _ in range(rounds):
            one, two = (timed(ranks, name) for ranks in groups)
            wall, cpu, passes = one / two
            turns.append((wall, cpu))
            load, seconds = os.getloadavg()[0], f"{one[0]:.1f} s, {two[0]:.1f} s by two: {wall:.2f}"
            print(f"{name}: {seconds}; CPU {cpu:.2f}; passes {passes:.2f}; load {load:.1f}", flush=True)
        walls, cpus = np.sort(turns, axis=0).T
        print(f"{name}: median {walls[rounds // 2]:.2f}, best {walls[-1]:.2f}; CPU {cpus[rounds // 2]:.2f}", flush=True)
    for ranks in groups:
        for one in ranks:
            assert one.stdin is not None
            one.stdin.close()
            one.wait()


# -------------------------------------------------------------------- many, counted
class Counted(NamedTuple):
    """Of one rank: passes (a backward pass counts as two forward ones), exchanges, bytes received."""

    passes: float
    exchanges: int
    bytes: int


def simulated(size: int, call: Callable[[], object]) -> list[Counted]:
    """A call in so many threads, each a rank of one group."""
    sent: list[bytes] = [b""] * size
    meeting, found = threading.Barrier(size), [Counted(0, 0, 0)] * size
    errors: list[BaseException] = []

    def rank(number: int) -> None:
        exchanges = received = 0

        def exchange(own: bytes) -> list[bytes]:
            nonlocal exchanges, received
            sent[number] = own
            meeting.wait()
            parts = list(sent)
            meeting.wait()
            exchanges, received = exchanges + 1, received + sum(map(len, parts)) - len(own)
            return parts

        counter = costs.Costs()
        costs._counter.set(counter)
        try:
            with processes.within(processes.Group(number, size, exchange)):
                call()
        except BaseException as error:
            errors.append(error)
            meeting.abort()
        found[number] = Counted(counter.forwards + 2 * counter.backwards, exchanges, received)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def unlocked(*kinds: type) -> None:
    """Before Python 3.12 a cached property is one thread's at a time: ranks that exchange in it would wait forever."""
    for one in (one for kind in kinds for one in vars(kind).values() if isinstance(one, cached_property)):
        vars(one)["lock"] = nullcontext()


def simulate(n: int, only: list[str], sizes: tuple[int, ...] = SIZES) -> None:
    torch.set_num_threads(1)
    unlocked(Experiment, Evaluator, SweepPlan)
    whole = cf.load("tiny")
    copies = [
        cf.wrap(copy.deepcopy(whole.hf), whole.tokenizer, name="tiny", check=False, backend="hooks")
        for _ in range(max(sizes))
    ]
    task = cf.task("ioi", whole, n=n)

    def model() -> tuple[Any, Any]:
        own = copies[processes.group().rank]
        return own, task

    scores = cf.attribute(whole, task, "eap")
    circuit = scores.top(100)
    last = whole.graph.names(whole.graph.real)[:-301:-1]

    known: dict[str, Callable[[], object]] = {
        "attribute (eap-ig-inputs)": lambda: cf.attribute(*model()),
        "sweep, heads": lambda: cf.patch(*model(), "heads"),
        "evaluate": lambda: cf.evaluate(*model(), circuit),
        "curve, 10 circuits": lambda: cf.curve(*model(), scores),
        "ACDC, 300 edges": lambda: cf.acdc(*model(), 0.05, order=last),
        "learned masks, 20 steps": lambda: cf.learn_masks(*model(), steps=20),
        "find": lambda: cf.find(*model()),
        "exact effects, all edges": lambda: cf.attribute(*model(), "exact"),
    }
    print(f"{n} pairs; {model()[0].graph.n_edges:,} edges")
    for name, call in known.items():
        if only and not any(part in name for part in only):
            continue
        alone = simulated(1, call)[0]
        for size in sizes[1:]:
            ranks = simulated(size, call)
            busiest, most = max(one.passes for one in ranks), max(one.bytes for one in ranks)
            print(
                f"{name:25} {size:3} ranks: limit {alone.passes / busiest:5.1f}, {ranks[0].exchanges:6,} exchanges,"
                f" {most / 2**20:8.2f} MiB a rank; {alone.passes:9,.0f} passes alone, {busiest:8,.0f} of the busiest",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="a folder; by default a random GPT-2 small")
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--pairs", type=int, help="by default 8, simulated 64")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="calls whose name contains one of these")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(asked.model, asked.pairs)
    elif asked.simulate:
        simulate(asked.pairs or 64, asked.only)
    else:
        speed(asked.rounds, asked.model, asked.pairs or 8, asked.only)
