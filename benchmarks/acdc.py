"""Cost of ACDC: one trial on a random-weight GPT-2 small, a whole run on the embedded model beside the literal loop.

    python benchmarks/acdc.py [--edges 300]

GPT-2 small, 8 prompts of 16 tokens, one thread: a fixed sample of edges spread over all layers, each tried in the
circuit that a backwards run would have by then (every later reader keeps a random 2% of its edges), as ratio to a bare
forward pass of the same batch. Beside it the dearest case: the same edges in the full, unpruned graph.

The embedded model, IOI, 32 pairs: CPU seconds of `acdc` to the end, and of the textbook loop that runs the whole
circuit for every edge (on a sample of edges, scaled up), with equal decisions on that sample.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from common import bare_forward, gpt2, pairs

import circuitfind as cf
from circuitfind.engine.prepare import prepare
from circuitfind.engine.revision import CircuitState
from circuitfind.evaluation.faithfulness import Evaluator

KEPT = 0.02


def one_trial(n_edges: int) -> None:
    """Seconds a trial, layer by layer, as ratio to a bare forward."""
    model = gpt2()
    batch = pairs().on(model).batch
    prepared, graph = prepare(model.adapter, batch), model.graph
    metric = pairs().on(model).metric
    rng = np.random.default_rng(0)
    pruned, full = [], []
    per_layer = -(-n_edges // graph.n_layers)
    for layer in reversed(range(graph.n_layers)):
        readers = graph.readers(layer, "all")
        later = np.zeros(graph.n_readers, dtype=bool)
        later[readers.stop :] = True
        gone = graph.real & later & (rng.random(graph.real.shape) >= KEPT)
        states = {"pruned": CircuitState(prepared), "full": CircuitState(prepared)}
        states["pruned"].attempt([[(int(u), int(r)) for u, r in np.argwhere(gone)]])
        states["pruned"].commit(0)
        edges = rng.permutation(np.argwhere(graph.real[:, readers]))[:per_layer] + np.array([0, readers.start])
        for writer, reader in edges.tolist():
            base = cpu(lambda: bare_forward(model, batch.clean.ids))
            for name, ratios in (("pruned", pruned), ("full", full)):
                state = states[name]
                if not state.reaches_logits([reader]):
                    ratios.append(0.0)  # decided without a run
                    continue
                ratios.append(cpu(lambda s=state, e=(writer, reader): metric(s.attempt([[e]])[0], batch)) / base)
    dead = sum(ratio == 0 for ratio in pruned)
    print(f"one trial / bare forward, {len(pruned)} edges over {graph.n_layers} layers:")
    print(f"  later readers at {KEPT:.0%} of their edges: mean {np.mean(pruned):.2f}, {dead} decided without a run")
    ran = [ratio for ratio in pruned if ratio]
    print(f"  of those that ran: median {statistics.median(ran):.2f}, largest {max(ran):.2f}")
    print(f"  nothing pruned yet: mean {np.mean(full):.2f}")


def whole_run(sample: int = 60) -> None:
    """ACDC to completion on the embedded model, and the literal loop."""
    model = cf.load("tiny", backend="hooks")
    bound = cf.task("ioi", model, n=32).on(model)
    start = time.process_time()
    circuit = cf.acdc(model, bound, 0.05)
    fast = time.process_time() - start
    evaluator = Evaluator(model, bound, metric="kl")
    mask = model.graph.real.copy()
    evaluator.run(mask[None])
    current, seconds, tried = 0.0, 0.0, 0
    order = [(u, r) for r in reversed(range(model.graph.n_readers)) for u in reversed(range(model.graph.limits[r]))]
    for edge in order[:sample]:
        mask[edge] = False
        start = time.process_time()
        after = float(evaluator.run(mask[None]).metric[0].mean())
        seconds, tried = seconds + time.process_time() - start, tried + 1
        if current - after < 0.05:
            current = after
        else:
            mask[edge] = True
        assert mask[edge] == circuit.mask[edge], "the literal loop decides otherwise"
    literal = seconds / tried * model.graph.n_edges
    facts = circuit.facts
    print(f"embedded model, IOI, 32 pairs: {len(circuit)} edges, {fast:.1f} s CPU for the whole run")
    print(f"  {facts['trials_run']} trials run, {facts['decided_without_a_run']} decided without one")
    print(f"  the literal loop: {1000 * seconds / tried:.0f} ms an edge, {literal:.0f} s in all,")
    print(f"  {literal / fast:.0f} times as much")


def cpu(run) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    whole_run()
    one_trial(options.edges)
