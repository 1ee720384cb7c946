"""Information flow routes: each writer's share of a reader's input. One forward pass, no gradient, no metric.

    share(u -> v) = closeness(u) / sum of the closeness of all summands of y       (Ferrando and Voita 2024)
    closeness(u)  = max(0, ||y||_1 - ||y - x_u||_1)

1. `y` is the residual stream that v reads in the clean run, before v's norm; `x_u` is u's output. If all norms of the
   model subtract the mean over d_model, so do `y` and `x_u`.
2. `y` is the sum of the outputs of all earlier writers and of the biases of their output projections. The biases count
   as one more summand, which is no edge: the shares of a reader's edges sum to 1 only in a model without biases.
3. A score is the mean share over an example's real tokens, averaged over examples; for `logits`, over the positions
   where the metric reads them. The q, k and v readers of a layer read the same stream, so their edges tie.

A summand has closeness 0 if y is no larger than y without it: if it points away from y, or far exceeds y. As each
reader's shares sum to 1, they are not comparable between readers: a ranking of all edges prefers early readers, which
have few writers. Use `Scores.greedy`, which grows a circuit from the logits, as the paper does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitfind.attribution.gradients import mean_over
from circuitfind.attribution.method import Method, Request
from circuitfind.batch import Batch
from circuitfind.engine.capture import Run, capture
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.memory_plan import HELD, token_slices
from circuitfind.models.adapter import Adapter
from circuitfind.record import NO_EFFECT

SIGN = f"{NO_EFFECT}share of what a reader reads, mean over tokens, 0 to 1"


def flow_shares(experiment: Experiment, _: Request) -> Tensor:
    """Return the shares on the clean prompts, `[writers, readers]`, zero where there is no edge."""
    adapter = experiment.adapter

    def one(part: Batch, rows: slice) -> Tensor:
        run = capture(adapter, part.clean, stop=True)
        mask = part.clean.mask.to(adapter.work)
        reads = torch.zeros_like(mask).scatter(1, part.clean.read, 1)
        return _shares(adapter, run, mask / mask.sum(1, keepdim=True), reads / reads.sum(1, keepdim=True))

    return mean_over(experiment, one, "edge scores")


def _shares(adapter: Adapter, run: Run, real: Tensor, read: Tensor) -> Tensor:
    """Return shares `[writers, readers]` summed over tokens with weights `[batch, pos]`: `read` for the logits, `real`
    for all other readers."""
    graph, work = adapter.graph, adapter.work
    shares = torch.zeros(graph.n_writers, graph.n_readers, dtype=work, device=real.device)
    delta = run.writers.map(lambda part: part.flatten(0, 1))
    resid, middle = ([x.to(work).flatten(0, 1) for x in part] for part in (run.resid, run.middle))
    weights = {"qkv": real.flatten(), "mlp": real.flatten(), "logits": read.flatten()}
    for tokens in token_slices(len(delta.embed), 2 * graph.n_writers, adapter, HELD):
        written = delta.embed.new_empty(graph.n_writers, *delta.embed[tokens].shape)
        written[0] = adapter.centre(delta.embed[tokens])

        def add(layer: int, kind: str, stream: Tensor, tokens: slice = tokens, written: Tensor = written) -> None:
            parts = written[: graph.reads(layer, kind)]
            found = shares_of(adapter.centre(stream[tokens]), parts)[:-1] @ weights[kind][tokens]
            shares[: len(parts), graph.readers(layer, kind)] += found.unsqueeze(1)

        for layer, view in enumerate(adapter.layers):
            add(layer, "qkv", resid[layer])
            heads = torch.bmm(delta.heads[layer][tokens].transpose(0, 1), view.output_weight())
            written[graph.heads(layer)] = adapter.centre(heads)
            add(layer, "mlp", middle[layer])
            written[graph.mlp(layer)] = adapter.centre(delta.mlps[layer][tokens])
        add(graph.n_layers, "logits", resid[-1])
    return shares


def shares_of(stream: Tensor, parts: Tensor) -> Tensor:
    """Return the shares of a stream's summands, `[parts + 1, tokens]`; the last is the rest, stream minus all parts.

    `stream`: `[tokens, d_model]`; `parts`: `[parts, tokens, d_model]`. Shares are between 0 and 1 and sum to 1 at each
    token; all are 0 at a token where no summand has positive closeness.
    """
    size = stream.abs().sum(-1)
    written = parts.sum(0)  # the stream minus the rest
    distances = torch.cat([(stream - parts).abs().sum(-1), written.abs().sum(-1)[None]])
    closeness = (size - distances).clamp(min=0)
    return closeness / closeness.sum(0).clamp(min=torch.finfo(closeness.dtype).tiny)


METHOD = Method(
    "ifr",
    "information flow routes: shares of what a reader reads",
    "Ferrando and Voita 2024",
    "1 forward",
    ("edge",),
    score=flow_shares,
    sign=lambda level, options: SIGN,
    ungrouped=True,
    spellings=("information-flow-routes",),
)
