"""The runs of a batch of pairs that do not depend on the circuit: computed once.

1. `clean`: the clean run.
2. `ablated`: each writer's ablated value, which an edge outside a circuit carries.
3. `empty`: the run with every edge ablated. Under interchange it is the corrupted run. Otherwise (zero, means, pairs
   aligned by spans) the input of every reader is replaced by the sum of the ablated values and output biases before it,
   and the model computes the rest.

`PreparedRuns` holds these for many pairs, batch by batch. They are kept between uses if those of all pairs fit a memory
budget, otherwise computed again. When memory runs out, the kept runs are dropped; if those of other batches were among
them, runs are not kept from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from circuitfind.batch import Batch, Inputs
from circuitfind.engine.ablation import CORRUPTED, Ablation, ablation_of
from circuitfind.engine.batches import in_batches, out_of_memory
from circuitfind.engine.capture import Recorder, Run, capture, capture_corrupted
from circuitfind.engine.memory_plan import KEPT_RUNS, KEPT_WEIGHTS, room, run_bytes
from circuitfind.engine.writers import Writers
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import Stop
from circuitfind.models.layer import AttentionReaders

if TYPE_CHECKING:
    from circuitfind.engine.experiment import Experiment

R = TypeVar("R")


@dataclass
class Prepared:
    """A batch with its clean run, ablated values and empty run.

    Attributes:
        batch: the pairs, for metrics: whole prompts, with the clean run's logits as reference.
        inputs: the clean prompts as they are run: whole, or without the shared prefix (`prefix.py`).
        interchange: whether the empty run's writers equal the ablated values. Then a writer that no kept edge reaches
            has exactly its ablated value.
    """

    adapter: Adapter
    batch: Batch
    inputs: Inputs
    clean: Run
    ablated: Writers
    empty: Run
    interchange: bool
    _readers: dict[int, AttentionReaders] = field(default_factory=dict)

    def readers(self, layer: int) -> AttentionReaders:
        """Return a layer's folded weights; kept between calls if those of all layers fit a memory budget."""
        folded = self._readers.get(layer) or AttentionReaders(self.adapter.layers[layer])
        if folded.n_bytes * self.adapter.graph.n_layers <= KEPT_WEIGHTS:
            self._readers[layer] = folded
        return folded


def prepare(
    adapter: Adapter,
    batch: Batch,
    ablation: str | Ablation = CORRUPTED,
    means: Writers | None = None,
    run: Batch | None = None,
) -> Prepared:
    """Run both sides of the pairs, and the empty circuit unless it is the corrupted run.

    Args:
        means: `Experiment.means`, for the mean ablations.
        run: the pairs as they are run, if without their shared prefix; default: `batch`.
    """
    run = run or batch
    clean, corrupted = capture(adapter, run.clean), capture_corrupted(adapter, run)
    batch, ablation = batch.with_reference(clean.logits), ablation_of(ablation)
    values = ablated(ablation, clean, corrupted, means)
    interchange = ablation.interchange and batch.alignment is None
    empty = corrupted if interchange else capture_empty(adapter, run.clean, values)
    return Prepared(adapter, batch, run.clean, clean, values, empty, interchange)


def ablated(ablation: Ablation, clean: Run, corrupted: Run | None, means: Writers | None) -> Writers:
    """Return the writers' ablated values in the clean run's shapes. `corrupted`: from `capture_corrupted`, or None."""
    other = corrupted.writers if corrupted is not None and ablation.corrupted else None
    return clean.writers.map(ablation.carried, other, means)


def capture_empty(adapter: Adapter, inputs: Inputs, values: Writers) -> Run:
    """Record the run in which every reader sees the sum of ablated values and output biases."""
    return _EmptyRecorder(adapter, values).record(inputs)


class _EmptyRecorder(Recorder):
    """Replaces every reader's input by the sum of the ablated values and output biases before it."""

    def __init__(self, adapter: Adapter, values: Writers) -> None:
        super().__init__(adapter)
        self.values, self.stream = values, values.embed.clone()

    def __call__(self, site: str, layer: int, value: Tensor) -> Tensor | Stop | None:
        shown = None
        if site in ("resid", "final"):
            shown = self.stream.to(value.dtype)
        elif site == "mlp_in":
            middle = self.run.middle[layer].to(self.adapter.work)
            shown = self.adapter.layers[layer].mlp_reads(middle).to(value.dtype).view(value.shape)
        super().__call__(site, layer, value if shown is None else shown)
        if site == "attn_out":
            self._add(self.adapter.head_outputs(layer, self.values.heads[layer]).sum(0), layer, 0)
            if not self.adapter.graph.parallel:
                self.run.middle[layer] = self.stream.to(value.dtype)
        elif site == "mlp_out":
            self._add(self.values.mlps[layer], layer, 1)
        return shown

    def _add(self, written: Tensor, layer: int, branch: int) -> None:
        constant = self.adapter.layers[layer].constants()[branch]
        self.stream = self.stream + written if constant is None else self.stream + written + constant


# -------------------------------------------------------------------- batch by batch
class PreparedRuns:
    """The prepared runs of some of an experiment's pairs, `size` pairs at a time; kept if all its pairs' runs fit."""

    def __init__(self, experiment: Experiment, batch: Batch, size: int) -> None:
        self.experiment, self.batch, self._size = experiment, batch, size
        self._keep = run_bytes(experiment.adapter, experiment.batch.clean.ids.numel(), runs=2) <= KEPT_RUNS
        experiment.share()
        self._kept: dict[tuple[int, int], Prepared] = {}

    def of(self, rows: slice) -> PreparedRuns:
        """Return the prepared runs of some of these pairs."""
        whole = rows.stop - rows.start == len(self.batch)
        return self if whole else PreparedRuns(self.experiment, self.batch.rows(rows), self._size)

    @property
    def size(self) -> int:
        """How many pairs are run at a time, until memory runs out again."""
        return room().fitting(self._size, len(self.batch))

    def each(self, function: Callable[[Prepared], R], label: str) -> Iterator[R]:
        """Apply a function to each prepared batch and yield the results; batches are halved when memory runs out."""

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
