"""Cost of scores and of one circuit on a real model, as ratios to bare passes of the same batch.

    python benchmarks/real_models.py MODEL [--pairs 8] [--rounds 5] [--parts]
    python benchmarks/real_models.py MODEL --find [--pairs 64]

MODEL: whatever `cf.load` takes. The pairs are the built-in task `ioi`; one thread, CPU time, medians of paired turns.
A bare pass is the model as a user would call it, the whole vocabulary at every position. `--parts` times the
parts of edge scoring. The circuit has the strongest edges by score; a random circuit of that size has more nodes. Peak
memory is measured in a fresh process that scores once, beyond the loaded model.

`--find`: CPU time of one whole `cf.find`, scores and checks included, over a bare forward pass of its search pairs.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import parts_of_eap, ratio, take_turns
from gpt2_small import resident

import circuitfind as cf
from circuitfind.engine.circuit_run import run_circuits
from circuitfind.engine.prepare import prepare
from circuitfind.evaluation.random_circuits import random_circuit
from circuitfind.models.load import Model
from circuitfind.tasks.bound import BoundTask

EDGES = 600


def bare(model: Model, bound: BoundTask, backward: bool) -> None:
    """All positions and the whole vocabulary; backward to the token embeddings with frozen parameters."""
    side = bound.batch.clean
    embeddings = model.hf.get_input_embeddings()(side.ids).detach()
    with torch.set_grad_enabled(backward):
        embeddings.requires_grad_(backward)
        keywords = {"attention_mask": side.mask.long(), "position_ids": side.position_ids, "use_cache": False}
        logits = model.hf(inputs_embeds=embeddings, **keywords).logits
        if backward:
            torch.autograd.grad(logits[:, -1, 0].sum() - logits[:, -1, 1].sum(), embeddings)


def contestants(model: Model, bound: BoundTask) -> dict[str, Callable[[], object]]:
    """The timed calls, by name."""
    prepared = prepare(model.adapter, bound.batch)
    strong = cf.attribute(model, bound, "eap-ig-inputs").top(EDGES).mask
    drawn = random_circuit(model.graph, EDGES, np.random.default_rng(0)).mask
    return {
        "forward and backward": lambda: bare(model, bound, True),
        "forward": lambda: bare(model, bound, False),
        "eap": lambda: cf.attribute(model, bound, "eap"),
        "relp": lambda: cf.attribute(model, bound, "relp"),
        "eap-ig-inputs, 5 points": lambda: cf.attribute(model, bound, "eap-ig-inputs"),
        "eap by query head": lambda: cf.attribute(model, bound, "eap", ungrouped=True),
        "eap-ig-inputs, 5 points, by query head": lambda: cf.attribute(model, bound, "eap-ig-inputs", ungrouped=True),
        f"circuit of the strongest {EDGES} edges": lambda: run_circuits(prepared, strong[None]),
        f"circuit of {EDGES} random edges": lambda: run_circuits(prepared, drawn[None]),
    }


def peak(options: argparse.Namespace, method: str) -> float:
    """Peak in MB beyond the loaded model, of a fresh process."""
    command = [sys.executable, __file__, options.model, "--pairs", str(options.pairs), "--peak", method]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(model: Model, bound: BoundTask, method: str) -> None:
    """Prints how far the resident set rose above what it was with the model loaded."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: start the high-water mark anew
    before = resident("VmHWM")
    if method == "bare":
        bare(model, bound, True)
    else:
        cf.attribute(model, bound, method)
    print(resident("VmHWM") - before)


def find(model: Model, task: cf.Task, rounds: int) -> None:
    """Times a bare forward pass of the search pairs before and after a whole search."""
    search, _ = task.on(model).held_out(0.5, 0)
    before = take_turns({"forward": lambda: bare(model, search, False)}, rounds)["forward"]
    start = time.process_time()
    result = cf.find(model, task)
    seconds = time.process_time() - start
    after = take_turns({"forward": lambda: bare(model, search, False)}, rounds)["forward"]
    forward = statistics.median([*before, *after])
    print(f"{model.name}: {result}")
    print(f"{seconds:.0f} s CPU; bare forward of the {len(search)} search pairs: {forward:.2f} s")
    print(f"find / bare forward: {seconds / forward:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--find", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = cf.load(options.model)
    options.pairs = options.pairs or (64 if options.find else 8)
    if options.find:
        find(model, cf.task("ioi", model, n=options.pairs), options.rounds)
        return
    bound = cf.task("ioi", model, n=options.pairs).on(model)
    if options.peak:
        child(model, bound, options.peak)
        return
    clean, corrupted = bound.batch.clean, bound.batch.corrupted
    differ = int((clean.ids != corrupted.ids).cumsum(-1).bool().logical_and(clean.mask).sum())
    print(f"{model.name}: {options.pairs} pairs, {int(clean.mask.sum())} tokens, {differ} from the first difference on")
    both = "forward and backward"
    what = contestants(model, bound) | (parts_of_eap(model, bound) if options.parts else {})
    seconds = take_turns(what, options.rounds)
    print(
        f"bare {both}: {statistics.median(seconds[both]):.2f} s CPU; forward: {ratio(seconds, 'forward', both)} of it"
    )
    for name in list(what)[2:]:
        base = "forward" if name.startswith("circuit") else both
        print(f"{name} / bare {base}: {ratio(seconds, name, base)}")
    used = {method: peak(options, method) for method in ("bare", "eap", "eap-ig-inputs")}
    print("peak memory beyond the model: " + ", ".join(f"{name} {size:.0f} MB" for name, size in used.items()))


if __name__ == "__main__":
    main()
