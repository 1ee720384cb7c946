"""AtP* (Kramár et al. 2024): attribution patching that recomputes the softmax for queries and keys, and GradDrop.

**The QK fix** (3.1.1; `atp-qk`, and within `atp-star`):

    effect(place) ~ - sum over heads, queries i and keys j of (a'_ij - a_ij) da_ij

`a` is the attention pattern in the run where the gradient was taken, `a'` the pattern after this place's queries or
keys are replaced, and `da` the metric's gradient at the pattern: the gradient at the head's output, times the values.

1. The layer's attention runs again with one head's queries or keys replaced at all positions, and its scores are
   recorded (`engine/sites.py`). Each score depends on one query and one key, so `s'_ij` also holds if fewer positions
   are replaced. Other heads' scores change only if a norm spans all heads (OLMo 2), and then their change counts, too.
2. Queries: row i of the pattern depends on query i alone, so a place's effect is the sum over its positions' rows.
3. Keys at all positions or in a span: replace the columns of these positions in the scores and compute the softmax.
4. Replacing the key of one position t changes one column. The other entries of a row keep their proportions, so no
   softmax is needed:

       effect(k_t) ~ - sum over i of (a'_it - a_it) (da_it - mean of da_ij over j != t, weighted by a_ij)
       a'_it = sigmoid(s'_it - log of the sum over j != t of exp s_ij)

The effect of a grouped key includes all query heads that read it. When denoising, the base run is the corrupted run and
the sign is reversed. The cost is one run of a layer's attention for each of its heads or key/value heads, in batches.

**GradDrop** (3.1.2; `atp-star`): the mean magnitude of first-order effects with each layer's gradient dropped in turn.

    score(n) = mean over examples of the mean over layers l without n of |I_l(n)|

1. `I_l(n)` is the first-order effect of n when no gradient flows through layer l's attention and MLP: their outputs
   are constants in the backward pass. The forward pass is unchanged.
2. A node of layer l has no `I_l`: its mean is over the other layers. For the residual stream it is over all layers.
3. Magnitudes are taken for each example and each dropped layer, so effects of different examples or dropped layers
   cannot cancel. The result ranks places; it is not an effect and has no sign.

An effect that one later layer cancels survives in the term that drops this layer, divided by the number of layers. The
cost is one forward and one backward pass per layer.
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
NO_LAYER = -1  # the layer of the embedding and of the residual stream, which are no part of an attention or MLP


# -------------------------------------------------------------------- queries and keys
def query_key_changes(restart: Restart, kind: str, other: Values, places: Tensor, at_heads: Tensor) -> Tensor:
    """Compute how much replacing each place changes the metric, to first order in the pattern: `[passes, layers,
    units, spans, batch]`. ModelError if the model's attention does not expose its scores.

    `restart`: the base run. `kind`: "q" or "k". `other`: by layer, the queries or keys to put in (may broadcast over
    examples and positions). `places`: `[batch, pos, spans]`, 1 at the positions of each span, else 0. `at_heads`:
    `[passes, layers, batch, pos, heads, d_head]`, gradients at the input of the output projection, from passes on the
    base run's inputs; layers in the order of `other`.
    """
    layers = zip(other.items(), at_heads.unbind(1), strict=True)
    return torch.stack([_layer_changes(restart, layer, kind, new, at, places) for (layer, new), at in layers], dim=1)


def _layer_changes(restart: Restart, layer: int, kind: str, other: Tensor, at_heads: Tensor, places: Tensor) -> Tensor:
    """Return `query_key_changes` of one layer, `[passes, units, spans, batch]`."""
    base = restart.base.qkv[layer]
    shared = restart.adapter.layers[layer].values_by_head(base.v).to(at_heads)
    own: Tensor = getattr(base, kind)
    length = own.shape[1]
    scores = attention_scores(restart, layer, kind, own[None], INSTEAD).scores[0]
    held = max(1, HELD // (scores.numel() * scores.element_size()))  # patterns that fit in the budget
    found = []
    for units in torch.split(torch.arange(own.shape[2], device=own.device), min(restart.at_once, held)):
        replaced = own.expand(len(units), *own.shape).clone()
        for values, unit in zip(replaced, units, strict=True):
            values[:, :, unit] = other.expand_as(own)[:, :, unit].to(own)
        new = attention_scores(restart, layer, kind, replaced, INSTEAD).scores
        if kind == "k" and scores.shape[-1] > length:
            # The last column is the attention sink's, which depends on no key. If it moved, the model has shifted the
            # whole row by a constant: shift it back.
            new = new + (scores - new)[..., length:]
        some = torch.split(at_heads, held)
        found.append(torch.cat([_changes(kind, scores, new, _at_pattern(at, shared, scores), places) for at in some]))
    return torch.cat(found, dim=1)


def _at_pattern(at_heads: Tensor, values: Tensor, scores: Tensor) -> Tensor:
    """Return the gradients at the pattern, `[passes, batch, heads, query, key]`; 0 at sinks, which have no value."""
    gradient = einsum(at_heads, values, "p b i h e, b j h e -> p b h i j")
    return torch.nn.functional.pad(gradient, (0, scores.shape[-1] - gradient.shape[-1]))


def _changes(kind: str, scores: Tensor, new: Tensor, gradient: Tensor, places: Tensor) -> Tensor:
    """Return the changes `[passes, units, spans, batch]` from scores before and after replacing some units' queries or
    keys, with shapes as for `single_keys`."""
    if kind == "q":
        moved = einsum(new.softmax(-1) - scores.softmax(-1), gradient, "u b h i j, p b h i j -> p u b i")
    elif bool((places.sum(1) <= 1).all()):
        moved = single_keys(scores, new, gradient)[..., : places.shape[1]]
    else:
        return _keys_together(scores, new, gradient, places)
    return einsum(moved, places, "p u b t, b t s -> p u s b")


def single_keys(scores: Tensor, new: Tensor, gradient: Tensor) -> Tensor:
    """Compute how much replacing one key alone changes the metric, for each key: `[passes, units, batch, key]`.

    `scores`: `[batch, heads, query, key]`, finite. `new`: `[units, batch, heads, query, key]`, all keys of a unit
    replaced. `gradient`: `[passes, batch, heads, query, key]`, of the metric at the pattern.
    """
    pattern, top = scores.softmax(-1), scores.argmax(-1, keepdim=True)
    # The log-sum-exp over keys other than t. If t has the row's largest score, sum the others directly: 1 - a_it would
    # lose all precision.
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
    """Compute how much replacing all keys of a span changes the metric: `[passes, units, spans, batch]`."""
    before, length = scores.softmax(-1), places.shape[1]
    found = []
    for place in places.bool().unbind(-1):
        columns = torch.nn.functional.pad(place, (0, scores.shape[-1] - length))[:, None, None]
        after = torch.where(columns, new, scores).softmax(-1)
        found.append(einsum(after - before, gradient, "u b h i j, p b h i j -> p u b"))
    return torch.stack(found, dim=2)


# -------------------------------------------------------------------- GradDrop
def dropped(experiment: Experiment, base: Base) -> Iterator[Gradients]:
    """Yield gradients on the base run's inputs with layer 0 dropped, then with layer 1 dropped, and so on."""
    for layer in range(experiment.graph.n_layers):
        held = {("attn_out", layer): base.run.attn_out[layer], ("mlp_out", layer): base.run.mlp_out[layer]}
        yield capture_gradients(
            experiment.adapter, base.inputs, lambda logits: experiment.metric(logits, base.batch), outputs=held
        )


def mean_magnitude(effects: Tensor, layers: list[int]) -> Tensor:
    """Average magnitudes of effects `[dropped layer, places, ...]` over the dropped layers; return `[places, ...]`.
    `layers`: the layer of each place, which does not count; `NO_LAYER` if all count."""
    at = torch.arange(len(effects), device=effects.device).unsqueeze(1)
    counts = (at != torch.tensor(layers, device=effects.device)).to(effects)
    counts = counts.view(*counts.shape, *[1] * (effects.ndim - 2))
    return (effects.abs() * counts).sum(0) / counts.sum(0)


def node_magnitudes(experiment: Experiment) -> Tensor:
    """Return the GradDrop scores of nodes, `[writers]`, never negative. ScoreError if the gradient vanishes."""
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
    """Score nodes or places with GradDrop; queries and keys also with the QK fix. ScoreError for a one-layer model."""
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
