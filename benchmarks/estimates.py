"""How well methods of a few passes estimate exact effects: attribution patching, RelP, GIM, integrated gradients.

    python benchmarks/estimates.py [--model FOLDER] [--tasks copy | --data examples/pronouns.jsonl] [--n 32]

Pearson's r of estimates with exact effects, noising, by default on the embedded model's five behaviours: over the
places of a sweep by kind (residual stream, attention, MLP: by layer and named span, or all positions together where the
pairs have no spans; heads: all positions together), over nodes, over edges. Then what edge scores cost, in bare passes
forwards and backwards of the same model and pairs.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from common import ratio, take_turns

import circuitfind as cf

BEHAVIOURS = "ioi,greater-than,gendered-pronoun,subject-verb-agreement,induction"
PLAIN = "one gradient"  # atp over places and nodes, eap over edges
METHODS = (PLAIN, "relp", "gim", "eap-ig-inputs")
ROUNDS = 7


def fits(model: cf.Model, task: Any) -> dict[str, list[float]]:
    """By kind of place, then over nodes and over edges: r of each method."""
    found: dict[str, list[float]] = {}
    for what in ("resid", "attn", "mlp", "heads"):
        where = {"by_span": True} if task.spans and what != "heads" else {"by_position": False}
        exact = cf.patch(model, task, what, **where).effects
        options = {"level": "node", "what": what, **where}
        found[what] = [
            pearson(cf.attribute(model, task, named(method, "atp"), **options).effects, exact) for method in METHODS
        ]
    for level, plain in (("node", "atp"), ("edge", "eap")):
        cells = model.graph.real if level == "edge" else slice(None)
        exact = cf.attribute(model, task, "exact", level=level).values[cells]
        found[f"{level}s"] = [
            pearson(cf.attribute(model, task, named(method, plain), level=level).values[cells], exact)
            for method in METHODS
        ]
    return found


def named(method: str, plain: str) -> str:
    return plain if method == PLAIN else method


def pearson(estimates: np.ndarray, exact: np.ndarray) -> float:
    return float(np.corrcoef(estimates.ravel(), exact.ravel())[0, 1])


def costs(model: cf.Model, task: Any) -> list[str]:
    """CPU time of each method's edge scores over that of a bare pass forwards and backwards."""
    clean = task.batch.clean
    for parameter in model.hf.parameters():
        parameter.requires_grad_(False)

    def bare() -> None:
        embeddings = model.hf.get_input_embeddings()(clean.ids).requires_grad_()
        logits = model.hf(inputs_embeds=embeddings, attention_mask=clean.mask.long(), use_cache=False).logits
        torch.autograd.grad(logits[:, -1, 0].sum(), embeddings)

    def scores(method: str) -> None:
        cf.attribute(model, task, named(method, "eap"), batch_size=len(task))

    runs = {method: lambda method=method: scores(method) for method in METHODS}
    seconds = take_turns({**runs, "bare": bare}, ROUNDS)
    return [ratio(seconds, method, "bare") for method in METHODS]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tasks", default=BEHAVIOURS)
    parser.add_argument("--data")
    parser.add_argument("--n", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = cf.load(options.model, backend="hooks")
    tasks = [cf.Task.from_file(options.data)] if options.data else []
    tasks = tasks or [cf.task(name, model, n=options.n) for name in options.tasks.split(",")]
    print(f"| pairs | places | {' | '.join(METHODS)} |\n| --- | --- |{' ---: |' * len(METHODS)}")
    for task in tasks:
        bound = task.on(model)
        for kind, values in fits(model, bound).items():
            cells = [f"**{value:.3f}**" if value == max(values) else f"{value:.3f}" for value in values]
            print(f"| {bound.name} | {kind} | {' | '.join(cells)} |", flush=True)
        print(f"| {bound.name} | bare passes for edge scores | {' | '.join(costs(model, bound))} |", flush=True)
