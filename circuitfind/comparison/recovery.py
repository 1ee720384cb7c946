"""`recovery`: which methods find known circuits, and at what cost.

1. Every method ranks the edges of every known circuit (`circuitfind.testbed`) on the same pairs.
2. The ranking by |score| is compared with the true circuit: AUROC and average precision of edges, AUROC of nodes (a
   node has the score of its best edge), and the number of true edges among the k strongest, where k edges are true.
   Scores below the rounding of float32 count as 0.
3. `find` and `find-complete` return circuits instead of rankings: the circuit is compared with the true one.
4. Costs are counted in forward passes of all pairs; a backward pass counts as two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from circuitfind.attribution.method import Method
from circuitfind.calls import own_arithmetic
from circuitfind.circuit import Circuit
from circuitfind.comparison.methods import Entrant, Given, chosen
from circuitfind.costs import measuring
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import ModelError, ScoreError, TaskError, unknown
from circuitfind.evaluation.agreement import Level, agreement
from circuitfind.progress import track
from circuitfind.result import Result
from circuitfind.scores import Scores
from circuitfind.search.find import find
from circuitfind.testbed.build import build, names
from circuitfind.testbed.known import Drawing, Known

BACKWARD = 2.0  # forward passes
ROUNDING = 1e-6  # of the largest |score|
LEVELS: tuple[Level, ...] = ("edge", "node")


class Recovered(NamedTuple):
    """One method on one circuit.

    Attributes:
        edges: number k of true edges.
        auroc, average_precision, auroc_nodes: of the ranking; NaN without one.
        found: number of true edges among the k strongest, or in the circuit.
        extra: number of spurious edges among them.
        exact: whether these edges are exactly the true ones.
        passes: costs in forward passes of all pairs.
        seconds: CPU time.
        refused: why there is no ranking; all other fields are then empty.
        missing, spurious: names of true edges not found, and of found edges that are not true.
    """

    circuit: str
    method: str
    edges: int
    auroc: float = math.nan
    average_precision: float = math.nan
    auroc_nodes: float = math.nan
    found: int = 0
    extra: int = 0
    exact: bool = False
    passes: float = math.nan
    seconds: float = math.nan
    refused: str = ""
    missing: tuple[str, ...] = ()
    spurious: tuple[str, ...] = ()


class MethodRow(NamedTuple):
    """A method over all circuits that it could run on.

    circuits: their number; exact: number recovered exactly; of_eap: passes relative to those of eap; missed: circuits
    not recovered exactly. The other fields are means over circuits.
    """

    method: str
    circuits: int
    exact: int
    auroc: float
    average_precision: float
    auroc_nodes: float
    passes: float
    of_eap: float
    missed: tuple[str, ...]

    @classmethod
    def of(cls, method: str, rows: Sequence[Recovered], base: float) -> MethodRow:
        ran = [row for row in rows if not row.refused]
        names = ("auroc", "average_precision", "auroc_nodes", "passes")
        means = [float(np.mean([getattr(row, name) for row in ran])) if ran else math.nan for name in names]
        missed = tuple(row.circuit for row in ran if not row.exact)
        auroc, precision, nodes, passes = means
        exact = sum(row.exact for row in ran)
        return cls(method, len(ran), exact, auroc, precision, nodes, passes, passes / base, missed)


@dataclass(frozen=True, eq=False, repr=False)
class Recovery(Result):
    """Methods on known circuits: a row for each method and circuit."""

    FORMAT, ROWS = "circuitfind.recovery", "recovered"

    recovered: tuple[Recovered, ...]
    n: int
    seed: int
    form: str
    norm: str

    @property
    def circuits(self) -> list[str]:
        return list(dict.fromkeys(row.circuit for row in self.recovered))

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(row.method for row in self.recovered))

    def of(self, method: str) -> list[Recovered]:
        """Rows of a method, one for each circuit."""
        return [row for row in self.recovered if row.method == method]

    def picture(self, circuit: str, method: str, path: str | PathLike[str] | None = None) -> str:
        """Draw the true circuit against the found one, as Graphviz source: missing edges red and dashed, spurious grey.

        Args:
            path: also render to this `.svg`, `.png` or `.pdf` file, with Graphviz's `dot`.

        Raises:
            ScoreError: the method did not run on this circuit, or the circuit is your own drawing, which is not stored:
                use `found.render(path, truth=known.truth)`.
            FileError: Graphviz is not installed.
        """
        rows = {(row.circuit, row.method): row for row in self.recovered if not row.refused}
        if (row := rows.get((circuit, method))) is None:
            raise ScoreError(unknown("circuit and method", f"{circuit}, {method}", [", ".join(one) for one in rows]))
        truth = build(circuit, n=2, seed=self.seed, form=self.form, norm=self.norm).truth
        edges = set(truth.edges) - set(row.missing) | set(row.spurious)
        found = Circuit.of(truth.graph, edges)
        style: dict[str, Any] = {"truth": truth, "title": f"{circuit}: {method}"}
        if path is not None:
            found.render(path, **style)
        return found.to_dot(**style)

    def summary(self) -> list[MethodRow]:
        """A row for each method, best first: by circuits recovered exactly, then by average precision."""
        base = np.mean([row.passes for row in self.of("eap")]) if "eap" in self.methods else math.nan
        rows = (MethodRow.of(method, self.of(method), float(base)) for method in self.methods)
        return sorted(rows, key=lambda row: (-row.exact, -np.nan_to_num(row.average_precision), row.passes))


Finder = Callable[[Experiment], Circuit]


def _found(experiment: Experiment, complete: bool) -> Circuit:
    model, bound, seed = experiment.model, experiment.bound, experiment.setting.seed
    return find(model, bound, complete=complete, max_checks=0, random=0, knockouts=0, seed=seed).circuit


FINDERS: dict[str, Finder] = {"find": partial(_found, complete=False), "find-complete": partial(_found, complete=True)}


@own_arithmetic()
def recovery(
    circuits: Sequence[str | Drawing] | None = None,
    methods: Sequence[str | Method] | Mapping[str, Given] | None = None,
    *,
    n: int = 32,
    seed: int = 0,
    form: str = "gpt2",
    norm: str = "identity",
) -> Recovery:
    """Run methods on known circuits.

    Args:
        circuits: names or drawings, as for `circuitfind.testbed.build`; default: all.
        methods: as for `circuitfind.compare`, also "find" and "find-complete"; default: all.
        n: number of pairs.
        seed, form, norm: as for `circuitfind.testbed.build`.

    Raises:
        ScoreError: an unknown circuit, form or method.
    """
    asked = [circuits] if isinstance(circuits, (str, Drawing)) else list(circuits or names(form))
    known = [build(one, n=n, seed=seed, form=form, norm=norm) for one in asked]
    entrants = _entrants(methods)
    pairs = [(one, name) for one in known for name in entrants]
    rows = (_recovered(one, name, entrants[name], seed) for one, name in track(pairs, "recovery"))
    return Recovery(tuple(rows), n, seed, form, norm)


def _entrants(methods: Sequence[str | Method] | Mapping[str, Given] | None) -> dict[str, Entrant | Finder]:
    if methods is None:
        return {**chosen(None), **FINDERS}
    if isinstance(methods, (str, Method)):
        methods = [methods]
    finders = {name: FINDERS[name] for name in methods if isinstance(name, str) and name in FINDERS}
    rest: Any = [one for one in methods if one not in finders]
    if isinstance(methods, Mapping):
        rest = {name: methods[name] for name in rest}
    return {**(chosen(rest) if rest or not finders else {}), **finders}


def _recovered(known: Known, name: str, entrant: Entrant | Finder, seed: int) -> Recovered:
    truth = known.truth
    experiment = Experiment.of(known.model, known.task, {"seed": seed}, direction=False)
    try:
        with measuring() as costs:
            given = entrant.rank(experiment) if isinstance(entrant, Entrant) else entrant(experiment)
    except (ModelError, ScoreError, TaskError) as error:
        return Recovered(known.name, name, len(truth), refused=str(error))
    if isinstance(given, Scores):
        given = _above_rounding(given)
    found = given.mask if isinstance(given, Circuit) else _strongest(given, len(truth))
    right, extra = int((found & truth.mask).sum()), int((found & ~truth.mask).sum())
    row = Recovered(
        known.name,
        name,
        len(truth),
        found=right,
        extra=extra,
        exact=right == len(truth) and not extra,
        passes=(costs.forwards + BACKWARD * costs.backwards) / len(experiment),
        seconds=costs.cpu_seconds,
        missing=tuple(truth.graph.names(truth.mask & ~found)),
        spurious=tuple(truth.graph.names(found & ~truth.mask)),
    )
    if isinstance(given, Circuit):
        return row
    edges, nodes = (agreement(given, known.reference, level=level) for level in LEVELS)
    return row._replace(auroc=edges.auroc, average_precision=edges.average_precision, auroc_nodes=nodes.auroc)


def _above_rounding(scores: Scores) -> Scores:
    """Set scores that are only rounding to 0, so that they do not count as a ranking."""
    values = np.asarray(scores.values)
    return replace(scores, values=np.where(np.abs(values) > ROUNDING * np.abs(values).max(), values, 0))


def _strongest(scores: Scores, count: int) -> np.ndarray:
    """`[writers, readers]` bool: the `count` edges of largest |score|, without edges of score 0."""
    mask = np.zeros_like(scores.graph.real)
    mask[tuple(scores.ranked("absolute")[:count].T)] = True
    return np.asarray(mask & (scores.values != 0))
