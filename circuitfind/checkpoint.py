"""Named arrays of a long run on disk, so that a stopped run goes on where it was.

1. A file is written whole or not at all, and carries the key of its run: a digest of everything that decides the
   result. A file with another key is refused, never overwritten. On a full disk the run warns and goes on.
2. A run that measures many places keeps `[places, examples]` values, NaN where not measured yet, and writes them now
   and then: a killed process loses no more than was measured since.
3. The file of a complete run is removed. Inside `until_saved` it waits, complete, for the block's end: what becomes of
   the result may fail, too (a full disk, Ctrl-C while it is judged).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from os import PathLike
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from circuitfind.errors import FileError, warn
from circuitfind.export.files import write_bytes

SECONDS_BETWEEN_WRITES = 20.0
_WAITING: ContextVar[list[CheckpointFile] | None] = ContextVar(
    "files that wait for their results to be saved", default=None
)


class CheckpointFile:
    """The file of the run that `key` (see `key_of`) identifies; with no path, nothing is kept.

    `parts`: what another key differs in, for the error.
    """

    def __init__(self, path: str | PathLike[str] | None, key: str, parts: str) -> None:
        self.path, self.key, self.parts = None if path is None else Path(path), key, parts

    def read(self) -> dict[str, np.ndarray] | None:
        """What was written last; None where there is no file yet. Files of other runs are refused."""
        if self.path is None or not self.path.exists():
            return None
        remedy = "remove it, or name another file"
        try:
            with safe_open(str(self.path), framework="numpy") as file:
                if (file.metadata() or {}).get("key") != self.key:
                    raise FileError(f"{self.path} is the checkpoint of another run (other {self.parts}): {remedy}")
                return {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError):
            raise FileError(f"{self.path} is no checkpoint of circuitfind: {remedy}") from None

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replaces what was written, whole or not at all: a run does not end because its checkpoint cannot be kept."""
        if self.path is None:
            return
        try:
            write_bytes(self.path, save(dict(arrays), metadata={"key": self.key}))
        except FileError as error:
            warn(f"checkpoint {error}; the run goes on without it")

    def finish(self, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Removes the file of a run that is complete. Inside `until_saved` it waits there, with the last `arrays` if
        they are not written yet."""
        if self.path is None:
            return
        waiting = _WAITING.get()
        if waiting is None:
            self.path.unlink(missing_ok=True)
        else:
            if arrays is not None:
                self.write(arrays)
            waiting.append(self)


@contextmanager
def until_saved() -> Iterator[list[CheckpointFile]]:
    """Inside, files of complete runs stay; they are removed if the block ends without an error. Gives those files."""
    files: list[CheckpointFile] = []
    token = _WAITING.set(files)
    try:
        yield files
    finally:
        _WAITING.reset(token)
    for file in files:
        if file.path is not None:
            file.path.unlink(missing_ok=True)


class Measurements:
    """What a long run measured, `shape` (places, examples), kept in a `CheckpointFile`."""

    def __init__(self, path: str | PathLike[str] | None, key: str, parts: str, shape: tuple[int, int]) -> None:
        self.file, self._written = CheckpointFile(path, key, parts), time.monotonic()
        known = self.file.read()
        self.values = np.full(shape, np.nan) if known is None else known["values"]

    def missing(self, places: slice, examples: slice) -> bool:
        """Whether any of these is not measured yet."""
        return bool(np.isnan(self.values[places, examples]).any())

    def add(self, places: slice, examples: slice, effects: np.ndarray) -> None:
        """Notes effects `[places, examples]`; writes now and then."""
        self.values[places, examples] = effects
        if time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Writes what there is, if there is anything."""
        if not np.isnan(self.values).all():
            self.file.write({"values": self.values})
        self._written = time.monotonic()

    def finish(self) -> None:
        """The run is complete."""
        self.file.finish({"values": self.values})


def key_of(*parts: object) -> str:
    """A digest of arrays (by content) and everything else (by its text)."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
        digest.update(b"|")
    return digest.hexdigest()
