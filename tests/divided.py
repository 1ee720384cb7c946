"""Scores of a model whose heads are divided among processes, beside those of the whole one.

    torchrun --nproc-per-node 2 tests/divided.py FOLDER

Prints, as JSON, how far off each is, relative to the largest.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from test_devices import pairs_of
from torch import distributed

import circuitfind as cf


def measured(model: cf.Model, task: cf.Task) -> dict[str, Any]:
    scores = cf.attribute(model, task, "eap")
    return {
        "eap": scores.values,
        "circuit": cf.evaluate(model, task, scores.top(40), ablation="mean").metric,
        "patterns": cf.patch(model, task, "pattern").effects,
        "neurons": cf.patch(model, task, "neurons", layers=1).effects,
    }


def main(folder: str) -> None:
    torch.set_num_threads(1)
    cf.processes.join()  # of a divided model's pairs each process runs all
    divided = cf.load(folder, tp_plan="auto")
    assert divided.adapter.processes is not None and not divided.adapter.state.hooks
    whole = cf.load(folder)
    task = pairs_of(whole.hf)
    found, expected = measured(divided, task), measured(whole, task)
    if distributed.get_rank() == 0:
        off = {
            name: float(np.nanmax(np.abs(value - expected[name])) / np.nanmax(np.abs(expected[name])))
            for name, value in found.items()
        }
        sys.stdout.write(json.dumps(off) + "\n")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
