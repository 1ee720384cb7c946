"""What a model was like when it was last read, so that a change between two calls is noticed.

Projections are read from the modules at each use. Norms are kept as formulas, and hooks make modules give something
else than their weights say. A state therefore holds the `form`, the module at each path with its class's forward, and
the precision and device of each weight; the values of every norm's parameters (`norms`, one after another, so that one
comparison tells), and its epsilon; and by path the hooks and replaced forwards that run there (`hooks`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from circuitfind.models.placement import own_forward, weights_of


class State(NamedTuple):
    """A model as it was; objects are held, not their ids, which Python uses again."""

    form: tuple[Any, ...]
    norms: Tensor
    epsilons: tuple[Any, ...]
    hooks: dict[str, tuple[Any, ...]]

    @classmethod
    def of(cls, model: nn.Module, norms: Iterable[nn.Module]) -> State:
        """The state now; `norms`: the modules that are kept as formulas."""
        modules, norms = dict(model.named_modules()), list(norms)
        form = [(path, module, type(module).forward) for path, module in modules.items()]
        weights = [(weight.dtype, weight.device) for weight in model.parameters()]
        return cls(
            (*form, *weights),
            _together([weight for norm in norms for weight in weights_of(norm)]),
            tuple(getattr(norm, name, None) for norm in norms for name in ("eps", "variance_epsilon")),
            {path: hooks for path, module in modules.items() if (hooks := tuple(_hooks(module)))},
        )

    def same_norms(self, other: State) -> bool:
        """Whether the formulas of the norms still hold; the form is the same."""
        return self.epsilons == other.epsilons and torch.equal(self.norms, other.norms)

    def adds_hooks_to(self, before: State) -> bool:
        """Whether a hook runs that did not run before."""
        return any(hooks != before.hooks.get(path) for path, hooks in self.hooks.items())


def _together(weights: list[Tensor]) -> Tensor:
    """Their values in one tensor, at the widest of their precisions."""
    return torch.cat([weight.flatten().to(weights[0].device) for weight in weights]) if weights else torch.empty(0)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """What runs beside or instead of its class's forward; of nnsight's and accelerate's wrappers, what they wrap."""
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()
    yield from module._backward_pre_hooks.values()
    yield from module._backward_hooks.values()
    forward = own_forward(module)
    if type(forward).__module__.startswith("nnsight."):
        forward = forward.state.original
    if forward is not None and forward is not type(module).forward:
        yield forward
