"""The one loop of exact patching: many places patched, each in a run of its own, several runs side by side.

1. For each batch of pairs, `start` runs what does not depend on the place: both ends, and the groups of places that are
   patched together.
2. Each group is run, and the metric compared with that of the base run, example by example. Noising: metric(clean) -
   metric(patched); denoising: metric(patched) - metric(corrupted). Positive = the place supports the behaviour.
3. Several processes divide the places of a batch, by the blocks that they run, or the pairs, whichever leaves the
   busiest less to do.
4. Where a checkpoint is named, what was measured is written now and then, and when anything stops the loop. A repeated
   call measures only what is missing. Out of memory halves the batch (`engine/batches.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuitfind.batch import Batch
from circuitfind.checkpoint import Measurements
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import ScoreError
from circuitfind.processes import division
from circuitfind.progress import track

PARTS = "model, prompts, metric or places"  # what decides the effects


class Group(NamedTuple):
    """Places that are patched together: rows of the result, the layer from which on they run, what `logits` takes."""

    places: slice
    layer: int
    patches: Any


class Started(NamedTuple):
    """A batch ready to be patched.

    batch: with the clean run's logits for reference.
    full, empty: logits `[batch, reads, vocab]` with nothing and with everything ablated; the one that is not the base
        run may be left out.
    logits: runs one group: `[places, batch, reads, vocab]`.
    """

    batch: Batch
    full: Tensor | None
    empty: Tensor | None
    groups: Sequence[Group]
    logits: Callable[[Any], Tensor]


class Measured(NamedTuple):
    """`effects [places, examples]` in units of the metric; the metric `[examples]` with nothing and with everything
    ablated (None where that end was not run)."""

    effects: np.ndarray
    full: np.ndarray | None
    empty: np.ndarray | None


def measure(
    experiment: Experiment,
    start: Callable[[Batch, slice], Started],
    n_places: int,
    name: Callable[[int], str],
    label: str,
    checkpoint: str | PathLike[str] | None = None,
    key: Sequence[object] = (),
) -> Measured:
    """Effects of patching all places on all examples.

    Args:
        start: gets a batch, and which rows of all pairs it holds.
        name: of a place by its number, for errors.
        checkpoint: a file that a stopped run leaves and a repeated call continues from; removed at the end.
        key: what decides the places, for the checkpoint.

    Raises:
        ScoreError, FileError: an effect is NaN or infinite; the checkpoint belongs to another run.
    """
    noising, metric = experiment.setting.noising, experiment.metric
    own = experiment.key(*key) if checkpoint else ""
    measured = Measurements(checkpoint, own, PARTS, (n_places, len(experiment)))

    divided = division(len(experiment), n_places)

    def one(part: Batch, rows: slice) -> _Done:
        batch, full, empty, groups, logits = start(part, rows)
        ends = [None if end is None else metric(end, batch) for end in (full, empty)]
        before, done = ends[0 if noising else 1], []
        assert before is not None, "the base run is given"
        ends_at = experiment.graph.n_layers + 1  # the unembedding takes about as much as a block
        own = divided.own((places.stop - places.start) * (ends_at - layer) for places, layer, _ in groups)
        for places, _, group in track([groups[at] for at in own], label):
            if not measured.missing(places, rows):  # before memory ran out, or a run was stopped: others need them, too
                done.append((places, measured.values[places, rows]))
                continue
            values = torch.stack([metric(run, batch) for run in logits(group)])
            effects = as_numpy(before - values if noising else values - before)
            _check(effects, places.start, name)
            measured.add(places, rows, effects)
            done.append((places, effects))
        return _Done([None if end is None else as_numpy(end) for end in ends], done)

    ends = np.full((2, len(experiment)), np.nan)
    known = [False, False]
    try:
        for rows, part in experiment.in_batches(one, "pairs", division=divided):
            for at, values in enumerate(part.ends):
                if values is not None:
                    ends[at, rows], known[at] = values, True
            for places, effects in part.effects:  # those of other processes, too
                measured.values[places, rows] = effects
    except BaseException:  # Ctrl-C included: what was measured is kept
        measured.flush()
        raise
    measured.finish()
    full, empty = (side if there else None for side, there in zip(ends, known, strict=True))
    return Measured(measured.values, full, empty)


class _Done(NamedTuple):
    """What one process made of a batch: the metric `[examples]` at both ends; of its part of the places, which they are
    and their effects `[places, examples]`."""

    ends: list[np.ndarray | None]
    effects: list[tuple[slice, np.ndarray]]


def as_numpy(values: Tensor) -> np.ndarray:
    """In float64."""
    return values.double().cpu().numpy()


def _check(effects: np.ndarray, first: int, name: Callable[[int], str]) -> None:
    """Refuses NaN and infinity among effects `[places, examples of a batch]`."""
    bad = np.argwhere(~np.isfinite(effects))
    if len(bad):
        place, example = bad[0].tolist()
        found = "NaN" if np.isnan(effects[place, example]) else "infinite"
        raise ScoreError(
            f"the effect of {name(first + place)} is {found} on example {example} of the batch: look for inf or NaN in"
            " the logits or in your metric"
        )
