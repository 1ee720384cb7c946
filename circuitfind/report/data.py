"""What a report is made of: plain data, nothing that needs a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from circuitfind.circuit import Circuit
from circuitfind.report.plots import Check, CurvePoint


class ExampleRow(NamedTuple):
    """One example: prompt, answer, and the metric in the full model, in the circuit, and with every edge ablated."""

    prompt: str
    answer: str
    full: float
    circuit: float
    empty: float


@dataclass(frozen=True)
class ReportData:
    """Everything that the page shows; what is left out has no section.

    Attributes:
        task: label -> text, such as `{"behaviour": "indirect object", "examples": "64"}`.
        drawn: the part of the circuit that the picture shows, where the whole is too large for one.
        faithfulness, interval: of the circuit as a whole, and its interval over the examples (`level`, 0.95 = 95%).
        metric, metric_full, metric_empty: means over examples of circuit, full model and empty circuit.
        checks: edges with estimated and exact effect; `correlation` of the two.
        curve: circuits that the search tried; `tolerance` is half the width of the band around 1 it aimed for.
        random: faithfulness of random circuits of the same size.
        steps: `(stage, text)` of the search, in order.
        command: the exact command, to be run again.
    """

    title: str
    model: str
    task: Mapping[str, str]
    circuit: Circuit
    drawn: Circuit | None = None
    faithfulness: float | None = None
    interval: tuple[float, float] | None = None
    level: float = 0.95
    metric: float | None = None
    metric_full: float | None = None
    metric_empty: float | None = None
    checks: Sequence[Check] = ()
    correlation: float | None = None
    curve: Sequence[CurvePoint] = ()
    tolerance: float | None = None
    random: Sequence[float] = ()
    examples: Sequence[ExampleRow] = ()
    steps: Sequence[tuple[str, str]] = field(default=())
    command: str = ""
