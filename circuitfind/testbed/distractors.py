"""Heads and MLPs that compute real things that nothing uses.

1. Each distractor attends by a random match of words, or to an earlier word, and moves the words, or what earlier
   distractors wrote, to a variable of its own. An MLP's distractor table mixes such variables.
2. Their values differ between a clean prompt and its corrupted twin, and edges between them carry these differences.
   None of their variables is read by the circuit or the unembedding, so ablating any of it changes no answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitfind.testbed.blueprint import SHARP, Blueprint, Head, Match, Offset, Variable

WIDTH = 3


def distract(plan: Blueprint, seed: int = 0) -> None:
    """Adds distractors to all but the last head of every layer, and to every MLP."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sources: list[Variable] = [plan.token]
    for layer in range(plan.n_layers):
        taken = sum(isinstance(part, Head) and part.layer == layer for part in plan.parts)
        written = []
        for number in range(taken, plan.heads - 1):
            source = sources[int(torch.randint(len(sources), (1,), generator=generator))]
            match = plan.match(plan.token, source, SHARP / 8 * random(plan.token.width, source.width))
            looks: list[Match | Offset] = [match] if number % 2 else [Offset(2, SHARP), match]
            written.append(plan.variable(f"aside {layer}.{number}", WIDTH))
            plan.head(layer, looks, {source: random(source.width, WIDTH) / 2}, {written[-1]: 1})
        sources += written
        mixed = plan.variable(f"aside {layer}", WIDTH)
        takes = {source: random(source.width, 2 * WIDTH) / 2 for source in sources[-3:]}
        plan.table(layer, takes, 0.1, {mixed: random(2 * WIDTH, WIDTH) / 4})
        sources.append(mixed)
