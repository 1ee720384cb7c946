"""How time and memory of the methods grow with the size of the true circuit, from 10 edges to 10,000.

    python benchmarks/growth.py [--sizes 10,100,1000,10000] [--methods A,B,...] [--pairs 16] [--limit 120]

The random circuits `layered-N` of the testbed, in GPT-2's form: CPU seconds on one thread, and the growth of the
process (peak resident set). A method is skipped at sizes where, if its time grew as the graph's number of edges, it
would exceed the limit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import circuitfind as cf
from circuitfind.costs import Costs, measuring

Run = Callable[[cf.testbed.Known], object]
QUICK = {"max_checks": 0, "random": 0, "knockouts": 0}
FINDERS: dict[str, Run] = {
    "find": lambda known: cf.find(known.model, known.task, **QUICK),  # type: ignore[arg-type]
    "find-complete": lambda known: cf.find(known.model, known.task, complete=True, **QUICK),  # type: ignore[arg-type]
    "edge-pruning": lambda known: cf.learn_masks(known.model, known.task),
}
METHODS = ("eap", "relp", "eap-ig-inputs", "eap-ig-activations", *FINDERS, "exact", "acdc")


def run(method: str, known: cf.testbed.Known) -> Costs:
    """What one method costs on one circuit."""
    with measuring() as costs:
        if method in FINDERS:
            FINDERS[method](known)
        elif method == "acdc":
            cf.acdc(known.model, known.task, threshold=0.01)
        else:
            cf.attribute(known.model, known.task, method=method)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10,100,1000,10000")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--limit", type=float, default=120.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    last: dict[str, tuple[float, int]] = {}  # CPU seconds, edges of the graph
    print("| true edges | of | method | CPU s | peak MB |\n|---|---|---|---|---|")
    for size in map(int, asked.sizes.split(",")):
        known = cf.testbed.build(f"layered-{size}", n=asked.pairs)
        edges = known.model.graph.n_edges
        for method in asked.methods.split(","):
            seconds, before = last.get(method, (0.0, 1))
            if seconds * edges / before > asked.limit:
                print(f"| {size:,} | {edges:,} | `{method}` | - | - |", flush=True)
                continue
            costs = run(method, known)
            last[method] = costs.cpu_seconds, edges
            memory = "?" if costs.memory is None else f"{costs.memory / 2**20:.0f}"
            print(f"| {size:,} | {edges:,} | `{method}` | {costs.cpu_seconds:.2f} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
