"""Everything about a batch of pairs that does not depend on the circuit, computed once.

1. `clean`: the clean run.
2. `ablated`: what each writer carries on an edge outside a circuit.
3. `empty`: the run with every edge ablated. Under interchange it is the corrupted run; otherwise (zero, means, prompts
   aligned by spans) every reader is shown the sum of the ablated values and the output biases, and the model computes
   the rest itself.

`PreparedRuns` are those of many pairs, batch by batch: kept between uses where all of them fit, else computed again.
Where memory runs out, what is kept is dropped and computed again with smaller batches; it is not kept any more if other
batches' runs took the room.
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
    """A batch with its clean, ablated and empty runs.

    `batch`: as metrics are given it; `inputs`: the clean prompts as they are run, all tokens or those after the shared
    ones; `interchange`: the empty run's writers are the ablated values, so a writer that no kept edge reaches differs
    from its ablated value by exactly zero.
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
        """A layer's folded weights, kept between calls where all layers' fit a modest budget."""
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
    """Runs both sides of the pairs, and the empty circuit where it is not the corrupted run. `means`: those of all
    pairs (`Experiment.means`), for the mean ablations; `run`: the batch as it is run."""
    run = run or batch
    clean, corrupted = capture(adapter, run.clean), capture_corrupted(adapter, run)
    batch, ablation = batch.with_reference(clean.logits), ablation_of(ablation)
    values = ablated(ablation, clean, corrupted, means)
    interchange = ablation.interchange and batch.alignment is None
    empty = corrupted if interchange else capture_empty(adapter, run.clean, values)
    return Prepared(adapter, batch, run.clean, clean, values, empty, interchange)


def ablated(ablation: Ablation, clean: Run, corrupted: Run | None, means: Writers | None) -> Writers:
    """The writers' ablated values for one batch, of the clean run's shapes; `corrupted` is from `capture_corrupted`."""
    other = corrupted.writers if corrupted is not None and ablation.corrupted else None
    return clean.writers.map(ablation.carried, other, means)


def capture_empty(adapter: Adapter, inputs: Inputs, values: Writers) -> Run:
    """The run in which every reader sees the ablated values only."""
    return _EmptyRecorder(adapter, values).record(inputs)


class _EmptyRecorder(Recorder):
    """Shows every reader the sum of the ablated values so far."""

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
