"""Reference circuits, with which others are compared: edges of a graph, and heads by their function.

1. A reference comes from this package (`circuitfind.references.published`), from any file that `Circuit.open` reads, or
   from a file of this form, in which only `graph` is required:

    {"graph": {"n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "d_model": 768, "parallel": false},
     "heads": {"name mover": ["a9.h9", ...], ...}, "edges": ["a9.h9->logits", ...],
     "name": "...", "model": "...", "source": "...", "attention_only": false}

2. ACDC's graph also has edges inside a head, from its q, k and v inputs to its output, which published counts include.
   They are not edges here, but `direct` counts them: one for each q, k or v input that an edge of the circuit feeds.
3. The graph of a model without MLPs has MLP nodes here; with `attention_only` they have no edges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from circuitfind.circuit import Circuit
from circuitfind.errors import FileError, NoFile
from circuitfind.export.circuit_file import GraphPart
from circuitfind.graph import Graph
from circuitfind.record import Record


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    graph: GraphPart
    heads: dict[str, list[str]] = {}
    edges: list[str] = []
    name: str = ""
    model: str = ""
    source: str = ""
    attention_only: bool = False


@dataclass(frozen=True, eq=False)
class Reference(NoFile):
    """A circuit with which others are compared.

    Attributes:
        mask: `[writers, readers]` bool, the circuit's edges; all False if only heads are known.
        heads: names of heads by class (function), such as `{"name mover": ("a9.h9", ...)}`.
        model: Hugging Face id of the circuit's model.
        source: where the circuit is published.
        attention_only: whether the model has no MLPs.
    """

    name: str
    graph: Graph
    mask: np.ndarray
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    model: str = ""
    source: str = ""
    attention_only: bool = False

    def __post_init__(self) -> None:
        all_heads = {name for name in self.graph.writer_names if name.startswith("a")}
        for kind, names in self.heads.items():
            if strange := [name for name in names if name not in all_heads]:
                raise FileError(f"reference '{self.name}', {kind}: no head '{strange[0]}' in a model of {self.graph}")
        if self.mask.shape != self.graph.real.shape or (self.mask & ~self.possible).any():
            raise FileError(f"reference '{self.name}': its mask has edges that a model of {self.graph} does not have")

    @property
    def possible(self) -> np.ndarray:
        """The edges that the model has, `[writers, readers]` bool."""
        real = self.graph.real.copy()
        for layer in range(self.graph.n_layers if self.attention_only else 0):
            real[self.graph.mlp(layer)] = False
            real[:, self.graph.readers(layer, "mlp")] = False
        return real

    @property
    def circuit(self) -> Circuit:
        """The edges as a circuit."""
        record = Record(self.model, self.name, method="published", settings={"source": self.source}, versions={})
        return Circuit(self.graph, self.mask, record=record)

    @property
    def head_mask(self) -> np.ndarray:
        """Heads in any class, and heads in the circuit, `[writers]` bool."""
        found = self.circuit.node_mask[:-1].copy()
        found[[0, *map(self.graph.mlp, range(self.graph.n_layers))]] = False
        found[[self.graph.writer(name) for names in self.heads.values() for name in names]] = True
        return found

    @property
    def n_edges(self) -> int:
        return int(self.mask.sum())

    @property
    def direct(self) -> int:
        """Number of edges inside heads, which only ACDC's graph has: one for each q, k or v input with an edge."""
        columns = np.concatenate([np.r_[self.graph.readers(layer, "qkv")] for layer in range(self.graph.n_layers)])
        return int(self.mask[:, columns].any(axis=0).sum())

    def __repr__(self) -> str:
        return f"Reference({self.name}: {self.n_edges} edges, {int(self.head_mask.sum())} heads; {self.graph})"

    @classmethod
    def from_file(cls, path: str | PathLike[str], graph: Graph | None = None) -> Reference:
        """Read a reference file, a circuit.json, or a file of the EAP-IG library.

        Args:
            graph: needed for an EAP-IG file of a grouped-query model (see `Circuit.open`).

        Raises:
            FileError: the file is missing, has another format, or names nodes that its graph does not have.
        """
        path = Path(path)
        raw = _reference_json(path)
        if raw is None:
            circuit = Circuit.open(path, graph=graph)
            return cls(path.stem, circuit.graph, circuit.mask, model=circuit.record.model, source=str(path))
        try:
            given = _File.model_validate(raw)
            found = Graph(**given.graph.model_dump())
            heads = {kind: tuple(names) for kind, names in given.heads.items()}
            origin = given.model, given.source or str(path)
            return cls(given.name or path.stem, found, found.mask(given.edges), heads, *origin, given.attention_only)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            raise FileError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except FileError as error:
            raise FileError(f"{path}: {error}") from None


def _reference_json(path: Path) -> dict[str, Any] | None:
    """Return the file's JSON if it is a reference; else None, and `Circuit.open` reads it."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return raw if isinstance(raw, dict) and "graph" in raw and "format" not in raw else None
