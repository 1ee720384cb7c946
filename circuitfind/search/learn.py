"""`learn_masks`: learn by gradient descent which edges (or nodes) a circuit keeps.

Every edge has a gate between 0 and 1. At each step gates are drawn at random around learned logits, the model runs with
each edge scaled by its gate, and the logits are updated to keep the metric with few open gates (`training.py`). The
default metric is `kl`, the distance from the whole model's predictions. The result is a ranking, and a circuit cut from
it. At level "node" each node has one gate, for all its outgoing edges.

| method | gates | what makes the circuit small |
|---|---|---|
| `edge-pruning` (Bhaskar et al. 2024) | hard concrete | Lagrange multipliers steer to a target number of gates |
| `subnetwork-probing` (Cao et al. 2021) | hard concrete | a fixed price per gate |
| `ugs` (uniform gradient sampling, Li and Janson 2024) | 0, 1 or uniform between | a fixed price per gate |
| `matryoshka` (arXiv 2609.25518) | soft, of exactly k expected edges | k is drawn anew at each step |

`matryoshka` draws only k at random, so its ranking serves every size. It has its own objectives (`matryoshka.py`), and
uses the task's metric by default. `starts.py` sets the first logits.

Prices are in units of the metric. The default prices are fractions of metric(full) - metric(empty), so they suit any
metric.

Differences from the authors' code: their Edge Pruning also has gates for whole nodes; here only edges have gates. One
mask is drawn for all pairs of a step, where their UGS draws several for each pair, so its gradients are noisier here.
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
# These numbers and the learning rates were chosen on the embedded model's `greater-than` task.
# The contrast is metric(full) - metric(empty).
SHARE = 0.1  # default price of all wanted gates together, as a fraction of the contrast
ASCENT = 0.5  # learning rate of the multipliers, in contrasts per step and unit gap


class Learner(NamedTuple):
    """A method, with its gates and defaults.

    Attributes:
        gates: its kinds of gates, by objective; under None for a method without objectives.
        sparsity: the default fraction of gates to close, for methods that steer to a size; None: it has a fixed price.
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

    steps: the most steps of Adam (200; `matryoshka` 300).
    lr: Adam's learning rate for the gates' logits; by default the method's.
    regularisation: the price of an open gate, in units of the metric; not for `edge-pruning` and `matryoshka`. By
        default a tenth of metric(full) - metric(empty), divided by the wanted number of gates (if none is given, by a
        tenth of all gates).
    pairs_per_step: pairs in a mini-batch (32; `matryoshka` 4).
    patience: stop early after this many rows of `history` without a new lowest loss (5); None: never. `matryoshka`
        never stops early.
    objective: for `matryoshka`. "metric", as published, raises the metric; "faithfulness" lowers the distance from the
        whole model's metric; "both" (the default) trains the order by sign with the former, and the order by magnitude
        with the latter.
    start: scores to start from (`Scores`, or `NodeScores` at level "node"); or the name of an attribution method that
        computes them from the same pairs; or "alike". By default "alike"; for `matryoshka` under ablation "corrupted"
        "eap-ig-inputs". With a circuit, only its edges have gates, which start from its estimates, if any; all other
        edges stay closed.
    """

    steps: int | None
    lr: float | None
    regularisation: float | None
    pairs_per_step: int | None
    patience: int | None
    objective: str | None
    start: Scores | NodeScores | Circuit | str | None


class LearnKeywords(TrainingKeywords, JudgeKeywords, total=False):
    """The keywords of a run and of the training."""


TRAINING: Mapping[str, Any] = {**dict.fromkeys(TrainingKeywords.__annotations__), "patience": 5}


@dataclass(frozen=True, eq=False, repr=False)
class LearnedMasks(FolderResult):
    """The result of `learn_masks`.

    Attributes:
        scores: a ranking, as `Scores`, or `NodeScores` at level "node": sigmoid of the learned logits, 0 to 1; of
            `matryoshka` the learned scores themselves, or their softplus under objective "metric" (see `record.sign`).
        circuit: of the wanted number of edges or nodes; if none was given, of the gates above 1/2. Its `facts` have the
            number of steps and the last row of the history.
        history: a row per 10 steps: step, and mean loss, metric of the masked runs and expected number of open gates.
    """

    FORMAT, ROWS = "circuitfind.learned", "history"

    scores: Scores | NodeScores
    circuit: Circuit
    history: tuple[Logged, ...]
    record: Record

    def shown(self) -> dict[str, Any]:
        """Return the facts that the one-line display shows."""
        return {"method": self.record.method, "n_edges": len(self.circuit), "steps": self.history[-1].step}

    def write(self, folder: str | PathLike[str], **more: Any) -> list[Path]:
        """Write learned.json, learned.dot and, if Graphviz is installed, learned.svg (the circuit), learned.safetensors
        (the ranking) and learning.json (the history); return their paths."""
        made, folder = self.record, Path(folder)
        return [
            *save_circuit(self.circuit, folder, "learned", f"{made.method} on {made.task} in {made.model}"),
            self.scores.save(folder / "learned.safetensors"),
            files.write(folder / "learning.json", self.FORMAT, {"history": as_json(self.history)}),
        ]

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Self:
        """Read the folder that `save` wrote. Needs no model. FileError: a file is missing or not of this format."""
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
    """Learn which edges or nodes to keep. The model's weights are frozen.

    Args:
        method: "edge-pruning", "subnetwork-probing", "ugs" or "matryoshka".
        level: "edge", or "node" (one gate for all edges from a node).
        n_edges, n_nodes: the number of edges (or, at level "node", nodes) of the circuit, before pruning.
        sparsity: the size as the fraction that is left out: 0.9 keeps a tenth. `edge-pruning` steers to the given size
            (0.95 by default). The ranking of other methods is cut at that size; without one, at gates above 1/2
            (`matryoshka`: at 0.95). `scores.top(n)` gives a circuit of any other size.
        prune: keep only edges on a path from `input` to `logits`.
        checkpoint: a file from which the same call continues after it was stopped. Deleted at the end.
        asked: steps, lr, regularisation, pairs_per_step, patience, objective, start
            (`circuitfind.search.learn.TrainingKeywords`); metric ("kl" by default; None, the default of `matryoshka`:
            the task's own; metrics other than "kl" are maximised, even beyond the whole model's), ablation, batch_size,
            seed (of the mini-batches and the gates' noise; on one processor the same seed gives the same result to the
            bit), see `circuitfind.setting`.

    Raises:
        ScoreError: the method or an option is unknown, the size is impossible, or the metric is NaN or has no gradient.
        TaskError: the task does not fit the model or the ablation.
        FileError: the checkpoint belongs to another run.
    """
    if level not in ("edge", "node"):
        raise ScoreError(f"level '{level}' is unknown: use 'edge' or 'node'")
    graph = model.graph
    run: Any = dict(asked)
    options = {name: run.pop(name, default) for name, default in TRAINING.items()}
    learner = _checked_learner(method, options)
    steps, patience, lr = options["steps"], options["patience"], options["lr"]
    gates = learner.gates[options["objective"]]
    chosen = options["start"]
    if isinstance(chosen, Circuit) and not len(chosen):
        raise ScoreError("start=Circuit has no edges, so there is no gate to learn: give a circuit with edges")
    edges = chosen.mask if isinstance(chosen, Circuit) else graph.real  # the edges that have gates
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
        kept = "gates above 1/2" if target is None else f"the top {target} {level}s"
        warn(
            f"{method}: {kept} hold no path from input to logits, so the circuit is empty: keep more (n_{level}s=,"
            f" --{level}s), train longer (steps=, --steps), or see the unconnected edges with prune=False (in Python)"
        )
    history = state.history()
    facts = {"steps": state.step, "metric_of_masked_runs": history[-1].metric, "expected": history[-1].expected}
    circuit = replace(cut, facts={"n_edges": len(cut), **facts})
    return LearnedMasks(scores, circuit, history, circuit.record)


# -------------------------------------------------------------------- options
def learner_of(name: str) -> Learner:
    """Return the method of this name. ScoreError if none that learns masks has it."""
    if name not in LEARNERS:
        raise ScoreError(f"method '{name}' does not learn masks: use one of {', '.join(LEARNERS)}")
    return LEARNERS[name]


def _checked_learner(name: str, options: dict[str, Any]) -> Learner:
    """Return the method of this name, and set its defaults in `options`. ScoreError if an option is not valid."""
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
        raise ScoreError(f"method '{name}' steers to a size, so it has no fixed price: leave regularisation= out")
    if price is not None and not (isinstance(price, Real) and float(price) >= 0):
        raise ScoreError(f"regularisation={price!r}: give the price of an open gate, a number of 0 or more")
    if lr is not None and not (isinstance(lr, Real) and float(lr) > 0):
        raise ScoreError(f"lr={lr!r}: give a number above 0")
    for count in ("steps", "pairs_per_step", "patience"):
        if count != "patience" or options[count] is not None:
            check_count(count, options[count], 1)
    return learner


def _target(level: str, count: int, n_edges: int | None, n_nodes: int | None, sparsity: float | None) -> int | None:
    """Return the number of gates that the circuit keeps; None if no size is given."""
    given = {"n_edges": n_edges, "n_nodes": n_nodes, "sparsity": sparsity}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ScoreError(f"{' and '.join(named)} are given, and each sets the circuit's size: give one")
    other = "n_nodes" if level == "edge" else "n_edges"
    if other in named:
        raise ScoreError(f"{other} is for level='{'node' if level == 'edge' else 'edge'}': give n_{level}s or sparsity")
    if sparsity is not None:
        if not isinstance(sparsity, Real) or not 0 <= sparsity <= 1:
            raise ScoreError(f"sparsity={sparsity!r}: give the fraction of {level}s that is left out, between 0 and 1")
        if not (kept := round((1 - sparsity) * count)):
            raise ScoreError(f"sparsity={sparsity!r} leaves none of {count:,} {level}s: give a smaller value")
        return kept
    n = n_edges if level == "edge" else n_nodes
    if n is not None:
        check_count(f"n_{level}s", n, 1, count)
    return n


def _pressure(
    learner: Learner, batches: MiniBatches, target: int | None, gates: int, steps: int, price: float | None
) -> Pressure:
    """Return the pressure that makes masks small. ScoreError if its default needs the contrast, and the metric does not
    fall when every edge is ablated."""
    if price is not None:
        return Price(price)
    contrast, name = batches.contrast(), batches.experiment.metric.name
    if math.isnan(contrast):
        raise ScoreError(f"metric '{name}' is NaN on these pairs: look for inf or NaN in the logits or in your metric")
    if contrast <= 0:
        raise ScoreError(
            f"metric '{name}' is not higher on the whole model than with every edge ablated (the difference is"
            f" {contrast:.3g}): there is no effect for the gates to keep; give another metric"
        )
    if learner.objective:
        return NoPressure()
    if learner.steers and target is not None:
        return Target(target, gates, steps, ASCENT * contrast)
    return Price(SHARE * contrast / (target or SHARE * gates))


# -------------------------------------------------------------------- from gates to masks and scores
def _values(logits: Tensor, learner: Learner, gates: tuple[Gates, ...]) -> tuple[Tensor, str]:
    """Return scores `[gates]` in float32, in the order of the logits, and the text of `record.sign`."""
    if not learner.objective:
        return torch.sigmoid(logits).float(), SIGN
    if any(one.faithful for one in gates):
        return logits.float(), SIGNED
    return torch.nn.functional.softplus(logits).float(), POSITIVE


def _spread(graph: Graph, level: str, edges: np.ndarray, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the function from gates `[gates]` to a mask `[writers, readers]`; a node's gate fills its row."""
    readers, writers = (torch.from_numpy(index).to(device) for index in np.nonzero(edges.T))

    def spread(gates: Tensor) -> Tensor:
        if level == "node":
            return gates[:, None].expand(graph.real.shape)
        return gates.new_zeros(graph.real.shape).index_put((writers, readers), gates)

    return spread


def _ranked(
    graph: Graph, level: str, edges: np.ndarray, values: np.ndarray, record: Record, target: int | None, prune: bool
) -> tuple[Scores | NodeScores, Circuit]:
    """Return the scores with these values `[gates]`, and the circuit that is cut from them."""
    if level == "node":
        of_nodes = NodeScores(graph, values, record)
        return of_nodes, _node_circuit(of_nodes, target, prune)
    matrix = np.zeros(graph.real.shape, dtype=np.float32)
    matrix.T[edges.T] = values
    scores = Scores(graph, matrix, record)
    return scores, scores.threshold(0.5, prune=prune) if target is None else scores.top(target, prune=prune)


def _node_circuit(scores: NodeScores, target: int | None, prune: bool) -> Circuit:
    """Return the circuit of all edges from the `target` top nodes, or from nodes with scores above 1/2."""
    graph, chosen = scores.graph, np.zeros(scores.graph.n_writers, dtype=bool)
    if target is None:
        chosen = scores.values > 0.5
    else:
        chosen[[graph.writer(name) for name in scores.top(target)]] = True
    mask = graph.real & chosen[:, None]
    record = scores.record.with_settings(nodes=[graph.writer_names[u] for u in np.flatnonzero(chosen)])
    return Circuit(graph, connected(graph, mask) if prune else mask, record=record)
