"""Exact effects: patch each edge or node on its own and measure the metric. Attribution methods estimate these.

Noising: metric(clean) - metric(clean with the edge or node at its ablated value). Denoising: metric(corrupted with the
edge or node at its clean value) - metric(corrupted).

1. **Edges** into the same reader are patched in one batch, which starts from the cached residual stream that enters the
   reader's layer (`engine/restart.py`). A whole graph therefore costs about half a forward pass per edge.
2. Replacing a **node's** output ablates all its outgoing edges together: the residual stream changes by the node's
   ablated value minus its own value (noising). An MLP changes the stream that enters the next block, a head also the
   input of its own layer's MLP, and `input` the stream that enters layer 0. The model restarts from there, with several
   nodes in one batch.

In a model with a norm after attention (Gemma 2), a head's output is taken after that norm, with the norm's scale in the
same run; `circuitfind.patch` replaces heads before that norm.
"""

from __future__ import annotations

from os import PathLike
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuitfind.attribution.method import Method, Request, Scored
from circuitfind.batch import Batch
from circuitfind.engine.capture import WRITTEN, capture, capture_corrupted
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.measure import Group, Started, measure
from circuitfind.engine.restart import Restart, at_position
from circuitfind.engine.writers import Writers
from circuitfind.patching.patch import runs_of, swept


class EdgeEffects(NamedTuple):
    """`edges [edges, 2]`: (writer, reader); `values [edges, examples]`: exact effects of each edge on each example."""

    edges: np.ndarray
    values: np.ndarray

    def matrix(self, shape: tuple[int, int]) -> np.ndarray:
        """Return means over examples as `[writers, readers]` float32, NaN for edges that were not measured."""
        matrix = np.full(shape, np.nan, dtype=np.float32)
        matrix[self.edges[:, 0], self.edges[:, 1]] = self.values.mean(axis=1)
        return matrix


def exact_effects(
    experiment: Experiment, mask: np.ndarray, checkpoint: str | PathLike[str] | None = None
) -> EdgeEffects:
    """Measure the exact effects of the edges in a mask `[writers, readers]`, in units of the metric, positive =
    supports. Edges are in the order of their readers.

    `checkpoint`: a file that an interrupted run leaves and a repeated call continues from; removed at the end.
    ScoreError if an effect is NaN or infinite, FileError if the checkpoint belongs to another run.
    """
    graph, (readers, writers) = experiment.graph, np.nonzero(mask.T)
    edges = np.stack([writers, readers], axis=1)

    def start(batch: Batch, _: slice) -> Started:
        restart, change, started = _started(experiment, batch, divided=True)
        runs = runs_of(edges[:, 1], restart.at_once)
        firsts = [(rows, int(edges[rows.start, 1])) for rows in runs]
        groups = [Group(rows, graph.reader(at).layer, (at, edges[rows, 0].tolist())) for rows, at in firsts]
        return started._replace(groups=groups, logits=lambda group: restart.edges(group[0], group[1], change))

    def name(place: int) -> str:
        return graph.edge_name(*edges[place])

    found = measure(experiment, start, len(edges), name, "exact effects", checkpoint, [edges])
    return EdgeEffects(edges, found.effects)


def exact_node_effects(
    experiment: Experiment,
    by_position: bool = False,
    checkpoint: str | PathLike[str] | None = None,
    writers: np.ndarray | None = None,
) -> np.ndarray:
    """Measure the exact effects of every writer, or of `writers` (ascending indices): `[writers, examples]`.

    `by_position`: patch each position on its own, `[writers, positions, examples]`; prompts must have the same length.
    Units, sign, checkpoint and errors as for `exact_effects`.
    """
    graph = experiment.graph
    positions = np.arange(experiment.batch.clean.ids.shape[1]) if by_position else np.array([-1])
    writers = np.arange(graph.n_writers) if writers is None else writers
    places = np.stack(np.meshgrid(writers, positions, indexing="ij"), axis=-1).reshape(-1, 2)
    layers = np.array([graph.layer_of(writer) for writer in places[:, 0]])  # -1 is the input's

    def start(batch: Batch, _: slice) -> Started:
        restart, change, started = _started(experiment, batch, divided=not by_position)
        runs = runs_of(layers, restart.at_once)
        groups = [Group(rows, layer := int(layers[rows.start]), (layer, places[rows].tolist())) for rows in runs]
        return started._replace(groups=groups, logits=lambda group: _nodes_patched(restart, change, *group))

    def name(place: int) -> str:
        return str(graph.writer_names[places[place, 0]])

    values = measure(experiment, start, len(places), name, "exact node effects", checkpoint, [places]).effects
    return values.reshape(len(writers), *([len(positions)] if by_position else []), -1)


def _started(experiment: Experiment, batch: Batch, divided: bool) -> tuple[Restart, Writers, Started]:
    """Return the base run to restart from, the change of each writer (its value in the patch minus its value in the
    base run), and the batch for `measure`, without groups. `divided`: as for `Ends` in `gradients.py`."""
    adapter, run = experiment.adapter, experiment.after_prefix(batch) if divided else batch
    noising = experiment.setting.noising  # the run that is not the base needs to keep its writers only
    clean = capture(adapter, run.clean, keep=None if noising else WRITTEN)
    corrupted = capture_corrupted(adapter, run, keep=WRITTEN if noising else None)
    if noising:
        restart, other = Restart(adapter, run.clean, clean), experiment.ablated(clean, corrupted)
    else:
        restart, other = Restart(adapter, run.corrupted, corrupted), clean.writers
    full, empty = (clean.logits, None) if noising else (None, corrupted.logits)
    started = Started(batch.with_reference(clean.logits), full, empty, [], lambda group: group)
    return restart, other.minus(restart.base.writers), started


def _nodes_patched(restart: Restart, change: Writers, layer: int, places: list[list[int]]) -> Tensor:
    """Return logits `[places, batch, reads, vocab]`, each with one (writer, position) patched; position -1 patches all
    positions. All writers belong to `layer`; -1 is the input's."""
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
    single = [changes[writer] if at < 0 else at_position(changes[writer], at) for writer, at in places]
    return restart.from_stream(layer + 1, torch.stack(single))


def score(experiment: Experiment, request: Request) -> Scored:
    """Measure the exact effects of all edges, nodes or places."""
    if request.level == "place":
        return swept(experiment, request.where, request.checkpoint)
    if request.level == "edge":
        real = experiment.graph.real
        return exact_effects(experiment, real, request.checkpoint).matrix(real.shape)
    return exact_node_effects(experiment, bool(request.by_position), request.checkpoint).mean(-1)


METHOD = Method(
    "exact",
    "every edge, node or place patched on its own",
    "Vig et al. 2020, Meng et al. 2022",
    "about half a forward an edge",
    ("edge", "node", "place"),
    score=score,
    examples=lambda experiment: exact_effects(experiment, experiment.graph.real).values,
    ungrouped=True,
    by_position=True,
    spellings=("patching", "activation-patching", "act-patch", "ap"),
)
