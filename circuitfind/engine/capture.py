"""One forward pass, remembered: what every writer wrote and what every reader read.

`capture` runs a model and keeps its writers (`engine/writers.py`), its residual streams, and its logits at the read
positions. Gradients: `engine/reader_gradients.py`.

Where prompts are aligned by spans, the corrupted run is moved onto the clean prompts' positions (`capture_corrupted`):
its values at `alignment[t]`, the embedding with its learned position included, stand at position t, so every writer has
an ablated value at every token. The run with every edge ablated then has the corrupted run's logits, because the
unembedding reads the sum of the ablated values and biases. But its writers do not write the ablated values (a head
attends over the clean prompt's tokens there), so it is computed as under mean ablation.
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

# ("attn_out" or "mlp_out", layer) -> what that module returns: the attention's output projection, or the MLP
Outputs = Mapping[tuple[str, int], Tensor]
WRITTEN, READ = {"heads", "mlps"}, {"resid", "middle"}  # of a `Run`: what its writers are; where its readers read
OUTPUTS = {"attn_out", "mlp_out"}


@dataclass
class Run:
    """What a pass left behind. Lists are by layer; `resid` has one more entry, the final norm's input. In the model's
    own precision `resid [batch, pos, d_model]`, the residual entering each block, and `middle`, what each MLP reads,
    before its norm; `qkv`, `mlp_in`: values at the projections' outputs and at the MLP's input, as the module sees
    them; `attn_out`, `mlp_out`: raw outputs of the attention's output projection and of the MLP; `logits [batch, reads,
    vocab]`, empty if the pass was stopped before the unembedding."""

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
        """The same function of every value but the logits."""

        def each(value: Any) -> Any:
            return Heads(*map(function, value)) if isinstance(value, Heads) else function(value)

        names = (one.name for one in fields(self) if one.name != "logits")
        return Run(**{name: list(map(each, getattr(self, name))) for name in names}, logits=self.logits)


@dataclass
class Recorder:
    """The visitor that fills a `Run`; arguments as for `capture`.

    `outputs`: what these modules are to return instead. `keep`: the lists of the `Run` that are filled; by default all.
    Of `resid` the first is always kept, for the writers.
    """

    adapter: Adapter
    stop: bool = False
    embed: Tensor | None = None
    outputs: Outputs = field(default_factory=dict)
    keep: Container[str] | None = None

    def __post_init__(self) -> None:
        self.run = Run()
        self._projected: dict[str, Tensor] = {}  # of a layer whose other projections are waited for
        self._stream: Tensor  # that entered the block
        self._z: Tensor  # the heads of the layer whose output is waited for

    def record(self, inputs: Inputs) -> Run:
        """Runs the model without gradients."""
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
    """Runs the model without gradients; `stop`: end the pass before the unembedding (no logits); `keep`: the lists of
    the `Run` that are wanted, by default all."""
    return Recorder(adapter, stop, keep=keep).record(inputs)


# -------------------------------------------------------------------- prompts that are aligned by spans
def capture_corrupted(adapter: Adapter, batch: Batch, stop: bool = False, keep: Container[str] | None = None) -> Run:
    """The corrupted run, moved onto the clean prompts' positions where pairs are aligned; its logits are its own."""
    run = capture(adapter, batch.corrupted, stop, keep=keep)
    return run if batch.alignment is None else run.map(lambda value: moved(value, batch))


def moved(value: Tensor, batch: Batch) -> Tensor:
    """Values of the corrupted run, `[batch, pos, ...]` or `[batch x pos, ...]`, on the clean prompts' positions."""
    if batch.alignment is None:
        return value
    index = batch.alignment.to(value.device)
    rows = torch.arange(len(index), device=value.device).unsqueeze(1)
    return value.reshape(*index.shape, -1)[rows, index].reshape(value.shape)


def refuse_aligned(batch: Batch, what: str, remedy: str) -> None:
    """Raises a TaskError for `what` has no meaning between aligned prompts, if these are."""
    if batch.alignment is not None:
        raise TaskError(f"{what} is not defined between prompts aligned by spans: {remedy}")
