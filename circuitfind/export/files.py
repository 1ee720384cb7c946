"""Files are there before they are read, and are written whole or not at all.

A file is written into a hidden neighbour first, which then takes the name.
"""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from circuitfind.errors import FileError


def check_file(path: str | PathLike[str]) -> None:
    """Refuses what is no file.

    Raises:
        FileError: there is nothing of this name, or it is a folder.
    """
    if Path(path).is_dir():
        raise FileError(f"{path}: this is a folder: name a file in it")
    if not Path(path).exists():
        raise FileError(f"{path}: no such file")


def write_bytes(path: str | PathLike[str], content: bytes) -> Path:
    """Writes `content`, making the parent folder; a reader never sees half a file.

    Raises:
        FileError: the place cannot be written to.
    """
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
    """`write_bytes` of UTF-8 text, line ends as they are."""
    return write_bytes(path, text.encode("utf-8"))
