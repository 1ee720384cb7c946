"""Exact effects of whole nodes: a writer's output is replaced for every reader, and the metric measured.

1. Replacing a node's output is ablating all its outgoing edges together. What it writes changes the residual stream by
   its ablated value minus its own: everything before it stays as it was.
2. An MLP changes the stream where the next block begins, a head also what its own layer's MLP reads, the input the
   stream that enters layer 0: from there the model is restarted (`engine/restart.py`), several nodes side by side.

Noising: metric(clean) - metric(clean with the node carrying its ablated value). Denoising: metric(corrupted with the
node carrying its clean value) - metric(corrupted). Under a norm on what attention writes (Gemma 2) a head's values are
taken as it wrote them, each at its own run's scale; `circuitfind.patch` replaces them before that norm.
"""

from __future__ import annotations

from functools import partial
from os import PathLike

import numpy as np
import torch
from torch import Tensor

from circuitfind.attribution.exact import PARTS, key_of_run
from circuitfind.attribution.gradients import Pairs
from circuitfind.batch import Batch
from circuitfind.checkpoint import Measurements
from circuitfind.engine.ablation import ablated
from circuitfind.engine.aligned import capture_corrupted
from circuitfind.engine.capture import Writers, capture
from circuitfind.engine.memory import in_batches
from circuitfind.engine.restart import Restart, at_position
from circuitfind.progress import track
from circuitfind.score_checks import check_effects


def exact_node_effects(
    pairs: Pairs,
    direction: str = "noising",
    by_position: bool = False,
    batch_size: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
) -> np.ndarray:
    """Exact effects of every writer.

    Args:
        by_position: each position on its own; prompts of one length only.
        checkpoint: a file that a stopped run leaves and a repeated call continues from; removed at the end.

    Returns:
        `[writers, (positions,) examples]` in units of the metric, positive = supports.

    Raises:
        ScoreError: an effect is NaN or infinite.
        FileError: the checkpoint belongs to another run.
    """
    pairs.check_direction(direction)
    n_writers = pairs.adapter.graph.n_writers
    positions = np.arange(pairs.batch.clean.ids.shape[1]) if by_position else np.array([-1])
    places = np.stack(np.meshgrid(np.arange(n_writers), positions, indexing="ij"), axis=-1).reshape(-1, 2)
    key = key_of_run(pairs, places, direction) if checkpoint else ""
    measured = Measurements(checkpoint, key, PARTS, (len(places), len(pairs.batch)))
    measure = partial(_measure, pairs, measured, places, direction)
    try:
        for _ in in_batches(pairs.adapter, pairs.batch, measure, batch_size, "pairs"):
            pass
    except BaseException:  # Ctrl-C included: what was measured is kept
        measured.flush()
        raise
    measured.finish()
    shape = (n_writers, len(positions)) if by_position else (n_writers,)
    return measured.values.reshape(*shape, -1)


def _measure(
    pairs: Pairs, measured: Measurements, places: np.ndarray, direction: str, batch: Batch, examples: slice
) -> None:
    """Measures what is missing of a batch."""
    adapter, metric = pairs.adapter, pairs.metric
    clean, corrupted = capture(adapter, batch.clean), capture_corrupted(adapter, batch)
    batch = batch.with_reference(clean.logits)
    if direction == "noising":
        sign, restart = 1, Restart(adapter, batch.clean, clean)
        change = ablated(pairs.ablation, clean, corrupted, pairs.means).minus(clean.writers)
    else:
        sign, restart = -1, Restart(adapter, batch.corrupted, corrupted)
        change = clean.writers.minus(corrupted.writers)
    before = metric(restart.base.logits, batch)
    for layer, rows in track(_groups(adapter.graph.n_heads, places, restart.at_once), "exact node effects"):
        if not measured.missing(rows, examples):
            continue
        logits = _patched(restart, change, layer, places[rows].tolist())
        effects = sign * (before - torch.stack([metric(one, batch) for one in logits])).cpu().double().numpy()
        names = adapter.graph.writer_names
        check_effects(effects, [f"the exact effect of {names[writer]}" for writer in places[rows, 0]])
        measured.add(rows, examples, effects)


def _groups(n_heads: int, places: np.ndarray, at_once: int) -> list[tuple[int, slice]]:
    """(layer, rows of `places`): nodes of one layer, a few at a time; -1 is the input's."""
    layers = (places[:, 0] - 1) // (n_heads + 1)
    groups = []
    for layer in range(layers[0], layers[-1] + 1):
        start, stop = np.searchsorted(layers, [layer, layer + 1]).tolist()
        groups += [(layer, slice(first, min(first + at_once, stop))) for first in range(start, stop, at_once)]
    return groups


def _patched(restart: Restart, change: Writers, layer: int, places: list[list[int]]) -> Tensor:
    """Logits `[places, batch, reads, vocab]` with each (writer, position or -1) replaced in a run of its own."""
    graph = restart.adapter.graph
    changes: dict[int, Tensor] = {}
    writers = sorted({writer for writer, _ in places})
    if layer < 0:
        changes[0] = change.embed
    else:
        heads = [writer - graph.head(layer) for writer in writers if writer != graph.mlp(layer)]
        if heads:
            weight = restart.adapter.layers[layer].output_weight()[heads]
            written = torch.stack([change.heads[layer][..., h, :] @ w for h, w in zip(heads, weight, strict=True)])
            moved = restart.after_mlp(layer, written)
            changes |= {graph.head(layer, h): one for h, one in zip(heads, moved, strict=True)}
        changes[graph.mlp(layer)] = change.mlps[layer]
    single = [
        changes[writer] if position < 0 else at_position(changes[writer], position) for writer, position in places
    ]
    return restart.from_stream(layer + 1, torch.stack(single))
