"""The state of a model when it was last read, so that changes between two calls are noticed.

Projections need no state, because they are read from the modules at each use. Norms are kept as formulas, and hooks can
change what modules return. A state therefore holds:

* `form`: the module at each path, its class's forward, and the precision and device of each weight,
* `norms`, `epsilons`: the parameters of all norms, concatenated so that one comparison suffices, and their epsilons,
* `hooks`: by path, the hooks of the module and a forward that replaces its class's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from circuitfind.models.placement import own_forward, weights_of


class State(NamedTuple):
    """A model's state. It holds the objects themselves, not their ids, which Python reuses."""

    form: tuple[Any, ...]
    norms: Tensor
    epsilons: tuple[Any, ...]
    hooks: dict[str, tuple[Any, ...]]

    @classmethod
    def of(cls, model: nn.Module, norms: Iterable[nn.Module]) -> State:
        """Return a model's present state; `norms`: the modules that are kept as formulas."""
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
        """Whether the formulas of the norms still hold, for states of the same form."""
        return self.epsilons == other.epsilons and torch.equal(self.norms, other.norms)

    def adds_hooks_to(self, before: State) -> bool:
        """Whether a module has other hooks than before, or hooks for the first time."""
        return any(hooks != before.hooks.get(path) for path, hooks in self.hooks.items())


def _together(weights: list[Tensor]) -> Tensor:
    """Concatenate the weights' values, in the widest of their precisions."""
    return torch.cat([weight.flatten().to(weights[0].device) for weight in weights]) if weights else torch.empty(0)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Yield a module's hooks, and the forward that replaces its class's, if any. Wrappers that nnsight and accelerate
    put around a forward do not count."""
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()
    yield from module._backward_pre_hooks.values()
    yield from module._backward_hooks.values()
    forward = own_forward(module)
    if type(forward).__module__.startswith("nnsight."):
        forward = forward.state.original
    if forward is not None and forward is not type(module).forward:
        yield forward
