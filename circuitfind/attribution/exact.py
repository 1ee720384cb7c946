"""Exact effects: every edge is patched on its own and the metric measured. What all attribution methods estimate.

Noising: metric(clean) - metric(clean with the edge carrying its ablated value). Denoising: metric(corrupted with the
edge carrying its clean value) - metric(corrupted). Edges of one reader are patched side by side from the cached
residual that the reader's layer starts with (`engine/replay.py`), so a whole graph costs about half a forward pass an
edge.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from circuitfind.attribution.gradients import Pairs
from circuitfind.batch import Batch
from circuitfind.engine.ablation import ablated
from circuitfind.engine.capture import capture
from circuitfind.engine.memory import in_batches
from circuitfind.engine.replay import Replay
from circuitfind.errors import ScoreError
from circuitfind.progress import track

# Rows of patched prompts that run as one batch: more gains nothing on a processor.
TOKENS_AT_ONCE = {"cpu": 2048}
MANY_TOKENS_AT_ONCE = 65536


class EdgeEffects(NamedTuple):
    """`edges [edges, 2]` (writer, reader) and their exact effects on every example, `values [edges, batch]`."""

    edges: np.ndarray
    values: np.ndarray

    def matrix(self, shape: tuple[int, int]) -> np.ndarray:
        """`[writers, readers]` float32 means over examples, NaN where not measured."""
        matrix = np.full(shape, np.nan, dtype=np.float32)
        matrix[self.edges[:, 0], self.edges[:, 1]] = self.values.mean(axis=1)
        return matrix


def exact_effects(
    pairs: Pairs, mask: np.ndarray, direction: str = "noising", batch_size: int | None = None
) -> EdgeEffects:
    """Exact effects of the edges in a mask.

    Args:
        mask: `[writers, readers]` bool.

    Returns:
        Effects by edge (reader by reader) and example, in units of the metric, positive = supports.
    """
    readers, writers = np.nonzero(mask.T)
    edges = np.stack([writers, readers], axis=1)
    found = in_batches(
        pairs.adapter, pairs.batch, lambda batch: _batch(pairs, batch, edges, direction), batch_size, "pairs"
    )
    return EdgeEffects(edges, np.concatenate([values for _, values in found], axis=1))


def _batch(pairs: Pairs, batch: Batch, edges: np.ndarray, direction: str) -> np.ndarray:
    """`[edges, batch]` exact effects."""
    adapter, metric = pairs.adapter, pairs.metric
    clean, corrupted = capture(adapter, batch.clean), capture(adapter, batch.corrupted)
    batch = batch.with_reference(clean.logits)
    carried = ablated(pairs.ablation, clean, corrupted, pairs.means)
    if direction == "noising":
        replay = Replay(adapter, batch.clean, clean, carried.minus(clean.writers))
        base = metric(clean.logits, batch)
    else:
        replay = Replay(adapter, batch.corrupted, corrupted, clean.writers.minus(corrupted.writers))
        base = metric(corrupted.logits, batch)
    limit = TOKENS_AT_ONCE.get(adapter.device.type, MANY_TOKENS_AT_ONCE)
    at_once = max(1, limit // batch.clean.ids.numel())
    sign = 1 if direction == "noising" else -1
    out = []
    for reader, group in track(_groups(edges, at_once), "exact effects"):
        logits = replay.patch_edges(reader, group)
        effects = base - torch.stack([metric(one, batch) for one in logits])
        out.append((sign * effects).double().cpu().numpy())
    values = np.concatenate(out)
    if np.isnan(values).any():
        name = adapter.graph.edge_name(*edges[np.isnan(values).any(axis=1).argmax()])
        raise ScoreError(f"the exact effect of {name} is NaN: look for inf or NaN in the model's logits or your metric")
    return values


def _groups(edges: np.ndarray, at_once: int) -> list[tuple[int, list[int]]]:
    """Edges of one reader, a few at a time, in the order given."""
    groups: list[tuple[int, list[int]]] = []
    for writer, reader in edges.tolist():
        if not groups or groups[-1][0] != reader or len(groups[-1][1]) == at_once:
            groups.append((reader, []))
        groups[-1][1].append(writer)
    return groups
