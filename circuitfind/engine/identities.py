"""The identities that every model must satisfy before its numbers are trusted.

On pairs of short random prompts, within a tolerance that depends on the dtype:

1. writers + output biases = the residual stream that enters the final norm;
2. the circuit of all edges = the clean run = the model called without circuitfind;
3. the circuit of no edges = the corrupted run;
4. a layer reads the stream only through the readers that the graph names, each of its own head (`models/heads.py`).

The user's hooks may act at late positions only, in long prompts only, or on gradients only. So with hooks, two more
things are checked:

5. the identities on the pairs that are measured: after a hook is added, on the longest and the first pair of the next
   call, and of each later call with a longer pair;
6. that autograd's gradients are the derivatives of the values (`derivatives.py`), in float32 and float64.

What is not checked: that a hook does the same to all other pairs (it may act on some tokens only, or at random), and
gradients in half precision.

Each circuit is run in both of its forms. There is no identity for a small circuit through every MLP, in whose sparse
form most modules are skipped, but its two forms must agree. Errors are relative to the largest value compared; for
logits that are all near zero, to 1% of the largest logit that the stream and the unembedding could produce.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuitfind.batch import Batch, Inputs
from circuitfind.circuit import Circuit
from circuitfind.engine import derivatives
from circuitfind.engine.circuit_run import run_circuits
from circuitfind.engine.derivatives import derivative_error
from circuitfind.engine.prepare import Prepared, prepare
from circuitfind.errors import ModelError
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import read_rows, undisturbed
from circuitfind.models.heads import reader_errors
from circuitfind.models.layer import weight_of

# Rounding errors that a few dozen layers add up to. In a float64 model RMSNorms still compute in float32 (transformers
# casts there), hence 1e-5.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
LENGTH = 8


class Identity(NamedTuple):
    """A check's name, its error relative to the largest value, and the largest error that is allowed."""

    name: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


def check_identities(adapter: Adapter, seed: int = 0) -> list[Identity]:
    """Check all identities on random pairs, and return each with its error."""
    return list(_identities(adapter, seed))


def _identities(adapter: Adapter, seed: int = 0, batch: Batch | None = None) -> Iterator[Identity]:
    """Check the identities on a batch (by default random pairs), and with hooks the derivatives, too."""
    tolerance, alone = TOLERANCE.get(adapter.dtype, 1e-4), batch is None
    batch = _random_pairs(adapter, seed) if batch is None else batch
    prepared = prepare(adapter, batch)
    full, empty = (make(adapter.graph).mask[None] for make in (Circuit.full, Circuit.empty))
    clean, corrupted, least = prepared.clean.logits, prepared.empty.logits, _least_logit(prepared)
    yield Identity("writers + output biases = residual stream", _stream_error(prepared), tolerance)
    if alone:
        yield Identity(
            "a run = the model by itself", _error(_plain_logits(adapter, batch.clean), clean, least), tolerance
        )
        # these compare rows of one batch that compute the same: they hardly differ in any precision
        yield from (Identity(name, error, tolerance / 10) for name, error in reader_errors(adapter, seed).items())
    yield Identity("all edges in = clean run", _circuit_error(prepared, full, clean, least), tolerance)
    yield Identity("no edge in = corrupted run", _circuit_error(prepared, empty, corrupted, least), tolerance)
    yield Identity("both forms of a small circuit agree", _forms_error(prepared, least), tolerance)
    if adapter.state.hooks and adapter.dtype == adapter.work:
        error = derivative_error(adapter, batch.clean.rows(slice(0, 1)))
        yield Identity("gradients = what the values change by", error, derivatives.TOLERANCE)


def require_identities_on(adapter: Adapter, batch: Batch) -> None:
    """With the user's hooks, require the identities on the longest and the first of these pairs, unless they were
    proved on a longer pair."""
    if not adapter.state.hooks or adapter.unproven is None or adapter.held_by is not None:
        return
    lengths = torch.maximum(batch.clean.mask.sum(-1), batch.corrupted.mask.sum(-1))
    if (longest := int(lengths.max())) > adapter.proven_length:
        rows = torch.tensor(sorted({int(lengths.argmax()), 0}, reverse=True), device=lengths.device)
        require_identities(adapter, batch.rows(rows).trimmed())
        adapter.proven_length = longest


def require_identities(adapter: Adapter, batch: Batch | None = None) -> list[Identity]:
    """Check the identities and return them; ModelError, which names the identity and its error, if one fails."""
    identities = []
    for identity in _identities(adapter, batch=batch):
        identities.append(identity)
        name, error, tolerance = identity
        if not error <= tolerance:
            hooked = [path or type(adapter.model).__name__ for path in adapter.state.hooks]
            why = "Its weights may hold NaN, its code may have been modified, or its family's row does not fit"
            said = f"'{name}' is off by {error:.2g} (allowed {tolerance:.0e})"
            if adapter.inferred and not hooked:
                raise ModelError(f"model family '{adapter.kind}' is not covered: {adapter.row}, {said}")
            if hooked:
                more = f" and {len(hooked) - 5} more modules" if len(hooked) > 5 else ""
                why = (
                    f"Hooks run on {', '.join(hooked[:5])}{more}: remove those that change what a module gives, or its"
                    " gradient, or make the change in the module itself"
                )
            raise ModelError(
                f"the model's self-check failed: {said}. {why};"
                " check=False in cf.load or cf.wrap skips the check, but then scores cannot be trusted"
            )
    return identities


def _random_pairs(adapter: Adapter, seed: int) -> Batch:
    vocabulary = adapter.model.get_input_embeddings().weight.shape[0]
    length = adapter.at_most(LENGTH)
    ids = torch.randint(vocabulary, (2, 2, length), generator=torch.Generator().manual_seed(seed)).to(adapter.device)
    read = torch.full_like(ids[0, :, :1], length - 1)
    clean, corrupted = (Inputs(side, torch.ones_like(side, dtype=torch.bool), read) for side in ids)
    answers = torch.zeros_like(read).unsqueeze(-1)
    return Batch(clean, corrupted, answers, answers)


def _plain_logits(adapter: Adapter, inputs: Inputs) -> Tensor:
    """Return the logits at the read positions of a plain call of the model, without explicit position ids."""
    with torch.no_grad(), undisturbed(adapter.model):
        return read_rows(adapter.model(input_ids=inputs.ids, use_cache=False).logits, inputs)


def _stream_error(prepared: Prepared) -> float:
    adapter, run = prepared.adapter, prepared.clean
    stream = run.writers.embed
    for layer, view in enumerate(adapter.layers):
        stream = stream + adapter.head_outputs(layer, run.heads[layer]).sum(0) + run.mlps[layer]
        for constant in view.constants():
            stream = stream if constant is None else stream + constant
    return _error(stream, run.resid[-1])


def _least_logit(prepared: Prepared) -> float:
    """Return the least value that errors of logits are divided by: 1% of the largest logit that the final stream and
    the unembedding could produce, because logits have the rounding errors of that stream."""
    adapter = prepared.adapter
    stream = adapter.final_norm(prepared.clean.resid[-1])
    unembedding = weight_of(adapter.model.get_output_embeddings()).T.to(adapter.device)
    largest = (torch.linalg.vector_norm(rows.float(), dim=-1).max() for rows in (stream, unembedding))
    return 0.01 * math.prod(map(float, largest))


def _circuit_error(prepared: Prepared, mask: np.ndarray, expected: Tensor, least: float) -> float:
    """Return the larger error of a circuit's two forms; NaN if either is NaN (which Python's `max` could lose)."""
    errors = [_error(run_circuits(prepared, mask, sparse)[0], expected, least) for sparse in (False, True)]
    return float(torch.tensor(errors).max())


def _forms_error(prepared: Prepared, least: float) -> float:
    """Return the difference between the two forms of the circuit of `input->m{l}->logits` for all layers l."""
    graph = prepared.adapter.graph
    names = [name for layer in range(graph.n_layers) for name in (f"input->m{layer}", f"m{layer}->logits")]
    sparse, dense = (run_circuits(prepared, graph.mask(names)[None], form) for form in (True, False))
    return _error(sparse, dense, least)


def _error(value: Tensor, expected: Tensor, least: float = 0.0) -> float:
    value, expected = value.cpu().double(), expected.cpu().double()  # some accelerators have no float64
    return float((value - expected).abs().max()) / max(float(expected.abs().max()), least, 1e-30)
