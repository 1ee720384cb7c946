"""The identities that every model must pass before its numbers are believed.

On a short random prompt and another one as its corrupted twin:

1. writers + output biases = the residual stream that enters the final norm;
2. the circuit of all edges = the clean run, and that = the model by itself;
3. the circuit of no edge = the corrupted run;
4. the readers of a layer are those that the graph names, each of its own head (`circuitfind.models.heads`).

Hooks of the user's may do something at late positions, in long prompts or to gradients only. Where they run, two more
things are asked:

5. the identities hold on the pairs that are measured, too: on the longest and the first at the first call after a hook
   is new, and on each that is longer later;
6. autograd's derivatives are those of the values (`derivatives.py`), in float32 and float64.

Not proved: that a hook does the same to other pairs (it may act on some token, or by chance), and in half precision the
gradients.

Each circuit is evaluated in both of its forms. A small circuit through every MLP, most of whose modules the sparse form
skips, has no identity to meet, but its two forms must agree. Errors are relative to the largest value compared; logits
that are all near zero count as a hundredth of the largest that the stream and the unembedding could make.
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

# Rounding of one addition, times what a few dozen layers of them amount to. A float64 model's RMSNorms still compute
# in float32 (transformers casts there), hence no less than 1e-5.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
LENGTH = 8


class Identity(NamedTuple):
    """A check's name, its error relative to the largest value, and the error that is allowed."""

    name: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


def check_identities(adapter: Adapter, seed: int = 0) -> list[Identity]:
    """Runs the identities, and the comparison of forms, on random pairs."""
    return list(_identities(adapter, seed))


def _identities(adapter: Adapter, seed: int = 0, batch: Batch | None = None) -> Iterator[Identity]:
    """On random pairs or on a batch; where hooks run, the derivatives, too."""
    tolerance, alone = TOLERANCE.get(adapter.dtype, 1e-4), batch is None
    batch = _random_pairs(adapter, seed) if batch is None else batch
    prepared = prepare(adapter, batch)
    full, empty = (make(adapter.graph).mask[None] for make in (Circuit.full, Circuit.empty))
    clean, corrupted, least = prepared.clean.logits, prepared.empty.logits, _least_logit(prepared)
    yield Identity("writers + output biases = residual stream", _stream_error(prepared), tolerance)
    if alone:
        yield Identity("a run = the model by itself", _error(_by_itself(adapter, batch.clean), clean, least), tolerance)
        # rows of one batch that compute the same hardly differ in any precision
        yield from (Identity(name, error, tolerance / 10) for name, error in reader_errors(adapter, seed).items())
    yield Identity("all edges in = clean run", _circuit_error(prepared, full, clean, least), tolerance)
    yield Identity("no edge in = corrupted run", _circuit_error(prepared, empty, corrupted, least), tolerance)
    yield Identity("both forms of a small circuit agree", _forms_error(prepared, least), tolerance)
    if adapter.state.hooks and adapter.dtype == adapter.work:
        error = derivative_error(adapter, batch.clean.rows(slice(0, 1)))
        yield Identity("gradients = what the values change by", error, derivatives.TOLERANCE)


def require_identities_on(adapter: Adapter, batch: Batch) -> None:
    """Under the user's hooks, requires the identities on the longest and the first of these pairs, unless they hold on
    longer ones."""
    if not adapter.state.hooks or adapter.unproven is None or adapter.held_by is not None:
        return
    lengths = torch.maximum(batch.clean.mask.sum(-1), batch.corrupted.mask.sum(-1))
    if (longest := int(lengths.max())) > adapter.proven_length:
        rows = torch.tensor(sorted({int(lengths.argmax()), 0}, reverse=True), device=lengths.device)
        require_identities(adapter, batch.rows(rows).trimmed())
        adapter.proven_length = longest


def require_identities(adapter: Adapter, batch: Batch | None = None) -> list[Identity]:
    """Runs the identities; ModelError, naming the identity and its error, for a model that fails one."""
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
                " check=False in cf.load or cf.wrap leaves the check out, but scores then cannot be trusted"
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


def _by_itself(adapter: Adapter, inputs: Inputs) -> Tensor:
    """The model's logits without explicit positions."""
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
    """What errors of logits are at least relative to: they have the rounding of the stream that they are made of."""
    adapter = prepared.adapter
    stream = adapter.final_norm(prepared.clean.resid[-1])
    unembedding = weight_of(adapter.model.get_output_embeddings()).T.to(adapter.device)
    largest = (torch.linalg.vector_norm(rows.float(), dim=-1).max() for rows in (stream, unembedding))
    return 0.01 * math.prod(map(float, largest))


def _circuit_error(prepared: Prepared, mask: np.ndarray, expected: Tensor, least: float) -> float:
    """The larger error of a circuit's two forms; NaN if either is (Python's `max` would lose it)."""
    errors = [_error(run_circuits(prepared, mask, sparse)[0], expected, least) for sparse in (False, True)]
    return float(torch.tensor(errors).max())


def _forms_error(prepared: Prepared, least: float) -> float:
    """How far the sparse and the dense run of `input->m{l}->logits`, for all layers l, are apart."""
    graph = prepared.adapter.graph
    names = [name for layer in range(graph.n_layers) for name in (f"input->m{layer}", f"m{layer}->logits")]
    sparse, dense = (run_circuits(prepared, graph.mask(names)[None], form) for form in (True, False))
    return _error(sparse, dense, least)


def _error(value: Tensor, expected: Tensor, least: float = 0.0) -> float:
    value, expected = value.cpu().double(), expected.cpu().double()  # not every accelerator has float64
    return float((value - expected).abs().max()) / max(float(expected.abs().max()), least, 1e-30)
