"""Named arrays of a long run on disk, so that a stopped run goes on where it was.

1. A file is written whole or not at all, and carries the key of its run: a digest of everything that decides the
   result. A file with another key is refused, never overwritten. On a full disk the run warns and goes on.
2. A run that measures many places keeps `[places, examples]` values, NaN where not measured yet, and writes them now
   and then: a killed process loses no more than was measured since.
3. Of several processes the first writes the file, and tells the others what it read. Of many places each keeps what it
   measured itself, in a file beside it (`NAME.rank1`); any number of processes goes on with what all have left.
4. The file of a complete run is removed. Inside `until_saved` it waits, complete, for the block's end: what becomes of
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

from circuitfind import processes
from circuitfind.errors import FileError, warn
from circuitfind.export.files import write_own

SECONDS_BETWEEN_WRITES = 20.0
OF_RANK = ".rank"
_WAITING: ContextVar[list[CheckpointFile] | None] = ContextVar(
    "files that wait for their results to be saved", default=None
)


class CheckpointFile:
    """The file of the run that `key` (see `key_of`) identifies; with no path, nothing is kept. `parts`: what another
    key differs in, for the error; `each`: every process has a file of its own."""

    def __init__(self, path: str | PathLike[str] | None, key: str, parts: str, each: bool = False) -> None:
        self.path, self.key, self.parts = None if path is None else Path(path), key, parts
        if self.path is not None and each and not processes.first():
            self.path = self.path.with_name(f"{self.path.name}{OF_RANK}{processes.group().rank}")
        self._writes = each or processes.first()

    def read(self) -> dict[str, np.ndarray] | None:
        """What the first process wrote last; None where there is no file yet. Files of other runs are refused."""
        return processes.of_first(lambda: None if self.path is None else self.content(self.path))

    def others(self) -> list[Path]:
        """The files that other processes of this or of a stopped run left, as far as this one is to look after them."""
        assert self.path is not None, "files are asked for"
        here, name = processes.group(), self.path.name.partition(OF_RANK)[0]
        found = [(one, one.suffix.removeprefix(OF_RANK)) for one in self.path.parent.glob(f"{name}{OF_RANK}*")]
        return [one for one, rank in found if rank.isdigit() and int(rank) % here.size == here.rank % here.size]

    def content(self, path: Path) -> dict[str, np.ndarray] | None:
        """What a file of this run holds; None where there is none."""
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
        """Replaces what was written, whole or not at all: a run does not end because its checkpoint cannot be kept."""
        if self.path is None or not self._writes:
            return
        try:
            write_own(self.path, save(dict(arrays), metadata={"key": self.key}))
        except FileError as error:
            warn(f"checkpoint {error}; the run goes on without it")

    def finish(self, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Removes the file of a run that is complete. Inside `until_saved` it waits there, with the last `arrays` if
        they are not written yet."""
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
        """Removes the file, and what other processes of a stopped run left."""
        if self.path is not None and self._writes:
            for one in (self.path, *self.others()):
                one.unlink(missing_ok=True)


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
        file.remove()


class Measurements:
    """What a long run measured, `shape` (places, examples), kept in a `CheckpointFile`."""

    def __init__(self, path: str | PathLike[str] | None, key: str, parts: str, shape: tuple[int, int]) -> None:
        self.file, self._written = CheckpointFile(path, key, parts, each=True), time.monotonic()
        self.values = np.full(shape, np.nan)
        files = [] if self.file.path is None else [self.file.path, *self.file.others()]
        for left in processes.of_each(lambda: [self.file.content(one) for one in files]) if files else ():
            for known in left:
                if known is not None:
                    self.values = np.where(np.isnan(known["values"]), self.values, known["values"])

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
