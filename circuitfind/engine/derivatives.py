"""Whether autograd's gradients are those of the values that a model computes: hooks may detach or scale them.

1. A pass is cut at every site: what a site gives is recorded, and the model goes on from a copy of it. A site's value
   then depends on the few sites before it only, so that a hook between two of them makes most of the difference.
2. Every copy moves by a random part of itself, up and down: the difference of the two values is the derivative.
3. Autograd gives the same derivative along random directions. Positions count alike, however large their values are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitfind.batch import Inputs
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import through_hooks, undisturbed

TOLERANCE = 2e-2  # errors are about 5e-4 in float32
STEPS = (1e-3, 1e-4)  # parts of a value; the smaller where a step changes an expert or crosses a kink
DIRECTIONS = 3
LEAST = 0.05  # a derivative along a part of all values is at least such a part of the value, for errors
Place = tuple[str, int]


def derivative_error(adapter: Adapter, inputs: Inputs) -> float:
    """The largest error of a derivative by autograd, relative to the derivative (with two steps: the smaller)."""
    first = _error(adapter, inputs, STEPS[0])
    return first if first <= TOLERANCE else min(first, _error(adapter, inputs, STEPS[1]))


def _error(adapter: Adapter, inputs: Inputs, step: float) -> float:
    generator = torch.Generator().manual_seed(0)
    given, leaves = _cut(adapter, inputs, {})
    moves = {place: _random(leaf, generator) * leaf.detach() for place, leaf in leaves.items()}
    up, down = (
        _cut(adapter, inputs, {place: leaves[place].detach() + sign * step * move for place, move in moves.items()})[0]
        for sign in (1, -1)
    )
    inside, along = list(leaves.values()), list(moves.values())
    worst = 0.0
    for place, value in given.items():
        if place == ("resid", 0):
            continue
        rows = (value.detach().double().flatten(0, -2), (up[place] - down[place]).double().flatten(0, -2) / (2 * step))
        sizes = [torch.linalg.vector_norm(one, dim=-1, keepdim=True) for one in rows]
        weight = 1 / torch.maximum(sizes[1], LEAST * sizes[0]).clamp_min(1e-30)
        for _ in range(DIRECTIONS):
            direction = _random(rows[0], generator) * weight
            expected = float((direction * rows[1]).sum())
            found = 0.0
            if value.requires_grad:
                seed = direction.to(value.dtype).view(value.shape)
                gradients = torch.autograd.grad(value, inside, seed, retain_graph=True, allow_unused=True)
                pairs = zip(gradients, along, strict=True)
                found = sum(float((g.double() * move).sum()) for g, move in pairs if g is not None)
            worst = max(worst, abs(found - expected) / len(rows[0]) ** 0.5)
    return worst


def _cut(adapter: Adapter, inputs: Inputs, put: dict[Place, Tensor]) -> tuple[dict[Place, Tensor], dict[Place, Tensor]]:
    """What every site gives, and what the model goes on from there: `put`, or a copy."""
    given: dict[Place, Tensor] = {}
    leaves: dict[Place, Tensor] = {}

    def visit(site: str, layer: int, value: Tensor) -> Tensor:
        given[site, layer] = value if value.grad_fn is None else value.view_as(value)
        leaves[site, layer] = put.get((site, layer), value.detach().clone()).requires_grad_(not put)
        return leaves[site, layer].clone()  # some models write into it

    with torch.enable_grad(), undisturbed(adapter.model):
        given["logits", 0] = through_hooks(adapter, inputs, visit)
    return given, leaves


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device)
