"""Reading and writing files: atomic writes, and the JSON of results.

1. A file is written under a temporary name in the same folder and then renamed, so a reader never sees half a file.
2. A result is one JSON object, UTF-8, that names its format: `{"format": "circuitfind.paths", "version": 1, ...}`.
   Unknown keys are ignored.
3. Numbers are finite: NaN and infinite values become null in the file, and NaN when the file is read.

Nothing here needs a model or imports torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from socket import gethostname
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from circuitfind import processes
from circuitfind.errors import FileError, ScoreError, no_character

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

VERSION, LOCK = 1, ".circuitfind.lock"
_CUT = "'circuitfind export --top N --to json' or Scores.open(path).top(n) cuts a circuit from them"
TENSORS = {  # (format, level) in a safetensors file's metadata -> what the file holds and what opens it
    ("circuitfind.scores", "edge"): f"edge scores: 'circuitfind find --scores' searches them, {_CUT}",
    ("circuitfind.scores", "node"): (
        "node scores: 'circuitfind show' draws them, NodeScores.open(path).circuit(n) makes a circuit of them"
    ),
    ("circuitfind.sweep", None): "a sweep: 'circuitfind show' draws it, Sweep.open(path) reads it",
}


OPENED = "give a result's .json or .safetensors, EAP-IG's .json or .pt, or ACDC's .pth or .pkl"


# -------------------------------------------------------------------- any file
def check_file(path: str | PathLike[str]) -> None:
    """Raise FileError if there is no such file, or if it is a folder."""
    if Path(path).is_dir():
        raise FileError(f"{path}: this is a folder: name a file in it")
    if not Path(path).exists():
        raise FileError(f"{path}: no such file")


def read_bytes(path: str | PathLike[str]) -> bytes:
    """Return the content of a file; raise FileError if it is missing or cannot be read."""
    check_file(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from None


def write_bytes(path: str | PathLike[str], content: bytes) -> Path:
    """Write a file atomically, create its folder if needed, and return the path. Of several processes one writes."""
    return write_own(path, content) if processes.first() else Path(path)


def write_own(path: str | PathLike[str], content: bytes) -> Path:
    """Do what `write_bytes` does in every process, for files of which each process has its own."""
    path = Path(path)
    # A plain open, not tempfile: the file gets the permissions that the user's umask gives.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}") from None
    return path


def write_text(path: str | PathLike[str], text: str) -> Path:
    """Write text as UTF-8 with `write_bytes`; line ends are kept."""
    if why := no_character(text):
        raise FileError(f"{path}: {why}")
    return write_bytes(path, text.encode("utf-8"))


@contextmanager
def held(folder: str | PathLike[str], by: str) -> Iterator[None]:
    """Hold a folder inside this context: other processes that try to hold it get a FileError that names `by`.

    The folder is held by a lock on a file in it. The lock ends with its process, so a killed process holds nothing.
    """
    path = Path(folder, LOCK)
    file = _locked(path) if processes.first() else None
    if file is None:
        yield
        return
    try:
        with suppress(OSError):  # a full disk
            os.truncate(file, 0)
            os.write(file, f"process {os.getpid()} on {gethostname()} ({by})".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _locked(path: Path) -> int | None:
    """Return the descriptor of the locked file; None if the system cannot lock or create it."""
    while fcntl is not None:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                return file
            os.close(file)  # its process has just ended and removed the file: try again
        except BlockingIOError:
            who = os.read(file, 10_000).decode() or "another process"
            os.close(file)
            raise FileError(f"{path.parent}: {who} writes there now: wait for it, or name another folder") from None
        except OSError:
            break
    return None


# -------------------------------------------------------------------- JSON
def plain(value: Any) -> Any:
    """Convert a value for JSON: NaN and infinity become None, tuples and arrays lists, unknown types text."""
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return plain(value.tolist())
    return str(value)


def numbers(values: Any) -> np.ndarray:
    """Return nested lists of numbers as a float64 array; None becomes NaN."""
    return np.array(values, dtype=np.float64)


def json_object(path: str | PathLike[str]) -> dict[str, Any]:
    """Return the JSON object that a file holds; raise FileError if it holds none. NaN and Infinity are refused."""
    text = read_bytes(path)
    try:
        content = json.loads(text.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 are both ValueErrors
        if found := _tensors(path):
            raise FileError(f"{path}: holds {found}") from None
        said = "this is no text file" if isinstance(error, UnicodeDecodeError) else str(error)
        if Path(path).suffix.lower() != ".json":
            kind = said if isinstance(error, UnicodeDecodeError) else "this is another kind of file"
            said = f"{kind}: {OPENED}"
        raise FileError(f"{path}: not JSON: {said}") from None
    if not isinstance(content, dict):
        raise FileError(f"{path}: a JSON {type(content).__name__}, not a result of circuitfind")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number in JSON")


def _tensors(path: str | PathLike[str]) -> str:
    """Say what a safetensors file holds; "" for other files."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError):
        return ""
    named = header.get("format", ""), header.get("level")
    return TENSORS.get(named, "tensors (safetensors), not a result of circuitfind")


# -------------------------------------------------------------------- results
def write(path: str | PathLike[str], format: str, content: Mapping[str, Any]) -> Path:
    """Write a result as JSON with its format's name, and return the path."""
    if Path(path).suffix.lower() != ".json":
        raise FileError(f"{path}: this result is saved as .json: give a name that ends in .json")
    whole = plain({"format": format, "version": VERSION, **content})
    return write_text(path, json.dumps(whole, ensure_ascii=False, allow_nan=False) + "\n")


def read(path: str | PathLike[str], format: str, old_keys: Iterable[str] = ()) -> dict[str, Any]:
    """Return the JSON object of a file of this format; raise FileError for other formats and newer versions.

    old_keys: the keys by which to recognise old files, which do not name their format.
    """
    content = json_object(path)
    if "format" not in content and old_keys and content.keys() >= set(old_keys):
        return content
    if content.get("format") != format:
        found = f"format '{content['format']}'" if "format" in content else 'no "format" key'
        raise FileError(f"{path}: holds {found}, expected '{format}'")
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        versions = f"version {version} of {format}, this one reads {VERSION}"
        raise FileError(f"{path}: written by a newer circuitfind ({versions}): upgrade circuitfind")
    if str(version) != str(VERSION):  # older comparisons wrote it as text
        raise FileError(f"{path}: version {version!r} of {format} is unknown, this circuitfind reads {VERSION}")
    return content


@contextmanager
def reading(path: str | PathLike[str]) -> Iterator[None]:
    """Inside this context, turn errors about a file's content into a FileError that names the file."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, ScoreError) as error:
        raise FileError(f"{path}: cannot be read ({type(error).__name__}: {error}): write it again") from None
