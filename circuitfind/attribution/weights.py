"""Weight composition: rank edges without any prompt, by the composition scores of Elhage et al. (2021).

    score(u -> v) = ||U V^T|| / (||U|| ||V||)    between 0 and 1, Frobenius norms

1. U `[*, d_model]` is the matrix through which u writes: for a head W_V W_O, for an MLP its output projection, for
   `input` the token embedding. A post-norm's weight is folded in. If all norms of the model subtract the mean over
   d_model, so does U.
2. V `[*, d_model]` is the matrix through which v reads, with the norm's weight and centring folded in: for `<q>` and
   `<k>` the query side and the key side of W_Q W_K^T, for `<v>` W_V W_O, for an MLP all its input projections, for
   `logits` the unembedding. For a shared key/value head, the matrices of its query heads are stacked.
3. The score depends only on U^T U and V^T V. So a product A B is replaced by R B with A = Q R, which has `d_head` rows,
   and a matrix with more than `d_model` rows by its own R.

The scores ignore everything but these weights: the norms' scales, rotary embeddings and q/k norms, biases, gates and
prompts. For random weights the score is about 1 / sqrt(d_model), not 0.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor

from circuitfind.attribution.method import Method, Request
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.unembedding import head_scale
from circuitfind.errors import ModelError, ScoreError
from circuitfind.models.adapter import Adapter
from circuitfind.models.layer import Heads, LayerView, weight_of
from circuitfind.progress import track
from circuitfind.record import NO_EFFECT

SIGN = f"{NO_EFFECT}composition of the weights, 0 to 1, the same for every prompt"


def composition_scores(experiment: Experiment, _: Request) -> Tensor:
    """Return the scores `[writers, readers]`, zero where there is no edge. ScoreError if a layer's attention or MLP, or
    an embedding, does not reduce to single matrices."""
    adapter, graph = experiment.adapter, experiment.graph
    embedding, unembedding = _embeddings(adapter)
    scores = torch.zeros(graph.n_writers, graph.n_readers, dtype=adapter.work, device=unembedding.device)
    written: list[tuple[slice, Tensor]] = []  # (writers, their normalised U: `[writers, rows, d_model]`)

    def write(writers: slice, matrix: Tensor) -> None:
        written.append((writers, _unit(adapter.centre(matrix))))

    def read(layer: int, kind: str, matrix: Tensor) -> None:
        unit, limit = _unit(matrix), graph.reads(layer, kind)
        for writers, factor in written:
            if writers.start < limit:
                products = einsum(factor, unit, "u a d, v b d -> u v a b")
                scores[writers, graph.readers(layer, kind)] = torch.linalg.matrix_norm(products)

    write(slice(0, 1), _few_rows(embedding)[None])
    for layer, view in enumerate(track(adapter.layers, "weight composition")):
        weights, output = _folded(view), view.output_weight()
        for kind, matrix in zip("qkv", _attention_readers(weights, output), strict=True):
            read(layer, kind, matrix)
        write(graph.heads(layer), einsum(_served(_r(weights.v), output), output, "h r e, h e d -> h r d"))
        reading, writing = _mlp(view)
        read(layer, "mlp", _few_rows(reading.T)[None])
        write(slice(graph.mlp(layer), graph.mlp(layer) + 1), _few_rows(writing)[None])
    read(graph.n_layers, "logits", _few_rows(adapter.final_norm.fold(unembedding.T).T)[None])
    return scores


def _attention_readers(weights: Heads, output: Tensor) -> Heads:
    """Return V for a layer's q, k and v readers, `[readers, rows, d_model]` each."""
    group = len(output) // weights.k.shape[1]
    queries = einsum(_served(_r(weights.k), output), weights.q, "h r e, d h e -> h r d")
    keys = einsum(rearrange(_r(weights.q), "(g n) r e -> g n r e", n=group), weights.k, "g n r e, d g e -> g n r d")
    outputs = rearrange(_r(rearrange(output, "h e d -> d h e")), "(g n) r e -> g n r e", n=group)
    values = einsum(outputs, weights.v, "g n r e, d g e -> g n r d")
    return Heads(queries, keys.flatten(1, 2), values.flatten(1, 2))


def _folded(view: LayerView) -> Heads:
    """Return the q, k and v weights with attention's norm folded in, `[d_model, heads, d_head]` each."""
    whys = {
        "a mixer has no queries, keys and values": view.family.mixer,
        "a norm stands between two projections of its keys": view.family.kv,
        "its queries and their gates are read together": view.family.gated,
    }
    for why, so in whys.items():
        if so:
            raise ScoreError(f"method 'weights' cannot score this model: {why}")
    weights = view.qkv_weight()
    return weights if view.attn_norm is None else Heads(*map(view.attn_norm.fold, weights))


def _mlp(view: LayerView) -> tuple[Tensor, Tensor]:
    """Return an MLP's input projections `[d_model, hidden]`, its norm folded in, and its output projection `[hidden,
    d_model]`."""
    try:
        reading, writing = view.mlp_weights()
    except ModelError as error:
        raise ScoreError(f"method 'weights' cannot score this model: {error}") from None
    return reading if view.mlp_norm is None else view.mlp_norm.fold(reading), writing


def _embeddings(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return the token embedding and the unembedding, `[vocab, d_model]` each."""
    head_scale(adapter)
    modules = adapter.model.get_input_embeddings(), adapter.model.get_output_embeddings()
    first, last = (weight_of(module).T.to(adapter.device, adapter.work) for module in modules)
    for matrix in (first, last):
        if matrix.shape[1] != adapter.graph.d_model:
            widths = f"an embedding is {matrix.shape[1]} wide, the residual stream {adapter.graph.d_model}"
            raise ScoreError(f"method 'weights' cannot score this model: {widths}")
    return first, last


def _served(by_kv_head: Tensor, by_head: Tensor) -> Tensor:
    """Repeat the entries of key/value heads, once for each query head."""
    return by_kv_head.repeat_interleave(len(by_head) // len(by_kv_head), dim=0)


def _r(weight: Tensor) -> Tensor:
    """Return R of each head's weight `[d_model, heads, d_head]`: `[heads, d_head, d_head]`."""
    found: Tensor = torch.linalg.qr(rearrange(weight, "d h e -> h d e"), mode="r").R
    return found


def _few_rows(matrix: Tensor) -> Tensor:
    """Return a matrix with the same Gram matrix `M^T M` and no more rows than columns."""
    return matrix if len(matrix) <= matrix.shape[1] else torch.linalg.qr(matrix, mode="r").R


def _unit(matrices: Tensor) -> Tensor:
    """Divide each matrix of `[n, rows, d_model]` by its Frobenius norm; zero matrices stay zero."""
    norms: Tensor = torch.linalg.matrix_norm(matrices, keepdim=True)
    return matrices / norms.where(norms > 0, 1)


METHOD = Method(
    "weights",
    "composition of weights, without data",
    "Elhage et al. 2021",
    "none",
    ("edge",),
    score=composition_scores,
    sign=lambda level, options: SIGN,
    ungrouped=True,
)
