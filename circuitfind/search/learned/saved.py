"""A training on disk: run to the end, from where a stopped run left off, to the same result to the bit."""

from __future__ import annotations

import time
from dataclasses import fields
from os import PathLike

import numpy as np
import torch

from circuitfind.checkpoint import CheckpointFile, key_of
from circuitfind.progress import progress
from circuitfind.search.learned.training import State, Training

SECONDS_BETWEEN_WRITES = 20.0
PARTS = "model, prompts, metric or settings"


def run(
    training: Training,
    state: State,
    steps: int,
    patience: int | None,
    checkpoint: str | PathLike[str] | None,
    settings: object,
) -> State:
    """Trains for `steps` steps, or until the training has finished.

    Args:
        settings: everything, besides pairs, metric and ablation, that decides the result.

    Raises:
        FileError: the checkpoint belongs to another run.
    """
    key = key_of(training.batches.experiment.key(), settings) if checkpoint else ""
    file = CheckpointFile(checkpoint, key, PARTS)
    known = file.read()
    if known is not None:
        devices = {field.name: getattr(state, field.name).device for field in fields(state)}
        state = State(**{name: torch.from_numpy(known[name]).to(device) for name, device in devices.items()})
    written = time.monotonic()
    with progress("learning masks", steps) as advance:
        advance(state.step)
        try:
            while state.step < steps and not training.finished(state, patience):
                state = training.advance(state)
                advance(1)
                if time.monotonic() - written > SECONDS_BETWEEN_WRITES:
                    file.write(_arrays(state))
                    written = time.monotonic()
        except BaseException:  # Ctrl-C included: what was learned is kept
            file.write(_arrays(state))
            raise
    file.remove()
    return state


def _arrays(state: State) -> dict[str, np.ndarray]:
    return {field.name: getattr(state, field.name).cpu().numpy() for field in fields(state)}
