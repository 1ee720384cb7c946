"""The loop of a sweep: every place of every layer patched in a run of its own, several runs side by side.

1. For each batch of pairs, both sides are run once and the site's values kept.
2. Places of one layer restart together, as many as are worth running at once.
3. The metric of each patched run is compared with that of the base run, example by example.
4. Where a checkpoint is named, what was measured is written now and then, and when anything stops the loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuitfind.batch import Batch
from circuitfind.checkpoint import Measurements
from circuitfind.engine.ablation import ablated, writer_means
from circuitfind.engine.aligned import moved
from circuitfind.engine.capture import Run, Writers
from circuitfind.engine.memory import in_batches
from circuitfind.engine.prepare import capture_empty
from circuitfind.engine.restart import Restart
from circuitfind.engine.run_key import run_key
from circuitfind.engine.site_values import Values, capture_site, site_means
from circuitfind.metrics import Metric
from circuitfind.models.adapter import Adapter
from circuitfind.patching.places import KINDS, Patcher, Place
from circuitfind.patching.stretches import Stretches
from circuitfind.progress import track
from circuitfind.score_checks import check_effects


class Measured(NamedTuple):
    """`effects [places, examples]`, layer by layer, unit by unit, stretch by stretch; the metric with nothing and with
    everything ablated, `[examples]` each."""

    effects: np.ndarray
    full: np.ndarray
    empty: np.ndarray


class Means(NamedTuple):
    """What mean ablation puts at the site, and at every writer for the run with everything ablated."""

    site: Values
    writers: Writers


class Sides(NamedTuple):
    """A batch (with the clean run's logits for reference), its two runs, what the site holds in the clean run and when
    it is ablated, and the metric with nothing and with everything ablated, `[batch]` each."""

    batch: Batch
    clean: Run
    corrupted: Run
    own: Values
    other: Values
    full: Tensor
    empty: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """What is patched, and how.

    Attributes:
        units: of each layer.
        stretches: of the prompts, each patched on its own; None patches all positions together.
    """

    what: str
    layers: list[int]
    units: int
    stretches: Stretches | None
    ablation: str
    direction: str

    @property
    def settings(self) -> dict[str, object]:
        """For the record."""
        axis = None if self.stretches is None else self.stretches.axis.name
        by = {"by_position": axis == "position", "by_span": axis == "span"}
        return {"what": self.what, **by, "layers": self.layers}

    @property
    def places(self) -> list[Place]:
        """Of one layer."""
        stretches = [None] if self.stretches is None else range(len(self.stretches.axis.labels))
        return [Place(unit, stretch) for unit in range(self.units) for stretch in stretches]

    def numbers(self, rows: slice, batch: Batch) -> Tensor | None:
        """`[batch, pos]` which stretch each position belongs to, of a batch made of these rows of all pairs."""
        return None if self.stretches is None else self.stretches.numbers[rows, : batch.clean.ids.shape[1]]


def measure(
    adapter: Adapter,
    batch: Batch,
    plan: Plan,
    metric: Metric,
    batch_size: int | None,
    checkpoint: str | PathLike[str] | None = None,
) -> Measured:
    """Effects of all places on all examples.

    Raises:
        ScoreError: an effect is NaN or infinite.
        FileError: the checkpoint belongs to another run.
    """
    key = _key(adapter, batch, plan, metric) if checkpoint else ""
    shape = len(plan.layers) * len(plan.places), len(batch)
    measured = Measurements(checkpoint, key, "model, prompts, metric or places", shape)
    means = means_of(adapter, batch, plan, batch_size)

    def one(part: Batch, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        return _measure_batch(adapter, part, plan, metric, means, measured, rows)

    try:
        parts = [part for _, part in in_batches(adapter, batch, one, batch_size, "pairs")]
    except BaseException:
        measured.flush()
        raise
    measured.finish()
    full, empty = (np.concatenate(values) for values in zip(*parts, strict=True))
    return Measured(measured.values, full, empty)


def _key(adapter: Adapter, batch: Batch, plan: Plan, metric: Metric) -> str:
    """Digest of everything that decides the effects of a sweep."""
    numbers = None if plan.stretches is None else plan.stretches.numbers.cpu().numpy()
    places = (plan.what, plan.layers, plan.units, plan.ablation, plan.direction)
    return run_key(adapter, batch, metric, numbers, places)


def means_of(adapter: Adapter, batch: Batch, plan: Plan, batch_size: int | None) -> Means | None:
    """What the mean ablations need of all pairs; None for the others."""
    writers = writer_means(adapter, batch, plan.ablation, batch_size)
    if writers is None:
        return None
    by_position = plan.ablation == "mean-position"
    return Means(site_means(adapter, batch, KINDS[plan.what].site, plan.layers, by_position, batch_size), writers)


def capture_sides(adapter: Adapter, batch: Batch, plan: Plan, metric: Metric, means: Means | None) -> Sides:
    """Runs both sides of a batch."""
    site = KINDS[plan.what].site
    clean, own = capture_site(adapter, batch.clean, site, plan.layers)
    corrupted, other = capture_site(adapter, batch.corrupted, site, plan.layers)
    batch = batch.with_reference(clean.logits)
    other = {layer: moved(value, batch) for layer, value in other.items()}
    empty = corrupted.logits
    if plan.ablation not in ("corrupted", "resample"):
        carried = ablated(plan.ablation, clean, None, means.writers if means else None)
        empty = capture_empty(adapter, batch.clean, carried).logits
        other = means.site if means else {layer: torch.zeros_like(value) for layer, value in own.items()}
    return Sides(batch, clean, corrupted, own, other, metric(clean.logits, batch), metric(empty, batch))


def _measure_batch(
    adapter: Adapter,
    batch: Batch,
    plan: Plan,
    metric: Metric,
    means: Means | None,
    measured: Measurements,
    examples: slice,
) -> tuple[np.ndarray, np.ndarray]:
    """Measures what is missing of a batch; the metric in full and empty runs."""
    batch, clean, corrupted, own, other, full, empty = capture_sides(adapter, batch, plan, metric, means)
    numbers = plan.numbers(examples, batch)
    if plan.direction == "denoising":
        patcher = Patcher(plan.what, Restart(adapter, batch.corrupted, corrupted), other, own, numbers)
        sign, before = -1, empty
    else:
        patcher = Patcher(plan.what, Restart(adapter, batch.clean, clean), own, other, numbers)
        sign, before = 1, full
    places, at_once = plan.places, patcher.restart.at_once
    groups = [
        (index, layer, start) for index, layer in enumerate(plan.layers) for start in range(0, len(places), at_once)
    ]
    for index, layer, start in track(groups, "patches"):
        some = places[start : start + at_once]
        rows = slice(index * len(places) + start, index * len(places) + start + len(some))
        if measured.missing(rows, examples):
            values = torch.stack([metric(one, batch) for one in patcher.logits(layer, some)])
            effects = as_numpy(sign * (before - values))
            check_effects(effects, [f"the effect of {plan.what} in layer {layer}, unit {one.unit}" for one in some])
            measured.add(rows, examples, effects)
    return as_numpy(full), as_numpy(empty)


def as_numpy(values: Tensor) -> np.ndarray:
    """In float64."""
    return values.double().cpu().numpy()
