"""`Method`: the record that describes an attribution method.

A method scores edges, nodes or the places of a sweep. Each file of a method ends in its record, and
`circuitfind/attribution/methods.py` lists the records. To use a method of your own, pass its `Method` to `attribute`,
`find` or `compare` in place of a name, register it with `circuitfind.register`, or name it as "package.module:name".

    def score(experiment, request):                     # `[writers, readers]` in units of the metric
        runs = experiment.in_batches(one_batch, "my scores")
        ...

    MINE = cf.Method("mine", "what it does", "where it is from", "2 forward", ("edge",), score=score)
    scores = cf.attribute(model, task, MINE)

`experiment` holds the model, the pairs and the setting (`circuitfind.engine.experiment`). `request` holds the level
that is scored and the method's options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from circuitfind.engine.backward_rules import Rules
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import NoFile
from circuitfind.patching.patch import Where
from circuitfind.record import SIGN, Record

LEVELS = ("edge", "node", "place")


class Point(NamedTuple):
    """Where a gradient is taken, and its weight in the average.

    `alpha`: the point on the line from the corrupted (0) to the clean (1) prompt. `component`: None to interpolate the
    residual stream that enters layer 0; ("attn_out" or "mlp_out", layer) to interpolate this output alone, on the clean
    prompt. `rules`: backward rules that replace the gradient's own (`engine/backward_rules.py`).
    """

    weight: float
    alpha: float
    component: tuple[str, int] | None = None
    rules: Rules | None = None


@dataclass(frozen=True)
class Request:
    """What a call asks a method to score, and the method's options.

    Attributes:
        level: "edge", "node" or "place".
        options: a value for every option of the method, given or default.
        what: at level "place", the kind of place.
        by_position, by_span, layers: as for `attribute`.
        checkpoint: a file that an interrupted run leaves and a repeated call continues from.
        ungrouped: the experiment's graph has a key and a value reader for every query head.
    """

    level: str
    options: Mapping[str, Any] = field(default_factory=dict)
    what: str = ""
    by_position: bool | None = None
    by_span: bool = False
    layers: int | Iterable[int] | None = None
    checkpoint: str | PathLike[str] | None = None
    ungrouped: bool = False

    @property
    def where(self) -> Where:
        """The places to score, in the form that sweeps take."""
        return Where(self.what, self.by_position, self.by_span, self.layers)


Scored = Any  # by level: `[writers, readers]`, `[writers]` or `[writers, pos]` (arrays or tensors), a `Sweep`
Points = Callable[[str, int, Mapping[str, Any]], list[Point]]


@dataclass(frozen=True)
class Method(NoFile):
    """An attribution method.

    Attributes:
        summary: a description in a few words.
        source: where the method was published.
        cost: the number of passes through the model, in words.
        levels: the levels that it scores, of "edge", "node" and "place".
        score: a function `(experiment, request) -> scores`: `[writers, readers]` for edges, `[writers]` for nodes
            (`[writers, pos]` by position), a `Sweep` for places; in units of the metric, positive = supports. None for
            methods with `points`.
        points: for methods that average gradients, a function `(direction, n_layers, options) -> list[Point]`.
        examples: a function `(experiment) -> [edges, examples]`, the effect of every edge on every example, edges in
            the graph's order. Not needed with `points`.
        options: option names and defaults; `attribute` takes them as keywords.
        check: a function `(options)` that raises a `ScoreError` for invalid values.
        sign: a function `(level, options)` that returns the text of `Record.sign`; by default, scores are effects.
        twin: the method interpolates between the clean and the corrupted run, so it needs ablation="corrupted".
        at_clean: when noising, the method takes its only gradient at the clean run, where some metrics are flat.
        by_position: the method has node scores by position, and they add up to the node scores.
        whats: the kinds of place that it scores; None for all.
        ungrouped: the method can score each query head's keys and values separately (`attribute(ungrouped=True)`).
            `experiment.graph` and `experiment.adapter` are then those of the ungrouped graph, over which no circuit can
            be run. Not needed with `points`.
        spellings: other names, for "did you mean".
    """

    name: str
    summary: str
    source: str
    cost: str
    levels: tuple[str, ...]
    score: Callable[[Experiment, Request], Scored] | None = None
    points: Points | None = None
    examples: Callable[[Experiment], np.ndarray] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] | None = None
    sign: Callable[[str, Mapping[str, Any]], str] = lambda level, options: SIGN
    twin: bool = False
    at_clean: bool = False
    by_position: bool = False
    whats: tuple[str, ...] | None = None
    ungrouped: bool = False
    spellings: tuple[str, ...] = ()

    @property
    def by_example(self) -> bool:
        """Whether edge scores are means of scores of single examples, which the method can return."""
        return "edge" in self.levels and (self.points is not None or self.examples is not None)

    def is_effect(self, level: str) -> bool:
        """Whether the scores at this level, with default options, are effects in units of the metric."""
        return Record(sign=self.sign(level, self.options)).is_effect


def as_array(values: Tensor | np.ndarray) -> np.ndarray:
    """Return the values as float32 on the CPU."""
    return values.astype(np.float32) if isinstance(values, np.ndarray) else values.float().cpu().numpy()
