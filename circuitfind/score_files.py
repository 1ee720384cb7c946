"""The file of scores: safetensors with one array `values`; format, level, graph and record in the header as JSON.

Node scores by position also say what the positions are called (`positions`, which older files lack).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from circuitfind.errors import FileError
from circuitfind.export.files import check_file, plain, write_bytes
from circuitfind.graph import Graph
from circuitfind.record import Record

FORMAT = "circuitfind.scores"
VERSION = "1"


class StoredScores(NamedTuple):
    """What a file holds."""

    graph: Graph
    values: np.ndarray
    record: Record
    positions: tuple[str, ...] | None


def save_scores(
    path: str | PathLike[str],
    level: str,
    graph: Graph,
    values: np.ndarray,
    record: Record,
    positions: tuple[str, ...] | None = None,
) -> Path:
    """Writes scores of a level, "edge" or "node"; `positions`: what these are called, where scores go by position."""
    header = {"format": FORMAT, "version": VERSION, "level": level}
    header |= {} if positions is None else {"positions": json.dumps(positions)}
    header |= {"graph": json.dumps(plain(asdict(graph))), "record": json.dumps(plain(asdict(record)))}
    return write_bytes(path, save({"values": np.ascontiguousarray(values, dtype=np.float32)}, metadata=header))


def open_scores(path: str | PathLike[str], level: str) -> StoredScores:
    """Reads what `save_scores` wrote.

    Raises:
        FileError: there is no such file, or it holds no scores of this level and version.
    """
    check_file(path)
    try:
        with safe_open(str(path), framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT or header.get("level") != level:
                kind = f"{header.get('level')} scores" if header.get("format") == FORMAT else "no scores of circuitfind"
                raise FileError(f"{path}: expected {level} scores, this file holds {kind}")
            if header.get("version") != VERSION:
                raise FileError(
                    f"{path}: version {header.get('version')} of the format, this circuitfind reads {VERSION}:"
                    " upgrade circuitfind, or save the scores again"
                )
            values = file.get_tensor("values")
    except SafetensorError as error:
        raise FileError(f"{path}: not a scores file (safetensors written by Scores.save): {error}") from None
    try:
        graph, record = Graph(**json.loads(header["graph"])), Record(**json.loads(header["record"]))
        positions = json.loads(header.get("positions", "null"))
        return StoredScores(graph, values, record, None if positions is None else tuple(map(str, positions)))
    except KeyError as error:
        raise FileError(f"{path}: its header has no {error}: save the scores again with Scores.save") from None
    except (TypeError, ValueError, FileError) as error:  # no JSON object, or not of these fields
        raise FileError(f"{path}: its header cannot be read: {error}") from None
