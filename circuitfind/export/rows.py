"""The plain row that files and pictures are made of."""

from __future__ import annotations

from typing import NamedTuple


class EdgeRow(NamedTuple):
    """One edge: writer and reader index, estimated and exact effect in units of the metric (None = unknown)."""

    writer: int
    reader: int
    estimate: float | None
    exact: float | None

    @property
    def effect(self) -> float | None:
        """The exact effect where it was measured, else the estimate."""
        return self.estimate if self.exact is None else self.exact
