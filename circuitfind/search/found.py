"""Results of searches, in memory and as folders: what the verbs leave."""

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
    """A circuit that was run: stage ("start", "re-scored", "grid", "bisection", "pruning"), edges asked for and kept,
    exact faithfulness."""

    stage: str
    asked: int
    n_edges: int
    faithfulness: float


class FrontierPoint(NamedTuple):
    """A circuit on the frontier, on the search pairs and on the held-out pairs.

    opposing: its edges of negative estimated effect, None where scores estimate no effects; distance: by the search's
    criterion, on the search pairs that of the worse half; pair_error: mean over pairs of |circuit - model|, over the
    mean of |model - empty circuit|; kl: KL(whole model || circuit) in nats; accuracy: NaN on a task without answers.
    Held-out values are NaN where there was no time for them.
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
    """A result whose `save` writes a folder; a path that ends in .csv gets the rows as a table."""

    def save(self, path: str | PathLike[str], **more: Any) -> Path:
        """Writes the folder; see `write`.

        Raises:
            FileError: the place cannot be written to.
        """
        if Path(path).suffix.lower() == ".csv":
            return super().save(path)
        self.write(path, **more)
        return Path(path)

    @abstractmethod
    def write(self, folder: str | PathLike[str], **more: Any) -> list[Path]:
        """Writes the folder, and returns the files that were written."""


@dataclass(frozen=True, eq=False, repr=False)
class FindResult(FolderResult):
    """What `find` found.

    Attributes:
        circuit: the circuit, with estimates, exact effects and the facts measured of it.
        scores: every edge's estimate, from the search pairs.
        checks: the verification on the held-out pairs.
        curve: every circuit that was run, in order.
        steps: every decision, in words.
        summary: how well the model does the task on the search pairs.
        frontier: for each size the nearest circuit to the whole model, smallest first.
        held_out: the held-out pairs; None where the result was opened (`circuitfind.unseen(model, task,
            result.circuit)` finds them again).
        model: the model that was searched; None where the result was opened.
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
        """Whether the faithfulness on the held-out pairs, too, is within the tolerance of the search."""
        made, facts = self.circuit.record.settings, self.circuit.facts
        if "distance" in facts:
            return bool(facts["distance"] <= made["tolerance"])
        value = self.checks.faithfulness  # a file of an earlier version
        return bool(value >= 1 - made["tolerance"] and (made["one_sided"] or value <= 1 + made["tolerance"]))

    def shown(self) -> dict[str, Any]:
        """What a line of text says of the result."""
        known = {"task": self.summary.name, "n_edges": len(self.circuit)}
        return {**known, "faithfulness": self.checks.faithfulness, "interval": self.checks.interval}

    def _repr_html_(self) -> str:
        return html.block(type(self).__name__, html.facts(self.shown()), self.circuit._repr_html_())

    def to_dict(self) -> dict[str, Any]:
        """JSON values (scores are saved on their own)."""
        circuit = {"edges": self.circuit.edges, "nodes": self.circuit.nodes, **self.circuit.facts}
        parts = self._as_json("checks", "curve", "steps", "frontier")
        return {"circuit": circuit, "task": as_json(self.summary), **parts}

    def _as_json(self, *names: str) -> dict[str, Any]:
        return {name: as_json(getattr(self, name)) for name in names}

    # ---------------------------------------------------------------- as a folder
    def write(self, folder: str | PathLike[str], **more: Any) -> list[Path]:
        """circuit.json, circuit.dot, circuit.svg (with Graphviz), scores.safetensors, find.json and report.html.

        Args:
            more: `command`, the command that the report shows; `batch_size` and `seed` of what it measures.
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
        """Reads the folder that `save` wrote, without any model.

        Raises:
            FileError: a file is missing, or holds something else.
        """
        folder = Path(path)
        content = files.read(folder / "find.json", cls.FORMAT)
        circuit, scores = Circuit.open(folder / "circuit.json"), Scores.open(folder / "scores.safetensors")
        with files.reading(folder / "find.json"):
            hints = get_type_hints(cls)
            known = {name: build(hints[name], content[name]) for name in ("checks", "curve", "steps", "summary")}
            known["frontier"] = build(hints["frontier"], content.get("frontier", []))
        estimates = scores.values if scores.record.is_effect else None  # a circuit's file knows those of its own edges
        return cls(replace(circuit, estimates=estimates, exact=known["checks"].exact), scores, **known)

    def report(self, path: str | PathLike[str], **more: Any) -> Path:
        """Writes the report page. Where the model is known, the circuit is also run at several sizes and its heads'
        attention patterns are shown; arguments as for `save`.
        """
        known = {name: getattr(self, name) for name in ("scores", "checks", "curve", "steps", "summary", "frontier")}
        page: Path = import_module(REPORT).write_report(path, self.circuit, self.model, self.held_out, **known, **more)
        return page


def save_circuit(circuit: Circuit, folder: str | PathLike[str], name: str, title: str) -> list[Path]:
    """`circuitfind.report.write.save_circuit`."""
    written: list[Path] = import_module(REPORT).save_circuit(circuit, folder, name, title)
    return written
