"""Attribution patching of the places of a sweep: an estimate for every place, from one backward pass.

    effect(place) ~ (its clean value - its ablated value) . gradient of the metric at it      (Nanda 2023)

1. The clean and the corrupted prompts are run, and the values at the places' site are kept.
2. Gradients are taken at the points of the method: in the clean run for noising and the corrupted run for denoising
   ("atp"), in both ("clean-corrupted"), or on a line between them ("eap-ig-inputs"). `engine/stream_effects.py` pulls
   them back to the site.
3. Products are summed over each unit's features and over positions: all of them, or each position or span separately.
4. Two methods differ (`Estimate`, `atp_star.py`): for queries and keys, "atp-qk" and "atp-star" use the change of the
   attention pattern, and "atp-star" takes mean magnitudes with each layer's gradient dropped, which are not effects.
5. A norm's output does not depend on the scale of its input. If an ablation changes only this scale (zero ablation of
   everything that a post-norm reads, or of queries that have a norm of their own), the gradient is orthogonal to the
   change and every estimate is rounding noise. Such estimates are refused.

Places, axes and signs are those of `circuitfind.patch`, which measures what this estimates.
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
    """The run that is patched: its inputs, the recorded run, and the batch that the metric gets."""

    inputs: Inputs
    run: Run
    batch: Batch


RIGHT_ANGLE = 1e-3  # a norm's eps, or rounding, can raise the cosine of a right angle to this
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
    """How a method differs from the sum of first-order effects over its points.

    `passes`: takes the gradients in another way, and yields the effects of each backward pass and the metric's largest
    magnitude in it. `changes`: returns `[passes, layers, units, spans, batch]`, how much replacing each place changes
    the metric, from the replacement and the gradients at the heads (`atp_star.query_key_changes`). `combine`: turns the
    effects of all passes into scores, given the layers that are swept, each -1 in sweeps of the residual stream.
    """

    passes: Passes | None = None
    changes: Changes | None = None
    combine: Callable[[Tensor, list[int]], Tensor] = lambda total, layers: total.sum(0)


def place_effects(experiment: Experiment, method: Method, request: Request, estimate: Estimate | None = None) -> Sweep:
    """Estimate the effect of every place of one kind, on each example.

    Raises the errors of `circuitfind.patch`, a ScoreError if the gradient vanishes, and a ModelError if attention
    scores are needed and the model's attention does not expose them.
    """
    what, adapter, noising = request.what, experiment.adapter, experiment.setting.noising
    passes, changes, combine = estimate or Estimate()
    plan = planned(experiment, request.where)
    _ = plan.means  # a mean over all pairs: all processes compute it here, before they divide the pairs
    own_layers = [-1 if plan.kind.in_stream else layer for layer in plan.layers]
    at = (experiment.setting.direction, adapter.graph.n_layers, request.options)
    points = method.points(*at) if method.points else []
    reach: list[float] = []  # the largest products of the final residual stream and its gradient
    values: list[float] = []  # the largest magnitudes of the metric
    cosines: list[float] = []  # the largest cosines between a place's change and its gradient

    def one(batch: Batch, rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sides = plan.capture(batch)
        places = _members(plan, rows, batch)
        delta = {at: sides.own[at].to(adapter.work) - sides.other[at].to(adapter.work) for at in plan.layers}

        def effects(adapter: Adapter, run: Run, gradients: ReaderGradients) -> Tensor:
            reach.append(float((gradients.final * run.resid[-1]).abs().max()))
            if changes is not None:  # keep the gradients: the patterns' changes are computed once for all passes
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
        raise ScoreError(f"the estimate of {name} is NaN or infinite: check the logits and your metric for such values")
    return sweep


def _check_angle(experiment: Experiment, method: Method, what: str, cosines: list[float]) -> None:
    least = max(RIGHT_ANGLE, 2 * torch.finfo(experiment.adapter.dtype).eps)
    if cosines and max(cosines) < least:
        other = f"use {BETTER[what]} or method='exact'" if what in BETTER else "use method='exact'"
        raise ScoreError(
            f"'{method.name}' cannot estimate what='{what}' under ablation '{experiment.ablation.name}' in this model:"
            " the ablation changes only the scale of a norm's input, and the norm removes it. Every estimate would be"
            f" rounding noise around 0: {other}"
        )


def _members(plan: SweepPlan, rows: slice, batch: Batch) -> Tensor:
    """Return `[batch, pos, spans]`, 1 at the positions of each span; without spans, one span of all positions."""
    adapter, numbers = plan.experiment.adapter, plan.numbers(rows, batch)
    if plan.spans is None or numbers is None:
        return torch.ones(*batch.clean.ids.shape, 1, dtype=adapter.work, device=adapter.device)
    labels = torch.arange(len(plan.spans.labels), device=numbers.device)
    return (numbers.unsqueeze(-1) == labels).to(adapter.work)
