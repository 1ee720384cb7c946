"""The result of an activation-patching sweep: an effect for every place, along named axes.

Positive = the patched place supports the behaviour, in both directions. `normalised` divides by what there is to win or
lose, metric(full) - metric(empty): 1 = patching this place alone undoes (noising) or restores (denoising) all of it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from circuitfind.errors import FileError, ScoreError
from circuitfind.export.files import check_file, plain, write_bytes
from circuitfind.graph import Graph
from circuitfind.patching.places import KINDS
from circuitfind.record import Record
from circuitfind.statistics import bootstrap_mean

FORMAT, VERSION = "circuitfind.sweep", "1"


class Axis(NamedTuple):
    """What an axis of a sweep counts, and a label for each of its entries."""

    name: str
    labels: tuple[str, ...]


class Row(NamedTuple):
    """One place of a sweep: its name, its position's or span's label (empty where all positions are patched), its
    effect and interval."""

    name: str
    position: str
    effect: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Sweep:
    """Effects of patching each place of a model, one at a time.

    Attributes:
        what: a key of `circuitfind.patching.places.KINDS`.
        axes: layer, then the unit (head, key/value head, neuron; none where a layer is one unit), then the position or
            span if swept by either. Labels of layers and units are their numbers.
        per_example: `[*axes, examples]` float64 effects in units of the metric.
        full, empty: `[examples]` the metric with nothing ablated (the clean run) and with everything ablated (the
            corrupted run under the default ablation).
    """

    what: str
    graph: Graph
    axes: tuple[Axis, ...]
    per_example: np.ndarray
    full: np.ndarray
    empty: np.ndarray
    record: Record = field(default_factory=Record)

    def __post_init__(self) -> None:
        shape = (*(len(axis.labels) for axis in self.axes), len(self.full))
        if self.per_example.shape != shape or len(self.empty) != len(self.full):
            raise ScoreError(f"a sweep's values have shape {list(self.per_example.shape)}, its axes {list(shape)}")

    @property
    def effects(self) -> np.ndarray:
        """`[*axes]` mean effects, in units of the metric."""
        return np.asarray(self.per_example.mean(axis=-1))

    @property
    def normalised(self) -> np.ndarray:
        """`[*axes]` effects divided by metric(full) - metric(empty).

        Raises:
            ScoreError: the two do not differ beyond noise.
        """
        difference = self.full - self.empty
        error = difference.std(ddof=1) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
        if abs(difference.mean()) <= 2 * error or difference.mean() == 0:
            raise ScoreError(
                f"a normalised effect is undefined: the metric is {self.full.mean():.4g} on the whole model and"
                f" {self.empty.mean():.4g} with everything ablated, which is within noise (standard error {error:.2g},"
                f" {len(difference)} examples). Use the raw effects"
            )
        return np.asarray(self.effects / difference.mean())

    @property
    def by_position(self) -> bool:
        return self.axes[-1].name == "position"

    @property
    def by_span(self) -> bool:
        return self.axes[-1].name == "span"

    @property
    def positions(self) -> tuple[str, ...]:
        """Labels of the positions or spans; one empty label where all positions are patched together."""
        return self.axes[-1].labels if self.by_position or self.by_span else ("",)

    def intervals(self, seed: int = 0, level: float = 0.95) -> np.ndarray:
        """`[*axes, 2]` percentile bootstrap intervals of the effects over examples; NaN for a single example."""
        return bootstrap_mean(self.per_example, seed, level)

    def names(self) -> list[str]:
        """A name for every place, in the order of `effects.ravel()`; the same one at each of its positions or spans."""
        kind, kv = KINDS[self.what], "kv" if self.graph.group > 1 else "h"
        units = self.axes[1].labels if kind.unit else ("",)
        return [
            kind.name.format(layer=layer, unit=unit, kv=kv)
            for layer in self.axes[0].labels
            for unit in units
            for _ in self.positions
        ]

    def top(self, n: int, by: str = "absolute") -> list[Row]:
        """The n places of largest effect, or (by="signed") of most positive effect, best first.

        Raises:
            ScoreError: an unknown way to rank.
        """
        if by not in ("absolute", "signed"):
            raise ScoreError(f"by='{by}' is unknown: use 'absolute' or 'signed'")
        effects, names = self.effects.ravel(), self.names()
        order = np.argsort(-(np.abs(effects) if by == "absolute" else effects), kind="stable")[:n]
        examples = self.per_example.reshape(len(effects), -1)[order]
        axes = (Axis("place", tuple(names[i] for i in order)),)
        chosen = Sweep(self.what, self.graph, axes, examples, self.full, self.empty)
        return [
            Row(names[i], self.positions[i % len(self.positions)], float(effects[i]), float(low), float(high))
            for i, (low, high) in zip(order.tolist(), chosen.intervals(), strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `normalised` is None where it is undefined."""
        try:
            normalised = self.normalised.tolist()
        except ScoreError:
            normalised = None
        return {
            "what": self.what,
            "axes": [{"name": axis.name, "labels": list(axis.labels)} for axis in self.axes],
            "effects": self.effects.tolist(),
            "normalised": normalised,
            "metric_full": float(self.full.mean()),
            "metric_empty": float(self.empty.mean()),
            "record": asdict(self.record),
        }

    # ---------------------------------------------------------------- files
    def save(self, path: str | PathLike[str]) -> Path:
        """Writes safetensors; axes, graph and record in the header."""
        header = {"format": FORMAT, "version": VERSION, "what": self.what}
        parts = {"axes": self.axes, "graph": asdict(self.graph), "record": asdict(self.record)}
        header |= {name: json.dumps(plain(part)) for name, part in parts.items()}
        tensors = {"per_example": self.per_example, "full": self.full, "empty": self.empty}
        return write_bytes(path, save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata=header))

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Sweep:
        """Reads what `save` wrote, without any model.

        Raises:
            FileError: the file is missing, or holds no sweep of this version.
        """
        check_file(path)
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT or header.get("version") != VERSION:
                    found = f"{header.get('format', 'another format')}, version {header.get('version', '?')}"
                    raise FileError(f"{path}: expected {FORMAT}, version {VERSION}, this file holds {found}")
                tensors = {name: file.get_tensor(name) for name in ("per_example", "full", "empty")}
            axes = tuple(Axis(name, tuple(labels)) for name, labels in json.loads(header["axes"]))
            graph, record = Graph(**json.loads(header["graph"])), Record(**json.loads(header["record"]))
            return cls(header["what"], graph, axes, record=record, **tensors)
        except SafetensorError as error:
            raise FileError(f"{path}: not a sweep's file (safetensors written by Sweep.save): {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{path}: its header cannot be read ({error}): save the sweep again") from None
