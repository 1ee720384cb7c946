"""A long exact run on disk, so that a stopped one goes on where it was.

The file holds `[edges, examples]` effects, NaN where not measured yet, and a key made of everything that decides them:
graph, weights, prompts, metric, ablation, direction, edges. A file with another key is refused, never overwritten.
"""

from __future__ import annotations

import hashlib
import time
from os import PathLike
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from circuitfind.errors import FileError

SECONDS_BETWEEN_WRITES = 20.0


class Checkpoint:
    """Measured effects, kept in a file when there is a path and in memory otherwise.

    Args:
        path: None keeps nothing on disk.
        key: identifies the run.
        shape: (edges, examples).

    Raises:
        FileError: the file belongs to another run, or is no checkpoint.
    """

    def __init__(self, path: str | PathLike[str] | None, key: str, shape: tuple[int, int]) -> None:
        self.path = None if path is None else Path(path)
        self.key, self._written = key, time.monotonic()
        self.values = np.full(shape, np.nan)
        if self.path is not None and self.path.exists():
            self.values = self._read(self.path)

    def _read(self, path: Path) -> np.ndarray:
        try:
            with safe_open(str(path), framework="numpy") as file:
                if (file.metadata() or {}).get("key") != self.key:
                    raise FileError(
                        f"{path} is the checkpoint of another run (other model, prompts, metric or edges):"
                        " remove it, or name another file"
                    )
                return file.get_tensor("values").copy()
        except SafetensorError:
            raise FileError(f"{path} is no checkpoint of circuitfind: remove it, or name another file") from None

    def missing(self, edges: slice, examples: slice) -> bool:
        """Whether any of these is not measured yet."""
        return bool(np.isnan(self.values[edges, examples]).any())

    def add(self, edges: slice, examples: slice, effects: np.ndarray) -> None:
        """Notes effects `[edges, examples]`; writes now and then."""
        self.values[edges, examples] = effects
        if time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Writes what there is, whole or not at all."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        save_file({"values": self.values}, str(part), metadata={"key": self.key})
        part.replace(self.path)
        self._written = time.monotonic()

    def finish(self) -> None:
        """Removes the file of a run that is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def key_of(*parts: object) -> str:
    """A digest of arrays (by content) and everything else (by its text)."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
        digest.update(b"|")
    return digest.hexdigest()
