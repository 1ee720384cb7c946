"""What `test_processes.py` asks of one process and of several: run as a script, each of several processes leaves its
results in FOLDER/rankN.pickle."""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from toys import wrapped

import circuitfind as cf
from circuitfind import processes
from circuitfind.errors import CircuitfindWarning


def pairs(n: int = 6, metric: str = "logit_diff", length: int = 7) -> cf.Task:
    clean, corrupted = torch.randint(3, 128, (2, n, length), generator=torch.Generator().manual_seed(0))
    return cf.Task(clean, corrupted, list(range(3, 3 + n)), list(range(20, 20 + n)), metric=metric)


def calls(folder: Path) -> dict[str, Callable[[], Any]]:
    """By name, what gives numbers (arrays, lists, texts) to be compared."""
    model, task, apart = wrapped("llama"), pairs(), pairs(9, "kl")  # by "kl" a circuit is never like the whole model
    few, bound = pairs(1).on(model), task.on(model)
    estimates = cf.attribute(model, apart, "eap-ig-inputs")
    circuit = estimates.top(40)

    def exact() -> Any:
        return cf.attribute(model, task, "exact", checkpoint=folder / "exact.npz").values

    def compared() -> Any:
        found = cf.compare(model, apart, ["eap", "eap-ig-inputs", "clean-corrupted"], folder=folder / "compared")
        return [(one.method, one.cpr, one.cmd, one.costs.forwards, one.costs.backwards) for one in found.entries]

    def acdc(pairs: Any, **options: Any) -> Any:
        found = cf.acdc(model, pairs, 0.02, metric=None, **options)
        return found.edges, found.exact

    def learned(**options: Any) -> Any:
        return cf.learn_masks(model, task, steps=8, n_edges=40, **options).scores.values

    def find() -> Any:
        found = cf.find(model, apart, max_checks=5, random=2, knockouts=1)
        return found.circuit.edges, found.checks.faithfulness

    return {
        "eap": lambda: cf.attribute(model, task, "eap").values,
        "eap-ig-inputs": lambda: cf.attribute(model, task, "eap-ig-inputs").values,
        "mean": lambda: cf.attribute(model, task, "atp", level="node", ablation="mean").values,
        "nodes": lambda: cf.attribute(model, task, "atp-star", level="node").values,
        "places": lambda: cf.attribute(model, task, "atp", level="node", what="heads").effects,
        "exact": exact,
        "exact of one pair": lambda: cf.attribute(model, few, "exact").values,
        "sweep": lambda: cf.patch(model, task, "heads", by_position=True).per_example,
        "sweep of means": lambda: cf.patch(model, task, "resid", ablation="mean").per_example,
        "paths": lambda: cf.path_patch(model, task).per_example,
        "verify": lambda: [(row.name, row.exact) for row in cf.verify(model, apart, estimates, top=9).edges],
        "evaluate": lambda: cf.evaluate(model, apart, circuit).per_example.circuit,
        "curve": lambda: [point.faithfulness for point in cf.curve(model, apart, estimates).points],
        "acdc": lambda: acdc(task),
        "acdc of one pair": lambda: acdc(few),
        "acdc under zero": lambda: acdc(task, ablation="zero", remove_dangling="tested"),
        "learned": learned,
        "learned in batches of one size": lambda: learned(batch_size=3),
        "in batches of one size": lambda: cf.attribute(model, task, "eap-ig-inputs", batch_size=3).values,
        "compare": compared,
        "find": find,
        "diagnose": lambda: [str(one) for one in cf.diagnose(model, bound).said],
    }


def run(folder: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CircuitfindWarning)
        return {name: call() for name, call in calls(folder).items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert processes.join()
    where = Path(sys.argv[1])
    found = run(where)
    (where / f"rank{processes.group().rank}.pickle").write_bytes(pickle.dumps(found))
    processes.leave()
