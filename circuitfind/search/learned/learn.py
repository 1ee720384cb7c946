"""`learn_masks`: a circuit by gradient descent on which edges (or nodes) to let through.

Every edge gets a gate between 0 and 1; gates are drawn at random around learned logits, the model runs with each edge
let through as far as its gate says, and the logits learn to keep the metric with few open gates (`training.py`). By
default the metric is `kl`: stay close to the whole model. What is learned is a ranking, and a circuit cut from it. The
methods (`methods.py`) differ in how gates are drawn and in what makes the circuit small.

At level "node" each node has one gate, for all edges out of it, by any of the methods.

Differences from the authors' own code: Edge Pruning there learns gates of whole nodes beside those of edges; here every
edge of the graph has its own gate and nothing else has one. One mask is drawn for all pairs of a step, where UGS draws
several for each pair: its gradients are noisier here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from os import PathLike
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from circuitfind.circuit import Circuit, connected
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import ScoreError, check_count
from circuitfind.graph import Graph
from circuitfind.models.load import Model
from circuitfind.record import NO_EFFECT, Record
from circuitfind.remote.call import remotable
from circuitfind.scores import NodeScores, Scores
from circuitfind.search.learned import saved
from circuitfind.search.learned.batches import MiniBatches
from circuitfind.search.learned.methods import START, method_of, pressure_of
from circuitfind.search.learned.pressure import Price
from circuitfind.search.learned.training import Logged, State, Training
from circuitfind.setting import JudgeKeywords
from circuitfind.tasks.task import BoundTask, Task

SIGN = f"{NO_EFFECT}sigmoid of the learned logit, 0 to 1: a ranking of what to keep"


@dataclass(frozen=True, eq=False)
class LearnedMasks:
    """What was learned.

    Attributes:
        scores: `Scores`, or `NodeScores` at level "node": sigmoid of the learned logits, a ranking.
        circuit: the wanted number of edges or nodes, or (none wanted) the gates above 1/2; `facts` says how it went.
        history: a row every 10 steps: step, loss, metric of the masked runs, expected number of open gates.
    """

    scores: Scores | NodeScores
    circuit: Circuit
    history: tuple[Logged, ...]
    record: Record


@remotable
def learn_masks(
    model: Model,
    task: Task | BoundTask,
    method: str = "edge-pruning",
    *,
    level: str = "edge",
    n_edges: int | None = None,
    n_nodes: int | None = None,
    sparsity: float | None = None,
    steps: int = 200,
    lr: float | None = None,
    regularisation: float | None = None,
    pairs_per_step: int = 32,
    patience: int | None = 5,
    prune: bool = True,
    checkpoint: str | PathLike[str] | None = None,
    **asked: Unpack[JudgeKeywords],
) -> LearnedMasks:
    """Learns which edges or nodes to keep, with the model's weights frozen.

    Args:
        method: "edge-pruning", "subnetwork-probing" or "ugs".
        level: "edge", or "node": one gate for all edges out of a node.
        n_edges, n_nodes: how many edges (or, at level "node", nodes) the circuit has before pruning.
        sparsity: the same as a part that is left out: 0.9 keeps a tenth. Edge Pruning needs one of the three and
            steers to it; the others are cut there, or, if none is given, at gates above 1/2.
        steps: at most so many steps of Adam.
        lr: Adam's learning rate, on the logits of the gates.
        regularisation: price of an open gate, in units of the metric; not for Edge Pruning. By default a tenth of
            metric(full) - metric(empty), divided by the wanted number of gates (by a tenth of all, if none is given).
        pairs_per_step: pairs in a mini-batch.
        patience: stop early after so many rows of `history` without a new lowest loss; None never does.
        prune: keep only what is connected from `input` to `logits`.
        checkpoint: a file that a stopped run leaves and the same call continues from; removed at the end.
        asked: metric ("kl" by default: the circuit is to do what the model does; None takes the task's own; another
            metric is maximised, even beyond the whole model's), ablation, batch_size, seed (of the mini-batches and the
            gates' noise; on one processor the same seed gives the same result to the bit); see `circuitfind.setting`.

    Raises:
        ScoreError: unknown method or impossible sizes; a metric that is NaN, or has no gradient.
        TaskError: the task does not fit the model or the ablation.
        FileError: the checkpoint belongs to another run.
    """
    if level not in ("edge", "node"):
        raise ScoreError(f"level '{level}' is unknown: use 'edge' or 'node'")
    graph = model.graph
    count = graph.n_edges if level == "edge" else graph.n_writers
    target = _target(level, count, n_edges, n_nodes, sparsity)
    chosen = method_of(method, level, target, regularisation)
    _check_training(steps, lr, pairs_per_step, patience)
    lr = chosen.lr if lr is None else lr
    own = "metric" in asked and asked["metric"] is None  # None asks for the task's own
    experiment = Experiment.of(model, task, asked, metric=None if own else "kl", direction=False)
    seed = experiment.setting.seed
    batches = MiniBatches(experiment, pairs_per_step)
    pressure = pressure_of(chosen, batches, target, count, steps, regularisation)
    spread = _spread(graph, level, model.adapter.device)
    training = Training(batches, chosen.gates, spread, pressure, lr, seed)
    settings = {"level": level, "target": target, "steps": steps, "lr": lr}
    settings |= {"regularisation": pressure.price} if isinstance(pressure, Price) else {}
    settings |= {"pairs_per_step": pairs_per_step, "patience": patience}
    start = State.start(torch.full((count,), START, dtype=model.adapter.work, device=model.adapter.device))
    state = saved.run(training, start, steps, patience, checkpoint, (method, sorted(settings.items()), seed))
    record = replace(experiment.record(method, **settings), sign=SIGN)
    values = torch.sigmoid(state.logits.cpu().double()).float()
    history = state.history()
    facts = {"steps": state.step, "metric_of_masked_runs": history[-1].metric, "expected": history[-1].expected}
    scores: Scores | NodeScores
    if level == "edge":
        matrix = np.zeros(graph.real.shape, dtype=np.float32)
        matrix.T[graph.real.T] = values.numpy()
        scores = Scores(graph, matrix, record)
        cut = scores.threshold(0.5, prune=prune) if target is None else scores.top(target, prune=prune)
    else:
        scores = NodeScores(graph, values.numpy(), record)
        cut = _of_nodes(scores, target, prune)
    circuit = replace(cut, facts={"n_edges": len(cut), **facts})
    return LearnedMasks(scores, circuit, history, circuit.record)


def _spread(graph: Graph, level: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Puts gates `[gates]` into a mask `[writers, readers]`: an edge's into its cell, a node's into its row."""
    readers, writers = (torch.from_numpy(index).to(device) for index in np.nonzero(graph.real.T))

    def spread(gates: Tensor) -> Tensor:
        if level == "node":
            return gates[:, None].expand(graph.real.shape)
        return gates.new_zeros(graph.real.shape).index_put((writers, readers), gates)

    return spread


def _of_nodes(scores: NodeScores, target: int | None, prune: bool) -> Circuit:
    """All edges out of the chosen nodes."""
    graph, chosen = scores.graph, np.zeros(scores.graph.n_writers, dtype=bool)
    if target is None:
        chosen = scores.values > 0.5
    else:
        chosen[[graph.writer(name) for name in scores.top(target)]] = True
    mask = graph.real & chosen[:, None]
    record = scores.record.with_settings(nodes=[graph.writer_names[u] for u in np.flatnonzero(chosen)])
    return Circuit(graph, connected(graph, mask) if prune else mask, record=record)


def _target(level: str, count: int, n_edges: int | None, n_nodes: int | None, sparsity: float | None) -> int | None:
    """How many gates the circuit keeps."""
    given = {"n_edges": n_edges, "n_nodes": n_nodes, "sparsity": sparsity}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ScoreError(f"{' and '.join(named)} are given: one of them says the circuit's size")
    other = "n_nodes" if level == "edge" else "n_edges"
    if other in named:
        raise ScoreError(f"{other} is for level='{'node' if level == 'edge' else 'edge'}': give n_{level}s or sparsity")
    if sparsity is not None:
        if not isinstance(sparsity, Real) or not 0 <= sparsity <= 1:
            raise ScoreError(f"sparsity={sparsity!r} is the part of {level}s that is left out: between 0 and 1")
        return round((1 - sparsity) * count)
    n = n_edges if level == "edge" else n_nodes
    if n is not None:
        check_count(f"n_{level}s", n, 0, count)
    return n


def _check_training(steps: int, lr: float | None, pairs_per_step: int, patience: int | None) -> None:
    for name, value in (("steps", steps), ("pairs_per_step", pairs_per_step), ("patience", patience)):
        if value is not None:
            check_count(name, value, 1)
    if lr is not None and not (isinstance(lr, Real) and lr > 0):
        raise ScoreError(f"lr={lr!r}: give a number above 0")
