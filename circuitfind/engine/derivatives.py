"""Check that autograd's gradients are the derivatives of what the model computes: hooks may detach or scale them.

1. A pass is cut at every site: the site's value is recorded, and the model continues from a copy, a new leaf of
   autograd. So each value depends on the leaves of the few sites before it only, and a hook between two sites makes a
   large difference there.
2. Every leaf is moved by a random fraction of itself, up and down: the central difference is the derivative.
3. Autograd must give the same derivative along random directions. All positions have equal weight, however large their
   values are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitfind.batch import Inputs
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import through_hooks, undisturbed

TOLERANCE = 2e-2  # errors are about 5e-4 in float32
STEPS = (1e-3, 1e-4)  # fractions of a value; the second in case the first selects another expert or crosses a kink
DIRECTIONS = 3
LEAST = 0.05  # of the value: smaller derivatives count as this large when errors are divided by them
Place = tuple[str, int]


def derivative_error(adapter: Adapter, inputs: Inputs) -> float:
    """Return the largest error of a derivative by autograd, relative to the derivative; the smaller of two steps'
    errors."""
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
    """Run the model cut at every site; returns the sites' values, and the values that the model continued from: those
    in `put`, or else copies that require a gradient."""
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
