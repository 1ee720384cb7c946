"""How far scores in half precision are from those in float32, by method.

    python benchmarks/precision.py MODEL [--task ioi] [--n 8] [--methods eap,relp] [--dtypes bfloat16,float16]

Rank correlation of all edges' magnitudes, how many of the 100 strongest are the same, and the relative error (the norm
of the difference over that of the scores).
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from scipy.stats import spearmanr

import circuitfind as cf

METHODS = "eap,eap-ig-inputs,clean-corrupted,relp,gim"


def scores_of(model: cf.Model, task: str, n: int, methods: list[str]) -> dict[str, np.ndarray]:
    pairs = cf.task(task, model, n=n)
    return {name: cf.attribute(model, pairs, name).values[model.graph.real] for name in methods}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--task", default="ioi")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--dtypes", default="bfloat16,float16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    methods = options.methods.split(",")
    wide = scores_of(cf.load(options.model, dtype="float32"), options.task, options.n, methods)
    print("| method | precision | rank correlation | of the 100 strongest | relative error |\n|---|---|---|---|---|")
    for dtype in options.dtypes.split(","):
        half = scores_of(cf.load(options.model, dtype=dtype), options.task, options.n, methods)
        for name, value in half.items():
            expected = wide[name]
            rank = spearmanr(np.abs(value), np.abs(expected)).statistic
            top, other = (set(np.argsort(-np.abs(one))[:100].tolist()) for one in (value, expected))
            error = np.linalg.norm(value - expected) / np.linalg.norm(expected)
            print(f"| `{name}` | {dtype} | {rank:.3f} | {len(top & other)} | {error:.3f} |", flush=True)


if __name__ == "__main__":
    main()
