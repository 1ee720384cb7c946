"""Cost of the main operations on a random-weight GPT-2 small, 8 prompts of 16 tokens, as ratios to bare passes.

    python benchmarks/gpt2_small.py [--rounds 7] [--growth]

Parts of the edge scores are timed on their own; `--growth` adds prompts x1, x2, x4 and layers 6, 12, 24. Peak memory is
measured in child processes, as the resident set's high-water mark beyond its value with the model loaded.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from common import bare_forward, bare_forward_backward, gpt2, pairs, parts_of_eap, ratio, take_turns

import circuitfind as cf
from circuitfind.engine.circuit_run import run_circuits
from circuitfind.engine.prepare import prepare
from circuitfind.engine.restart import Restart
from circuitfind.evaluation.random_circuits import random_circuit


def edge_scores(rounds: int) -> None:
    """All edge scores by EAP, whole and in parts."""
    model, task = gpt2(), pairs()
    bound = task.on(model)
    seconds = take_turns(
        {
            "bare": lambda: bare_forward_backward(model, bound.batch.clean.ids),
            "all": lambda: cf.attribute(model, bound, "eap"),
            **parts_of_eap(model, bound),
        },
        rounds,
    )
    print(f"bare forward+backward: {1000 * statistics.median(seconds['bare']):.0f} ms CPU")
    print(f"all {model.graph.n_edges:,} edge scores / bare forward+backward: {ratio(seconds, 'all', 'bare')}")
    print(f"  corrupted forward, stopped before the unembedding: {ratio(seconds, 'corrupted', 'bare')}")
    print(f"  clean forward and backward, last position unembedded: {ratio(seconds, 'gradients', 'bare')}")
    print(f"  contraction of differences with gradients: {ratio(seconds, 'contraction', 'bare')}")


def circuits(rounds: int) -> None:
    """Exact circuits and exact single edges."""
    model = gpt2()
    batch = pairs().on(model).batch
    graph, prepared = model.graph, prepare(model.adapter, batch)
    rng = np.random.default_rng(0)
    half = graph.real & (rng.random(graph.real.shape) < 0.5)
    small = random_circuit(graph, 200, rng).mask
    restart = Restart(model.adapter, batch.clean, prepared.clean)
    change = prepared.ablated.minus(prepared.clean.writers)
    edges = {
        "middle": ("m2->a6.h3<q>", "m2->a6.h3<v>", "a1.h4->m6"),
        "first": ("input->a0.h0<k>", "input->m0"),
        "last": ("m2->a11.h3<q>", "a10.h1->m11", "a5.h1->logits"),
    }

    def patch(names: tuple[str, ...]) -> None:
        for name in names:
            writer, reader = graph.edge(name)
            restart.edges(reader, [writer], change)

    contestants = {
        "bare": lambda: bare_forward(model, batch.clean.ids),
        "dense": lambda: run_circuits(prepared, half[None], sparse=False),
        "half": lambda: run_circuits(prepared, half[None]),
        "200": lambda: run_circuits(prepared, small[None]),
    }
    contestants |= {name: lambda names=names: patch(names) for name, names in edges.items()}
    seconds = take_turns(contestants, rounds)
    print(f"bare forward: {1000 * statistics.median(seconds['bare']):.0f} ms CPU")
    print(f"exact circuit of half the edges, dense form / bare forward: {ratio(seconds, 'dense', 'bare')}")
    print(f"exact circuit of half the edges, chosen form / bare forward: {ratio(seconds, 'half', 'bare')}")
    print(f"exact circuit of 200 edges / bare forward: {ratio(seconds, '200', 'bare')}")
    for name, names in edges.items():
        seconds[name] = [value / len(names) for value in seconds[name]]
        print(f"one exact edge, {name} layer / bare forward: {ratio(seconds, name, 'bare')}")


def growth(rounds: int) -> None:
    """How the edge scores' time and memory grow with prompts and layers."""
    for examples, layers in ((8, 12), (16, 12), (32, 12), (8, 6), (8, 24)):
        model = gpt2(layers)
        bound = pairs(examples).on(model)
        seconds = take_turns(
            {
                "bare": lambda model=model, ids=bound.batch.clean.ids: bare_forward_backward(model, ids),
                "all": lambda model=model, bound=bound: cf.attribute(model, bound, "eap"),
            },
            rounds,
        )
        print(
            f"{layers} layers, {examples} prompts: {ratio(seconds, 'all', 'bare')} of bare forward+backward"
            f" ({1000 * statistics.median(seconds['all']):.0f} ms), peak memory {memory('scores', examples, layers)}"
        )


def memory(what: str, examples: int = 8, layers: int = 12) -> str:
    """Peak beyond the weights, beside that of a bare forward and backward pass."""
    own, bare = (statistics.median(peak(name, examples, layers) for _ in range(3)) for name in (what, "bare"))
    return f"{own:.0f} MB beyond the weights (bare forward+backward: {bare:.0f} MB, extra {own - bare:.0f} MB)"


def peak(what: str, examples: int, layers: int) -> float:
    """Peak in MB, beyond the loaded model, of a fresh process that does one thing."""
    command = [sys.executable, __file__, "--peak", what, "--examples", str(examples), "--layers", str(layers)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(what: str, examples: int, layers: int) -> None:
    """The fresh process: prints how far its resident set rose above what it was with the model loaded."""
    model = gpt2(layers)
    bound = pairs(examples).on(model)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: start the high-water mark anew, without what loading took
    before = resident("VmHWM")
    if what == "bare":
        bare_forward_backward(model, bound.batch.clean.ids)
    elif what == "scores":
        cf.attribute(model, bound, "eap")
    else:
        prepared = prepare(model.adapter, bound.batch)
        half = model.graph.real & (np.random.default_rng(0).random(model.graph.real.shape) < 0.5)
        run_circuits(prepared, half[None], sparse=False)
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """A figure of this process's status in MB."""
    status = Path("/proc/self/status").read_text()
    return float(status.split(f"{field}:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--peak", choices=("bare", "scores", "circuit"), help=argparse.SUPPRESS)
    parser.add_argument("--examples", type=int, default=8, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=12, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        child(options.peak, options.examples, options.layers)
        return
    edge_scores(options.rounds)
    print(f"peak memory of all edge scores: {memory('scores')}")
    circuits(options.rounds)
    print(f"peak memory of a dense exact circuit with its clean and corrupted runs: {memory('circuit')}")
    if options.growth:
        growth(max(3, options.rounds // 2))


if __name__ == "__main__":
    main()
