"""Two processes do together what one does alone: the same numbers, the same decisions."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes_calls import run

from circuitfind import processes

TESTS = Path(__file__).parent
EXACT = ("exact", "sweep", "paths", "in batches of one size", "learned in batches of one size")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], ...]:
    """What one process found, and each of two: this one, which is the first of them, and another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("two")
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    paths = {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    script = [sys.executable, TESTS / "processes_calls.py", folder]
    other = subprocess.Popen(script, env={**os.environ, **group, **paths, "RANK": "1", "LOCAL_RANK": "1"})
    alone = run(tmp_path_factory.mktemp("one"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**group, "RANK": "0", "LOCAL_RANK": "0"}.items():
            patch.setenv(name, value)
        assert processes.join()
        try:
            first = run(folder)
        finally:
            processes.leave()
    assert other.wait(240) == 0
    return alone, first, pickle.loads((folder / "rank1.pickle").read_bytes())


def differ(a: Any, b: Any, tolerance: float) -> bool:
    """Whether numbers differ by more than a part of the largest, or anything else at all."""
    if isinstance(a, (tuple, list)):
        return len(a) != len(b) or any(differ(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, (float, np.ndarray)):
        a, b = np.asarray(a), np.asarray(b)
        size = np.abs(a[np.isfinite(a)]).max(initial=0)
        return not np.allclose(a, b, 0, tolerance * size, equal_nan=True)
    return bool(a != b)


def test_two_processes_equal_one(found) -> None:
    """Scores, effects, evaluations, decisions and passes."""
    alone, first, _ = found
    assert [name for name in alone if differ(alone[name], first[name], 1e-4)] == []


def test_every_process_has_the_same_to_the_bit(found) -> None:
    """What is added up is added up in one order on all of them."""
    _, first, second = found
    assert [name for name in first if differ(first[name], second[name], 0)] == []


def test_the_same_to_the_bit_where_batches_are(found) -> None:
    """Places that are divided are patched in the batches of one process; so are pairs in batches of a given size."""
    alone, first, _ = found
    assert [name for name in EXACT if differ(alone[name], first[name], 0)] == []
