"""Attribution patching of whatever a sweep patches: an estimate for every place, from one backward pass.

    effect(place) ~ (its clean value - its ablated value) . gradient of the metric at it      (Nanda 2023)

1. Both sides of the pairs are run, and the values noted of the site that the places are units of.
2. Gradients are taken at the points of the method: the clean run for noising, the corrupted run for denoising ("atp"),
   both ("clean-corrupted"), or a line between them ("eap-ig-inputs"). `engine/site_effects.py` brings them to the site.
3. Products are summed over each unit's features and over positions: all of them, or those of each stretch that the
   sweep goes by.
4. "atp-qk" and "atp-star" (Kramár et al. 2024) take the change of the attention pattern in place of that of queries and
   keys (`qk_fix.py`). "atp-star" then takes magnitudes with each layer's gradient dropped (`grad_drop.py`): no effects.

The same places, axes and signs as those of `circuitfind.patch`, which measures what this estimates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from einops import einsum
from torch import Tensor

from circuitfind.attribution import grad_drop, qk_fix
from circuitfind.attribution.gradients import Pairs, Point
from circuitfind.batch import Batch
from circuitfind.engine.capture import ReaderGradients, Run, Writers
from circuitfind.engine.memory import in_batches
from circuitfind.engine.restart import Restart
from circuitfind.engine.site_effects import head_gradients, site_effects
from circuitfind.errors import ScoreError
from circuitfind.models.adapter import Adapter
from circuitfind.models.load import Model
from circuitfind.patching.measure import Plan, as_numpy, capture_sides, means_of
from circuitfind.patching.patch import SIGNS, planned, shape_of
from circuitfind.patching.places import KINDS
from circuitfind.patching.sweep import Sweep
from circuitfind.tasks.bound import BoundTask


def component_effects(
    model: Model,
    bound: BoundTask,
    what: str,
    method: str,
    points: list[Point],
    *,
    by_position: bool | None = None,
    by_span: bool = False,
    layers: int | Iterable[int] | None = None,
    ablation: str = "corrupted",
    direction: str = "noising",
    batch_size: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> Sweep:
    """Estimates for every place of one kind.

    Args:
        what, by_position, by_span, layers, ablation, direction: as for `circuitfind.patch`.
        method, points: its name, and where it takes gradients.
        settings: of the method, for the record.

    Returns:
        A `Sweep` of estimates in units of the metric, per example too ("atp-star": magnitudes).

    Raises:
        ScoreError: as for `circuitfind.patch`; or the gradient vanishes; 'atp-star' of one layer.
        ModelError: the model's attention does not show its scores.
    """
    adapter = model.adapter
    if method == "atp-star":
        grad_drop.check_layers(adapter.graph)
    plan, axes = planned(adapter, bound, what, by_position, by_span, layers, ablation, direction)
    pairs = Pairs.of(adapter, bound.batch, bound.metric, ablation, seed, batch_size)
    means = means_of(adapter, pairs.batch, plan, batch_size)
    mended = method in ("atp-qk", "atp-star") and what in qk_fix.KINDS
    own_layers = [grad_drop.NO_LAYER if what in grad_drop.STREAM else layer for layer in plan.layers]
    reach: list[float] = []  # how much the stream's end could move the metric, and the metric itself
    values: list[float] = []

    def one(batch: Batch, rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sides = capture_sides(adapter, batch, plan, bound.metric, means)
        delta = {
            layer: sides.own[layer].to(adapter.work) - sides.other[layer].to(adapter.work) for layer in plan.layers
        }
        places = _places(plan, rows, batch, adapter)

        def effects(adapter: Adapter, _: Writers, run: Run, gradients: ReaderGradients) -> Tensor:
            reach.append(float((gradients.final * run.resid[-1]).abs().max()))
            if mended:  # a pattern's change serves all passes: their gradients wait for it
                found = head_gradients(adapter, plan.layers, run, gradients)
                return torch.stack([found[layer] for layer in plan.layers])
            found = site_effects(adapter, KINDS[what].site, delta, run, gradients)
            return einsum(torch.stack([found[layer] for layer in plan.layers]), places, "l b t u, b t s -> l u s b")

        base, inputs, other, sign = sides.clean, batch.clean, sides.other, -1
        if direction == "denoising":
            base, inputs, other, sign = sides.corrupted, batch.corrupted, sides.own, 1
        if method == "atp-star":
            each = grad_drop.dropped(adapter, inputs, base, sides.batch, bound.metric)
            passes = [(effects(adapter, base.writers, run, at), float(size.abs().max())) for run, at, size in each]
        else:
            passes = list(pairs._effects(batch, points, effects))
        values.extend(size for _, size in passes)
        total = torch.stack([found for found, _ in passes])
        if mended:
            total = sign * qk_fix.query_key_changes(Restart(adapter, inputs, base), what, other, places, total)
        total = grad_drop.mean_magnitude(total, own_layers) if method == "atp-star" else total.sum(0)
        return as_numpy(total), as_numpy(sides.full), as_numpy(sides.empty)

    parts = [part for _, part in in_batches(adapter, pairs.batch, one, batch_size, "estimates")]
    pairs._check_not_flat(torch.tensor(reach), max(values))
    effects, full, empty = (np.concatenate(values, axis=-1) for values in zip(*parts, strict=True))
    record = bound.record(method, ablation, direction, seed, level="node", **plan.settings, **settings)
    sign = f"effect: {SIGNS[direction]}; positive = the place supports the behaviour"
    record = replace(record, sign=grad_drop.SIGN if method == "atp-star" else sign)
    sweep = Sweep(what, model.graph, axes, effects.reshape(*shape_of(axes), -1), full, empty, record)
    if not np.isfinite(effects).all():
        name = sweep.names()[int((~np.isfinite(sweep.effects)).ravel().argmax())]
        raise ScoreError(f"the estimate of {name} is NaN or infinite: look for these in the logits or in your metric")
    return sweep


def _places(plan: Plan, rows: slice, batch: Batch, adapter: Adapter) -> Tensor:
    """`[batch, pos, stretches]`: 1 at the positions of each stretch; all positions are one stretch by default."""
    numbers = plan.numbers(rows, batch)
    if plan.stretches is None or numbers is None:
        return torch.ones(*batch.clean.ids.shape, 1, dtype=adapter.work, device=adapter.device)
    labels = torch.arange(len(plan.stretches.axis.labels), device=numbers.device)
    return (numbers.unsqueeze(-1) == labels).to(adapter.work)
