"""The layout of a blueprint's variables in the residual stream, and a head's matches as inner products.

1. Every variable has its own channels, in the blueprint's order.
2. A match `query @ by @ key` becomes an inner product of n channels, where n is the width of the narrower variable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from circuitfind.testbed.blueprint import Blueprint, Head, Match, Table, Variable


class Product(NamedTuple):
    """A match as an inner product: `(query @ by_query) . (key @ by_key)`, with matrices `[width, n]`."""

    query: Variable
    by_query: Tensor
    key: Variable
    by_key: Tensor

    @property
    def size(self) -> int:
        return self.by_query.shape[1]

    @classmethod
    def of(cls, match: Match) -> Product:
        query, key = match.query.width, match.key.width
        if query <= key:
            return cls(match.query, torch.eye(query), match.key, match.by.T)
        return cls(match.query, match.by, match.key, torch.eye(key))


class Channels:
    """The residual stream's layout.

    Attributes:
        used: the number of channels of all variables.
        width: the number of all channels; those from `used` on belong to no variable.
    """

    def __init__(self, variables: list[Variable], width: int) -> None:
        self.width = width
        self._start: dict[Variable, int] = {}
        self.used = 0
        for variable in variables:
            self._start[variable] = self.used
            self.used += variable.width

    def of(self, variable: Variable) -> slice:
        return slice(self._start[variable], self._start[variable] + variable.width)

    def matrices(self, head: Head, products: Sequence[Product], size: int, free: Sequence[int]) -> Tensor:
        """Return a head's query, key and value matrices, `[3, width, size]`.

        size: the head's width. free: the channels of query and key that its matches take, in this order.
        """
        query, key, value = made = torch.zeros(3, self.width, size)
        used = 0
        for product in products:
            own = free[used : used + product.size]
            query[self.of(product.query), own] = product.by_query * size**0.5  # attention divides by this
            key[self.of(product.key), own] = product.by_key
            used += product.size
        for variable, matrix in head.moves.items():
            value[self.of(variable), : head.carried] = matrix
        return made

    def placed(self, parts: Mapping[Variable, Tensor], rows: int) -> Tensor:
        """Return `[rows, width]` with the matrix of each variable, `[rows, its width]`, in its channels."""
        whole = torch.zeros(rows, self.width)
        for variable, matrix in parts.items():
            whole[:, self.of(variable)] = matrix
        return whole


def heads_of(plan: Blueprint, layer: int) -> list[Head]:
    return [part for part in plan.parts if isinstance(part, Head) and part.layer == layer]


def tables_of(plan: Blueprint, layer: int) -> Iterator[tuple[slice, Table]]:
    """Yield a layer's tables, each with the slice of its neurons in the layer's MLP."""
    used = 0
    for table in plan.tables(layer):
        yield slice(used, used + len(table.bias)), table
        used += len(table.bias)
