"""A head's attention scores as a bilinear form of its projected query at one token and its projected key at another.

Between the projections and the softmax a model rotates queries and keys, may normalise them (Gemma 3, Qwen 3, OLMo 2),
scales them, and may add a bias that depends on the distance (ALiBi) and cap the score (Gemma 2). With the scales of
these norms held as they are on this prompt,

    score(i, j) = scale (q_i Q_i + a_i) . (k_j K_j + b_j) + position(i, j)      and then the cap, if there is one

where `q_i` and `k_j` are the projections' outputs. Q, a, K and b are found by running the model's own code:

1. The layer's eager attention runs with unit vectors in place of its queries, then in place of its keys, and with
   zeros. The factors of the product before the softmax (`engine/sites.py`) are then the rows of Q or K (plus a or b),
   and a or b.
2. A norm of queries or keys scales all unit vectors alike, and the real vectors differently. The ratio, one number for
   each token, is fitted.
3. `scale` is fitted to the change of the scores when the queries are set to zero; the rest of the scores is `position`.
4. Each step must reproduce the model's own numbers. Otherwise the head is refused, because its scores are not of this
   form.

`read_parts` decomposes `q_i` or `k_j` into the part of each writer, through the block's norm with its actual scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import einsum
from torch import Tensor

from circuitfind.engine.capture import Run
from circuitfind.engine.restart import Restart
from circuitfind.engine.sites import attention_scores, tolerance
from circuitfind.errors import ModelError
from circuitfind.models.adapter import Adapter
from circuitfind.models.layer import LayerView

CAP = "attn_logit_softcapping"  # the config's attribute
NEARLY = 0.9  # of the cap: larger scores are not used to fit the scale
MASKED = 64  # scores below the dtype's least number divided by this are masked: some families scale after masking
TINY = 1e-30


class Affine(NamedTuple):
    """The map from a head's projected queries or keys x to a factor of the scores: `x @ linear[pos] + constant[pos]`,
    with `linear [pos, d_read, features]` and `constant [pos, features]`."""

    linear: Tensor
    constant: Tensor


class ScoreForm(NamedTuple):
    """One head's scores on one prompt. All matrices are `[query, key]`.

    Attributes:
        queries, keys, scale: the bilinear form.
        position: the bias that depends on the distance (ALiBi), else zeros.
        scores: what enters the softmax, up to a constant for each query.
        visible: whether a query can attend to a key.
        pattern: the attention weights.
        cap: None, or c if the scores are `c tanh(x / c)` of the form's values x.
    """

    queries: Affine
    keys: Affine
    scale: float
    position: Tensor
    scores: Tensor
    visible: Tensor
    pattern: Tensor
    cap: float | None

    def capped(self, scores: Tensor) -> Tensor:
        return scores if self.cap is None else self.cap * torch.tanh(scores / self.cap)


def score_form(restart: Restart, layer: int, head: int) -> ScoreForm:
    """Return the form of a head's scores on the single prompt of `restart`; ModelError if the model does not show its
    scores, or they are not of this form."""
    adapter, base = restart.adapter, restart.base.qkv[layer]
    if type(adapter.layers[layer]) is not LayerView:
        refuse(adapter, "keys of all heads are read through one latent and its norm")
    queries, keys = (_affine(restart, layer, head, kind) for kind in "qk")

    def run(values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores `[query, key (and sink)]` and the product of their factors `[query, key]`."""
        scores, *factors = (
            _of_head(part, head, adapter.graph.n_heads)[0]
            for part in attention_scores(restart, layer, "q", values[None])
        )
        return scores, factors[0] @ factors[1].T

    def beside_own(values: Tensor) -> Tensor:
        """Subtract the score of the query's own token, because some families subtract a query's largest score."""
        return (values - values.diagonal().unsqueeze(-1))[fit & fit.diagonal().unsqueeze(-1)]

    (given, product), (empty, least) = run(base.q), run(torch.zeros_like(base.q))
    cap: float | None = getattr(adapter.config, CAP, None)
    scores, before = (part[:, : len(part)] for part in (given, empty))
    visible = fit = scores > torch.finfo(adapter.dtype).min / MASKED
    limit, uncapped = tolerance(adapter) * float(scores[visible].abs().max().clamp(min=1e-3)), scores
    if cap is not None:
        fit = visible & (scores.abs() < NEARLY * cap) & (before.abs() < NEARLY * cap)
        uncapped, before = (cap * torch.atanh(part / cap) for part in (scores, before))
    moved, product_moved = beside_own(uncapped - before), beside_own(product - least)
    scale = float(moved @ product_moved / (product_moved @ product_moved).clamp(min=TINY))
    left = torch.where(fit, uncapped - scale * product, 0)
    flat = bool((beside_own(left).abs() <= limit).all())
    shared = left.diagonal().unsqueeze(-1) if flat and cap is None else torch.zeros_like(left[:, :1])
    position = torch.zeros_like(left) if flat else left
    pattern = given.softmax(-1)[:, : len(given)]
    form = ScoreForm(queries, keys, scale, position, scores - shared, visible, pattern, cap)
    off = (form.capped(scale * product + position) - form.scores)[visible]
    if bool((torch.cat([off, moved - scale * product_moved]).abs() > limit).any()):
        refuse(adapter, "scores are not a product of queries and keys")
    return form


def refuse(adapter: Adapter, why: str) -> None:
    raise ModelError(f"the attention of this model ('{adapter.kind}') cannot be divided by nodes: its {why}")


def _of_head(part: Tensor, head: int, n_heads: int) -> Tensor:
    """Return a head's part of the single prompt, `[patches, ...]`; some families do not repeat keys of shared heads."""
    return part[:, 0, head * part.shape[2] // n_heads]


def _affine(restart: Restart, layer: int, head: int, kind: str) -> Affine:
    """Find the map of a head's queries or keys, from runs with the layer's own, with scaled unit vectors and zeros."""
    adapter, own = restart.adapter, getattr(restart.base.qkv[layer], kind)
    size = float(own.float().pow(2).mean().sqrt().clamp(min=1e-3))
    probes = torch.cat([torch.eye(own.shape[-1]) * size, torch.zeros(1, own.shape[-1])]).to(own)
    values = torch.cat([own[None], probes[:, None, None, None].expand(-1, *own.shape[:-1], -1)])
    runs = (attention_scores(restart, layer, kind, some) for some in values.split(restart.at_once))
    became = torch.cat(
        [_of_head(one.queries if kind == "q" else one.keys, head, adapter.graph.n_heads) for one in runs]
    )
    real, *units, constant = became  # pos features
    linear = torch.stack([unit - constant for unit in units], dim=1) / size
    projected = own[0, :, head * own.shape[2] // adapter.graph.n_heads].to(adapter.work)
    made, wanted = einsum(projected, linear, "t d, t d e -> t e"), real - constant
    ratio = (wanted * made).sum(-1, keepdim=True) / made.pow(2).sum(-1, keepdim=True).clamp(min=TINY)
    if bool(((ratio * made - wanted).abs() > tolerance(adapter) * wanted.abs().max()).any()):
        refuse(adapter, f"{'queries' if kind == 'q' else 'keys'} are not linear in what the projection returns")
    return Affine(linear * ratio.unsqueeze(-1), constant)


def read_parts(adapter: Adapter, run: Run, layer: int, kind: str, head: int, positions: Tensor) -> Tensor:
    """Return what each writer before a layer, and last all biases together, add to a head's projected query ("q") or
    key ("k") on the single prompt of a run: `[positions, writers + 1, d_read]`."""
    view, at = adapter.layers[layer], head if kind == "q" else head // adapter.graph.group
    raw: Tensor = getattr(view.qkv_weight(), kind)[:, at]  # d_model d_read
    norm, bias = view.attn_norm, view.qkv_bias()
    weight = raw if norm is None else norm.fold(raw)
    constants = torch.zeros_like(raw[:, 0])
    parts = [(run.resid[0][0, positions].to(adapter.work) @ weight).unsqueeze(1)]
    for earlier, writing in enumerate(adapter.layers[:layer]):
        heads, mlp = run.heads[earlier][0, positions], run.mlps[earlier][0, positions]
        parts += [einsum(heads, writing.output_weight() @ weight, "t h e, h e d -> t h d"), (mlp @ weight).unsqueeze(1)]
        for constant in writing.constants():
            constants = constants if constant is None else constants + constant
    together = torch.cat([*parts, (constants @ weight).expand(len(positions), 1, -1)], dim=1)
    if norm is not None:
        together *= norm.scale(run.resid[layer][0, positions].to(adapter.work)).unsqueeze(1)
    if norm is not None and norm.bias is not None:
        together[:, -1] += norm.bias @ raw
    if bias is not None:
        together[:, -1] += getattr(bias, kind)[at]
    return together
