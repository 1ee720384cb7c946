"""A ranking whose circuits do nothing, and why.

1. Circuits of the best edges, from a few up to a tenth of the graph, all have faithfulness about 0, where the whole
   model does the task. Sizes of less than `LARGE` of the graph prove nothing.
2. The usual reason, in small models: the gradient at the clean run has the wrong sign in the first layers, where the
   metric bends between the prompts. Edges that everything passes through get strongly negative effects, and a signed
   ranking puts them last. Integrated gradients and relevance propagation get the sign right, and a ranking by
   magnitude does not need it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from circuitfind.result import By
from circuitfind.scores import Scores

NOTHING = 0.05  # a smaller faithfulness is about 0
SMALL, LARGE = 0.1, 0.02  # parts of the graph
WRONG = 1 / 3  # the part of the strongest early edges that is negative, where signs are to blame
REPAIRS = ("eap-ig-inputs", "relp")  # what works, signed


def idle(scores: Scores, by: By, tried: Iterable[tuple[int, float]]) -> str | None:
    """A sentence if the circuits of a ranking by effects do nothing.

    `tried`: edges asked for and faithfulness of each that was run.
    """
    graph = scores.graph
    small = [(n, f) for n, f in tried if 0 < n <= SMALL * graph.n_edges]
    most = max((n for n, _ in small), default=0)
    if (
        not scores.record.is_effect
        or len(small) < 2
        or most < LARGE * graph.n_edges
        or any(f >= NOTHING for _, f in small)
    ):
        return None
    method = scores.record.method
    ways = [f"method='{name}'" for name in REPAIRS if name != method]
    said = f"the best edges by {by} effect ('{method}') do nothing: at every"
    said += f" size up to {most:,} edges the faithfulness is below {NOTHING}, while the whole model does the task"
    if by == "signed":
        ways.append("by='absolute'")
        strong = scores.ranked("absolute")[:most]
        layers = np.array([graph.reader(reader).layer for _, reader in strong.tolist()])
        early = strong[layers < max(1, graph.n_layers // 3)]
        wrong = int((scores.values[tuple(early.T)] < 0).sum())
        if wrong > WRONG * len(early) > 0:
            said += (
                f". Of the {len(early):,} strongest edges into the first layers {wrong:,} have negative effects, so a"
                " signed ranking leaves them out: the gradient at one prompt has the wrong sign there"
            )
    return f"{said}. Use {' or '.join(ways)}"
