"""Where heads attend from the last token, by the task's named spans: mean weights over clean prompts.

    python benchmarks/span_attention.py MODEL TASK HEAD,HEAD,... [--pairs 16]

A span's weight is the sum over its tokens. "first" is the first token, which many heads attend to when they do nothing.
"""

from __future__ import annotations

import argparse

import numpy as np

import circuitfind as cf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("task")
    parser.add_argument("heads")
    parser.add_argument("--pairs", type=int, default=16)
    options = parser.parse_args()
    heads = options.heads.split(",")
    model = cf.load(options.model, backend="hooks", check=False)
    bound = cf.task(options.task, model, n=options.pairs).on(model)
    names = list(dict.fromkeys(name for spans in bound.spans for name in spans))
    weights = np.full((len(bound), len(heads), 1 + len(names)), np.nan)
    for example, spans in enumerate(bound.spans):
        for at, head in enumerate(cf.attention(model, bound, heads, example=example)):
            last = head.pattern[-1]
            weights[example, at, 0] = last[0]
            for column, name in enumerate(names, start=1):
                if name in spans:
                    weights[example, at, column] = last[slice(*spans[name])].sum()
    print(f"{len(bound)} prompts\n{'head':8}" + "".join(f"{name:>12}" for name in ("first", *names)))
    for head, row in zip(heads, np.nanmean(weights, axis=0), strict=True):
        print(f"{head:8}" + "".join(f"{weight:12.2f}" for weight in row))


if __name__ == "__main__":
    main()
