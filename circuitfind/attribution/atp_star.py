"""AtP* (Kramár et al. 2024): attribution patching of queries and keys with the softmax computed, and GradDrop.

**The QK fix** (3.1.1; `atp-qk`, and within `atp-star`):

    effect(place) ~ - sum over heads, queries i and keys j of (a'_ij - a_ij) da_ij

`a` is the attention pattern of the run at which the gradient was taken, `a'` the one with this place's queries or keys
replaced, and `da` the gradient of the metric at the pattern: that at the head, times the values.

1. The layer's attention is run again with the place's head replaced at all positions, and its scores noted
   (`engine/sites.py`). A score depends on one query and one key, so `s'_ij` also holds where fewer positions are
   replaced. Other heads' scores change only where a model norms its heads together (OLMo 2), and then count.
2. Queries: row i of the pattern depends on query i alone, so a place's effect is a sum over its rows.
3. Keys of all positions or of a span: the place's columns of the scores are replaced, and the softmax taken.
4. The key of one position t changes one column, so all others keep their proportions and no softmax is needed:

       effect(k_t) ~ - sum over i of (a'_it - a_it) (da_it - mean of da_ij over j != t, weighted by a_ij)
       a'_it = sigmoid(s'_it - log of the sum over j != t of exp s_ij)

A shared key's effect takes in all heads that it serves. When denoising, the base run is the corrupted one and the sign
is turned. Costs one run of a layer's attention for each of its heads or key/value heads, several side by side.

**GradDrop** (3.1.2; `atp-star`): the mean magnitude of first-order effects with each layer's gradient dropped in turn.

    score(n) = mean over examples of the mean over layers l without n of |I_l(n)|

1. `I_l(n)` is the first-order effect of n where no gradient flows through layer l's attention and MLP: their outputs
   are held constant when the gradient is taken; the forward pass is the same.
2. A node of layer l has no `I_l`: the mean is over the other layers (the residual stream's is over all of them).
3. Magnitudes are taken of each example and each dropped layer, so nothing cancels, within an example or between two.
   The result ranks places; it is not an effect, and has no sign.

What one later layer cancels survives in the term that drops this layer, at a layers-th of its size. Costs one forward
and one backward pass a layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import einsum
from torch import Tensor

from circuitfind import processes
from circuitfind.attribution import eap
from circuitfind.attribution.components import AtPlaces, Base, Estimate, place_effects
from circuitfind.attribution.gradients import Ends, check_not_flat, mean_over
from circuitfind.attribution.method import Method, Request, Scored
from circuitfind.batch import Batch
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.memory_plan import HELD
from circuitfind.engine.reader_gradients import Gradients, capture_gradients
from circuitfind.engine.restart import Restart
from circuitfind.engine.sites import Values, attention_scores
from circuitfind.engine.stream_effects import node_effects
from circuitfind.errors import ScoreError
from circuitfind.record import NO_EFFECT

KINDS = ("q", "k")
INSTEAD = ", or use method='atp'"
SIGN = f"{NO_EFFECT}mean magnitude of first-order effects with one layer's gradient dropped, in units of the metric"
NO_LAYER = -1  # of what is no part of a layer's attention or MLP: the embedding, the residual stream


# -------------------------------------------------------------------- queries and keys
def query_key_changes(restart: Restart, kind: str, other: Values, places: Tensor, at_heads: Tensor) -> Tensor:
    """How much replacing each place changes the metric, to first order in the pattern: `[passes, layers, units, spans,
    batch]`.

    `restart`: the base run; `kind`: "q" or "k"; `other`: by layer, what queries or keys are replaced by (may broadcast
    over examples and positions); `places`: `[batch, pos, spans]`, 1 at the positions of each span that is a place of
    its own, else 0; `at_heads`: `[passes, layers, batch, pos, heads, d_head]` gradients before the output projection,
    from passes on the base run's inputs, layers in the order of `other`. ModelError where the model's attention does
    not show its scores.
    """
    layers = zip(other.items(), at_heads.unbind(1), strict=True)
    return torch.stack([_of_layer(restart, layer, kind, new, at, places) for (layer, new), at in layers], dim=1)


def _of_layer(restart: Restart, layer: int, kind: str, other: Tensor, at_heads: Tensor, places: Tensor) -> Tensor:
    """`[passes, units, spans, batch]`."""
    base = restart.base.qkv[layer]
    shared = restart.adapter.layers[layer].values_by_head(base.v).to(at_heads)
    own: Tensor = getattr(base, kind)
    length = own.shape[1]
    scores = attention_scores(restart, layer, kind, own[None], INSTEAD).scores[0]
    held = max(1, HELD // (scores.numel() * scores.element_size()))  # of patterns
    found = []
    for units in torch.split(torch.arange(own.shape[2], device=own.device), min(restart.at_once, held)):
        replaced = own.expand(len(units), *own.shape).clone()
        for values, unit in zip(replaced, units, strict=True):
            values[:, :, unit] = other.expand_as(own)[:, :, unit].to(own)
        new = attention_scores(restart, layer, kind, replaced, INSTEAD).scores
        if kind == "k" and scores.shape[-1] > length:  # no key moves a sink: what does is the model, with the whole row
            new = new + (scores - new)[..., length:]
        some = torch.split(at_heads, held)
        found.append(torch.cat([_changes(kind, scores, new, _at_pattern(at, shared, scores), places) for at in some]))
    return torch.cat(found, dim=1)


def _at_pattern(at_heads: Tensor, values: Tensor, scores: Tensor) -> Tensor:
    """`[passes, batch, heads, query, key]` gradients at the pattern; a sink has no value."""
    gradient = einsum(at_heads, values, "p b i h e, b j h e -> p b h i j")
    return torch.nn.functional.pad(gradient, (0, scores.shape[-1] - gradient.shape[-1]))


def _changes(kind: str, scores: Tensor, new: Tensor, gradient: Tensor, places: Tensor) -> Tensor:
    """`[passes, units, spans, batch]`."""
    if kind == "q":
        moved = einsum(new.softmax(-1) - scores.softmax(-1), gradient, "u b h i j, p b h i j -> p u b i")
    elif bool((places.sum(1) <= 1).all()):
        moved = single_keys(scores, new, gradient)[..., : places.shape[1]]
    else:
        return _keys_together(scores, new, gradient, places)
    return einsum(moved, places, "p u b t, b t s -> p u s b")


def single_keys(scores: Tensor, new: Tensor, gradient: Tensor) -> Tensor:
    """`[passes, units, batch, key]`: what replacing one key alone does, for each key. `scores`: `[batch, heads, query,
    key]`, finite; `new`: `[units, batch, heads, query, key]`, with all keys of a unit replaced; `gradient`: `[passes,
    batch, heads, query, key]` of the metric at the pattern."""
    pattern, top = scores.softmax(-1), scores.argmax(-1, keepdim=True)
    # Of all keys but t. Without its largest score a row has to be summed anew: the rest may be too small for 1 - a_it.
    without = scores.scatter(-1, top, torch.finfo(scores.dtype).min)
    is_top = torch.zeros_like(pattern, dtype=torch.bool).scatter(-1, top, True)
    left = torch.where(is_top, 0, pattern)
    others = torch.where(is_top, without.logsumexp(-1, True), scores.logsumexp(-1, True) + torch.log1p(-left))
    total = (pattern * gradient).sum(-1, keepdim=True)
    of_rest = (without.softmax(-1) * gradient).sum(-1, keepdim=True)
    mean = torch.where(is_top, of_rest, (total - left * gradient) / (1 - left))
    change = torch.sigmoid(new - others) - torch.sigmoid(scores - others)
    return einsum(change, gradient - mean, "u b h i t, p b h i t -> p u b t")


def _keys_together(scores: Tensor, new: Tensor, gradient: Tensor, places: Tensor) -> Tensor:
    """`[passes, units, spans, batch]`: what replacing a span's keys does."""
    before, length = scores.softmax(-1), places.shape[1]
    found = []
    for place in places.bool().unbind(-1):
        columns = torch.nn.functional.pad(place, (0, scores.shape[-1] - length))[:, None, None]
        after = torch.where(columns, new, scores).softmax(-1)
        found.append(einsum(after - before, gradient, "u b h i j, p b h i j -> p u b"))
    return torch.stack(found, dim=2)


# -------------------------------------------------------------------- GradDrop
def dropped(experiment: Experiment, base: Base) -> Iterator[Gradients]:
    """Gradients on a run's inputs with layer 0 dropped, then layer 1, and so on."""
    for layer in range(experiment.graph.n_layers):
        held = {("attn_out", layer): base.run.attn_out[layer], ("mlp_out", layer): base.run.mlp_out[layer]}
        yield capture_gradients(
            experiment.adapter, base.inputs, lambda logits: experiment.metric(logits, base.batch), outputs=held
        )


def mean_magnitude(effects: Tensor, layers: list[int]) -> Tensor:
    """`[places, ...]` from effects `[dropped layer, places, ...]`; `layers`: of each place, `NO_LAYER` for one of the
    residual stream."""
    at = torch.arange(len(effects), device=effects.device).unsqueeze(1)
    counts = (at != torch.tensor(layers, device=effects.device)).to(effects)
    counts = counts.view(*counts.shape, *[1] * (effects.ndim - 2))
    return (effects.abs() * counts).sum(0) / counts.sum(0)


def node_magnitudes(experiment: Experiment) -> Tensor:
    """`[writers]` scores, never negative; raises ScoreError where the gradient vanishes."""
    adapter, metric, graph = experiment.adapter, experiment.metric, experiment.graph
    layers = [NO_LAYER, *(graph.layer_of(writer) for writer in range(1, graph.n_writers))]
    sizes: list[float] = []

    def one(batch: Batch, _: slice) -> Tensor:
        ends, found = Ends(experiment, batch), []
        if experiment.setting.noising:
            base = Base(batch.clean, ends.clean, ends.batch)
        else:
            base = Base(batch.corrupted, ends.corrupted, ends.batch)
        for run, gradients, values in dropped(experiment, base):
            found.append(node_effects(adapter, ends.delta, run, gradients).sum(-1))
            sizes.append(float(values.abs().max()))
        return mean_magnitude(torch.stack(found), layers).sum(-1)

    total = mean_over(experiment, one, "node scores")
    check_not_flat(metric, total, max(max(one, default=0.0) for one in processes.gathered(lambda: sizes)))
    return total


def _passes(experiment: Experiment, base: Base, effects: AtPlaces) -> Iterator[tuple[Tensor, float]]:
    for run, gradients, values in dropped(experiment, base):
        yield effects(experiment.adapter, run, gradients), float(values.abs().max())


def score(experiment: Experiment, request: Request) -> Scored:
    """Nodes, or places: queries and keys by the QK fix, too. Refuses a model of one layer."""
    if experiment.graph.n_layers < 2:
        raise ScoreError("'atp-star' drops the gradient of every other layer, and this model has one: use 'atp'")
    if request.level == "node":
        return node_magnitudes(experiment)
    changes = query_key_changes if request.what in KINDS else None
    return place_effects(experiment, STAR, request, Estimate(_passes, changes, mean_magnitude))


QK: Method = Method(
    "atp-qk",
    "attribution patching of queries and keys with the softmax computed",
    "Kramár et al. 2024",
    "2 forward, 1 backward, and 1 attention of the layer a head",
    ("place",),
    score=lambda experiment, request: place_effects(experiment, QK, request, Estimate(changes=query_key_changes)),
    points=eap.one_end,
    at_clean=True,
    whats=KINDS,
)
STAR = Method(
    "atp-star",
    "attribution patching of nodes, each layer's gradient dropped",
    "Kramár et al. 2024",
    "2 forward, and 1 forward and backward a layer",
    ("node", "place"),
    score=score,
    sign=lambda level, options: SIGN,
    at_clean=True,
    spellings=("atp*", "atpstar", "graddrop"),
)
