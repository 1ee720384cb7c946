"""The loop of all exact patching: each place is patched in a run of its own, several runs side by side.

1. For each batch of pairs, `start` runs what does not depend on the place (the clean and the ablated run), and divides
   the places into groups that run side by side.
2. Each group is run, and its metric compared with that of the base run, example by example. Noising: metric(clean) -
   metric(patched); denoising: metric(patched) - metric(corrupted). Positive = the place supports the behaviour.
3. Several processes divide either the places of a batch (by the number of blocks that they run) or the pairs, whichever
   leaves the busiest process less work.
4. With a checkpoint, effects are saved from time to time and when anything stops the loop; a repeated call measures
   only what is missing. When memory runs out, the batch is halved (`engine/batches.py`).
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

PARTS = "model, prompts, metric or places"  # what a checkpoint's key depends on, for the error about another key


class Group(NamedTuple):
    """Places that are patched side by side: their rows in the result, the first layer that is run, and the argument of
    `Started.logits`."""

    places: slice
    layer: int
    patches: Any


class Started(NamedTuple):
    """A batch ready to be patched.

    batch: the pairs, with the clean run's logits as reference.
    full, empty: logits `[batch, reads, vocab]` with no edge and with every edge ablated; None is allowed for the one
        that is not the base run.
    groups: all places, group by group.
    logits: runs one group's `patches` and returns logits `[places, batch, reads, vocab]`.
    """

    batch: Batch
    full: Tensor | None
    empty: Tensor | None
    groups: Sequence[Group]
    logits: Callable[[Any], Tensor]


class Measured(NamedTuple):
    """`effects [places, examples]` in units of the metric; `full`, `empty`: the metric `[examples]` with no edge and
    with every edge ablated, None if that was not run."""

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
    """Measure the effect of patching each place, on all examples.

    Args:
        start: gets a batch, and the slice of all pairs that it holds.
        name: returns the name of a place by its number, for errors.
        label: names the loop in the progress bar.
        checkpoint: a file that a stopped run leaves and a repeated call continues from; removed at the end.
        key: what determines the places, for the checkpoint's key.

    Raises:
        ScoreError: an effect is NaN or infinite.
        FileError: the checkpoint belongs to another run.
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
        ends_at = experiment.graph.n_layers + 1  # the unembedding costs about as much as a block
        own = divided.own((places.stop - places.start) * (ends_at - layer) for places, layer, _ in groups)
        for places, _, group in track([groups[at] for at in own], label):
            if not measured.missing(places, rows):  # measured before memory ran out or the run was stopped
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
            for places, effects in part.effects:  # also those that other processes measured
                measured.values[places, rows] = effects
    except BaseException:  # including Ctrl-C: save what was measured
        measured.flush()
        raise
    measured.finish()
    full, empty = (side if there else None for side, there in zip(ends, known, strict=True))
    return Measured(measured.values, full, empty)


class _Done(NamedTuple):
    """One process's results for a batch. `ends`: the metric `[examples]` of `full` and `empty`; `effects`: of each of
    its groups the places and their effects `[places, examples]`."""

    ends: list[np.ndarray | None]
    effects: list[tuple[slice, np.ndarray]]


def as_numpy(values: Tensor) -> np.ndarray:
    """Return values as a float64 array."""
    return values.double().cpu().numpy()


def _check(effects: np.ndarray, first: int, name: Callable[[int], str]) -> None:
    """Raise a ScoreError if an effect `[places, examples of a batch]` is NaN or infinite."""
    bad = np.argwhere(~np.isfinite(effects))
    if len(bad):
        place, example = bad[0].tolist()
        found = "NaN" if np.isnan(effects[place, example]) else "infinite"
        raise ScoreError(
            f"the effect of {name(first + place)} is {found} on example {example} of the batch: look for inf or NaN in"
            " the logits or in your metric"
        )
