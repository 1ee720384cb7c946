"""How large a replaced change is beside what it is part of: what the reach of a first-order estimate depends on.

    size = root of (sum of |change|^2 over tokens and units) / (sum of |whole|^2 over the same tokens and units)

over the real tokens at which anything changes. The whole is the residual stream that the change is added to (`attn`,
`mlp`, `heads`, `neurons`), or the replaced value itself (`resid`, `resid-mid`, `q`, `k`, `v`, `pattern`): in the run
that is patched, clean in noising and corrupted in denoising.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitfind.batch import Batch
from circuitfind.engine.capture import capture_corrupted
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.writers import Writers
from circuitfind.patching.patch import Sides, SweepPlan


def change_sizes(plan: SweepPlan) -> dict[int, float]:
    """By layer of a sweep."""

    def one(part: Batch, _: slice) -> Tensor:
        sides = plan.capture(part)
        delta = _writers(plan.experiment, sides)
        return torch.stack([_sums(plan, layer, sides, delta) for layer in plan.layers])

    totals = torch.stack([sums for _, sums in plan.experiment.in_batches(one, "sizes of changes")]).sum(0)
    change, whole = totals.double().cpu().unbind(1)
    return dict(zip(plan.layers, (change / whole.clamp(min=1e-30)).sqrt().tolist(), strict=True))


def _writers(experiment: Experiment, sides: Sides) -> Writers:
    """The writers' clean values minus ablated values."""
    corrupted = sides.corrupted
    if sides.batch.alignment is not None:
        corrupted = capture_corrupted(experiment.adapter, sides.batch, stop=True)
    return sides.clean.writers.minus(experiment.ablated(sides.clean, corrupted))


def _sums(plan: SweepPlan, layer: int, sides: Sides, delta: Writers) -> Tensor:
    """`[2]`: squares of the change and of the whole, summed."""
    adapter, noising = plan.experiment.adapter, plan.experiment.setting.noising
    what, work = plan.what, adapter.work
    base, base_batch = (sides.clean, sides.batch.clean) if noising else (sides.corrupted, sides.batch.corrupted)
    own, other = sides.own[layer].to(work), sides.other[layer].to(work)
    own, other = (own, other) if noising else (other, own)
    difference = own - other
    if what == "heads":
        change = adapter.head_outputs(layer, delta.heads[layer]).pow(2).sum(-1).movedim(0, -1)
    elif what == "attn":
        change = adapter.head_outputs(layer, delta.heads[layer]).sum(0).pow(2).sum(-1, keepdim=True)
    elif what == "mlp":
        change = delta.mlps[layer].pow(2).sum(-1, keepdim=True)
    elif what == "neurons":
        view = adapter.layers[layer]
        change = difference.pow(2) * view.mlp_weights()[1].pow(2).sum(-1)
        if view.post_mlp_norm is not None:
            change = change * view.post_mlp_norm.scale(base.mlp_out[layer].to(work)).pow(2)
    else:  # one unit, or one a head
        change = difference.pow(2).sum(-1)
        change = change.unsqueeze(-1) if what in ("resid", "resid-mid") else change
    if what in ("q", "k", "v", "pattern"):
        whole = own.pow(2).sum(-1)
    else:
        stream = own if what in ("resid", "resid-mid") else base.resid[layer + 1].to(work)
        whole = stream.pow(2).sum(-1, keepdim=True)
    changed = (change.sum(-1) > 0) & base_batch.mask.to(change.device)
    return torch.stack([change[changed].sum(), whole.expand_as(change)[changed].sum()])
