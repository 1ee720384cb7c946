"""A random circuit of a given size: layers of heads and MLPs that pass numbers on.

1. Every node computes one number: a random number for the word, plus the numbers of some earlier nodes, each times a
   random weight. It writes this sum (an MLP: its leaky ReLU) to its own variable. Heads attend to their own token.
2. The last MLP reads every node, and decides between two words. So each node has two edges, from `input` and to the
   last MLP, and the last MLP has one to `logits`. All further edges are drawn at random among the pairs of an earlier
   and a later node.
3. Heads that compute no number, at least one in each layer, have weights of 0.
"""

from __future__ import annotations

import math
import random
from itertools import product

import torch
from torch import Tensor

from circuitfind.errors import ScoreError
from circuitfind.tasks.builder import Pair
from circuitfind.testbed.blueprint import Blueprint, Offset, Variable
from circuitfind.testbed.circuits import LETTERS, START
from circuitfind.testbed.known import Drawing

LEAST, MOST = 10, 10_000
DENSITY = 0.3  # the part of the possible edges between nodes that are drawn
WORDS = 3  # of a prompt
NEEDED = 2e-4  # of the whole effect, because each edge is one of many


def layered(edges: int, seed: int = 0) -> Drawing:
    """Heads and MLPs of a random circuit pass numbers on, and the last MLP decides."""
    if not LEAST <= edges <= MOST:
        raise ScoreError(f"testbed: a layered circuit has {LEAST} to {MOST:,} edges, not {edges:,}")
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    nodes = 1
    while 2 * nodes + 1 + DENSITY * (nodes - 1) ** 2 / 2 < edges:
        nodes += 1
    layers = max(2, round(nodes**0.5))
    heads = 1 + math.ceil(nodes / layers)  # a layer has places for `heads - 1` heads and, the last one, for its MLP
    places = [(number // heads, number % heads) for number in range(nodes)]
    plan = Blueprint([START, *LETTERS, "yes", "no"], 1 + WORDS, heads)
    own = {place: plan.variable("n{}.{}".format(*place), 1) for place in places}

    def later(one: tuple[int, int], other: tuple[int, int]) -> bool:
        """Whether `other` may read `one`: it is in a later layer, or the MLP of a head's layer."""
        return one[0] < other[0] or (one[0] == other[0] and other[1] == heads - 1 != one[1])

    def weights(*shape: int) -> Tensor:
        """Draw weights of random sign with magnitudes from 0.5 to 1.5."""
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return sign * (0.5 + torch.rand(shape, generator=generator))

    joined = [pair for pair in product(places, places) if later(*pair)]
    drawn = set(rng.sample(joined, edges - 2 * nodes - 1))
    numbers: dict[Variable, Tensor] = {plan.token: torch.eye(plan.token.width)}  # each variable's value at each word
    for place in places:
        sources = [own[one] for one in places if (one, place) in drawn]
        scale = (1 + len(sources)) ** -0.5
        takes = {one: scale * weights(one.width, 1) for one in (plan.token, *sources)}
        total = torch.stack([numbers[one] @ by for one, by in takes.items()]).sum(0)
        layer, number = place
        if number == heads - 1:
            plan.table(layer, _leaky(takes), 0.0, {own[place]: torch.tensor([[1.0], [-0.5]])})
        else:
            plan.head(layer, [Offset(0)], takes, {own[place]: 1})
        numbers[own[place]] = torch.where(total > 0, total, total / 2) if number == heads - 1 else total
    last = {one: nodes**-0.5 * weights(1, 1) for one in own.values()}
    verdict = plan.select("yes") - plan.select("no")
    plan.table(layers, _leaky(last), 0.0, {plan.output: torch.stack([verdict, -verdict])})
    decided = torch.stack([numbers[one] @ by for one, by in last.items()]).sum(0)[1 : 1 + len(LETTERS), 0]
    ranked = [LETTERS[i] for i in decided.argsort().tolist()]
    low, high = ranked[: len(ranked) // 2], ranked[len(ranked) // 2 :]
    level = decided.sort().values[len(low) - 1 : len(low) + 1].mean()  # half of the words are above this level
    idle = {next(iter(own.values())): torch.zeros(1, 1)}
    plan.table(layers, idle, 1.0, {plan.output: -level * verdict[None]})

    def draw(rng: random.Random) -> Pair:
        (first, second), (third, fourth) = rng.sample(LETTERS, WORDS - 1), rng.sample(LETTERS, WORDS - 1)
        clean, corrupted = f"{first} {second} {rng.choice(high)}", f"{third} {fourth} {rng.choice(low)}"
        return Pair(clean, corrupted, ("yes",), ("no",))

    return Drawing(plan, draw, needed=NEEDED)


def _leaky(takes: dict[Variable, Tensor]) -> dict[Variable, Tensor]:
    """Return weights of two neurons per number: its positive and its negative part."""
    return {one: torch.cat([by, -by], 1) for one, by in takes.items()}
