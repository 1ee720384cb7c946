"""Direct logit attribution: what each node's output adds to the logit difference directly, past all later layers.

The final norm multiplies by a scale r(x) for each token and applies a linear map; the unembedding is linear, too. With
r(x) frozen at its value in the run, the logit difference is a sum over all outputs in the residual stream (Elhage et
al. 2021):

    logit difference = sum over nodes of r(x) out_u . d + constants
    d = C^T diag(norm weight) (mean of W_U over answers - mean of W_U over wrong answers)

1. The clean prompts are run once. The direction d (with the model's logit scale, if it has one) is pulled back to the
   residual stream at the positions where the metric reads the logits; several positions are averaged.
2. Constants come from the biases of the output projections, the final norm and the unembedding.

If the model soft-caps its logits (Gemma 2), the sum is the difference before the cap. No ablation is involved; for the
direct effect of replacing a node, including its effect on r(x), use `path_patch(..., receivers="logits")`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import einsum, rearrange
from torch import Tensor

from circuitfind.attribution.method import Method
from circuitfind.batch import Batch
from circuitfind.calls import model_call
from circuitfind.engine.capture import Run, capture
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.unembedding import Unembedding, unembedding
from circuitfind.export import html
from circuitfind.graph import Graph
from circuitfind.metrics import METRICS
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import read_rows
from circuitfind.models.load import Model
from circuitfind.patching.sweep import EffectTable
from circuitfind.record import NO_EFFECT, Record
from circuitfind.scores import NodeScores
from circuitfind.tasks.bound import BoundTask
from circuitfind.tasks.task import Task

SIGN = f"{NO_EFFECT}direct contribution to the logit difference through the frozen final norm; positive = raises it"
BEFORE_CAP = f"{SIGN}; before the model's soft-cap"


class NodeEffect(NamedTuple):
    """What a node adds to the logit difference, and its 95% interval over examples."""

    node: str
    effect: float
    low: float
    high: float


@dataclass(frozen=True, eq=False, repr=False)
class DirectEffects(EffectTable):
    """What each node adds directly to the logit difference of the clean prompts.

    Attributes:
        per_example: `[writers, examples]` float64, in logits.
        constant: `[examples]`, what the biases add.
        logit_diff: `[examples]`, computed from the model's logits; equals `per_example.sum(0) + constant` up to
            rounding unless `capped`.
        capped: whether the model soft-caps its logits, which `per_example` and `constant` leave out.
    """

    FORMAT = "circuitfind.direct"

    graph: Graph
    per_example: np.ndarray
    constant: np.ndarray
    logit_diff: np.ndarray
    capped: bool
    record: Record

    @property
    def scores(self) -> NodeScores:
        """Node scores: means over examples, to rank nodes or to save without the examples."""
        return NodeScores(self.graph, self.per_example.mean(axis=-1).astype(np.float32), self.record)

    def _row(self, at: int, effect: float, low: float, high: float) -> NodeEffect:
        return NodeEffect(self.graph.writer_names[at], effect, low, high)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: means over examples, and under "examples" the values of every example."""
        return {
            "effects": self.scores.to_dict(),
            "constant": float(self.constant.mean()),
            "logit_diff": float(self.logit_diff.mean()),
            "capped": self.capped,
            "record": asdict(self.record),
            "graph": self.graph.as_dict(),
            "examples": {name: getattr(self, name).tolist() for name in ("per_example", "constant", "logit_diff")},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DirectEffects:
        return super().from_dict({**content, **content["examples"]})

    def shown(self) -> dict[str, Any]:
        means = {"logit_diff": float(self.logit_diff.mean()), "constant": float(self.constant.mean())}
        return {**means, "capped": self.capped}

    def _repr_html_(self) -> str:
        table = html.table(NodeEffect._fields, self.top(20), "strongest nodes")
        return html.block(repr(self), table, self.scores._repr_html_())


@model_call
def direct_effects(model: Model, task: Task | BoundTask, *, batch_size: int | None = None) -> DirectEffects:
    """Compute direct logit attribution for every node on a task's clean prompts.

    It is always of the logit difference, whatever the task's metric.

    Args:
        batch_size: the number of pairs per batch; by default as many as the memory budget allows.

    Raises:
        TaskError: the task has no answers or no wrong answers.
    """
    return effects_of(Experiment.of(model, task, {"metric": "logit_diff", "batch_size": batch_size}))


def effects_of(experiment: Experiment) -> DirectEffects:
    """Return `direct_effects` of an experiment whose metric is the logit difference."""
    adapter, head = experiment.adapter, unembedding(experiment.adapter)

    def one(batch: Batch, _: slice) -> list[np.ndarray]:
        run = capture(adapter, batch.clean)
        parts = *_contributions(adapter, head, batch, run), METRICS["logit_diff"](run.logits, batch)
        return [part.double().cpu().numpy() for part in parts]

    parts = [part for _, part in experiment.in_batches(one, "direct effects")]
    nodes, constant, measured = (np.concatenate(values, axis=-1) for values in zip(*parts, strict=True))
    record = experiment.bound.record("direct", ablation="", direction="", seed=0, level="node")
    record = replace(record, sign=BEFORE_CAP if head.capped else SIGN)
    return DirectEffects(experiment.graph, nodes, constant, measured, head.capped, record)


def _contributions(adapter: Adapter, head: Unembedding, batch: Batch, run: Run) -> tuple[Tensor, Tensor]:
    """Return the contributions of writers `[writers, batch]` and of biases `[batch]`."""
    graph, norm, work = adapter.graph, adapter.final_norm, adapter.work

    def read(value: Tensor) -> Tensor:
        return read_rows(value, batch.clean).to(work)

    counts = batch.weights.to(work)
    direction = _difference(head.weight, batch).to(work) * (head.scale * head.slope) * counts.unsqueeze(-1)
    at_stream = rearrange(norm.fold(rearrange(direction, "b r d -> d b r")), "d b r -> b r d")
    at_stream = at_stream * norm.scale(read(run.resid[-1]))
    nodes = direction.new_empty(graph.n_writers, len(batch))
    nodes[0] = einsum(read(run.resid[0]), at_stream, "b r d, b r d -> b")
    constants = direction.new_zeros(graph.d_model)
    for layer, view in enumerate(adapter.layers):
        by_head = einsum(at_stream, view.output_weight(), "b r d, h e d -> b r h e")
        nodes[graph.heads(layer)] = einsum(read(run.heads[layer]), by_head, "b r h e, b r h e -> h b")
        nodes[graph.mlp(layer)] = einsum(read(run.mlps[layer]), at_stream, "b r d, b r d -> b")
        for constant in view.constants():
            constants = constants if constant is None else constants + constant
    total = einsum(constants, at_stream, "d, b r d -> b")
    if norm.bias is not None:
        total = total + einsum(norm.bias, direction, "d, b r d -> b")
    if head.bias is not None:
        total = total + (_difference(head.bias, batch).to(work) * head.slope * counts).sum(-1)
    return nodes, total


def _difference(values: Tensor, batch: Batch) -> Tensor:
    """Return the mean of values `[vocab, ...]` over answers minus their mean over wrong answers, `[batch, reads,
    ...]`."""
    means = []
    for ids in (batch.answers, batch.wrong):
        real = (ids >= 0).to(torch.promote_types(values.dtype, torch.float32))
        chosen = values[ids.clamp(min=0)].to(real)
        counts = real.sum(-1).view(*real.shape[:2], *[1] * (values.ndim - 1))
        means.append(einsum(chosen, real, "b r a ..., b r a -> b r ...") / counts)
    return means[0] - means[1]


METHOD = Method(
    "direct",
    "direct logit attribution: contribution to the logit difference through the frozen final norm",
    "nostalgebraist 2020, Elhage et al. 2021",
    "1 forward",
    ("node",),
    score=lambda experiment, request: effects_of(experiment.set(metric=METRICS["logit_diff"])).scores,
    spellings=("dla", "direct-logit-attribution", "logit-attribution"),
)
