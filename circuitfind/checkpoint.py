"""Checkpoints: named arrays of a long run on disk, from which a stopped run continues.

1. A file is written completely or not at all. It contains the key of its run, a digest of everything that determines
   the result. A file with another key is refused, never overwritten. If a file cannot be written (a full disk), the run
   warns and continues.
2. `Measurements`: a run that measures many places keeps values `[places, examples]`, NaN where not measured yet, and
   writes them from time to time. A killed process loses only what it measured since.
3. With several processes, the first writes the file and sends the others what it read. `Measurements` differ: each
   process writes its own values to its own file (`NAME.rank1` and so on), and a later run with any number of processes
   continues from all of them.
4. The file is removed when the run is complete. Inside `until_saved` it is removed only at the end of the block,
   because later steps may fail, too (a full disk, Ctrl-C during an evaluation).
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

from circuitfind import processes
from circuitfind.errors import FileError, warn
from circuitfind.export.files import write_own

SECONDS_BETWEEN_WRITES = 20.0
OF_RANK = ".rank"
_WAITING: ContextVar[list[CheckpointFile] | None] = ContextVar(
    "checkpoints to be removed when the results are saved", default=None
)


class CheckpointFile:
    """The checkpoint of one run.

    Args:
        path: the file; None: nothing is read or written.
        key: identifies the run; see `key_of`.
        parts: what the key depends on, for the error about a file with another key.
        each: whether every process has a file of its own; otherwise only the first process writes.
    """

    def __init__(self, path: str | PathLike[str] | None, key: str, parts: str, each: bool = False) -> None:
        self.path, self.key, self.parts = None if path is None else Path(path), key, parts
        if self.path is not None and each and not processes.first():
            self.path = self.path.with_name(f"{self.path.name}{OF_RANK}{processes.group().rank}")
        self._writes = each or processes.first()

    def read(self) -> dict[str, np.ndarray] | None:
        """Return the arrays in the first process's file, on every process; None if there is no file. FileError for a
        file of another run."""
        return processes.of_first(lambda: None if self.path is None else self.content(self.path))

    def others(self) -> list[Path]:
        """Return this process's share of the files that other processes of this or a stopped run left."""
        assert self.path is not None, "a checkpoint without a path has no files"
        here, name = processes.group(), self.path.name.partition(OF_RANK)[0]
        found = [(one, one.suffix.removeprefix(OF_RANK)) for one in self.path.parent.glob(f"{name}{OF_RANK}*")]
        return [one for one, rank in found if rank.isdigit() and int(rank) % here.size == here.rank % here.size]

    def content(self, path: Path) -> dict[str, np.ndarray] | None:
        """Return the arrays in a file; None if there is none. FileError if it is of another run or no checkpoint."""
        if not path.exists():
            return None
        remedy = "remove it, or name another file"
        try:
            with safe_open(str(path), framework="numpy") as file:
                if (file.metadata() or {}).get("key") != self.key:
                    raise FileError(f"{path} is the checkpoint of another run (other {self.parts}): {remedy}")
                return {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError):
            raise FileError(f"{path} is no checkpoint of circuitfind: {remedy}") from None

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace the file's content, completely or not at all; warn, rather than raise, if that fails."""
        if self.path is None or not self._writes:
            return
        try:
            write_own(self.path, save(dict(arrays), metadata={"key": self.key}))
        except FileError as error:
            warn(f"checkpoint {error}; the run goes on without it")

    def finish(self, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Remove the file, because the run is complete. Inside `until_saved`: write the final `arrays`, if given, and
        leave the file to be removed at the end of the block."""
        if self.path is None:
            return
        waiting = _WAITING.get()
        if waiting is None:
            self.remove()
        else:
            if arrays is not None and processes.first():
                self.write(arrays)
            waiting.append(self)

    def remove(self) -> None:
        """Remove the file and those that other processes left."""
        if self.path is not None and self._writes:
            for one in (self.path, *self.others()):
                one.unlink(missing_ok=True)


@contextmanager
def until_saved() -> Iterator[list[CheckpointFile]]:
    """Inside this context, checkpoints of complete runs are kept; they are removed if it ends without an error. Yields
    the list of these checkpoints."""
    files: list[CheckpointFile] = []
    token = _WAITING.set(files)
    try:
        yield files
    finally:
        _WAITING.reset(token)
    for file in files:
        file.remove()


class Measurements:
    """Values of a long run, of `shape` (places, examples), saved to a `CheckpointFile`; NaN where not measured yet."""

    def __init__(self, path: str | PathLike[str] | None, key: str, parts: str, shape: tuple[int, int]) -> None:
        self.file, self._written = CheckpointFile(path, key, parts, each=True), time.monotonic()
        self.values = np.full(shape, np.nan)
        files = [] if self.file.path is None else [self.file.path, *self.file.others()]
        for left in processes.of_each(lambda: [self.file.content(one) for one in files]) if files else ():
            for known in left:
                if known is not None:
                    self.values = np.where(np.isnan(known["values"]), self.values, known["values"])

    def missing(self, places: slice, examples: slice) -> bool:
        """Whether any of these values is not measured yet."""
        return bool(np.isnan(self.values[places, examples]).any())

    def add(self, places: slice, examples: slice, effects: np.ndarray) -> None:
        """Store effects `[places, examples]`, and write the file from time to time."""
        self.values[places, examples] = effects
        if time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Write the file, if anything was measured."""
        if not np.isnan(self.values).all():
            self.file.write({"values": self.values})
        self._written = time.monotonic()

    def finish(self) -> None:
        """Finish the file, because the run is complete."""
        self.file.finish({"values": self.values})


def key_of(*parts: object) -> str:
    """Return a digest of arrays (by content) and other objects (by `repr`), as hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
        digest.update(b"|")
    return digest.hexdigest()
