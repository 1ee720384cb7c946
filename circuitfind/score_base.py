"""Shared code of edge and node scores: checks, the file format, and the ranking of edges by nodes.

The file is safetensors with one array `values`; format, level, graph and record are in the header as JSON. Node scores
by position also have the labels of the positions (`positions`, missing in older files).

Node methods are compared with edge methods by ranking edges by their nodes (`edge_values`):

1. A circuit of nodes has every edge between them. So an edge is added with the weaker of its two ends, and its score is
   the smaller of their scores. `input` and `logits` are always in. A shared key/value head has the score of the best
   head that it serves.
2. Of edges with the same weaker end, the one with the stronger other end comes first; then the graph's order decides.
3. One number per edge encodes 1 and 2: equal scores are increased by single steps of float32 (at most as many as there
   are nodes, a part in 10^4), so a value is the weaker end's score to three digits, and files keep the order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from circuitfind.errors import FileError, ScoreError
from circuitfind.export import files, table
from circuitfind.graph import Graph
from circuitfind.record import Record
from circuitfind.result import Result

FORMAT, VERSION = "circuitfind.scores", "1"
SIGN_BIT = 0x80000000


class ScoreTable(Result):
    """Base of scores: one number per edge or node. `LEVEL`: "edge", "node" or "edge by place"."""

    FORMAT: ClassVar[str] = FORMAT
    LEVEL: ClassVar[str]
    graph: Graph
    values: np.ndarray
    record: Record
    positions: tuple[str, ...] | None = None  # only nodes are scored by position

    @property
    def unit(self) -> str:
        """The word for a number: "effect", or "score" if it is not an effect."""
        return "effect" if self.record.is_effect else "score"

    def _check_array(self) -> None:
        values: Any = self.values
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
            what = f"an array of {values.dtype}" if isinstance(values, np.ndarray) else f"a {type(values).__name__}"
            raise ScoreError(f"scores are {what}: give a numpy array of numbers, np.asarray(scores, dtype=np.float32)")

    def _check_finite(self, bad: Sequence[str]) -> None:
        """Raise a `ScoreError` if `bad`, the edges or nodes whose values are NaN or infinite, is not empty."""
        if bad:
            what = "NaN" if np.isnan(self.values).any() else "infinite"
            raise ScoreError(
                f"the score of {bad[0]} is {what} ({len(bad)} of {self.values.size} are): look for inf or NaN in the"
                " model's logits (half precision overflows first: load with dtype='float32') or in a metric of your own"
            )

    def _save(self, path: str | PathLike[str]) -> Path:
        if table.fits(path):
            return table.write(path, self.columns())
        header = {"format": FORMAT, "version": VERSION, "level": self.LEVEL}
        header |= {} if self.positions is None else {"positions": json.dumps(self.positions)}
        header |= {"graph": json.dumps(self.graph.as_dict()), "record": json.dumps(files.plain(asdict(self.record)))}
        values = np.ascontiguousarray(self.values, dtype=np.float32)
        return files.write_bytes(path, save({"values": values}, metadata=header))


def open_scores(path: str | PathLike[str], level: str) -> tuple[Graph, np.ndarray, Record, tuple[str, ...] | None]:
    """Return the graph, values, record and labels of the positions of a file that `save` wrote."""
    files.check_file(path)
    try:
        with safe_open(str(path), framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT or header.get("level") != level:
                kind = f"{header.get('level')} scores" if header.get("format") == FORMAT else "no scores of circuitfind"
                raise FileError(f"{path}: expected {level} scores, this file holds {kind}")
            if header.get("version") != VERSION:
                versions = f"version {header.get('version')} of the format, this circuitfind reads {VERSION}"
                raise FileError(f"{path}: {versions}: upgrade circuitfind, or save the scores again")
            values = file.get_tensor("values")
    except SafetensorError as error:
        raise FileError(f"{path}: not a scores file (safetensors written by Scores.save): {error}") from None
    try:
        graph, record = Graph(**json.loads(header["graph"])), Record(**json.loads(header["record"]))
        positions = json.loads(header.get("positions", "null"))
        return graph, values, record, None if positions is None else tuple(map(str, positions))
    except KeyError as error:
        raise FileError(f"{path}: its header has no {error}: save the scores again with Scores.save") from None
    except (TypeError, ValueError, FileError) as error:  # no JSON object, or not of these fields
        raise FileError(f"{path}: its header cannot be read: {error}") from None


# -------------------------------------------------------------------- nodes as edges
def edge_values(graph: Graph, key: np.ndarray) -> np.ndarray:
    """Return float32 values `[writers, readers]` that rank edges as described above, zero where there is no edge.
    `key`: `[writers]`, the values that nodes are ranked by, higher = better."""
    nodes = np.append(key, np.inf).astype(np.float32)
    above_all = np.nextafter(nodes[1:-1].max(), np.float32(np.inf))
    nodes[0] = np.inf
    ends = nodes[:-1, None], np.where(graph.serves, nodes, -np.inf).max(axis=1).astype(np.float32)
    weaker, stronger = (combine(*ends)[graph.real] for combine in (np.minimum, np.maximum))
    weaker = np.minimum(weaker, above_all)
    order = np.lexsort((stronger, weaker))
    weaker, stronger = weaker[order], stronger[order]
    rank = np.cumsum(np.append(0, (np.diff(weaker) != 0) | (stronger[1:] != stronger[:-1])))
    values, matrix = np.zeros(len(order), dtype=np.float32), np.zeros(graph.real.shape, dtype=np.float32)
    # each distinct pair of ends at its weaker end's float, or at the next one that is free
    values[order] = _floats(np.maximum.accumulate(_steps(weaker) - rank) + rank)
    matrix[graph.real] = values
    return matrix


def _steps(values: np.ndarray) -> np.ndarray:
    """Map float32 to integers in the same order, so that adjacent floats differ by 1."""
    bits = values.view(np.uint32).astype(np.int64)
    return np.where(bits < SIGN_BIT, bits, SIGN_BIT - bits)


def _floats(steps: np.ndarray) -> np.ndarray:
    """The inverse of `_steps`."""
    bits = np.where(steps >= 0, steps, SIGN_BIT - steps)
    return np.asarray(bits.astype(np.uint32).view(np.float32))
