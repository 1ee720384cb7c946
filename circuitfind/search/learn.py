"""`learn_masks`: a circuit by gradient descent on which edges (or nodes) to let through.

Every edge gets a gate between 0 and 1. Gates are drawn at random around learned logits, the model runs with each edge
let through as far as its gate says, and the logits learn to keep the metric with few open gates (`training.py`). By
default the metric is `kl`: stay close to the whole model. What is learned is a ranking, and a circuit cut from it. At
level "node" each node has one gate, for all edges out of it.

| method | gates | what makes the circuit small |
|---|---|---|
| `edge-pruning` (Bhaskar et al. 2024) | hard concrete | Lagrange multipliers steer to a wanted number of gates |
| `subnetwork-probing` (Cao et al. 2021) | hard concrete | a fixed price a gate |
| `ugs` (uniform gradient sampling, Li and Janson 2024) | 0, 1 or uniform between | a fixed price a gate |
| `matryoshka` (arXiv 2609.25518) | soft, of exactly k expected edges | k is drawn anew at each step |

`matryoshka` draws nothing but k, so it ranks for every size. It has objectives of its own (`matryoshka.py`), and the
task's metric by default. `starts.py` says what the first logits are.

Prices are in units of the metric. The default ones are parts of the contrast, metric(full) - metric(empty), so that
they suit any metric.

Differences from the authors' own code: Edge Pruning there learns gates of whole nodes beside those of edges; here every
edge of the graph has its own gate and nothing else has one. One mask is drawn for all pairs of a step, where UGS draws
several for each pair: its gradients are noisier here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Self, Unpack

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict

from circuitfind.calls import model_call
from circuitfind.checkpoint import key_of
from circuitfind.circuit import Circuit, connected
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import ScoreError, check_count, warn
from circuitfind.export import files
from circuitfind.graph import Graph
from circuitfind.models.load import Model
from circuitfind.record import NO_EFFECT, Record
from circuitfind.result import as_json, build
from circuitfind.scores import NodeScores, Scores
from circuitfind.search.found import FolderResult, save_circuit
from circuitfind.search.matryoshka import OBJECTIVES
from circuitfind.search.starts import first_logits
from circuitfind.search.training import (
    HARD_CONCRETE,
    UNIFORM,
    Gates,
    Logged,
    MiniBatches,
    NoPressure,
    Pressure,
    Price,
    State,
    Target,
    Training,
)
from circuitfind.setting import JudgeKeywords
from circuitfind.tasks.task import BoundTask, Task

SIGN = f"{NO_EFFECT}sigmoid of the learned logit, 0 to 1: a ranking of what to keep"
SIGNED = f"{NO_EFFECT}learned scores: by magnitude a ranking of what to keep, by sign of what raises the metric"
POSITIVE = f"{NO_EFFECT}softplus of learned scores: a ranking of what raises the metric"
# The numbers, the learning rates too, were chosen on the embedded model's `greater-than` task.
SHARE = 0.1  # the default price of all wanted gates together, as a part of the contrast
ASCENT = 0.5  # contrasts that a step adds to a multiplier, per whole gap between the expected size and the wanted one


class Learner(NamedTuple):
    """A kind of gates, and what it does by default.

    Attributes:
        gates: by objective; those that have none have one kind, under None.
        sparsity: the part of the gates that it closes if it steers to a size; None: it has a fixed price.
    """

    gates: Mapping[Any, tuple[Gates, ...]]
    lr: float
    sparsity: float | None = None
    steps: int = 200
    pairs_per_step: int = 32
    metric: str | None = "kl"
    objective: str | None = None

    @property
    def steers(self) -> bool:
        return self.sparsity is not None


LEARNERS = {
    "edge-pruning": Learner({None: (HARD_CONCRETE,)}, 0.05, sparsity=0.95),
    "subnetwork-probing": Learner({None: (HARD_CONCRETE,)}, 0.1),
    "ugs": Learner({None: (UNIFORM,)}, 0.05),
    "matryoshka": Learner(OBJECTIVES, 0.1, 0.95, steps=300, pairs_per_step=4, metric=None, objective="both"),
}


class TrainingKeywords(TypedDict, total=False):
    """How masks are trained.

    steps: at most so many steps of Adam (200; `matryoshka` 300).
    lr: Adam's learning rate, on the logits of the gates; by default the method's.
    regularisation: price of an open gate, in units of the metric; not for Edge Pruning. By default a tenth of
        metric(full) - metric(empty), divided by the wanted number of gates (by a tenth of all, if none is given).
    pairs_per_step: pairs in a mini-batch (32; `matryoshka` 4).
    patience: stop early after so many rows of `history` without a new lowest loss (5); None never does, nor does
        `matryoshka`.
    objective: of `matryoshka`: "metric" is as published and raises the metric, "faithfulness" lowers its distance from
        the whole model's, "both" (the default) does the one for the edges' order by sign, the other for that by
        magnitude.
    start: scores to start from (`Scores`, or `NodeScores` at level "node"), the name of a method of attribution, which
        makes them from the same pairs, or "alike". By default "alike"; of `matryoshka` "eap-ig-inputs" under ablation
        "corrupted". A circuit: only its edges are learned, from its estimates if it has them; all others stay closed.
    """

    steps: int | None
    lr: float | None
    regularisation: float | None
    pairs_per_step: int | None
    patience: int | None
    objective: str | None
    start: Scores | NodeScores | Circuit | str | None


class LearnKeywords(TrainingKeywords, JudgeKeywords, total=False):
    """The keywords of a run, and those of the training."""


TRAINING: Mapping[str, Any] = {**dict.fromkeys(TrainingKeywords.__annotations__), "patience": 5}


@dataclass(frozen=True, eq=False, repr=False)
class LearnedMasks(FolderResult):
    """What was learned.

    Attributes:
        scores: `Scores`, or `NodeScores` at level "node", a ranking: sigmoid of the learned logits, 0 to 1; of
            `matryoshka` the learned scores themselves, with a sign (`record.sign` says which).
        circuit: the wanted number of edges or nodes, or (none wanted) the gates above 1/2; `facts` says how it went.
        history: a row every 10 steps: step, loss, metric of the masked runs, expected number of open gates.
    """

    FORMAT, ROWS = "circuitfind.learned", "history"

    scores: Scores | NodeScores
    circuit: Circuit
    history: tuple[Logged, ...]
    record: Record

    def shown(self) -> dict[str, Any]:
        """What a line of text says of the result."""
        return {"method": self.record.method, "n_edges": len(self.circuit), "steps": self.history[-1].step}

    def write(self, folder: str | PathLike[str], **more: Any) -> list[Path]:
        """learned.json, learned.dot and learned.svg (the circuit), learned.safetensors (the ranking), learning.json."""
        made, folder = self.record, Path(folder)
        return [
            *save_circuit(self.circuit, folder, "learned", f"{made.method} on {made.task} in {made.model}"),
            self.scores.save(folder / "learned.safetensors"),
            files.write(folder / "learning.json", self.FORMAT, {"history": as_json(self.history)}),
        ]

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Self:
        """Reads the folder that `save` wrote, without any model."""
        folder = Path(path)
        circuit, content = Circuit.open(folder / "learned.json"), files.read(folder / "learning.json", cls.FORMAT)
        with files.reading(folder / "learning.json"):
            history = build(tuple[Logged, ...], content["history"])
            kind: Any = NodeScores if circuit.record.settings["level"] == "node" else Scores
        return cls(kind.open(folder / "learned.safetensors"), circuit, history, circuit.record)


@model_call
def learn_masks(
    model: Model,
    task: Task | BoundTask,
    method: str = "edge-pruning",
    *,
    level: str = "edge",
    n_edges: int | None = None,
    n_nodes: int | None = None,
    sparsity: float | None = None,
    prune: bool = True,
    checkpoint: str | PathLike[str] | None = None,
    **asked: Unpack[LearnKeywords],
) -> LearnedMasks:
    """Learns which edges or nodes to keep, with the model's weights frozen.

    Args:
        method: "edge-pruning", "subnetwork-probing", "ugs" or "matryoshka".
        level: "edge", or "node": one gate for all edges out of a node.
        n_edges, n_nodes: how many edges (or, at level "node", nodes) the circuit has before pruning.
        sparsity: the same as the part that is left out: 0.9 keeps a tenth. Edge Pruning steers to one of the three
            (sparsity 0.95 if none is given); the others are cut there, or, if none is given, at gates above 1/2
            (`matryoshka`: 0.95; `scores.top(n)` gives any other size).
        prune: keep only what is connected from `input` to `logits`.
        checkpoint: a file that a stopped run leaves and the same call continues from; removed at the end.
        asked: steps, lr, regularisation, pairs_per_step, patience, objective, start
            (`circuitfind.search.learn.TrainingKeywords`); metric ("kl" by default: the circuit is to do what the model
            does; None, the default of `matryoshka`, takes the task's own; another metric is maximised, even beyond the
            whole model's), ablation, batch_size, seed (of the mini-batches and the gates' noise; on one processor the
            same seed gives the same result to the bit), see `circuitfind.setting`.

    Raises:
        ScoreError: unknown method or impossible sizes; a metric that is NaN, or has no gradient.
        TaskError: the task does not fit the model or the ablation.
        FileError: the checkpoint belongs to another run.
    """
    if level not in ("edge", "node"):
        raise ScoreError(f"level '{level}' is unknown: use 'edge' or 'node'")
    graph = model.graph
    run: Any = dict(asked)
    options = {name: run.pop(name, default) for name, default in TRAINING.items()}
    learner = _learner(method, options)
    steps, patience, lr = options["steps"], options["patience"], options["lr"]
    gates = learner.gates[options["objective"]]
    chosen = options["start"]
    if isinstance(chosen, Circuit) and not len(chosen):
        raise ScoreError("start=Circuit has no edges, so there is no gate to learn: give a circuit that has some")
    edges = chosen.mask if isinstance(chosen, Circuit) else graph.real  # that have a gate
    count = int(edges.sum()) if level == "edge" else graph.n_writers
    if n_edges is n_nodes is sparsity is None:
        sparsity = learner.sparsity
    target = _target(level, count, n_edges, n_nodes, sparsity)
    own = run.get("metric", learner.metric) is None  # None asks for the task's own
    experiment = Experiment.of(model, task, run, metric=None if own else "kl", direction=False)
    batches = MiniBatches(experiment, options["pairs_per_step"])
    pressure = _pressure(learner, batches, target, count, steps, options["regularisation"])
    spread = _spread(graph, level, edges, model.adapter.device)
    training = Training(batches, gates, spread, pressure, lr, None if edges is graph.real else edges)
    settings = {"level": level, "target": target, "steps": steps, "lr": lr}
    settings |= {"regularisation": pressure.price} if type(pressure) is Price else {}
    settings |= {"pairs_per_step": options["pairs_per_step"], "patience": patience}
    start, record = first_logits(experiment, level, chosen, signed=learner.objective is not None)
    settings |= {"objective": options["objective"]} if learner.objective else {}
    state = training.run(
        State.start(start.to(dtype=model.adapter.work, device=model.adapter.device)),
        *(steps, patience, checkpoint, (method, sorted(settings.items()), batches.seed, key_of(start.numpy()))),
    )
    made = experiment.record(method, **settings)
    if record is not None:
        made = made.with_settings(start=record.method).seeing(record)
    values, sign = _values(state.logits.cpu().double(), learner, gates)
    scores, cut = _ranked(graph, level, edges, values.numpy(), replace(made, sign=sign), target, prune)
    if prune and not len(cut):
        none = "no gate is above 1/2" if target is None else f"what the {target} {level}s let through is not connected"
        warn(
            f"{method}: {none}, so the circuit has no edges: keep more (n_{level}s=, --{level}s), train longer (steps=,"
            " --steps), or see what was kept with prune=False (in Python)"
        )
    history = state.history()
    facts = {"steps": state.step, "metric_of_masked_runs": history[-1].metric, "expected": history[-1].expected}
    circuit = replace(cut, facts={"n_edges": len(cut), **facts})
    return LearnedMasks(scores, circuit, history, circuit.record)


# -------------------------------------------------------------------- what is asked for
def learner_of(name: str) -> Learner:
    """The method of a name; raises ScoreError where it learns no masks."""
    if name not in LEARNERS:
        raise ScoreError(f"method '{name}' does not learn masks: use one of {', '.join(LEARNERS)}")
    return LEARNERS[name]


def _learner(name: str, options: dict[str, Any]) -> Learner:
    """The method of a name, if it can do what is asked; its own defaults go into `options`."""
    learner = learner_of(name)
    for option in ("steps", "lr", "pairs_per_step", "objective"):
        if options[option] is None:
            options[option] = getattr(learner, option)
    price, lr, objective = (options[option] for option in ("regularisation", "lr", "objective"))
    if objective not in learner.gates:
        only = {name: sorted(map(repr, one.gates)) for name, one in LEARNERS.items() if one.objective}
        known = "; ".join(f"{name} has {', '.join(names)}" for name, names in only.items())
        raise ScoreError(f"method '{name}' has no objective {objective!r}: {known}")
    if learner.steers and price is not None:
        raise ScoreError(f"method '{name}' is given a size, it has no fixed price: leave regularisation= out")
    if price is not None and not (isinstance(price, Real) and float(price) >= 0):
        raise ScoreError(f"regularisation={price!r} is the price of an open gate: 0 or more")
    if lr is not None and not (isinstance(lr, Real) and float(lr) > 0):
        raise ScoreError(f"lr={lr!r}: give a number above 0")
    for count in ("steps", "pairs_per_step", "patience"):
        if count != "patience" or options[count] is not None:
            check_count(count, options[count], 1)
    return learner


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
        if not (kept := round((1 - sparsity) * count)):
            raise ScoreError(f"sparsity={sparsity!r} leaves none of {count:,} {level}s: give less")
        return kept
    n = n_edges if level == "edge" else n_nodes
    if n is not None:
        check_count(f"n_{level}s", n, 1, count)
    return n


def _pressure(
    learner: Learner, batches: MiniBatches, target: int | None, gates: int, steps: int, price: float | None
) -> Pressure:
    """What makes the masks of a training small; a ScoreError where the metric does not fall when every edge is
    ablated, so that there is nothing to measure a price by."""
    if price is not None:
        return Price(price)
    contrast, name = batches.contrast(), batches.experiment.metric.name
    if math.isnan(contrast):
        raise ScoreError(f"metric '{name}' is NaN on these pairs: look for inf or NaN in the logits or in your metric")
    if contrast <= 0:
        raise ScoreError(
            f"metric '{name}' is not higher on the whole model than with every edge ablated (the difference is"
            f" {contrast:.3g}): there is nothing for the gates to keep; give another metric"
        )
    if learner.objective:
        return NoPressure()
    if learner.steers and target is not None:
        return Target(target, gates, steps, ASCENT * contrast)
    return Price(SHARE * contrast / (target or SHARE * gates))


# -------------------------------------------------------------------- from gates to masks
def _values(logits: Tensor, learner: Learner, gates: tuple[Gates, ...]) -> tuple[Tensor, str]:
    """Scores `[gates]` in float32 that rank as the logits do, by sign and by magnitude, and what they are."""
    if not learner.objective:
        return torch.sigmoid(logits).float(), SIGN
    if any(one.faithful for one in gates):
        return logits.float(), SIGNED
    return torch.nn.functional.softplus(logits).float(), POSITIVE


def _spread(graph: Graph, level: str, edges: np.ndarray, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Puts gates `[gates]` into a mask `[writers, readers]`: an edge's into its cell, a node's into its row."""
    readers, writers = (torch.from_numpy(index).to(device) for index in np.nonzero(edges.T))

    def spread(gates: Tensor) -> Tensor:
        if level == "node":
            return gates[:, None].expand(graph.real.shape)
        return gates.new_zeros(graph.real.shape).index_put((writers, readers), gates)

    return spread


def _ranked(
    graph: Graph, level: str, edges: np.ndarray, values: np.ndarray, record: Record, target: int | None, prune: bool
) -> tuple[Scores | NodeScores, Circuit]:
    """The scores of gates `[gates]`, and the circuit that is cut from them."""
    if level == "node":
        of_nodes = NodeScores(graph, values, record)
        return of_nodes, _of_nodes(of_nodes, target, prune)
    matrix = np.zeros(graph.real.shape, dtype=np.float32)
    matrix.T[edges.T] = values
    scores = Scores(graph, matrix, record)
    return scores, scores.threshold(0.5, prune=prune) if target is None else scores.top(target, prune=prune)


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
