"""The prepared runs of pairs, batch by batch: kept between uses where all of them fit, else computed again.

What is kept is dropped where memory runs out. It is computed again with smaller batches, and not kept any more if it
was other batches' runs that took the room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from circuitfind.batch import Batch
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.memory import KEPT_RUNS, in_batches, out_of_memory, room, run_bytes
from circuitfind.engine.prepare import Prepared

R = TypeVar("R")


class PreparedRuns:
    """The runs of some of an experiment's pairs, `size` at a time; kept if those of all its pairs fit."""

    def __init__(self, experiment: Experiment, batch: Batch, size: int) -> None:
        self.experiment, self.batch, self._size = experiment, batch, size
        self._keep = run_bytes(experiment.adapter, experiment.batch.clean.ids.numel(), runs=2) <= KEPT_RUNS
        experiment.share()
        self._kept: dict[tuple[int, int], Prepared] = {}

    def of(self, rows: slice) -> PreparedRuns:
        """Those of some of the pairs."""
        whole = rows.stop - rows.start == len(self.batch)
        return self if whole else PreparedRuns(self.experiment, self.batch.rows(rows), self._size)

    @property
    def size(self) -> int:
        """How many pairs are run at a time, as far as is known."""
        return room().fitting(self._size, len(self.batch))

    def each(self, function: Callable[[Prepared], R], label: str) -> Iterator[R]:
        """A function of each prepared batch; batches are halved where memory runs out."""

        def one(batch: Batch, rows: slice) -> R:
            key = (rows.start, rows.stop)
            try:
                prepared = self._kept.get(key) or self.experiment.prepare(batch, divided=True)
                if self._keep:
                    self._kept[key] = prepared
                return function(prepared)
            except Exception as error:
                if out_of_memory(error):
                    self._keep = self._keep and self._kept.keys() <= {key}
                    self._kept.clear()
                raise

        return (result for _, result in in_batches(self.experiment.adapter, self.batch, one, self._size, label))
