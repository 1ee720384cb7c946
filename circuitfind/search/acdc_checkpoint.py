"""An ACDC run on disk: what was decided up to the last point at which the states were computed anew from the mask.

A run that goes on from there computes the states from the mask in the same way and so repeats what the stopped run did
after that point, to the bit; it repeats 128 trials at the most. The file's key holds everything that decides an effect:
model, prompts, metric, ablation, edges and their order, and the rule.
"""

from __future__ import annotations

from os import PathLike

import numpy as np

from circuitfind.checkpoint import CheckpointFile, key_of
from circuitfind.progress import progress
from circuitfind.search import acdc_pruning
from circuitfind.search.acdc_pruning import Pruning
from circuitfind.search.acdc_rule import REASONS, Decision

PARTS = "model, prompts, metric, threshold, order or options"


def run(pruning: Pruning, checkpoint: str | PathLike[str] | None, label: str = "ACDC") -> CheckpointFile:
    """Runs to the end, from where the file left off; leaves the finished run in the file.

    Raises:
        FileError: the checkpoint belongs to another run.
    """
    file = CheckpointFile(checkpoint, _key(pruning) if checkpoint else "", PARTS)
    known = file.read()
    if known is not None:
        _restore(pruning, known)
    with progress(label, len(pruning.edges)) as advance:
        at = 0
        for resumable in pruning.steps():
            if resumable:
                file.write(_arrays(pruning))
            advance(pruning.position - at)
            at = pruning.position
    file.write(_arrays(pruning))
    return file


def _arrays(pruning: Pruning) -> dict[str, np.ndarray]:
    edges, effects, kept, how = zip(*pruning.decisions, strict=True) if pruning.decisions else ([], [], [], [])
    return {
        "edges": np.array(edges, dtype=np.int32).reshape(-1, 2),
        "effects": np.array(effects, dtype=np.float64),
        "kept": np.array(kept, dtype=np.uint8),
        "how": np.array([REASONS.index(one) for one in how], dtype=np.uint8),
        "counts": np.array([pruning.position, pruning.hopeful, pruning.screening_runs], dtype=np.int64),
        "current": np.array([pruning.current], dtype=np.float64),
    }


def _restore(pruning: Pruning, known: dict[str, np.ndarray]) -> None:
    columns = (known[name].tolist() for name in ("edges", "effects", "kept", "how"))
    pruning.decisions = [
        Decision((edge[0], edge[1]), effect, bool(kept), REASONS[how])
        for edge, effect, kept, how in zip(*columns, strict=True)
    ]
    pruning.position, pruning.hopeful, pruning.screening_runs = known["counts"].tolist()
    pruning.current = float(known["current"][0])


def _key(pruning: Pruning) -> str:
    """Digest of everything that decides the effects."""
    rule, edges = pruning.rule, np.array(pruning.edges)
    run = pruning.evaluator.experiment.key(edges)
    screened = np.zeros(0) if rule.screened is None else rule.screened
    return key_of(run, screened, "acdc", rule.threshold, rule.absolute, rule.dangling, acdc_pruning.RUNS_BETWEEN_STATES)
