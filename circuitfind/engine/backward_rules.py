"""Other ways back through the same model: rules that change what a gradient meets, and nothing that is computed.

Two sets of them. Both hold the scale of norms constant and halve what the product of a gated MLP hands back, so that
its two factors together get `value . coefficient` of the product.

`RELP`, relevance propagation (Jafari et al. 2025):

1. LN-rule: the scale of every norm of the residual stream, post-norms and the final norm among them, is a constant.
2. Identity rule: an MLP's activation is the product `x (act(x) / x)` with a constant second factor; nothing passes
   where x is 0. For ReLU that is the derivative anyway. A gate's activation is under this rule, too, as in the authors'
   program.
3. Half rule: the product of a gated MLP hands back half of what comes to it.

Attention keeps its gradient: its patterns, and with them norms of queries and keys, which never touch the stream.
(Constant patterns are a rule of the authors' as well, but none of their default ones.)

`GIM`, gradients corrected for interactions (Edin et al. 2025, arXiv 2505.17630):

1. The scale of every norm is a constant, norms of queries and keys among them.
2. Softmax of attention: its derivative is taken of the scores at temperature 2, `s (g - sum s g)` with `s =
   softmax(scores / 2)` and no factor 1/2. A key that takes all attention still passes something on.
3. Of what arrives at queries and at keys, a quarter is handed on; of what arrives at values, half.
4. Half rule, as above. Activations keep their derivative.

Attention is run under transformers' "eager" implementation, whose one softmax a layer is met on its way. (The authors'
program replaces `softmax`, which fused attention never calls, and releases up to 0.1.4 lacked the fourth rule.)

The activation is the MLP's one child without parameters that maps 0 to 0. An MLP is gated if what its input is
projected to is twice as wide as what its output projection reads; of another width it is refused, and so is a model
that computes past a module with a rule.
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

Back = Callable[[Tensor], Tensor]  # from the gradient at a module's output to the one at its input
Rule = Callable[[Tensor, Tensor], Back]  # of the module's input and output
REMEDY = "use method='eap-ig-inputs', 'eap' or 'atp'"
TEMPERATURE = 2.0
HANDED_ON = {"q": 0.25, "k": 0.25, "v": 0.5}  # of the gradient that arrives


@dataclass(frozen=True)
class Rules:
    """A set of rules. `method`: whose they are, for messages; `activations`: those are products; `attention`: there are
    rules for its norms, its softmax and its projections."""

    method: str
    activations: bool = False
    attention: bool = False


RELP, GIM = Rules("relp", activations=True), Rules("gim", attention=True)


class Ruled(NamedTuple):
    """A model under rules. `adapter`: its norms have fixed scales, to pull gradients back with; `hand_on`: as for
    `capture_gradients`."""

    adapter: Adapter
    hand_on: HandOn | None = None


def _returned(x: Tensor, value: Tensor, back: Back) -> Tensor:
    """A value that a module made of x, which hands gradients back to x by a rule."""
    value = value.detach()
    return mapped(x, lambda _: value.view_as(value), back)


@contextmanager
def backward_rules(adapter: Adapter, rules: Rules) -> Iterator[Ruled]:
    """Gradients of passes inside go back by the rules. ScoreError where the model's head is not linear, an MLP is not
    of a form that the rules cover, (attention) a layer has latent attention, gated heads or a mixer, or the model
    computes past a module with a rule."""
    head_scale(adapter)
    ruled, work = copy.copy(adapter), adapter.work
    at: dict[str, Rule] = {adapter.family.final_norm: _norm_rule(adapter.final_norm, work)}
    ruled.layers = []
    products: list[str] = []
    attentions: list[str] = []
    for view in adapter.layers:
        fixed: dict[str, Any] = {name: replace(norm, fixed_scale=True) for name, norm in view.norms.items()}
        ruled.layers.append(replace(view, **fixed))
        at |= {f"{view.path}.{getattr(view.family, name)}": _norm_rule(norm, work) for name, norm in view.norms.items()}
        products += _product(adapter, view, rules)
        if rules.activations:
            at[_activation(adapter, view, rules)] = _identity_rule(work)
        if rules.attention:
            attention = _attention(adapter, view, rules)
            attentions.append(f"{view.path}.{attention}")
            at |= {path: _norm_rule(norm, work) for path, norm in _inner_norms(view, attention).items()}
    waiting = {*at, *products, *attentions}  # until a pass meets them

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
        yield Ruled(ruled, _shares(adapter) if rules.attention else None)
        waiting -= {path for path in attentions if softened.met[path] == 1}
    if waiting:
        path = min(waiting)
        past = f"has a rule for '{path}', but the model computes past it: {REMEDY}"
        if path in attentions:
            past = f"has a rule for the one softmax of '{path}', and met {softened.met[path]}: "
            past += f"load the model with attn_implementation='eager', or {REMEDY}"
        raise ScoreError(f"method '{rules.method}' {past}")


class _Softened(TorchFunctionMode):
    """Inside watched modules, gradients go back through every softmax at `TEMPERATURE`; `met`: in the last run."""

    def __init__(self) -> None:
        super().__init__()
        self.met: Counter[str] = Counter()
        self._path = ""

    def watch(self, path: str, module: nn.Module) -> list[Callable[[], None]]:
        """Returns what ends the watch."""

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


def _shares(adapter: Adapter) -> HandOn:
    def hand_on(site: str, layer: int, value: Tensor) -> Tensor:
        layout = adapter.layers[layer].layout
        parts = layout.parts(site, value.detach().flatten(0, -2)[0])
        share = layout.whole(site, {kind: torch.full_like(part, HANDED_ON[kind]) for kind, part in parts.items()})
        return _returned(value, value, lambda gradient: gradient * share)

    return hand_on


def _norm_rule(norm: Norm, work: torch.dtype) -> Rule:
    fixed, home = replace(norm, fixed_scale=True), norm.weight.device
    return lambda x, _: lambda gradient: fixed.pull_back(x.to(home, work), gradient.to(home, work))


def _identity_rule(work: torch.dtype) -> Rule:
    return lambda x, value: lambda gradient: gradient * torch.where(x == 0, 0, value.to(work) / x)


# -------------------------------------------------------------------- what the rules are for
def _attention(adapter: Adapter, view: LayerView, rules: Rules) -> str:
    """The path of a layer's attention within its block."""
    other = "a mixer" if view.family.mixer else "latent attention" if view.family.kv else ""
    if other or view.family.gated:
        what = f"{other} in place of queries, keys and values" if other else "gates at its heads"
        raise ScoreError(
            f"method '{rules.method}' has rules for attention: '{view.path}' of '{adapter.kind}' has {what}, which they"
            f" do not cover; {REMEDY}"
        )
    return view.family.attn or view.family.o.rpartition(".")[0]


def _inner_norms(view: LayerView, attention: str) -> dict[str, Norm]:
    """By path, norms within attention: of queries, keys or values, or of a head each."""
    found = {}
    for name, module in module_at(view.block, attention).named_modules():
        if "norm" in name and not [*module.children()] and not isinstance(module, nn.Identity):
            weight = getattr(module, "weight", None)
            width = view.layout.d_head if weight is None else weight.shape[-1]
            path = f"{view.path}.{attention}.{name}"
            found[path] = Norm.of(module, width, path, view.device)
    return found


def _product(adapter: Adapter, view: LayerView, rules: Rules) -> list[str]:
    """The path of the projection that reads the product of a gated MLP, if it is one."""
    path = f"{view.path}.{_down(adapter, view, rules)}"
    read = sum(module.weight.numel() for module in view.mlp_projections())
    times, rest = divmod(read, module_at(adapter.model, path).weight.numel())
    if rest or times not in (1, 2):
        raise ScoreError(
            f"method '{rules.method}' has a rule for the product of a gated MLP: what '{path}' reads is not as wide as"
            f" what the MLP's input is projected to, nor half of it, so it is not known what is multiplied; {REMEDY}"
        )
    return [path] if times == 2 else []


def _down(adapter: Adapter, view: LayerView, rules: Rules) -> str:
    if view.family.down is None:
        raise ScoreError(
            f"method '{rules.method}' has rules for an MLP's activation or product: '{adapter.kind}' computes those of"
            f" its mixtures of experts out of reach; {REMEDY}"
        )
    return view.family.down


def _activation(adapter: Adapter, view: LayerView, rules: Rules) -> str:
    """The path of an MLP's activation."""
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
    device = next((buffer.device for buffer in module.buffers()), None)  # none: here, where nothing waits for it
    with torch.no_grad():
        return not module(torch.zeros(1, 1, 1, dtype=view.work, device=device)).any()
