"""Results of searches, in memory and as folders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Self, get_type_hints

from circuitfind.circuit import Circuit
from circuitfind.evaluation.diagnosis import TaskSummary
from circuitfind.evaluation.verify import Verification
from circuitfind.export import files, html
from circuitfind.models.load import Model
from circuitfind.result import UNSAVED, Result, as_json, build
from circuitfind.scores import Scores
from circuitfind.tasks.task import BoundTask

REPORT = "circuitfind.report.write"


class TriedCircuit(NamedTuple):
    """A circuit that was run: stage of the search ("start", "re-scored", "grid", "bisection", "pruning", "complete"),
    number of edges asked for, number of edges that are connected, exact faithfulness."""

    stage: str
    asked: int
    n_edges: int
    faithfulness: float


class FrontierPoint(NamedTuple):
    """A circuit on the frontier, on the search pairs and on the held-out pairs.

    opposing: number of its edges with a negative estimated effect; None if the scores are no effects.
    distance: by the search's criterion; on the search pairs, that of the worse half.
    pair_error: mean over pairs of |circuit - model|, divided by the mean of |model - empty circuit|.
    kl: KL(whole model || circuit), in nats.
    accuracy: NaN on a task without answers.
    held_out_...: the same on the held-out pairs; NaN if there was no time to run them.
    """

    n_edges: int
    opposing: int | None
    distance: float
    faithfulness: float
    pair_error: float
    kl: float
    accuracy: float
    held_out_distance: float
    held_out_faithfulness: float
    held_out_pair_error: float
    held_out_kl: float
    held_out_accuracy: float


class Step(NamedTuple):
    """One decision of the search, in words."""

    stage: str
    text: str


class FolderResult(Result, ABC):
    """A result that `save` writes as a folder, or, if the path ends in .csv, as a table of its rows."""

    def save(self, path: str | PathLike[str], **more: Any) -> Path:
        """Write the folder (see `write`) or the table, and return its path.

        Raises:
            FileError: the path cannot be written.
        """
        if Path(path).suffix.lower() == ".csv":
            return super().save(path)
        self.write(path, **more)
        return Path(path)

    @abstractmethod
    def write(self, folder: str | PathLike[str], **more: Any) -> list[Path]:
        """Write the folder, and return the files that were written."""


@dataclass(frozen=True, eq=False, repr=False)
class FindResult(FolderResult):
    """The result of `find`.

    Attributes:
        circuit: the circuit, with estimated and exact effects of its edges and the measured facts.
        scores: every edge's score, from the search pairs.
        checks: the verification on the held-out pairs.
        curve: every circuit that was run, in order.
        steps: every decision, in words.
        summary: how well the model does the task on the search pairs.
        frontier: for each size the circuit nearest to the whole model, smallest first.
        held_out: the held-out pairs; None if the result was opened from a file (`circuitfind.unseen(model, task,
            result.circuit)` finds them again).
        model: the model that was searched; None if the result was opened from a file.
    """

    FORMAT, ROWS = "circuitfind.find", "curve"

    circuit: Circuit
    scores: Scores
    checks: Verification
    curve: tuple[TriedCircuit, ...]
    steps: tuple[Step, ...]
    summary: TaskSummary
    frontier: tuple[FrontierPoint, ...] = ()
    held_out: BoundTask | None = field(default=None, metadata=UNSAVED)
    model: Model | None = field(default=None, metadata=UNSAVED)

    @property
    def unseen(self) -> BoundTask | None:
        """The former name of `held_out`."""
        return self.held_out

    @property
    def on_target(self) -> bool:
        """Whether the distance from the whole model on the held-out pairs is within the tolerance of the search."""
        made, facts = self.circuit.record.settings, self.circuit.facts
        if "distance" in facts:
            return bool(facts["distance"] <= made["tolerance"])
        value = self.checks.faithfulness  # saved by an earlier version
        return bool(value >= 1 - made["tolerance"] and (made["one_sided"] or value <= 1 + made["tolerance"]))

    def shown(self) -> dict[str, Any]:
        """Return the facts that the one-line display shows."""
        known = {"task": self.summary.name, "n_edges": len(self.circuit)}
        return {**known, "faithfulness": self.checks.faithfulness, "interval": self.checks.interval}

    def _repr_html_(self) -> str:
        return html.block(type(self).__name__, html.facts(self.shown()), self.circuit._repr_html_())

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values, without the scores."""
        circuit = {"edges": self.circuit.edges, "nodes": self.circuit.nodes, **self.circuit.facts}
        parts = self._as_json("checks", "curve", "steps", "frontier")
        return {"circuit": circuit, "task": as_json(self.summary), **parts}

    def _as_json(self, *names: str) -> dict[str, Any]:
        return {name: as_json(getattr(self, name)) for name in names}

    # ---------------------------------------------------------------- as a folder
    def write(self, folder: str | PathLike[str], **more: Any) -> list[Path]:
        """Write circuit.json, circuit.dot, circuit.svg (if Graphviz is installed), scores.safetensors, find.json and
        report.html; return their paths.

        Args:
            more: `command`, shown in the report; `batch_size` and `seed` of the report's own measurements.
        """
        folder = Path(folder)
        kept = self._as_json("checks", "curve", "steps", "summary", "frontier")
        title = f"{self.summary.name} in {self.circuit.record.model}"
        return [
            self.scores.save(folder / "scores.safetensors"),
            *save_circuit(self.circuit, folder, "circuit", title),
            files.write(folder / "find.json", self.FORMAT, kept),
            self.report(folder / "report.html", **more),
        ]

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Self:
        """Read the folder that `save` wrote. Needs no model.

        Raises:
            FileError: a file is missing or not of this format.
        """
        folder = Path(path)
        content = files.read(folder / "find.json", cls.FORMAT)
        circuit, scores = Circuit.open(folder / "circuit.json"), Scores.open(folder / "scores.safetensors")
        with files.reading(folder / "find.json"):
            hints = get_type_hints(cls)
            known = {name: build(hints[name], content[name]) for name in ("checks", "curve", "steps", "summary")}
            known["frontier"] = build(hints["frontier"], content.get("frontier", []))
        estimates = scores.values if scores.record.is_effect else None  # the circuit's file has its own edges only
        return cls(replace(circuit, estimates=estimates, exact=known["checks"].exact), scores, **known)

    def report(self, path: str | PathLike[str], **more: Any) -> Path:
        """Write the report page, and return its path. If the result holds its model, the page also shows circuits of
        several sizes and the heads' attention patterns, which are computed now. Arguments as for `write`.
        """
        known = {name: getattr(self, name) for name in ("scores", "checks", "curve", "steps", "summary", "frontier")}
        page: Path = import_module(REPORT).write_report(path, self.circuit, self.model, self.held_out, **known, **more)
        return page


def save_circuit(circuit: Circuit, folder: str | PathLike[str], name: str, title: str) -> list[Path]:
    """Call `circuitfind.report.write.save_circuit`; return the files that were written."""
    written: list[Path] = import_module(REPORT).save_circuit(circuit, folder, name, title)
    return written
