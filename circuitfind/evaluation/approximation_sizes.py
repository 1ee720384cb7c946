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
from circuitfind.engine.ablation import ablated
from circuitfind.engine.aligned import capture_corrupted
from circuitfind.engine.capture import Writers
from circuitfind.engine.memory import in_batches
from circuitfind.models.adapter import Adapter
from circuitfind.patching.measure import Means, Plan, Sides, capture_sides, means_of
from circuitfind.tasks.bound import BoundTask


def change_sizes(
    adapter: Adapter, bound: BoundTask, plan: Plan, batch: Batch, batch_size: int | None
) -> dict[int, float]:
    """By layer of a sweep.

    Args:
        batch: the task's pairs (under the "resample" ablation, dealt out anew).
    """
    means = means_of(adapter, batch, plan, batch_size)

    def one(part: Batch, _: slice) -> Tensor:
        sides = capture_sides(adapter, part, plan, bound.metric, means)
        delta = _writers(adapter, sides, plan, means)
        return torch.stack([_sums(adapter, plan, layer, sides, delta) for layer in plan.layers])

    totals = torch.stack([sums for _, sums in in_batches(adapter, batch, one, batch_size, "sizes of changes")]).sum(0)
    change, whole = totals.double().cpu().unbind(1)
    return dict(zip(plan.layers, (change / whole.clamp(min=1e-30)).sqrt().tolist(), strict=True))


def _writers(adapter: Adapter, sides: Sides, plan: Plan, means: Means | None) -> Writers:
    """The writers' clean values minus ablated values."""
    corrupted = (
        capture_corrupted(adapter, sides.batch, stop=True) if sides.batch.alignment is not None else sides.corrupted
    )
    return sides.clean.writers.minus(ablated(plan.ablation, sides.clean, corrupted, means.writers if means else None))


def _sums(adapter: Adapter, plan: Plan, layer: int, sides: Sides, delta: Writers) -> Tensor:
    """`[2]`: squares of the change and of the whole, summed."""
    what, work, noising = plan.what, adapter.work, plan.direction == "noising"
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
