"""Another way back through the same model: the propagation rules of RelP (Jafari et al. 2025).

What every module puts out is what the model computes, to the bit. Only what a gradient meets on its way back changes:

1. LN-rule: the scale of every norm of the residual stream, post-norms and the final norm among them, is a constant.
2. Identity rule: an MLP's activation is the product `x (act(x) / x)` with a constant second factor; nothing passes
   where x is 0. For ReLU that is the derivative anyway.
3. Half rule: the product of a gated MLP hands back half of what comes to it. Its gate's activation is under the second
   rule, too, as in the authors' program: the two factors together then get `value . coefficient` of the product.

Attention keeps its gradient: its patterns, and with them norms of queries and keys, which never touch the stream.
(Constant patterns are a rule of the authors' as well, but none of their default ones.)

The activation is the MLP's one child without parameters that maps 0 to 0. An MLP is gated if what its input is
projected to is twice as wide as what its output projection reads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from circuitfind.engine.unembedding import head_scale
from circuitfind.errors import ScoreError
from circuitfind.models.adapter import Adapter
from circuitfind.models.layer import LayerView, module_at
from circuitfind.models.norms import Norm

Back = Callable[[Tensor], Tensor]  # from the gradient at a module's output to the one at its input
Rule = Callable[[Tensor, Tensor], Back]  # of the module's input and output
REMEDY = "use method='eap-ig-inputs', 'eap' or 'atp'"


class _Return(torch.autograd.Function):
    """A given value forwards, a given map of gradients backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, back: Back) -> Tensor:
        ctx.back = back
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradients[0]).to(gradients[0].dtype), None, None


def _returned(x: Tensor, value: Tensor, back: Back) -> Tensor:
    found: Tensor = _Return.apply(x, value, back)  # type: ignore[no-untyped-call]  # torch has no types for it
    return found


@contextmanager
def relevance_rules(adapter: Adapter) -> Iterator[Adapter]:
    """Gradients of passes inside go back by the rules.

    Yields:
        The adapter to pull such gradients back to the stream with: its norms have fixed scales.

    Raises:
        ScoreError: the model's head is not linear, or an MLP has no activation module or no single output projection,
            or computes past them.
    """
    head_scale(adapter)
    ruled, work = copy.copy(adapter), adapter.work
    mlps = [_mlp(adapter, view) for view in adapter.layers]
    rules = {activation: _identity_rule(work) for activation, _ in mlps}
    rules[adapter.family.final_norm] = _norm_rule(replace(adapter.final_norm, fixed_scale=True), work)
    ruled.layers = []
    for view in adapter.layers:
        fixed: dict[str, Any] = {name: replace(norm, fixed_scale=True) for name, norm in view.norms.items()}
        ruled.layers.append(replace(view, **fixed))
        paths = {name: f"{view.path}.{getattr(view.family, name)}" for name in fixed}
        rules |= {paths[name]: _norm_rule(norm, work) for name, norm in fixed.items()}
    waiting = set(rules)  # until a pass meets them

    def follow(path: str, rule: Rule) -> Callable[..., Any]:
        def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Any:
            waiting.discard(path)
            return _returned(args[0], output.detach(), rule(args[0].detach(), output.detach()))

        return after

    with ExitStack() as hooks:
        for path, rule in rules.items():
            hooks.callback(module_at(adapter.model, path).register_forward_hook(follow(path, rule)).remove)
        for _, projection in mlps:
            if projection is not None:
                hooks.callback(module_at(adapter.model, projection).register_forward_pre_hook(_halved).remove)
        yield ruled
    if waiting:
        raise ScoreError(f"method 'relp' has a rule for '{min(waiting)}', but the model computes past it: {REMEDY}")


def _norm_rule(norm: Norm, work: torch.dtype) -> Rule:
    return lambda x, _: lambda gradient: norm.pull_back(x.to(work), gradient.to(work))


def _identity_rule(work: torch.dtype) -> Rule:
    return lambda x, value: lambda gradient: gradient * torch.where(x == 0, 0, value.to(work) / x)


def _halved(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return _returned(args[0], args[0].detach(), lambda gradient: gradient / 2), *args[1:]


def _mlp(adapter: Adapter, view: LayerView) -> tuple[str, str | None]:
    """Paths of an MLP's activation and, if it is gated, of the projection that reads the product."""
    what, down = f"method 'relp' has rules for an MLP's activation: '{adapter.kind}'", view.family.down
    if down is None:
        raise ScoreError(f"{what} computes those of its mixtures of experts out of reach; {REMEDY}")
    parent = ".".join([view.path, *down.split(".")[:-1]])
    children = module_at(adapter.model, parent).named_children()
    found = [name for name, child in children if _is_activation(child, view)]
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise ScoreError(f"{what} has no single module for it in '{parent}' (found: {names}); {REMEDY}")
    read = sum(module.weight.numel() for module in view.mlp_projections())
    gated = read == 2 * view.module(down).weight.numel()
    return f"{parent}.{found[0]}", f"{view.path}.{down}" if gated else None


def _is_activation(module: nn.Module, view: LayerView) -> bool:
    if isinstance(module, (nn.Dropout, nn.Identity)) or [*module.parameters(), *module.children()]:
        return False
    with torch.no_grad():
        return not module(torch.zeros(1, 1, 1, dtype=view.work, device=view.device)).any()
