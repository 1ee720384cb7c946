"""What the page shows beyond a search's own results, from the model: faithfulness by size, attention patterns.

1. Every cut of the circuit (see `report.sizes`) is run exactly, with an interval over the pairs.
2. The first clean prompts that are short enough are run once more, and the patterns of the circuit's heads kept:
   `[query, key]` weights between 0 and 1 in steps of 1/255, one byte each, the keys up to the query only (models read
   from left to right). Patterns come from `engine.sites`, which leaves the model as it was.
3. They share a budget of bytes, for the page stays small: where it is short, the second prompt goes first, then the
   heads of the weakest edges.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from circuitfind.circuit import Circuit
from circuitfind.engine.experiment import bind
from circuitfind.engine.sites import capture_site
from circuitfind.evaluation.curve import curve
from circuitfind.models.load import Model
from circuitfind.remote.call import remotable
from circuitfind.report.data import Attention
from circuitfind.report.sizes import Size
from circuitfind.tasks.task import BoundTask, Task

PROMPTS = 2
LONGEST = 192  # tokens; a longer prompt's pattern cannot be read on a page
BUDGET = 900_000  # bytes of patterns


def measure_sizes(
    model: Model,
    task: Task | BoundTask,
    circuits: Sequence[Circuit],
    *,
    ablation: str = "corrupted",
    batch_size: int | None = None,
    seed: int = 0,
) -> list[Size]:
    """Runs every cut of a circuit exactly.

    Args:
        task: preferably pairs that the circuit was not found on.
        ablation, batch_size, seed: as for `circuitfind.evaluate`.

    Raises:
        ScoreError: faithfulness is undefined on this task.
    """
    found = curve(model, task, circuits, ablation=ablation, batch_size=batch_size, seed=seed)
    return [
        Size(circuit, point.faithfulness, (point.interval.low, point.interval.high))
        for circuit, point in zip(found.circuits, found.points, strict=True)
    ]


@remotable
def attention(
    model: Model, task: Task | BoundTask, circuit: Circuit, *, prompts: int = PROMPTS, budget: int = BUDGET
) -> list[Attention]:
    """The attention patterns of a circuit's heads on the first clean prompts of at most `LONGEST` tokens.

    Args:
        budget: bytes that they may take in all.

    Raises:
        ModelError: the model does not hand out its attention patterns.
    """
    bound, graph = bind(model, task), circuit.graph
    heads = _heads(circuit)
    rows = [row for row, tokens in enumerate(bound.tokens) if len(tokens) <= LONGEST][:prompts]
    lengths = [len(bound.tokens[row]) for row in rows]
    while len(rows) > 1 and len(heads) * sum(map(_cells, lengths)) > budget:
        rows, lengths = rows[:-1], lengths[:-1]
    if not rows or not heads:
        return []
    heads = heads[: budget // sum(map(_cells, lengths))]
    layers = sorted({graph.layer_of(head) for head in heads})
    result = []
    for row in rows:
        inputs = bound.batch.clean.rows(slice(row, row + 1))
        real = inputs.mask[0]
        _, patterns = capture_site(model.adapter, inputs, "pattern", layers)
        packed = {}
        for head in heads:
            layer = graph.layer_of(head)
            weights = patterns[layer][0, :, head - graph.head(layer)].to(torch.float32)
            packed[graph.writer_names[head]] = pack(weights[real.to(weights.device)][:, real.to(weights.device)])
        result.append(Attention(bound.prompts[row], bound.tokens[row], packed))
    return result


def pack(weights: torch.Tensor) -> bytes:
    """`[query, key]` weights in 0..1 as bytes, 255 = 1: query after query, its keys up to itself."""
    whole = (weights.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return bytes(whole[np.tril_indices(len(whole))].tobytes())


def _cells(length: int) -> int:
    return length * (length + 1) // 2


def _heads(circuit: Circuit) -> list[int]:
    """Writer indices of the circuit's heads, those of the largest summed |effect| of edges out first."""
    graph = circuit.graph
    strength = np.zeros(graph.n_writers)
    for row in circuit.rows():
        strength[row.writer] += abs(row.effect or 0.0)
    inside = np.flatnonzero(circuit.node_mask[:-1]).tolist()
    heads = [writer for writer in inside if writer and writer != graph.mlp(graph.layer_of(writer))]
    return sorted(heads, key=lambda writer: -strength[writer])
