"""What several test files need: random pairs, a metric, the engine's scores, how far off they are, a killed process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping

import numpy as np
import torch
from families import VOCAB
from torch import Tensor

from circuitfind.batch import Batch, Inputs
from circuitfind.engine.ablation import ablation_of, mean_of, sum_writers
from circuitfind.engine.capture import capture
from circuitfind.engine.circuit_run import CircuitVisitor, Plan
from circuitfind.engine.edge_effects import edge_effects
from circuitfind.engine.prepare import Prepared
from circuitfind.engine.reader_gradients import capture_gradients
from circuitfind.engine.writers import Writers
from circuitfind.graph import Graph
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import through, undisturbed

LENGTH = 9


def random_pairs(left: tuple[int, ...], right: tuple[int, ...], seed: int = 0) -> Batch:
    """Random pairs, one for each entry of `left` and `right`: so many of its 9 positions are padding.

    Each reads its logits at two positions.
    """
    generator, size = torch.Generator().manual_seed(seed), len(left)
    clean, corrupted = torch.randint(3, VOCAB, (2, size, LENGTH), generator=generator)
    places = torch.arange(LENGTH)
    mask = torch.stack([(places >= low) & (places < LENGTH - high) for low, high in zip(left, right, strict=True)])
    clean, corrupted = clean * mask, corrupted * mask  # the padding token is 0
    last = LENGTH - 1 - torch.tensor(right)
    read = torch.stack([last, last - 2], dim=1)
    answers, wrong = torch.randint(3, VOCAB, (2, size, 2, 2), generator=generator)
    wrong[0, :, 1] = -1  # answer sets of unequal size
    return Batch(Inputs(clean, mask, read), Inputs(corrupted, mask, read), answers, wrong)


def means_of(adapter: Adapter, batch: Batch, ablation: str) -> Writers | None:
    """What the mean ablations put in place of each writer."""
    over = ablation_of(ablation).mean
    return None if over is None else mean_of([sum_writers(adapter, batch, over == "position")])


def surprise(logits: Tensor) -> Tensor:
    """A metric with a gradient at every logit: `[batch]` from `[batch, reads, vocab]`."""
    return (logits.log_softmax(-1)[..., 5] - 0.5 * logits[..., 7]).sum(-1)


def edge_scores(adapter: Adapter, batch: Batch) -> Tensor:
    """`[writers, readers]`: the engine's first-order effects on `surprise`, clean against corrupted."""
    corrupted = capture(adapter, batch.corrupted, stop=True)
    clean = capture_gradients(adapter, batch.clean, surprise)
    return edge_effects(adapter, clean.run.writers.minus(corrupted.writers), clean.run, clean.at)


def as_matrix(graph: Graph, values: Mapping[tuple[str, str], Tensor | float]) -> Tensor:
    """`[writers, readers]` summed over tokens, from (writer, reader) names: all edges, in the graph's order."""
    assert [f"{writer}->{reader}" for writer, reader in values] == graph.names(graph.real)
    matrix = torch.zeros(graph.n_writers, graph.n_readers, dtype=torch.float64)
    for (writer, reader), value in values.items():
        matrix[graph.edge(f"{writer}->{reader}")] = torch.as_tensor(value).sum()
    return matrix


def off(value: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected magnitude."""
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def run_circuits_traced(prepared: Prepared, masks: np.ndarray, sparse: bool) -> Tensor:
    """`run_circuits` through the adapter's own backend, without skipping: the two are held equal."""
    plan = Plan.of(prepared, masks, sparse)
    with torch.no_grad(), undisturbed(prepared.adapter.model):
        logits = through(prepared.adapter, prepared.batch.clean.repeat(len(masks)), CircuitVisitor(prepared, plan))
    return logits.unflatten(0, (len(masks), -1))


def ended_by(work: Callable[[], object]) -> int:
    """How a process of its own ends in which `work` runs, a copy of this one: minus the signal that killed it."""
    child = os.fork()
    if not child:
        try:
            signal.alarm(120)  # it must not outlive the tests
            torch.set_num_threads(1)
            work()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
