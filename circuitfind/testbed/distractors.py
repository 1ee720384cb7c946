"""Distractors: heads and MLP tables outside the circuit, which compute values that the circuit does not use.

1. A distractor head attends by a random match of words with its source: the words, or what an earlier distractor wrote.
   Every second one also prefers the token two back. It moves its source to its own variable. A distractor table mixes
   such variables.
2. Their values differ between the clean and the corrupted prompt, and the edges between them carry these differences.
   The circuit and the unembedding read none of their variables, so ablating these edges changes no answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitfind.testbed.blueprint import SHARP, Blueprint, Head, Match, Offset, Variable

WIDTH = 3


def distract(plan: Blueprint, seed: int = 0) -> None:
    """Add a distractor to every free head but the last one of each layer, and to every MLP."""
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
