"""A circuit: a set of edges of a graph, with the estimated and exact effects of each if they are known.

1. A circuit is a `[writers, readers]` boolean mask over a `Graph`; names are made only when asked for.
2. `connected` keeps the edges on a path from `input` to `logits`, in one pass forwards and one backwards. A head is
   reached if any of its q, k or v readers is. An edge into a shared key/value head is used if any query head of the
   group is.
3. Files and pictures are written by `circuitfind.export` from plain data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitfind.errors import FileError
from circuitfind.export import circuit_file, eap_ig, foreign, graphs, html, hub, neuronpedia, picture, table
from circuitfind.export.eap_ig import Foreign
from circuitfind.export.graphs import EdgeRow
from circuitfind.graph import Graph
from circuitfind.record import Record
from circuitfind.result import Result

if TYPE_CHECKING:
    import networkx


def paths(graph: Graph, mask: np.ndarray, feeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nodes that the edges of `mask` reach from `input`, `[nodes]` bool, and the readers from which they
    reach `logits`, `[readers]` bool.

    `mask`: `[writers, readers]` bool; `feeds`: `[readers, nodes]` bool, the nodes that each reader feeds.
    """
    reached, useful, read = (np.zeros(size, dtype=bool) for size in (graph.n_nodes, graph.n_nodes, graph.n_readers))
    reached[0] = useful[-1] = True
    for nodes, readers in graph.steps:
        reached[nodes] = (mask[:, readers] & reached[:-1, None]).any(axis=0) @ feeds[readers, nodes]
    for nodes, readers in reversed(graph.steps):
        if nodes.start < graph.n_writers:
            useful[nodes] = (mask[nodes] & read).any(axis=1)
        read[readers] = feeds[readers, nodes] @ useful[nodes]
    return reached, read


def connected(graph: Graph, mask: np.ndarray) -> np.ndarray:
    """Return those edges of `mask`, `[writers, readers]` bool, that are on a path from `input` to `logits`."""
    reached, useful = paths(graph, mask, graph.serves)
    return np.asarray(mask & reached[:-1, None] & useful)


MOST_DRAWN = 150  # edges up to which a notebook shows a picture


@dataclass(frozen=True, eq=False, repr=False)
class Circuit(Result):
    """Edges of a graph, with estimated and exact effects if they are known.

    Attributes:
        mask: `[writers, readers]` bool, true inside the circuit.
        estimates: `[writers, readers]` float32 attribution scores (units of the metric, positive = supports), or None.
        exact: `[writers, readers]` float32 measured effects, NaN where not measured, or None.
        facts: measurements of the circuit as a whole (faithfulness, intervals, ...), JSON values only.
        groups: your own names for groups of nodes, such as "name movers"; see `with_group`.
    """

    graph: Graph
    mask: np.ndarray
    estimates: np.ndarray | None = None
    exact: np.ndarray | None = None
    record: Record = field(default_factory=Record)
    facts: dict[str, Any] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = [self.graph.n_writers, self.graph.n_readers]
        for name in ("mask", "estimates", "exact"):
            value = getattr(self, name)
            if not isinstance(value, np.ndarray) and (value is not None or name == "mask"):
                raise FileError(f"circuit {name} is a {type(value).__name__}: give a numpy array {shape}")
            if value is not None and list(value.shape) != shape:
                raise FileError(f"circuit {name} has shape {list(value.shape)}, its graph needs {shape}")
        if self.mask.dtype != bool:
            raise FileError(f"circuit mask holds {self.mask.dtype}: give booleans, true inside the circuit")
        if (self.mask & ~self.graph.real).any():
            raise FileError("the circuit's mask holds cells that are not edges (a writer computed after its reader)")

    # ---------------------------------------------------------------- making
    @classmethod
    def of(cls, graph: Graph, edges: Iterable[str], **known: Any) -> Circuit:
        """Return the circuit of the named edges; `known`: further fields."""
        return cls(graph, graph.mask(edges), **known)

    @classmethod
    def full(cls, graph: Graph) -> Circuit:
        """Return the circuit of all edges."""
        return cls(graph, graph.real.copy())

    @classmethod
    def empty(cls, graph: Graph) -> Circuit:
        """Return the circuit without edges, whose faithfulness is 0."""
        return cls(graph, np.zeros_like(graph.real))

    def with_mask(self, mask: np.ndarray) -> Circuit:
        """Return a circuit of other edges with the same effects, record and groups, but without `facts`, which are of
        the whole circuit."""
        return replace(self, mask=mask, facts={})

    def with_group(self, name: str, nodes: Iterable[str]) -> Circuit:
        """Return the circuit with a name for a group of nodes, which is saved and drawn; without nodes the name is
        removed. Raises a `FileError` if the graph has no such node."""
        members = tuple(dict.fromkeys([nodes] if isinstance(nodes, str) else nodes))
        for node in members:
            if node not in self.graph.node_names:
                raise FileError(f"group '{name}': {self.graph.not_named('node', node, self.graph.node_names)}")
        others = {other: inside for other, inside in self.groups.items() if other != name}
        return replace(self, groups=others | ({name: members} if members else {}))

    def connected(self) -> Circuit:
        """Return the circuit of the edges on a path from `input` to `logits`."""
        return self.with_mask(connected(self.graph, self.mask))

    def complement(self) -> Circuit:
        """Return the circuit of all other edges."""
        return self.with_mask(self.graph.real & ~self.mask)

    # ---------------------------------------------------------------- reading
    @property
    def edges(self) -> list[str]:
        """Edge names, reader by reader in the graph's order."""
        return self.graph.names(self.mask)

    @property
    def node_mask(self) -> np.ndarray:
        """`[nodes]` bool: writers with an edge out, and nodes (logits too) with an edge in."""
        read = np.asarray(self.mask.any(axis=0))
        nodes = np.asarray((self.graph.serves & read[:, None]).any(axis=0))
        if self.graph.group > 1:  # a shared key/value head feeds its whole group: count the heads that are used
            own = [r for r in np.flatnonzero(read).tolist() if self.graph.reader(r).kind not in ("k", "v")]
            nodes &= self.graph.serves[own].any(axis=0) | np.append(self.mask.any(axis=1), False)
        nodes[:-1] |= self.mask.any(axis=1)
        return nodes

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that an edge of the circuit touches, in the graph's order."""
        return [self.graph.node_names[i] for i in np.flatnonzero(self.node_mask)]

    def rows(self) -> list[EdgeRow]:
        """Return one row an edge, with indices and effects; `columns` and `to_frame` give names."""
        readers, writers = np.nonzero(self.mask.T)
        effects = (np.full(self.mask.shape, np.nan) if one is None else one for one in (self.estimates, self.exact))
        known = ([None if value != value else value for value in one.T[self.mask.T].tolist()] for one in effects)  # NaN
        return list(map(EdgeRow, writers.tolist(), readers.tolist(), *known))

    def columns(self) -> dict[str, list[Any]]:
        """Return `edge`, `writer` and `reader` names, `estimate` and `exact` (None if unknown), as columns by name."""
        rows, names = self.rows(), self.edges
        return {
            "edge": names,
            "writer": [self.graph.writer_names[row.writer] for row in rows],
            "reader": [self.graph.reader_names[row.reader] for row in rows],
            "estimate": [row.estimate for row in rows],
            "exact": [row.exact for row in rows],
        }

    def to_dict(self) -> dict[str, Any]:
        """Return graph, edge names and record as JSON values, for the files of results; `save` also writes effects,
        facts and groups."""
        return {"graph": self.graph.as_dict(), "edges": self.edges, "record": asdict(self.record)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Circuit:
        """Rebuild a circuit from what `to_dict` returned."""
        return cls.of(Graph(**content["graph"]), content["edges"], record=Record(**content["record"]))

    def __len__(self) -> int:
        return int(self.mask.sum())

    def __contains__(self, edge: str) -> bool:
        return bool(self.mask[self.graph.edge(edge)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Circuit) and self.graph == other.graph and np.array_equal(self.mask, other.mask)

    __hash__ = None  # type: ignore[assignment]  # mutable arrays inside

    def __repr__(self) -> str:
        return f"Circuit({len(self)} of {self.graph.n_edges} edges, {int(self.node_mask.sum())} nodes; {self.graph})"

    def _repr_html_(self) -> str:
        columns, rows = self.columns(), self.rows()
        order = sorted(range(len(rows)), key=lambda at: -abs(rows[at].effect or 0))
        table = html.table(list(columns), ([column[at] for column in columns.values()] for at in order), most=20)
        svg = picture.svg(self.to_dot()) if 0 < len(self) <= MOST_DRAWN else None
        return html.block(repr(self), *([html.picture(svg)] if svg else []), table)

    # ---------------------------------------------------------------- set operations
    def __or__(self, other: Circuit) -> Circuit:
        return self.with_mask(self.mask | self._same_graph(other).mask)

    def __and__(self, other: Circuit) -> Circuit:
        return self.with_mask(self.mask & self._same_graph(other).mask)

    def __sub__(self, other: Circuit) -> Circuit:
        return self.with_mask(self.mask & ~self._same_graph(other).mask)

    def jaccard(self, other: Circuit) -> float:
        """Return the number of shared edges divided by that of edges in either; 1 for two empty circuits."""
        union = (self.mask | self._same_graph(other).mask).sum()
        return float((self.mask & other.mask).sum() / union) if union else 1.0

    def _same_graph(self, other: Circuit) -> Circuit:
        if not isinstance(other, Circuit):
            remedy = "make one of edge names with Circuit.of(circuit.graph, names)"
            raise FileError(f"a circuit goes with another circuit, not with a {type(other).__name__}: {remedy}")
        if self.graph != other.graph:
            raise FileError(f"the two circuits lie in different graphs: {self.graph} / {other.graph}")
        return other

    # ---------------------------------------------------------------- files and pictures
    def save(self, path: str | PathLike[str], format: eap_ig.Format = "circuitfind") -> Path:  # type: ignore[override]
        """Write `circuit.json`, or a file for another tool.

        The name's ending selects the file: `.neuronpedia.json` is a graph for Neuronpedia's page
        (`circuitfind.export.neuronpedia`), `.graphml` a graph for Gephi, Cytoscape or yEd; `.csv` and `.parquet` are
        tables of the edges.

        Args:
            format: "circuitfind" (schema: `circuitfind.export.circuit_file`), or "eap-ig": the EAP-IG library's file,
                `.json` or `.pt`, which MIB takes. Its scores are the estimates (0 where unknown).
                Without estimates, and for grouped-query models, they are 1 inside the circuit and 0 outside.

        Raises:
            FileError: the format or ending is unknown, or the file cannot be written.
        """
        name = str(path).lower()
        if name.endswith(neuronpedia.ENDING):
            return neuronpedia.write(path, self.graph, self.rows(), self.nodes, self.record, self.facts, self.groups)
        if name.endswith(".graphml"):
            return self.to_graphml(path)
        if table.fits(path):
            return table.write(path, self.columns())
        if eap_ig.check_format(format) == "eap-ig":
            scores = None if self.graph.group > 1 else self.estimates
            return eap_ig.write(path, Foreign(self.graph, self.mask, scores), self.node_mask)
        facts = {"facts": self.facts} | ({"groups": self.groups} if self.groups else {})
        return circuit_file.write(path, self.graph, self.rows(), self.nodes, self.record, **facts)

    @classmethod
    def open(cls, path: str | PathLike[str], sign: foreign.Sign = "effect", graph: Graph | None = None) -> Circuit:
        """Read `circuit.json`, or a circuit of the EAP-IG library (`.json`, `.pt`) or of ACDC (`.pth`, `.pkl`); needs
        no model.

        Args:
            sign: for an EAP-IG file: "effect", or "change" if its scores are the change of the metric when an edge is
                ablated.
            graph: the model's graph, for a file of another tool. It is needed if key/value heads are grouped (an edge
                into a shared head is in if it is in for any of its query heads), and if the file does not say how many
                heads the model has (ACDC's).

        Raises:
            FileError: the file is missing, of another kind or version, or names edges that its graph lacks.
        """
        if (found := foreign.read(path, sign, graph)) is not None:
            return cls(found.graph, found.mask, estimates=found.scores, record=found.record)
        content = circuit_file.read(path)
        graph = content.graph
        mask = np.zeros((graph.n_writers, graph.n_readers), dtype=bool)
        effects = np.full((2, *mask.shape), np.nan, dtype=np.float32)
        if content.rows:
            writers, readers, *known = zip(*content.rows, strict=True)
            mask[writers, readers] = True
            effects[:, writers, readers] = np.array(known, dtype=np.float32)  # None: NaN
        estimates, exact = (None if np.isnan(values).all() else values for values in effects)
        return cls(graph, mask, estimates, exact, content.record, content.facts, content.groups)

    def to_networkx(self) -> networkx.MultiDiGraph:
        """Return a networkx graph of nodes and edges with attributes; q, k and v of a head are parallel edges."""
        about = graphs.described(self.graph, self.record, self.facts)
        return graphs.to_networkx(self.graph, self.rows(), self.nodes, about)

    def to_graphml(self, path: str | PathLike[str]) -> Path:
        """Write GraphML, which Gephi, Cytoscape and yEd read."""
        return graphs.write_graphml(path, self.to_networkx())

    def push_to_hub(
        self, repo: str, *, private: bool | None = None, message: str = "Add a circuit", token: str | None = None
    ) -> str:
        """Upload `circuit.json` and a card made from the record to a dataset repository of the Hugging Face hub.

        Args:
            repo: such as "me/ioi-smollm2"; it is created if it does not exist.

        Returns:
            The URL of the commit.

        Raises:
            FileError: the hub refuses, or cannot be reached.
        """
        best = sorted(self.rows(), key=lambda row: -abs(row.effect or 0))[: hub.STRONGEST]
        strongest = [(self.graph.edge_name(row.writer, row.reader), row.estimate, row.exact) for row in best]
        card = hub.card(repo, repr(self), self.record, self.facts, strongest)
        with TemporaryDirectory() as folder:
            return hub.push(repo, self.save(Path(folder, hub.FILE)), card, message, private, token)

    @classmethod
    def from_hub(cls, repo: str, *, revision: str | None = None, token: str | None = None) -> Circuit:
        """Return the circuit that `push_to_hub` uploaded to a dataset repository of the Hugging Face hub."""
        return cls.open(hub.pull(repo, revision, token))

    def to_dot(self, *, truth: Circuit | None = None, **style: Any) -> str:
        """Return Graphviz source; see `circuitfind.export.picture.source` for the style options. Above 400 edges it is
        folded: one arrow for all edges between two layers (`fold=False`: every edge; the page of `report` shows them,
        too).

        Args:
            truth: a known true circuit to compare with: its edges that are missing here are drawn red and dashed, edges
                that are not in it grey.
        """
        if truth is None:
            return picture.source(self.graph, self.rows(), self.nodes, groups=self.groups, **style)
        both = self | truth
        marks = dict.fromkeys(both.edges, picture.FOUND)
        marks |= dict.fromkeys((truth - self).edges, picture.MISSING)
        marks |= dict.fromkeys((self - truth).edges, picture.SPURIOUS)
        return picture.source(self.graph, both.rows(), both.nodes, marks=marks, **style)

    def render(self, path: str | PathLike[str], **style: Any) -> Path:
        """Draw to `.svg`, `.png` or `.pdf` with Graphviz's `dot`; style as for `to_dot`. Raises a `FileError` if
        Graphviz is not installed or the ending is unknown."""
        return picture.render(path, self.to_dot(**style))

    def show(self, model: Any = None, task: Any = None, *, height: int = 820, **more: Any) -> Any:
        """Return the interactive page of the circuit for a notebook, which shows it if a cell ends in this call.

        Args:
            model, task, more: as for `report`; with a model, faithfulness is measured at several sizes and heads show
                their attention.
            height: of the frame, in pixels.
        """
        data = import_module("circuitfind.report.write").report_data(self, model, task, **more)
        return import_module("circuitfind.report.page").inline(data, height)

    def report(self, model: Any, task: Any, path: str | PathLike[str], **more: Any) -> Path:
        """Write the report page: the circuit measured on a task, at several sizes and with its heads' attention.

        Args:
            model, task: to measure the circuit with; if both are None, the page shows what the circuit itself holds.
            more: see `circuitfind.report.write.report_data`.
        """
        page: Path = import_module("circuitfind.report.write").write_report(path, self, model, task, **more)
        return page


def as_circuit(graph: Graph, edges: Circuit | Iterable[str] | Mapping[str, Any]) -> Circuit:
    """Return a circuit from a circuit (whose graph is checked), from edge names or from the name of one edge."""
    if isinstance(edges, Circuit):
        if edges.graph != graph:
            raise FileError(f"the circuit belongs to another model {graph.unlike(edges.graph)}")
        return edges
    return Circuit.of(graph, edges)
