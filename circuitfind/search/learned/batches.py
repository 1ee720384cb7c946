"""Pairs dealt into mini-batches once, each ready to run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from circuitfind.engine.experiment import Experiment
from circuitfind.engine.memory import KEPT_RUNS, batch_size_for, run_bytes
from circuitfind.engine.prepare import Prepared


class MiniBatches:
    """A seeded partition of the pairs into mini-batches, gone through in a new random order each epoch.

    Args:
        per_step: pairs in a mini-batch.
    """

    def __init__(self, experiment: Experiment, per_step: int) -> None:
        adapter, length = experiment.adapter, experiment.batch.clean.ids.shape[1]
        size = experiment.setting.batch_size  # it changes memory, not results beyond rounding
        if size is None:  # both autograd's activations and every writer's output are held
            size = min(batch_size_for(adapter, per_step, length, streams) for streams in (False, True))
        seed = experiment.setting.seed
        order = torch.randperm(len(experiment), generator=torch.Generator().manual_seed(seed))
        self.experiment, self.seed = experiment, seed
        self.batches = [[part.sort().values for part in rows.split(size)] for rows in order.split(per_step)]
        self._keep = run_bytes(adapter, experiment.batch.clean.ids.numel(), runs=2) <= KEPT_RUNS
        self._kept: dict[tuple[int, int], Prepared] = {}

    def at(self, step: int) -> Iterator[Prepared]:
        """The mini-batch of a step, in parts that fit in memory."""
        epoch, place = divmod(step, len(self.batches))
        generator = torch.Generator().manual_seed(self.seed + 1 + epoch)
        number = int(torch.randperm(len(self.batches), generator=generator)[place])
        for part, rows in enumerate(self.batches[number]):
            yield self._prepared((number, part), rows)

    def contrast(self) -> float:
        """The metric of the whole model minus that with every edge ablated, mean over all pairs."""
        total, metric = 0.0, self.experiment.metric
        for number, parts in enumerate(self.batches):
            for part, rows in enumerate(parts):
                prepared = self._prepared((number, part), rows)
                runs = prepared.clean, prepared.empty
                full, empty = (metric(run.logits, prepared.batch).cpu().double() for run in runs)
                total += float((full - empty).sum())
        return total / len(self.experiment)

    def _prepared(self, key: tuple[int, int], rows: Tensor) -> Prepared:
        if key in self._kept:
            return self._kept[key]
        batch = self.experiment.batch
        prepared = self.experiment.prepare(batch.rows(rows.to(batch.answers.device)).trimmed())
        if self._keep:
            self._kept[key] = prepared
        return prepared
