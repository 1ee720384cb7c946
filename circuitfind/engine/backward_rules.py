"""Modified backward rules: they change the backward pass only. The forward pass stays the model's own.

There are two sets of rules. Both treat the scale of norms as a constant, and halve the gradients at the two factors of
a gated MLP's product: the factors together then get the product's `value . gradient` once, not twice.

`RELP`, relevance propagation (Jafari et al. 2025):

1. LN rule: the scale of every norm on the residual stream is a constant, also of post-norms and the final norm.
2. Identity rule: an MLP's activation is the product `x (act(x) / x)`, whose second factor is a constant. The gradient
   is 0 where x is 0. For ReLU this is the ordinary derivative. The activation of a gate follows the rule, too, as in
   the authors' code.
3. Half rule: the gradient at both factors of a gated MLP's product is halved.

The gradient through attention is unchanged: through its patterns, and so through the norms of queries and keys, which
are not on the residual stream. (The authors' code can also hold patterns constant, but not by default.)

`GIM`, gradients corrected for interactions (Edin et al. 2025, arXiv 2505.17630):

1. The scale of every norm is a constant, also of norms of queries and keys.
2. The attention softmax is differentiated at temperature 2: `s (g - sum s g)` with `s = softmax(scores / 2)`, without
   the factor 1/2. So a query that attends to one key only still has a gradient.
3. The gradients at queries and at keys are multiplied by 1/4, those at values by 1/2.
4. The half rule, as above. Activations keep their derivative.

For this, attention runs in transformers' "eager" implementation, which calls one softmax in each layer. (The authors'
code replaces `softmax`, which fused attention never calls; its releases up to 0.1.4 lacked the fourth rule.)

How modules are recognised: the activation is the only child of the MLP that has no parameters and maps 0 to 0. An MLP
is gated if its input projections are together twice as wide as the input of its output projection. If they are neither
as wide nor twice as wide, the MLP is refused. So is a model whose forward pass skips a module with a rule.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from circuitfind.engine.reader_gradients import HandOn
from circuitfind.engine.sites import SOFTMAX, eager_attention
from circuitfind.engine.unembedding import head_scale
from circuitfind.errors import ScoreError
from circuitfind.models.adapter import Adapter
from circuitfind.models.layer import LayerView, module_at
from circuitfind.models.norms import Norm
from circuitfind.models.placement import mapped

Back = Callable[[Tensor], Tensor]  # from the gradient at a module's output to the gradient at its input
Rule = Callable[[Tensor, Tensor], Back]  # from a module's input and output
REMEDY = "use method='eap-ig-inputs', 'eap' or 'atp'"
TEMPERATURE = 2.0
FACTORS = {"q": 0.25, "k": 0.25, "v": 0.5}  # GIM's third rule


@dataclass(frozen=True)
class Rules:
    """A set of rules. `method`: the method's name, for messages; `activations`: whether the identity rule applies;
    `attention`: whether the norms, the softmax and the projections of attention have rules."""

    method: str
    activations: bool = False
    attention: bool = False


RELP, GIM = Rules("relp", activations=True), Rules("gim", attention=True)


class Ruled(NamedTuple):
    """A model under rules. `adapter`: a copy whose norms have fixed scales, to pull gradients back through them;
    `hand_on`: as for `capture_gradients`."""

    adapter: Adapter
    hand_on: HandOn | None = None


def _returned(x: Tensor, value: Tensor, back: Back) -> Tensor:
    """Return `value`, which a module computed from x, with `back` as its derivative with respect to x."""
    value = value.detach()
    return mapped(x, lambda _: value.view_as(value), back)


@contextmanager
def backward_rules(adapter: Adapter, rules: Rules) -> Iterator[Ruled]:
    """Inside this context, backward passes follow the rules.

    Raises:
        ScoreError: the logits are not linear in the final norm's output, the rules do not cover the form of an MLP or
            (for rules of attention) of an attention layer, or the forward pass skips a module that has a rule.
    """
    head_scale(adapter)
    at, products, attentions = _ruled_modules(adapter, rules)
    waiting = {*at, *products, *attentions}  # modules with a rule that no pass has called yet

    def follow(path: str, rule: Rule) -> Callable[..., Any]:
        def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Any:
            waiting.discard(path)
            return _returned(args[0], output, rule(args[0].detach(), output.detach()))

        return after

    def halve(path: str) -> Callable[..., Any]:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> Any:
            waiting.discard(path)
            return _returned(args[0], args[0], lambda gradient: gradient / 2), *args[1:]

        return before

    softened = _Softened()
    with ExitStack() as inside:
        for path, rule in at.items():
            inside.callback(module_at(adapter.model, path).register_forward_hook(follow(path, rule)).remove)
        for path in products:
            inside.callback(module_at(adapter.model, path).register_forward_pre_hook(halve(path)).remove)
        if rules.attention:
            inside.enter_context(eager_attention(adapter))
            inside.enter_context(softened)
            for path in attentions:
                for remove in softened.watch(path, module_at(adapter.model, path)):
                    inside.callback(remove)
        yield Ruled(_with_fixed_scales(adapter), _scaled_projections(adapter) if rules.attention else None)
        waiting -= {path for path in attentions if softened.met[path] == 1}
    if waiting:
        path = min(waiting)
        why = f"has a rule for '{path}', but the model's forward pass does not call it: {REMEDY}"
        if path in attentions:
            why = f"has a rule for the one softmax of '{path}', which calls {softened.met[path]}: "
            why += f"load the model with attn_implementation='eager', or {REMEDY}"
        raise ScoreError(f"method '{rules.method}' {why}")


class _Softened(TorchFunctionMode):
    """Inside watched modules, every softmax is differentiated at `TEMPERATURE`.

    `met`: by path, how many softmaxes the module called in the last pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met: Counter[str] = Counter()
        self._path = ""

    def watch(self, path: str, module: nn.Module) -> list[Callable[[], None]]:
        """Watch a module; returns the functions that end this."""

        def enter(*_: Any) -> None:
            self._path, self.met[path] = path, 0

        def leave(*_: Any) -> None:
            self._path = ""

        return [module.register_forward_pre_hook(enter).remove, module.register_forward_hook(leave).remove]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        value = func(*args, **(kwargs or {}))
        if func not in SOFTMAX or not self._path:
            return value
        self.met[self._path] += 1
        soft = func(args[0].detach() / TEMPERATURE, *args[1:], **(kwargs or {}))
        return _returned(args[0], value, lambda gradient: soft * (gradient - (soft * gradient).sum(-1, keepdim=True)))


def _scaled_projections(adapter: Adapter) -> HandOn:
    """GIM's third rule: multiply the gradients at q, k and v by `FACTORS`."""

    def hand_on(site: str, layer: int, value: Tensor) -> Tensor:
        layout = adapter.layers[layer].layout
        parts = layout.parts(site, value.detach().flatten(0, -2)[0])
        factors = layout.whole(site, {kind: torch.full_like(part, FACTORS[kind]) for kind, part in parts.items()})
        return _returned(value, value, lambda gradient: gradient * factors)

    return hand_on


def _norm_rule(norm: Norm, work: torch.dtype) -> Rule:
    fixed, home = replace(norm, fixed_scale=True), norm.weight.device
    return lambda x, _: lambda gradient: fixed.pull_back(x.to(home, work), gradient.to(home, work))


def _identity_rule(work: torch.dtype) -> Rule:
    return lambda x, value: lambda gradient: gradient * torch.where(x == 0, 0, value.to(work) / x)


# -------------------------------------------------------------------- the modules that rules apply to
def _with_fixed_scales(adapter: Adapter) -> Adapter:
    """Return a copy of the adapter whose layers' norms have fixed scales."""
    ruled = copy.copy(adapter)
    ruled.layers = []
    for view in adapter.layers:
        fixed: dict[str, Any] = {name: replace(norm, fixed_scale=True) for name, norm in view.norms.items()}
        ruled.layers.append(replace(view, **fixed))
    return ruled


def _ruled_modules(adapter: Adapter, rules: Rules) -> tuple[dict[str, Rule], list[str], list[str]]:
    """Return the rules of norms and activations by path, and the paths of the projections that read a gated MLP's
    product and (for rules of attention) of attentions."""
    work = adapter.work
    at: dict[str, Rule] = {adapter.family.final_norm: _norm_rule(adapter.final_norm, work)}
    products: list[str] = []
    attentions: list[str] = []
    for view in adapter.layers:
        at |= {f"{view.path}.{getattr(view.family, name)}": _norm_rule(norm, work) for name, norm in view.norms.items()}
        products += _product(adapter, view, rules)
        if rules.activations:
            at[_activation(adapter, view, rules)] = _identity_rule(work)
        if rules.attention:
            attention = _attention(adapter, view, rules)
            attentions.append(f"{view.path}.{attention}")
            at |= {path: _norm_rule(norm, work) for path, norm in _inner_norms(view, attention).items()}
    return at, products, attentions


def _attention(adapter: Adapter, view: LayerView, rules: Rules) -> str:
    """Return the path of a layer's attention within its block; ScoreError if the rules do not cover it."""
    other = "a mixer" if view.family.mixer else "latent attention" if view.family.kv else ""
    if other or view.family.gated:
        what = f"{other} in place of queries, keys and values" if other else "gates at its heads"
        raise ScoreError(
            f"method '{rules.method}' has rules for attention: '{view.path}' of '{adapter.kind}' has {what}, which they"
            f" do not cover; {REMEDY}"
        )
    return view.family.attn or view.family.o.rpartition(".")[0]


def _inner_norms(view: LayerView, attention: str) -> dict[str, Norm]:
    """Return the norms within attention by path: those of queries, keys or values, of all heads or of one."""
    found = {}
    for name, module in module_at(view.block, attention).named_modules():
        if "norm" in name and not [*module.children()] and not isinstance(module, nn.Identity):
            weight = getattr(module, "weight", None)
            width = view.layout.d_head if weight is None else weight.shape[-1]
            path = f"{view.path}.{attention}.{name}"
            found[path] = Norm.of(module, width, path, view.device)
    return found


def _product(adapter: Adapter, view: LayerView, rules: Rules) -> list[str]:
    """Return the path of the projection that reads a gated MLP's product; none if the MLP is not gated."""
    path = f"{view.path}.{_down(adapter, view, rules)}"
    read = sum(module.weight.numel() for module in view.mlp_projections())
    times, rest = divmod(read, module_at(adapter.model, path).weight.numel())
    if rest or times not in (1, 2):
        raise ScoreError(
            f"method '{rules.method}' has a rule for the product of a gated MLP: the input of '{path}' is neither"
            f" as wide as the MLP's input projections together nor half as wide, so it is unclear what is multiplied;"
            f" {REMEDY}"
        )
    return [path] if times == 2 else []


def _down(adapter: Adapter, view: LayerView, rules: Rules) -> str:
    if view.family.down is None:
        raise ScoreError(
            f"method '{rules.method}' has rules for an MLP's activation or product: in '{adapter.kind}' they lie inside"
            f" mixtures of experts, out of reach; {REMEDY}"
        )
    return view.family.down


def _activation(adapter: Adapter, view: LayerView, rules: Rules) -> str:
    """Return the path of an MLP's activation."""
    parent = ".".join([view.path, *_down(adapter, view, rules).split(".")[:-1]])
    children = module_at(adapter.model, parent).named_children()
    found = [name for name, child in children if _is_activation(child, view)]
    if len(found) != 1:
        raise ScoreError(
            f"method '{rules.method}' has rules for an MLP's activation: '{adapter.kind}' has no single module for it"
            f" in '{parent}' (found: {', '.join(found) or 'none'}); {REMEDY}"
        )
    return f"{parent}.{found[0]}"


def _is_activation(module: nn.Module, view: LayerView) -> bool:
    if isinstance(module, (nn.Dropout, nn.Identity)) or [*module.parameters(), *module.children()]:
        return False
    device = next((buffer.device for buffer in module.buffers()), None)  # no buffers: the CPU, so that nothing waits
    with torch.no_grad():
        return not module(torch.zeros(1, 1, 1, dtype=view.work, device=device)).any()
