"""The engine against numbers that the field's reference implementation computed on a fixed small model.

The files' scores are the change of the metric when an edge is corrupted: circuitfind's effect is their negative.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import as_matrix, off
from torch import Tensor
from transformers import AutoModelForCausalLM

from circuitfind.batch import Batch, Inputs
from circuitfind.engine.capture import capture
from circuitfind.engine.edge_effects import edge_effects
from circuitfind.engine.reader_gradients import capture_gradients
from circuitfind.engine.restart import Restart
from circuitfind.graph import Graph
from circuitfind.metrics import metric_of
from circuitfind.models.adapter import Adapter

pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def adapter(shared: Path, adapt: Callable) -> Adapter:
    return adapt(AutoModelForCausalLM.from_pretrained(shared / "conformance/gpt2-tiny", dtype=torch.float32).eval())


@pytest.fixture(scope="module")
def batch(shared: Path) -> Batch:
    content = json.loads((shared / "conformance/gpt2-tiny/data_n8.json").read_text())
    clean, corrupted = (torch.tensor(content[side]) for side in ("clean", "corrupted"))
    read = torch.full((len(clean), 1), clean.shape[1] - 1)
    sides = [Inputs(ids, torch.ones_like(ids, dtype=torch.bool), read) for ids in (clean, corrupted)]
    return Batch(*sides, *(torch.tensor(content[key]).view(-1, 1, 1) for key in ("answer", "wrong")))


def reference(shared: Path, name: str, graph: Graph) -> Tensor:
    """`[writers, readers]` changes of the metric, in whatever order the file lists them."""
    content = json.loads((shared / f"conformance/eap-ig/tiny_n8_{name}.json").read_text())
    scores = content.get("scores", content)
    return as_matrix(graph, {tuple(edge.split("->")): scores[edge] for edge in graph.names(graph.real)})


def test_metric_values(adapter: Adapter, batch: Batch) -> None:
    values = [metric_of("logit_diff")(capture(adapter, side).logits, batch) for side in (batch.clean, batch.corrupted)]
    assert [float(value.mean()) for value in values] == pytest.approx([6.15096, -3.45859], abs=1e-4)


def test_edge_attribution(adapter: Adapter, batch: Batch, shared: Path) -> None:
    clean = capture_gradients(adapter, batch.clean, lambda logits: metric_of("logit_diff")(logits, batch))
    delta = clean.run.writers.minus(capture(adapter, batch.corrupted).writers)
    effects = edge_effects(adapter, delta, clean.run, clean.at) / len(batch)
    assert off(effects, -reference(shared, "EAP", adapter.graph)) < 1e-5


def test_exact_effects(adapter: Adapter, batch: Batch, shared: Path) -> None:
    graph, metric = adapter.graph, metric_of("logit_diff")
    clean = capture(adapter, batch.clean)
    restart = Restart(adapter, batch.clean, clean)
    change = capture(adapter, batch.corrupted).writers.minus(clean.writers)
    before, effects = metric(clean.logits, batch).mean(), torch.zeros(graph.n_writers, graph.n_readers)
    for reader in range(graph.n_readers):
        for writer, logits in enumerate(restart.edges(reader, list(range(graph.limits[reader])), change)):
            effects[writer, reader] = before - metric(logits, batch).mean()
    assert off(effects, -reference(shared, "exact", graph)) < 1e-5
