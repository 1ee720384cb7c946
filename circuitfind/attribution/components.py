"""Attribution patching of the places of a sweep: an estimate for every place, from one backward pass.

    effect(place) ~ (its clean value - its ablated value) . gradient of the metric at it      (Nanda 2023)

1. Both sides of the pairs are run, and the values at the places' site are kept.
2. Gradients are taken at the points of the method: the clean run for noising, the corrupted run for denoising ("atp"),
   both ("clean-corrupted"), or a line between them ("eap-ig-inputs"). `engine/stream_effects.py` brings them to the
   site.
3. Products are summed over each unit's features and over positions: all, or those of each span that the sweep goes by.
4. Two methods differ (`Estimate`, `atp_star.py`): for queries and keys "atp-qk" and "atp-star" use the change of the
   attention pattern, and "atp-star" takes mean magnitudes with each layer's gradient dropped, which are not effects.
5. A norm takes the scale off what enters it. Where an ablation changes nothing but the scale (zero ablation of all that
   a post-norm reads, or of queries under a norm of their own), the gradient stands at a right angle to the change and
   every estimate is rounding noise. Such estimates are refused.

The same places, axes and signs as those of `circuitfind.patch`, which measures what this estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from einops import einsum
from torch import Tensor

from circuitfind import processes
from circuitfind.attribution.gradients import Pass, check_not_flat, each_point
from circuitfind.attribution.method import Method, Request
from circuitfind.batch import Batch, Inputs
from circuitfind.engine.capture import Run
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.measure import as_numpy
from circuitfind.engine.reader_gradients import ReaderGradients
from circuitfind.engine.restart import Restart
from circuitfind.engine.sites import Values
from circuitfind.engine.stream_effects import head_gradients, site_effects
from circuitfind.errors import ScoreError
from circuitfind.models.adapter import Adapter
from circuitfind.patching.patch import SweepPlan, planned
from circuitfind.patching.sweep import Sweep


class Base(NamedTuple):
    """The run that effects are changes of: its inputs, the run, and the batch that the metric is given."""

    inputs: Inputs
    run: Run
    batch: Batch


RIGHT_ANGLE = 1e-3  # a cosine that an eps within a norm, or rounding, may leave
BETTER = {
    "v": "method='relp'",
    "q": "method='atp-qk'",
    "k": "method='atp-qk'",
    "attn-out": "what='attn'",
    "mlp-out": "what='mlp'",
}

AtPlaces = Callable[[Adapter, Run, ReaderGradients], Tensor]
Passes = Callable[[Experiment, Base, AtPlaces], Iterable[tuple[Tensor, float]]]
Changes = Callable[[Restart, str, Values, Tensor, Tensor], Tensor]


class Estimate(NamedTuple):
    """How a method differs from a sum of first-order effects over its points. `passes`: effects from gradients that are
    taken in another way, and the metric's largest magnitude there; `changes`: `[passes, layers, units, spans, batch]`,
    how much replacing each place changes the metric, from the replacement and the gradients at the heads; `combine`:
    from the effects of all passes to the scores, given the plan's layers, -1 for the stream."""

    passes: Passes | None = None
    changes: Changes | None = None
    combine: Callable[[Tensor, list[int]], Tensor] = lambda total, layers: total.sum(0)


def place_effects(experiment: Experiment, method: Method, request: Request, estimate: Estimate | None = None) -> Sweep:
    """Estimates for every place of one kind, per example too; errors as from `circuitfind.patch`, a ScoreError where
    the gradient vanishes, and a ModelError where the model's attention does not show its scores."""
    what, adapter, noising = request.what, experiment.adapter, experiment.setting.noising
    passes, changes, combine = estimate or Estimate()
    plan = planned(experiment, request.where)
    _ = plan.means  # of all pairs, so by all processes together
    own_layers = [-1 if plan.kind.in_stream else layer for layer in plan.layers]
    at = (experiment.setting.direction, adapter.graph.n_layers, request.options)
    points = method.points(*at) if method.points else []
    reach: list[float] = []  # how much the stream's end could move the metric, and the metric itself
    values: list[float] = []
    cosines: list[float] = []  # the largest between the change of a place and the gradient, where there are both

    def one(batch: Batch, rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sides = plan.capture(batch)
        places = _members(plan, rows, batch)
        delta = {at: sides.own[at].to(adapter.work) - sides.other[at].to(adapter.work) for at in plan.layers}

        def effects(adapter: Adapter, run: Run, gradients: ReaderGradients) -> Tensor:
            reach.append(float((gradients.final * run.resid[-1]).abs().max()))
            if changes is not None:  # a pattern's change serves all passes: their gradients wait for it
                found = head_gradients(adapter, plan.layers, run, gradients)
                return torch.stack([found[layer] for layer in plan.layers])
            met = site_effects(adapter, plan.kind.site, delta, run, gradients)
            value, most = (
                einsum(torch.stack(each), places, "l b t u, b t s -> l u s b")
                for each in zip(*(met[layer] for layer in plan.layers), strict=True)
            )
            if (most > 0).any():
                cosines.append(float((value.abs() / most)[most > 0].max()))
            return value

        base, other = Base(batch.clean, sides.clean, sides.batch), sides.other
        if not noising:
            base, other = Base(batch.corrupted, sides.corrupted, sides.batch), sides.own

        def weighted(at: Pass) -> Tensor:
            return at.weight * effects(at.adapter, at.run, at.gradients)

        found: list[Tensor] = []
        if passes is None:
            values.append(each_point(experiment, batch, points, lambda at: found.append(weighted(at))))
        else:
            found, sizes = map(list, zip(*passes(experiment, base, effects), strict=True))
            values.extend(sizes)
        total = torch.stack(found)
        if changes is not None:
            changed = changes(Restart(adapter, base.inputs, base.run), what, other, places, total)
            total = -changed if noising else changed
        full, empty = (as_numpy(experiment.metric(logits, sides.batch)) for logits in (sides.full, sides.empty))
        return as_numpy(combine(total, own_layers)), full, empty

    parts = [part for _, part in experiment.in_batches(one, "estimates")]
    noted = processes.gathered(lambda: (reach, values, cosines))
    reach, values, cosines = ([one for each in lists for one in each] for lists in zip(*noted, strict=True))
    check_not_flat(experiment.metric, torch.tensor(reach), max(values))
    _check_angle(experiment, method, what, cosines)
    effects, full, empty = (np.concatenate(values, axis=-1) for values in zip(*parts, strict=True))
    sign = method.sign("place", request.options)
    if sign.startswith("effect"):
        sign = plan.sign
    record = experiment.record(method.name, level="node", **plan.settings, **request.options)
    shaped = effects.reshape(*plan.shape, -1)
    sweep = Sweep(what, experiment.graph, plan.axes, shaped, full, empty, replace(record, sign=sign))
    if not np.isfinite(effects).all():
        name = sweep.names()[int((~np.isfinite(sweep.effects)).ravel().argmax())]
        raise ScoreError(f"the estimate of {name} is NaN or infinite: look for these in the logits or in your metric")
    return sweep


def _check_angle(experiment: Experiment, method: Method, what: str, cosines: list[float]) -> None:
    least = max(RIGHT_ANGLE, 2 * torch.finfo(experiment.adapter.dtype).eps)
    if cosines and max(cosines) < least:
        other = f"use {BETTER[what]} or method='exact'" if what in BETTER else "use method='exact'"
        raise ScoreError(
            f"'{method.name}' cannot estimate what='{what}' under ablation '{experiment.ablation.name}' in this model:"
            " a norm that comes next takes off the scale, and nothing else is changed. Every estimate would be rounding"
            f" noise around 0: {other}"
        )


def _members(plan: SweepPlan, rows: slice, batch: Batch) -> Tensor:
    """`[batch, pos, spans]`: 1 at the positions of each span; all positions are one span by default."""
    adapter, numbers = plan.experiment.adapter, plan.numbers(rows, batch)
    if plan.spans is None or numbers is None:
        return torch.ones(*batch.clean.ids.shape, 1, dtype=adapter.work, device=adapter.device)
    labels = torch.arange(len(plan.spans.labels), device=numbers.device)
    return (numbers.unsqueeze(-1) == labels).to(adapter.work)
