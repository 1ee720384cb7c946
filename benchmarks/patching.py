"""Cost of activation-patching sweeps on a random-weight GPT-2 small, 8 prompts of 16 tokens, one thread.

    python benchmarks/patching.py [--layers 0 1 2 ...] [--what heads resid ...]

CPU time of each sweep by position, divided by its number of places times the CPU time of a bare forward pass (median of
passes before and after it). The default layers are a sample with the mean depth of all: costs fall evenly from the
first layer to the last.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import bare_forward, gpt2, pairs

import circuitfind as cf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 5, 6, 9, 11])
    parser.add_argument("--what", nargs="+", default=["heads", "resid", "attn", "mlp", "v", "pattern"])
    parser.add_argument("--rounds", type=int, default=5, help="bare passes before and after each sweep")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = gpt2()
    bound = pairs().on(model)
    ids = bound.batch.clean.ids
    bare_forward(model, ids)
    for what in options.what:
        bare = [seconds(lambda: bare_forward(model, ids)) for _ in range(options.rounds)]
        sweeps: list[cf.Sweep] = []
        took = seconds(
            lambda what=what, sweeps=sweeps: sweeps.append(
                cf.patch(model, bound, what, by_position=True, layers=options.layers)
            )
        )
        bare += [seconds(lambda: bare_forward(model, ids)) for _ in range(options.rounds)]
        places, each = sweeps[0].effects.size, statistics.median(bare)
        print(
            f"{what}: {places} places in {took:.1f} s CPU, {took / places / each:.2f} bare forwards a place", flush=True
        )


def seconds(run: object) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    run()  # type: ignore[operator]
    return time.process_time() - start


if __name__ == "__main__":
    main()
