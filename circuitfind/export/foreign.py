"""Reads circuits and scores from the files of other tools: the EAP-IG library (and MIB), ACDC, auto-circuit.

1. The content tells the format: JSON with `cfg`, `nodes` and `edges`, or plain data (`pickled.py`) in a `.pt`, `.pth`
   or `.pkl` file.
2. If an EAP-IG file's scores are the *change* of the metric when the edge is ablated, read it with `sign="change"`,
   which negates them.
3. All these files have a key and a value per query head. They are converted to the graph of a grouped-query model if
   one is given: an edge into a shared head is in the circuit if it is for any query head of the group, and its score is
   the sum over the group, because the gradient at a shared key or value is the sum of the gradients at its copies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np

from circuitfind.errors import FileError
from circuitfind.export import acdc_files, auto_circuit, pickled
from circuitfind.export.eap_ig import PARTS, RECORD, Foreign, columns, from_json, from_pt
from circuitfind.export.files import read_bytes
from circuitfind.graph import Graph
from circuitfind.record import Record

Sign = Literal["effect", "change"]


def read(path: str | PathLike[str], sign: str = "effect", graph: Graph | None = None) -> Foreign | None:
    """Read a file of another tool; return None if it is missing or of another kind.

    Args:
        sign: what an EAP-IG file's scores are: "effect" (positive = keep), or "change" of the metric on ablation.
        graph: the model's graph; needed for grouped-query models, because the files do not describe groups.

    Raises:
        FileError: the file is damaged, or `sign` or `graph` do not fit it.
    """
    if sign not in ("effect", "change"):
        raise FileError(f"sign='{sign}' is unknown: use 'effect' (positive = keep) or 'change' (of the metric)")
    found = _parse(Path(path), graph)
    if found is None:
        if sign != "effect" and Path(path).is_file():
            raise FileError(f"{path}: sign='{sign}' is for EAP-IG's files, and this is not one")
        return None
    form, raw = found
    with _named(path):
        content = _over(graph, form(raw))
    if sign == "change" and content.record != RECORD:
        raise FileError(f"{path}: sign='{sign}' is for EAP-IG's files, and this is one of {content.record.method}")
    return content.negated() if sign == "change" else content


def read_scores(
    path: str | PathLike[str], level: str, sign: str = "effect", graph: Graph | None = None
) -> tuple[Graph, np.ndarray, Record] | None:
    """Return the graph, the "edge" or "node" scores and the record of a file that `read` can read; else None.

    Raises:
        FileError: the file has no scores of this level, or some are not numbers.
    """
    content = read(path, sign, graph)
    if content is None:
        return None
    values = content.scores if level == "edge" else content.node_scores
    if values is None:
        raise FileError(f"{path}: holds no {level} scores")
    missing = np.isnan(values)
    if missing.any():
        name = content.graph.names(missing)[0] if level == "edge" else content.graph.writer_names[missing.argmax()]
        raise FileError(f"{path}: '{name}' has no score that is a number ({missing.sum()} of {values.size} have none)")
    return content.graph, values, content.record


def read_several(path: str | PathLike[str]) -> dict[str, tuple[Graph, np.ndarray, Record]]:
    """Return all sets of scores in a cache of auto-circuit by their names; an empty dictionary for other files."""
    raw: Any = pickled.load(path)
    with _named(path):
        found = {name: auto_circuit.read(one) for name, one in auto_circuit.sets(raw)} if auto_circuit.fits(raw) else {}
    return {name: (one.graph, one.scores, one.record) for name, one in found.items() if one.scores is not None}


@contextmanager
def _named(path: str | PathLike[str]) -> Iterator[None]:
    """Name the file in errors raised inside. Another tool wrote it, so any part can have any type."""
    try:
        yield
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    except (AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise FileError(f"{path}: damaged, or of another version of its tool: {error}") from None


def _parse(path: Path, graph: Graph | None) -> tuple[Callable[[Any], Foreign], Any] | None:
    """Return the function that reads this format, and its argument; None for files of another kind."""
    if not path.is_file():
        return None
    if path.suffix.lower() in pickled.ENDINGS:
        raw = pickled.load(path)
        if acdc_files.fits(raw):
            return lambda raw: acdc_files.read(raw, None if graph is None else graph.ungrouped()), raw
        return (_one, raw) if auto_circuit.fits(raw) else (from_pt, raw)
    text = read_bytes(path)
    try:
        raw = json.loads(text) if text[:1] == b"{" and b'"cfg"' in text else {}
    except (ValueError, RecursionError):  # not JSON: circuitfind's own reader reports that
        return None
    return (from_json, raw) if raw.keys() >= PARTS else None


def _one(raw: Any) -> Foreign:
    """Return the scores of a cache with one set; raise FileError if there are several."""
    found = dict(auto_circuit.sets(raw))
    if len(found) > 1:
        raise FileError(f"holds {len(found)} sets of scores, which cf.open gives by name: {'; '.join(found)}")
    return auto_circuit.read(next(iter(found.values())))


# -------------------------------------------------------------------- grouped-query models
def _over(graph: Graph | None, content: Foreign) -> Foreign:
    """Convert the content to the given graph, which may have shared key/value heads."""
    held = content.graph
    if graph is not None and held.d_model == 0:  # unknown to the file
        held = replace(held, d_model=graph.d_model)
        content = content._replace(graph=held)
    if graph is None or graph == held:
        return content
    if graph.ungrouped() != held:
        said, asked = (f"{g} (d_model {g.d_model})" for g in (held, graph))
        raise FileError(f"this file is for {said}, the given graph has {asked}")
    scores = None if content.scores is None else regrouped(graph, content.scores)
    return content._replace(graph=graph, mask=regrouped(graph, content.mask), scores=scores)


def regrouped(graph: Graph, values: np.ndarray) -> np.ndarray:
    """Convert `[writers, readers]` of `graph.ungrouped()` to those of `graph`.

    Copies of a shared head are joined: booleans by "any", numbers by their sum.
    """
    narrow = np.zeros((graph.n_readers, graph.n_writers), dtype=values.dtype)
    (np.logical_or if values.dtype == bool else np.add).at(narrow, columns(graph), values.T)
    return np.ascontiguousarray(narrow.T)
