"""Record one forward pass: the outputs of all writers and the inputs of all readers.

`capture` runs the model and records its writers (`engine/writers.py`), its residual streams, and its logits at the read
positions. For gradients see `engine/reader_gradients.py`.

If pairs are aligned by spans, `capture_corrupted` moves the corrupted run to the clean prompts' positions: position t
gets the values of position `alignment[t]`, including the embedding with its learned position. So every writer has an
ablated value at every token. The run with every edge ablated then has the corrupted run's logits, because the
unembedding reads the sum of the ablated values and biases. But its writers do not compute the ablated values (its heads
attend over the clean prompt's tokens), so it is run in its own right, as under mean ablation.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from circuitfind.batch import Batch, Inputs
from circuitfind.engine.writers import Writers
from circuitfind.errors import TaskError
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import STOP, Stop, through, undisturbed
from circuitfind.models.layer import PROJECTIONS, Heads

# ("attn_out" or "mlp_out", layer) -> the output of that module: the attention's output projection, or the MLP
Outputs = Mapping[tuple[str, int], Tensor]
WRITTEN, READ = {"heads", "mlps"}, {"resid", "middle"}  # fields of a `Run`: those of writers; streams that are read
OUTPUTS = {"attn_out", "mlp_out"}
ROUNDING = {torch.float16: 2e-2, torch.bfloat16: 1e-1}


def rounding(dtype: torch.dtype) -> float:
    """Return how far a model's values may differ between two ways to compute them, relative to the largest value."""
    return ROUNDING.get(dtype, 1e-4)


@dataclass
class Run:
    """The values recorded in one pass. All but the logits are lists by layer.

    Attributes:
        resid: `[batch, pos, d_model]`, the residual stream where each block begins, in the model's precision; one more
            entry at the end, the final norm's input.
        middle: `[batch, pos, d_model]`, the stream that each MLP reads, before its norm, in the model's precision.
        heads, mlps: as in `Writers`.
        qkv, mlp_in: outputs of the q, k and v projections, and the MLP module's input (after the norm).
        attn_out, mlp_out: raw outputs of the attention's output projection and of the MLP.
        logits: `[batch, reads, vocab]`; empty if the pass was stopped before the unembedding.
    """

    resid: list[Tensor] = field(default_factory=list)
    middle: list[Tensor] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    mlps: list[Tensor] = field(default_factory=list)
    qkv: list[Heads] = field(default_factory=list)
    mlp_in: list[Tensor] = field(default_factory=list)
    attn_out: list[Tensor] = field(default_factory=list)
    mlp_out: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def writers(self) -> Writers:
        return Writers(self.resid[0].to(self.mlps[0].dtype), self.heads, self.mlps)

    def map(self, function: Callable[[Tensor], Tensor]) -> Run:
        """Apply a function to every value but the logits, and return the new `Run`."""

        def each(value: Any) -> Any:
            return Heads(*map(function, value)) if isinstance(value, Heads) else function(value)

        names = (one.name for one in fields(self) if one.name != "logits")
        return Run(**{name: list(map(each, getattr(self, name))) for name in names}, logits=self.logits)


@dataclass
class Recorder:
    """The visitor that fills a `Run`. `stop` and `keep`: as for `capture`.

    `embed`: replaces the stream that enters layer 0. `outputs`: replace the outputs of these modules. The first entry
    of `resid` is always kept, because it is a writer.
    """

    adapter: Adapter
    stop: bool = False
    embed: Tensor | None = None
    outputs: Outputs = field(default_factory=dict)
    keep: Container[str] | None = None

    def __post_init__(self) -> None:
        self.run = Run()
        self._projected: dict[str, Tensor] = {}  # the current layer's projections so far
        self._stream: Tensor  # the stream where the current block begins
        self._z: Tensor  # the current layer's heads, before the output projection

    def record(self, inputs: Inputs) -> Run:
        """Run the model without gradients and return the filled `Run`."""
        with torch.no_grad(), undisturbed(self.adapter.model):
            self.run.logits = through(self.adapter, inputs, self)
        return self.run

    def _note(self, name: str, value: Any) -> None:
        if self.keep is None or name in self.keep:
            getattr(self.run, name).append(value)

    def __call__(self, site: str, layer: int, value: Tensor) -> Tensor | Stop | None:
        given = self.outputs.get((site, layer))
        value = value if given is None else given
        detached = value.detach()
        if site == "resid":
            return self._enter_block(layer, value)
        if site in PROJECTIONS:
            self._projected[site] = detached
            view = self.adapter.layers[layer]
            if len(self._projected) == len(view.family.projections):
                self._note("qkv", view.layout.gather(self._projected))
                self._projected = {}
        elif site == "z":
            self._z = detached
        elif site == "attn_out":
            view = self.adapter.layers[layer]
            self._note("heads", view.scaled_heads(self._z, detached))
            self._note("attn_out", detached)
            before, parallel = self._stream, self.adapter.graph.parallel
            self._note("middle", before if parallel else before + view.attn_written(detached).to(before))
        elif site == "mlp_out":
            detached = detached.clone()  # Falcon adds into this tensor in place
            self._note("mlp_out", detached)
            self._note("mlps", self.adapter.layers[layer].mlp_written(detached).view(self._stream.shape))
        else:
            self._note("resid" if site == "final" else "mlp_in", detached)
            return STOP if site == "final" and self.stop else None
        return None if given is None else given.clone()  # Falcon adds into the MLP's output in place

    def _enter_block(self, layer: int, value: Tensor) -> Tensor | None:
        given = None if layer or self.embed is None else self.embed.to(value.dtype)
        self._stream = (value if given is None else given).detach()
        if layer:
            self._note("resid", self._stream)
        else:
            self.run.resid.append(self._stream)
        return None if given is None else given.clone()


def capture(adapter: Adapter, inputs: Inputs, stop: bool = False, keep: Container[str] | None = None) -> Run:
    """Run the model without gradients and record the pass. `stop`: end it before the unembedding (no logits); `keep`:
    names of the lists of the `Run` to fill, by default all."""
    return Recorder(adapter, stop, keep=keep).record(inputs)


# -------------------------------------------------------------------- pairs aligned by spans
def capture_corrupted(adapter: Adapter, batch: Batch, stop: bool = False, keep: Container[str] | None = None) -> Run:
    """Record the corrupted run. Aligned pairs: moved to the clean prompts' positions, except the logits."""
    run = capture(adapter, batch.corrupted, stop, keep=keep)
    return run if batch.alignment is None else run.map(lambda value: moved(value, batch))


def moved(value: Tensor, batch: Batch) -> Tensor:
    """Move values `[batch, pos, ...]` or `[batch x pos, ...]` of the corrupted run to the clean prompts' positions."""
    if batch.alignment is None:
        return value
    index = batch.alignment.to(value.device)
    rows = torch.arange(len(index), device=value.device).unsqueeze(1)
    return value.reshape(*index.shape, -1)[rows, index].reshape(value.shape)


def refuse_aligned(batch: Batch, what: str, remedy: str) -> None:
    """Raise a TaskError if the pairs are aligned by spans, because `what` has no meaning there."""
    if batch.alignment is not None:
        raise TaskError(f"{what} is not defined between prompts aligned by spans: {remedy}")
