"""Exact effects: every edge is patched on its own and the metric measured. What all attribution methods estimate.

Noising: metric(clean) - metric(clean with the edge carrying its ablated value). Denoising: metric(corrupted with the
edge carrying its clean value) - metric(corrupted). Edges of one reader are patched side by side from the cached
residual that the reader's layer starts with (`engine/replay.py`), so a whole graph costs about half a forward pass an
edge.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from os import PathLike
from typing import NamedTuple

import numpy as np
import torch

from circuitfind.attribution.gradients import Pairs
from circuitfind.batch import Batch
from circuitfind.checkpoint import Measurements
from circuitfind.engine.ablation import ablated
from circuitfind.engine.aligned import capture_corrupted
from circuitfind.engine.capture import capture
from circuitfind.engine.memory import PATCHES, in_batches
from circuitfind.engine.replay import Replay
from circuitfind.engine.run_key import run_key
from circuitfind.progress import track
from circuitfind.score_checks import check_effects

PARTS = "model, prompts, metric or edges"  # what decides the effects


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
    pairs: Pairs,
    mask: np.ndarray,
    direction: str = "noising",
    batch_size: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
) -> EdgeEffects:
    """Exact effects of the edges in a mask.

    Args:
        mask: `[writers, readers]` bool.
        checkpoint: a file that a stopped run leaves and a repeated call continues from; removed at the end.

    Returns:
        Effects by edge (reader by reader) and example, in units of the metric, positive = supports.

    Raises:
        ScoreError: an effect is NaN or infinite.
        FileError: the checkpoint belongs to another run.
    """
    pairs.check_direction(direction)
    readers, writers = np.nonzero(mask.T)
    edges = np.stack([writers, readers], axis=1)
    key = key_of_run(pairs, edges, direction) if checkpoint else ""
    measured = Measurements(checkpoint, key, PARTS, (len(edges), len(pairs.batch)))
    measure = partial(_measure, pairs, measured, edges, direction)
    try:
        for _ in in_batches(pairs.adapter, pairs.batch, measure, batch_size, "pairs"):
            pass
    except BaseException:  # Ctrl-C included: what was measured is kept
        measured.flush()
        raise
    measured.finish()
    return EdgeEffects(edges, measured.values)


def _measure(
    pairs: Pairs, measured: Measurements, edges: np.ndarray, direction: str, batch: Batch, examples: slice
) -> None:
    """Measures what is missing of a batch."""
    adapter, metric = pairs.adapter, pairs.metric
    clean, corrupted = capture(adapter, batch.clean), capture_corrupted(adapter, batch)
    batch = batch.with_reference(clean.logits)
    carried = ablated(pairs.ablation, clean, corrupted, pairs.means)
    if direction == "noising":
        replay, base = Replay(adapter, batch.clean, clean, carried.minus(clean.writers)), clean
    else:
        replay, base = Replay(adapter, batch.corrupted, corrupted, clean.writers.minus(corrupted.writers)), corrupted
    sign, at_base = (1 if direction == "noising" else -1), metric(base.logits, batch)
    at_once = PATCHES.runs(adapter.device, batch.clean.ids.numel())
    for rows, reader, group in track(_groups(edges, at_once), "exact effects"):
        if not measured.missing(rows, examples):
            continue
        logits = replay.patch_edges(reader, group)
        effects = sign * (at_base - torch.stack([metric(one, batch) for one in logits])).cpu().double().numpy()
        check_effects(effects, [f"the exact effect of {adapter.graph.edge_name(u, reader)}" for u in group])
        measured.add(rows, examples, effects)


def key_of_run(pairs: Pairs, places: np.ndarray, direction: str) -> str:
    """Digest of everything that decides the effects of these places."""
    return run_key(pairs.adapter, pairs.batch, pairs.metric, places, pairs.ablation, direction)


def _groups(edges: np.ndarray, at_once: int) -> list[tuple[slice, int, list[int]]]:
    """Edges of one reader, a few at a time, in the order given: (rows of `edges`, reader, writers)."""
    groups: list[tuple[slice, int, list[int]]] = []
    starts = np.flatnonzero(np.diff(edges[:, 1], prepend=-1)).tolist()
    for start, stop in pairwise([*starts, len(edges)]):
        for first in range(start, stop, at_once):
            rows = slice(first, min(first + at_once, stop))
            groups.append((rows, int(edges[start, 1]), edges[rows, 0].tolist()))
    return groups
