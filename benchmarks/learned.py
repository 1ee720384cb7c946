"""Learned masks and attribution compared: faithfulness and cost of circuits of one size.

    python benchmarks/learned.py [--tasks greater-than ioi induction] [--edges 100]

Embedded model, 64 pairs of a task: half to find a circuit with, half to judge it on. Each method selects `--edges`
edges, and the connected ones are run. Shown are their number, faithfulness and KL from the whole model on the held-out
pairs, and the CPU seconds (one thread) of finding them. The methods' defaults were chosen on greater-than. First, the
cost of a step: a masked run forwards and backwards of random-weight GPT-2 small, 8 prompts of 16 tokens, in bare
forward passes.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import bare_forward, bare_forward_backward, gpt2, pairs, ratio, take_turns

import circuitfind as cf
from circuitfind.engine.masked_run import mask_gradient
from circuitfind.engine.prepare import prepare
from circuitfind.search.learn import LEARNERS


def one_step() -> None:
    """A masked run, forwards and backwards, as ratio to a bare forward and to a bare forward and backward."""
    model, task = gpt2(), pairs()
    bound = task.on(model)
    prepared, mask = prepare(model.adapter, bound.batch), torch.rand(model.graph.real.shape)
    ids = bound.batch.clean.ids
    contestants = {
        "masked": lambda: mask_gradient(prepared, mask, bound.metric),
        "forward": lambda: bare_forward(model, ids),
        "both": lambda: bare_forward_backward(model, ids),
    }
    seconds = take_turns(contestants, rounds=5)
    print(f"a step / bare forward: {ratio(seconds, 'masked', 'forward')}")
    print(f"a step / bare forward and backward: {ratio(seconds, 'masked', 'both')}")


def compare(task: str, n: int) -> None:
    """A table of all methods on a task."""
    model = cf.load("tiny", backend="hooks")
    seen, held_out = cf.task(task, model, n=64).on(model).split(0.5)
    finders = {method: lambda m=method: cf.attribute(model, seen, m).top(n) for method in ("eap", "eap-ig-inputs")}
    for method in LEARNERS:
        finders[method] = lambda m=method: cf.learn_masks(model, seen, m, n_edges=n).circuit
    print(f"\n{task}, {n} of {model.graph.n_edges:,} edges\n")
    print("| method | edges | faithfulness (95% interval) | KL | CPU s | steps |\n|---|--:|--:|--:|--:|--:|")
    for name, find in finders.items():
        start = time.process_time()
        circuit = find()
        seconds = time.process_time() - start
        value, kl = (cf.evaluate(model, held_out, circuit, metric=metric) for metric in (None, "kl"))
        low, high = value.interval
        print(
            f"| {name} | {len(circuit)} | {value.faithfulness:.3f} ({low:.3f} to {high:.3f}) |"
            f" {-kl.metric:.3f} | {seconds:.1f} | {circuit.facts.get('steps', '')} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["greater-than", "ioi", "induction"])
    parser.add_argument("--edges", type=int, nargs="+", default=[50, 100])
    options = parser.parse_args()
    torch.set_num_threads(1)
    one_step()
    for task in options.tasks:
        for n in options.edges:
            compare(task, n)
