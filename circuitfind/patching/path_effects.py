"""The result of path patching: an effect for every sender and every receiver, or group of receivers; its file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import numpy as np

from circuitfind.errors import ScoreError
from circuitfind.export import files as result_file
from circuitfind.record import Record
from circuitfind.statistics import bootstrap_mean

FORMAT = "circuitfind.paths"


class Path(NamedTuple):
    """One entry: the paths from a sender into its receivers, their effect and its 95% interval over examples."""

    sender: str
    receiver: str
    effect: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class PathEffects:
    """Effects of paths.

    Attributes:
        senders, receivers: names of the rows and columns; receivers that were patched together share a column.
        per_example: `[senders, receivers, examples]` float64 in units of the metric, positive = supports; NaN where the
            receiver is computed before the sender.
        full, empty: `[examples]` the metric with nothing and with everything ablated.
    """

    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    per_example: np.ndarray
    full: np.ndarray
    empty: np.ndarray
    record: Record

    def __post_init__(self) -> None:
        shape = (len(self.senders), len(self.receivers), len(self.full))
        if self.per_example.shape != shape or len(self.empty) != len(self.full):
            given = list(self.per_example.shape)
            raise ScoreError(f"effects of paths have shape {given}, their names and examples {list(shape)}")

    @property
    def effects(self) -> np.ndarray:
        """`[senders, receivers]` means over examples."""
        return np.asarray(self.per_example.mean(axis=-1))

    def top(self, n: int, by: str = "absolute") -> list[Path]:
        """The n paths of largest effect, or (by="signed") of most positive effect, best first.

        Raises:
            ScoreError: an unknown way to rank.
        """
        if by not in ("absolute", "signed"):
            raise ScoreError(f"by='{by}' is unknown: use 'absolute' or 'signed'")
        effects = self.effects.ravel()
        key = np.where(np.isnan(effects), -np.inf, np.abs(effects) if by == "absolute" else effects)
        order = np.argsort(-key, kind="stable")[: min(n, int((~np.isnan(effects)).sum()))]
        ends = bootstrap_mean(self.per_example.reshape(len(effects), -1)[order])
        return [
            Path(self.senders[row], self.receivers[column], float(effects[at]), float(low), float(high))
            for at, row, column, (low, high) in zip(
                order.tolist(), *np.divmod(order, len(self.receivers)), ends, strict=True
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; an effect is None where there is no path."""
        return {
            "senders": list(self.senders),
            "receivers": list(self.receivers),
            "effects": [[None if value != value else value for value in row] for row in self.effects.tolist()],
            "metric_full": float(self.full.mean()),
            "metric_empty": float(self.empty.mean()),
            "record": asdict(self.record),
        }

    # ---------------------------------------------------------------- files
    def save(self, path: str | PathLike[str], **more: Any) -> FilePath:
        """Writes `.json`: `to_dict` and the values of every example.

        Args:
            more: further entries of the file, which reading passes over.

        Raises:
            FileError: another ending, or the place cannot be written to.
        """
        examples = [[None if np.isnan(cell).all() else cell for cell in row] for row in self.per_example]
        values = {"per_example": examples, "full": self.full, "empty": self.empty}
        return result_file.write(path, FORMAT, {**more, **self.to_dict(), **values})

    @classmethod
    def open(cls, path: str | PathLike[str]) -> PathEffects:
        """Reads what `save` wrote, without any model.

        Raises:
            FileError: the file is missing, or holds no effects of paths.
        """
        content = result_file.read(path, FORMAT)
        with result_file.reading(path):
            full, empty = (result_file.numbers(content[name]) for name in ("full", "empty"))
            nothing = [None] * len(full)
            rows = [[nothing if cell is None else cell for cell in row] for row in content["per_example"]]
            values = result_file.numbers(rows)
            names = tuple(content["senders"]), tuple(content["receivers"])
            return cls(*names, values, full, empty, Record(**content["record"]))
