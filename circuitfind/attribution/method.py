"""What a method of attribution is: one record, from which everything else that names methods is read.

A method scores edges, nodes or the places of a sweep. It is written in a file that ends in its record, and listed in
`circuitfind/attribution/methods.py`. A method of your own is a `Method`, too: pass it to `attribute`, `find` or
`compare` in place of a name, give it one with `circuitfind.register`, or name it as "package.module:name".

    def score(experiment, request):                     # `[writers, readers]` in units of the metric
        runs = experiment.in_batches(one_batch, "my scores")
        ...

    MINE = cf.Method("mine", "what it does", "where it is from", "2 forward", ("edge",), score=score)
    scores = cf.attribute(model, task, MINE)

`experiment` has the model, the pairs and the setting (`circuitfind.engine.experiment`); `request` what is scored and
the options.
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
    """Where a gradient is taken, and its weight.

    `alpha`: where on the line from the corrupted (0) to the clean (1) prompt; `component`: ("attn_out" or "mlp_out",
    layer), then only this output is at alpha and the prompt is the clean one, else the residual entering layer 0 is at
    alpha; `rules`: the gradient goes back by these (`engine/backward_rules.py`).
    """

    weight: float
    alpha: float
    component: tuple[str, int] | None = None
    rules: Rules | None = None


@dataclass(frozen=True)
class Request:
    """What of a model is scored, and with which options of the method.

    Attributes:
        level: "edge", "node" or "place".
        what: the kind of place at level "place".
        ungrouped: the experiment is over a graph with a key and a value reader for every query head.
        options: every option of the method, its default where none was given.
        checkpoint: a file that a stopped run leaves and a repeated call continues from.
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
        """The places, as a sweep is asked for them."""
        return Where(self.what, self.by_position, self.by_span, self.layers)


Scored = Any  # by level: `[writers, readers]`, `[writers]` or `[writers, pos]` (arrays or tensors), a `Sweep`
Points = Callable[[str, int, Mapping[str, Any]], list[Point]]


@dataclass(frozen=True)
class Method(NoFile):
    """A way to score.

    Attributes:
        summary: what it is, in a few words.
        source: where it was published.
        cost: passes through the model, in words.
        levels: what it scores, of "edge", "node" and "place".
        score: the scores `(experiment, request) -> ` edges `[writers, readers]`, nodes `[writers]` (or by position
            `[writers, pos]`), places a `Sweep`; in units of the metric, positive = supports. None where `points` is
            enough.
        points: of methods that average gradients: `(direction, n_layers, options) ->` where gradients are taken.
        examples: `(experiment) ->` effects of every edge on every example, `[edges, examples]` in the graph's order;
            not needed with `points`.
        options: names and defaults; `attribute` takes them as keywords.
        check: raises a `ScoreError` for values of the options that make no sense.
        sign: what the scores are, by level and options; by default effects.
        twin: it interpolates between the clean and the corrupted run: only ablation="corrupted".
        at_clean: it takes one gradient at the clean run (noising), where some metrics are flat.
        by_position: its node scores have a form by position, which adds up.
        whats: the kinds of places that it scores; None for all.
        ungrouped: its edge scores can be asked for by query head (`attribute(ungrouped=True)`): `experiment.graph` and
            `experiment.adapter` are of the ungrouped graph then, which no circuit runs over. Not needed with `points`.
        spellings: other names that it goes by, for "did you mean".
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
        """Whether edges have a score on every example, whose mean is the score."""
        return "edge" in self.levels and (self.points is not None or self.examples is not None)

    def is_effect(self, level: str) -> bool:
        """Whether its scores, under the default options, are effects in units of the metric."""
        return Record(sign=self.sign(level, self.options)).is_effect


def as_array(values: Tensor | np.ndarray) -> np.ndarray:
    """In float32, on the processor."""
    return values.astype(np.float32) if isinstance(values, np.ndarray) else values.float().cpu().numpy()
