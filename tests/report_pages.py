"""Report pages of made-up circuits, without a model: for the tests of the page and of the page in a browser."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from circuitfind.circuit import Circuit
from circuitfind.graph import Graph
from circuitfind.record import Record
from circuitfind.report.page import Attention, ReportData
from circuitfind.report.sizes import Size, cuts
from circuitfind.scores import Scores

SMALL = Graph(3, 4, 4, 16)
GROUPED = Graph(3, 4, 2, 16)
GPT2_SMALL = Graph(12, 12, 12, 768)
PARTS = {"query side": [["m0", 1.25], ["input", -0.5]], "key side": [["a0.h1", 0.75]], "pairs": [["m0 x a0.h1", 0.5]]}
WHY = {f"a{layer}.h{head}": {"said": "From 4 to 1", **PARTS} for layer in range(3) for head in range(4)}
TOKENS = ("When", " Mary", " and", " John", " met", ",", " Mary", " gave", "\n")


def random_scores(graph: Graph, seed: int = 0) -> Scores:
    """Effects of random sign whose magnitudes fall off steeply."""
    rng = np.random.default_rng(seed)
    values = rng.exponential(size=graph.real.shape) ** 2 * rng.choice([-1, 1, 1], size=graph.real.shape)
    return Scores(graph, np.where(graph.real, values, 0).astype(np.float32), Record(model="random"))


def connected_circuit(graph: Graph, n_edges: int, seed: int = 0) -> Circuit:
    """A connected circuit of at least so many edges, nine tenths of them measured, some with another sign."""
    scores, n = random_scores(graph, seed), n_edges
    while len(circuit := scores.top(n)) < n_edges:
        n += max(1, (n_edges - len(circuit)) // 2)
    rng = np.random.default_rng(seed + 1)
    exact = scores.values * rng.normal(1, 0.6, size=scores.values.shape)
    measured = circuit.mask & (rng.random(exact.shape) < 0.9)
    return replace(circuit, exact=np.where(measured, exact, np.nan).astype(np.float32))


def random_pattern(length: int, seed: int = 0) -> bytes:
    """Weights of a head that reads from left to right: each query's sum to 1, in bytes."""
    rng = np.random.default_rng(seed)
    rows = [rng.dirichlet(np.full(query + 1, 0.3)) for query in range(length)]
    return bytes(np.rint(np.concatenate(rows) * 255).astype(np.uint8))


def explored(circuit: Circuit, tokens: tuple[str, ...] = TOKENS, prompts: int = 2) -> ReportData:
    """A page with all that can be explored: every size measured, a pattern for every head."""
    cells = cuts(circuit)
    sizes = [Size(cut, i / len(cells), (i / len(cells) - 0.1, i / len(cells) + 0.1)) for i, cut in enumerate(cells)]
    exact = [(edge, float(value)) for edge, value in zip(circuit.edges, _exact(circuit), strict=True) if value == value]
    heads = {name: random_pattern(len(tokens), i) for i, name in enumerate(circuit.nodes) if ".h" in name}
    return ReportData(
        "A circuit",
        "random",
        {},
        circuit,
        sizes=sizes,
        effect_intervals={edge: (value - 0.25, value + 0.25) for edge, value in exact},
        attention=[Attention(f"prompt {i}", tokens, heads, {} if i else WHY) for i in range(prompts)],
    )


def _exact(circuit: Circuit) -> np.ndarray:
    """Exact effects in the order of `Circuit.edges`."""
    assert circuit.exact is not None
    return circuit.exact.T[circuit.mask.T]
