"""Where heads attend in indirect object identification: mean weights over clean prompts.

    python benchmarks/ioi_attention.py MODEL HEAD,HEAD,... [--pairs 24]

From the last token, where the answer is read: to the indirect object (IO, the answer) and to the subject's first and
second name (S1, S2). From S2: to the token after S1, which is where an induction head looks.
"""

from __future__ import annotations

import argparse

import numpy as np

import circuitfind as cf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("heads")
    parser.add_argument("--pairs", type=int, default=24)
    options = parser.parse_args()
    heads = options.heads.split(",")
    model = cf.load(options.model, backend="hooks")
    bound = cf.task("ioi", model, n=options.pairs).on(model)
    weights = []
    for example, answers in enumerate(bound.answer_texts):
        indirect, subject = (name.strip() for name in answers.split(" / "))
        found = cf.attention(model, bound, heads, example=example)
        names = [token.strip() for token in found[0].tokens]
        io, (s1, s2) = names.index(indirect), [at for at, name in enumerate(names) if name == subject]
        rows = [(w[-1, io], w[-1, s1], w[-1, s2], w[s2, s1 + 1]) for w in (one.pattern for one in found)]
        weights.append(rows)
    means = np.mean(weights, axis=0)
    print(f"{len(weights)} prompts\n{'head':8}{'to IO':>8}{'to S1':>8}{'to S2':>8}{'S2 to S1+1':>12}")
    for head, (io, s1, s2, after) in zip(heads, means, strict=True):
        print(f"{head:8}{io:8.2f}{s1:8.2f}{s2:8.2f}{after:12.2f}")


if __name__ == "__main__":
    main()
