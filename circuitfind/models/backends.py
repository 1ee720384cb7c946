"""Two backends that run a forward pass with a visitor, which sees the same tensors in the same order in both.

A visitor is `visit(site name, layer, value) -> new value | None | STOP`. It gets every site's tensor and may replace it
or end the pass there. The rest of the engine does not depend on the backend:

* `through_nnsight`: an nnsight trace. The default, because it works together with a user's own nnsight interventions.
* `through_hooks`: plain module hooks, which cost a few microseconds per site, for loops that run thousands of passes.
  Only this backend can *skip* modules whose results are known (`Skips`), as restarts from a later layer do.

Only the read positions are unembedded, so logits are `[batch, reads, vocab]`. The model itself applies the head's bias,
soft-caps and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, TypeVar
from weakref import WeakSet

import nnsight
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from circuitfind.batch import Inputs, Past
from circuitfind.costs import count_forward
from circuitfind.errors import ModelError
from circuitfind.models.adapter import Adapter, Site
from circuitfind.models.layer import module_at, shape_of
from circuitfind.models.placement import as_given, gathered, own_part, reloading


class Stop:
    """What a visitor returns to end the pass at a site."""


STOP = Stop()
Visit = Callable[[str, int, Tensor], "Tensor | Stop | None"]
Skips = Mapping[str, Tensor]  # module path -> its (first) output, which need not be computed


class _Stopped(Exception):
    pass


_AT_REST: WeakSet[nn.Module] = WeakSet()


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Enter `undisturbed` for a whole call, so that its passes need not search all modules again."""
    with undisturbed(model):
        outermost = model not in _AT_REST
        _AT_REST.add(model)
        try:
            yield
        finally:
            if outermost:
                _AT_REST.discard(model)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Freeze the weights and switch to evaluation mode; restore both at the end."""
    modules = [] if model in _AT_REST else list(model.modules())
    trained = [
        (module, name)  # not the weights themselves: offloaded ones are replaced during a run
        for module in modules
        for name, weight in module._parameters.items()
        if weight is not None and weight.requires_grad
    ]
    training = [module for module in modules if module.training]
    for module, name in trained:
        module._parameters[name].requires_grad_(False)  # type: ignore[union-attr]
    if training:
        model.eval()
    try:
        with reloading(model) if hasattr(model, "_hf_hook") else nullcontext():
            yield
    finally:
        for module, name in trained:
            module._parameters[name].requires_grad_(True)  # type: ignore[union-attr]
        for module in training:
            module.training = True


def read_rows(value: Tensor, inputs: Inputs) -> Tensor:
    """Return values `[batch, pos, ...]` at the positions that the metric reads, `[batch, reads, ...]`."""
    index = inputs.read.to(value.device)
    return value[torch.arange(value.shape[0], device=value.device)[:, None], index]


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _with_first(output: Any, value: Tensor) -> Any:
    return (value, *output[1:]) if isinstance(output, tuple) else value


@contextmanager
def attached(adapter: Adapter, visit: Visit, skips: Skips | None = None) -> Iterator[None]:
    """Inside the block, forward passes call the visitor at every site but the unembedding, and raise `_Stopped` if it
    returns STOP.

    `skips`: modules that do not run; in a skipped block, the visitor is called only at the block's input.
    """

    visit = _at_home(adapter, visit)

    def visited(site: Site, value: Tensor) -> Tensor | None:
        new = visit(site.name, site.layer, value)
        if isinstance(new, Stop):
            raise _Stopped
        return new

    def hook_input(site: Site, module: nn.Module) -> RemovableHandle:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            key = None if args else next(iter(kwargs))
            new = visited(site, args[0] if key is None else kwargs[key])
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: new})

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def hook_output(site: Site, module: nn.Module) -> RemovableHandle:
        def after(_: nn.Module, __: Any, output: Any) -> Any:
            new = visited(site, _first(output))
            return None if new is None else _with_first(output, new)

        return module.register_forward_hook(after)

    idle = {layer for layer, view in enumerate(adapter.layers) if skips and view.path in skips}
    with ExitStack() as hooks:
        for site in adapter.sites:
            if site.name != "unembed" and (site.layer not in idle or site.name == "resid"):
                hook = hook_input if site.side == "input" else hook_output
                hooks.callback(hook(site, adapter.at_sites[site.path]).remove)
        yield


def _at_home(adapter: Adapter, visit: Visit) -> Visit:
    """Wrap a visitor for a model on several devices or processes: values are moved to circuitfind's device and gathered
    before the visitor, and moved back and divided after it."""
    if not adapter.spread:
        return visit
    home, group = adapter.device, adapter.processes
    features = {} if group is None else _features(adapter)

    def moving(site: str, layer: int, value: Tensor) -> Tensor | Stop | None:
        here = gathered(value.to(home), features.get((site, layer)), group)
        new = visit(site, layer, here)
        if new is None and here is not value and here.requires_grad:
            new = here  # the visitor may take gradients at `here`, so the model must go on from it
        return own_part(new, value.shape[-1], group).to(value.device) if isinstance(new, Tensor) else new

    return moving


def _features(adapter: Adapter) -> dict[tuple[str, int], int]:
    """Return the total number of features at sites whose features are divided among processes."""
    modules = {site: module_at(adapter.model, site.path) for site in adapter.sites if site.name in ("qkv", *"qkvz")}
    return {site[:2]: shape_of(module)[site.side == "output"] for site, module in modules.items()}


def through_hooks(adapter: Adapter, inputs: Inputs, visit: Visit, skips: Skips | None = None) -> Tensor:
    """Run a forward pass with module hooks; return logits `[batch, reads, vocab]`, empty if the visitor stopped it.
    `skips`: the results of modules that need not run."""
    adapter.check_free()
    skips = skips or {}
    blocks = sum(view.path in skips for view in adapter.layers)
    count_forward(len(inputs.ids) * inputs.part, 1 - blocks / len(adapter.layers))
    try:
        with ExitStack() as skipped:
            for path, value in skips.items():
                skipped.enter_context(_skipped(module_at(adapter.model, path), adapter.output_forms.get(path), value))
            with attached(adapter, visit, skips):
                return _logits_read(adapter, inputs)
    except _Stopped:
        return torch.empty(0)


def past_of(adapter: Adapter, inputs: Inputs, end: int) -> Past:
    """Run the prompts' tokens before position `end`; return their keys and values for later tokens to attend to."""
    adapter.check_free()
    early, cache, last = inputs.positions(slice(0, end)), DynamicCache(), ("z", adapter.graph.n_layers - 1)
    count_forward(len(inputs.ids) * end / inputs.ids.shape[1])
    stopped = attached(adapter, lambda site, layer, _: STOP if (site, layer) == last else None)
    with torch.no_grad(), undisturbed(adapter.model), suppress(_Stopped), stopped:
        adapter.model(**adapter.keywords(early), past_key_values=cache)
    layers: list[Any] = cache.layers
    return Past(early.mask, [(layer.keys, layer.values) for layer in layers])


@contextmanager
def _skipped(module: nn.Module, form: Any, value: Tensor) -> Iterator[None]:
    """Inside the block, the module computes nothing and returns this value, in the form of its own results."""
    before = module.__dict__.get("forward")  # nnsight and accelerate set one on the instance: restored at the end
    # The value is cloned, because some models (Falcon) add into the result in place.
    value = as_given(module, value)
    module.forward = lambda *_, **__: _with_first(form, value.clone())
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def bare_logits(adapter: Adapter, inputs: Inputs) -> Tensor:
    """Return the whole model's logits `[batch, reads, vocab]`, even inside a `circuitfind.only` block."""
    with adapter.lock, torch.no_grad(), undisturbed(adapter.model):
        holder, adapter.held_by = adapter.held_by, None
        try:
            count_forward(len(inputs.ids))
            return _logits_read(adapter, inputs)
        finally:
            adapter.held_by = holder


def _logits_read(adapter: Adapter, inputs: Inputs) -> Tensor:
    """Run the model, unembed the read positions only, and return their logits."""
    head = module_at(adapter.model, adapter.head_path)
    handle = head.register_forward_pre_hook(lambda _, args: (read_rows(args[0], inputs), *args[1:]))
    try:
        logits: Tensor = adapter.model(**adapter.keywords(inputs)).logits
        return logits.to(adapter.device)
    finally:
        handle.remove()


def through_nnsight(adapter: Adapter, inputs: Inputs, visit: Visit) -> Tensor:
    """Run a forward pass in an nnsight trace; return logits as `through_hooks` does."""
    adapter.check_free()
    envoy, keywords = adapter.envoy, adapter.keywords(inputs)
    count_forward(len(inputs.ids) * inputs.part)
    box: list[Tensor] = []
    with envoy.trace(**keywords) as tracer:
        if _drive(envoy, adapter.sites, _at_home(adapter, visit)):
            tracer.stop()
        else:
            head = module_at(envoy, adapter.head_path)
            head.input = read_rows(head.input, inputs)
            box.append(nnsight.save(envoy.output.logits.to(adapter.device)))
    return box[0] if box else torch.empty(0)


def _drive(envoy: Any, sites: list[Site], visit: Visit) -> bool:
    """Call the visitor at every site, in order of execution; return whether it stopped the pass."""
    for site in sites:
        if site.name == "unembed":
            continue
        module = module_at(envoy, site.path)
        if site.side == "input":
            new = visit(site.name, site.layer, module.input)
            if isinstance(new, Tensor):
                module.input = new
        else:
            output = module.output
            new = visit(site.name, site.layer, _first(output))
            if isinstance(new, Tensor):
                module.output = _with_first(output, new)
        if new is STOP:
            return True
    return False


BACKENDS = {"nnsight": through_nnsight, "hooks": through_hooks}


def through(adapter: Adapter, inputs: Inputs, visit: Visit) -> Tensor:
    """Run a forward pass with the adapter's backend; return logits as `through_hooks` does."""
    return BACKENDS[adapter.backend](adapter, inputs, visit)


K = TypeVar("K")


@contextmanager
def noting(modules: Mapping[K, nn.Module]) -> Iterator[dict[K, tuple[Any, Any]]]:
    """Inside the block, record each module's first argument and result in a pass, by the module's key."""
    noted: dict[K, tuple[Any, Any]] = {}
    with ExitStack() as hooks:
        for key, module in modules.items():

            def note(_: nn.Module, args: tuple[Any, ...], output: Any, key: K = key) -> None:
                noted[key] = (args[0] if args else None), output

            hooks.callback(module.register_forward_hook(note).remove)
        yield noted


def observe(adapter: Adapter) -> None:
    """Find, in one short run, the order in which the sites execute and which modules return tuples. ModelError if a
    site's module does not run."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=adapter.device)
    inputs = Inputs(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids[:, :1]))
    seen: list[tuple[str, int]] = []
    parts = ((view.path, name) for view in adapter.layers for name in ("", view.family.attn, view.family.mlp))
    paths = [f"{path}.{name}".rstrip(".") for path, name in parts if name is not None]
    modules = {path: module_at(adapter.model, path) for path in paths}
    with noting(modules) as noted, torch.no_grad(), undisturbed(adapter.model):
        through_hooks(adapter, inputs, lambda name, layer, _: seen.append((name, layer)))
    if seen.count(last := ("final", len(adapter.layers))) > 1:  # nanochat also applies its final norm to embeddings
        adapter.sites = [site for site in adapter.sites if site.name != "final"]
        adapter.sites.append(Site(*last, adapter.layers[-1].path, "output"))
        seen = [key for key in seen if key != last] + [last]
    missing = [site.path for site in adapter.sites if site.name != "unembed" and (site.name, site.layer) not in seen]
    if missing:
        raise ModelError(f"module '{missing[0]}' did not run in a forward pass: this form of the family is not covered")
    position = {key: i for i, key in enumerate(seen)}
    adapter.sites.sort(key=lambda site: position.get((site.name, site.layer), len(position)))
    results = {path: output for path, (_, output) in noted.items()}
    adapter.output_forms = {p: (None, *one[1:]) if isinstance(one, tuple) else None for p, one in results.items()}
