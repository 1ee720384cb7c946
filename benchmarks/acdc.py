"""Cost of ACDC: one trial and a whole run on a random-weight GPT-2 small, a whole run on the embedded model.

    python benchmarks/acdc.py [--edges 300]
    python benchmarks/acdc.py --full [--threshold T] [--checkpoint FILE]

1. The embedded model, IOI, 32 pairs: CPU seconds of a whole `acdc` run, and of the textbook loop that runs the whole
   circuit for every edge (on a sample of edges, scaled up). Decisions on that sample are equal.
2. GPT-2 small, 8 prompts of 16 tokens, one thread: a fixed sample of edges spread over all layers, each tried alone in
   the circuit that a backwards run would have by then (every later reader keeps a random 2% of its edges), as ratio to
   a bare forward pass of the same batch. The worst case is measured too: the same edges in the full, unpruned graph.
3. `--full`: the same model and pairs, all 32,491 edges by KL, from first to last. A stopped run continues from the
   checkpoint. The default threshold, 0.0001, is the smallest of `acdc_scores`' grid.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from common import bare_forward, gpt2, pairs

import circuitfind as cf
from circuitfind.engine.prepare import prepare
from circuitfind.engine.revision import CircuitState
from circuitfind.evaluation.faithfulness import Evaluator

KEPT = 0.02


def one_trial(n_edges: int) -> None:
    """CPU seconds of a trial, layer by layer, as ratio to a bare forward."""
    model = gpt2()
    bound = pairs().on(model)
    prepared, graph = prepare(model.adapter, bound.batch), model.graph
    rng = np.random.default_rng(0)
    pruned, full = [], []
    whole = CircuitState(prepared)
    for layer in reversed(range(graph.n_layers)):
        readers = graph.readers(layer, "all")
        later = np.zeros(graph.n_readers, dtype=bool)
        later[readers.stop :] = True
        gone = graph.real & later & (rng.random(graph.real.shape) >= KEPT)
        by_then = CircuitState(prepared, graph.real & ~gone)
        per_layer = n_edges // graph.n_layers + (layer < n_edges % graph.n_layers)
        edges = rng.permutation(np.argwhere(graph.real[:, readers]))[:per_layer] + np.array([0, readers.start])
        for writer, reader in edges.tolist():
            base = cpu(lambda: bare_forward(model, bound.batch.clean.ids))
            for state, ratios in ((by_then, pruned), (whole, full)):
                if not state.reach.useful[reader]:
                    ratios.append(0.0)  # decided without a run
                    continue
                trial = lambda s=state, e=(writer, reader): bound.metric(s.attempt([[e]])[0], bound.batch)  # noqa: E731
                ratios.append(cpu(trial) / base)
    ran = [ratio for ratio in pruned if ratio]
    print(f"one trial / bare forward, {len(pruned)} edges over {graph.n_layers} layers:")
    print(f"  later readers at {KEPT:.0%} of their edges: mean {np.mean(pruned):.2f} an edge")
    print(f"  {len(pruned) - len(ran)} decided without a run; the others: {spread(ran)}")
    print(f"  nothing pruned yet: {spread(full)}")


def spread(ratios: list[float]) -> str:
    """Mean, median and largest."""
    return f"mean {np.mean(ratios):.2f}, median {statistics.median(ratios):.2f}, largest {max(ratios):.2f}"


def whole_run(sample: int = 60) -> None:
    """ACDC to completion on the embedded model, and the literal loop."""
    model = cf.load("tiny", backend="hooks")
    bound = cf.task("ioi", model, n=32).on(model)
    start = time.process_time()
    circuit = cf.acdc(model, bound, 0.05)
    fast = time.process_time() - start
    evaluator = Evaluator.of(model, bound, metric="kl")
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
    print(f"embedded model, IOI, 32 pairs: {len(circuit)} edges, {fast:.1f} s CPU for the whole run")
    print(f"  {circuit.facts['trials_run']} trials run, {circuit.facts['decided_without_a_run']} decided without one")
    print(f"  the literal loop: {1000 * seconds / tried:.0f} ms an edge, {literal:.0f} s in all,")
    print(f"  {literal / fast:.0f} times as much")


def full_run(threshold: float, checkpoint: Path | None) -> None:
    """ACDC over all edges of GPT-2 small's shape."""
    model = gpt2()
    bound = pairs().on(model)
    base = statistics.median(cpu(lambda: bare_forward(model, bound.batch.clean.ids)) for _ in range(7))
    again = checkpoint is not None and checkpoint.exists()
    print(f"threshold {threshold:.3g}; a bare forward takes {base:.2f} s CPU", flush=True)
    start, wall = time.process_time(), time.monotonic()
    circuit = cf.acdc(model, bound, threshold, checkpoint=checkpoint)
    seconds, wall = time.process_time() - start, time.monotonic() - wall
    facts, n_edges = circuit.facts, model.graph.n_edges
    print(f"{len(circuit)} of {n_edges:,} edges kept ({len(circuit) / n_edges:.1%}); KL {-facts['metric']:.4f}")
    without = facts["decided_without_a_run"]
    print(f"{facts['trials_run']:,} trials run, {without:,} ({without / n_edges:.0%}) decided without one")
    print(f"  {facts['without_a_run']}; {len(facts['close_calls'])} close calls")
    since = " since the checkpoint" if again else ""
    print(
        f"{seconds / 60:.1f} min CPU, {wall / 60:.1f} min wall{since}; {seconds / base / n_edges:.3f} forwards an edge"
    )


def cpu(run) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", type=int, default=300)
    parser.add_argument("--full", action="store_true", help="only the whole run on GPT-2 small")
    parser.add_argument("--threshold", type=float, default=1e-4, help="of the whole run on GPT-2 small")
    parser.add_argument("--checkpoint", type=Path, help="where the whole run on GPT-2 small goes on from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.full:
        with cf.show_progress() if sys.stderr.isatty() else nullcontext():
            full_run(options.threshold, options.checkpoint)
    else:
        whole_run()
        one_trial(options.edges)
