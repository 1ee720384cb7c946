"""Two backends that take a visitor through one forward pass, with the same tensors in the same order.

A visitor is `visit(site name, layer, value) -> new value | None | STOP`. It gets every site's tensor and may replace it
or end the pass there. The rest of the engine does not depend on the backend:

* `through_nnsight`: an nnsight trace. The default, because it works together with a user's own nnsight interventions.
* `through_hooks`: plain module hooks, a few microseconds per site, for the loops that run thousands of passes. Only
  this one can *skip* a module whose result is known (`Skips`); restarts from a later layer use that.

The unembedding gets the read positions only, so logits are `[batch, reads, vocab]`. The model itself applies the head's
bias, caps and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import nnsight
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from circuitfind.batch import Inputs
from circuitfind.costs import count_forward
from circuitfind.errors import ModelError
from circuitfind.models.adapter import Adapter, Site
from circuitfind.models.layer import module_at


class Stop:
    """What a visitor returns to end the pass at a site."""


STOP = Stop()
Visit = Callable[[str, int, Tensor], "Tensor | Stop | None"]
Skips = Mapping[str, Tensor]  # module path -> its (first) output, which need not be computed


class _Stopped(Exception):
    pass


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Freezes weights and switches to evaluation mode; restores both at the end."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    for parameter in trained:
        parameter.requires_grad_(False)
    if training:
        model.eval()
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def read_rows(value: Tensor, inputs: Inputs) -> Tensor:
    """`[batch, reads, d_model]`: the unembedding's input at the positions that the metric reads."""
    index = inputs.read.to(value.device)
    return value[torch.arange(value.shape[0], device=value.device)[:, None], index]


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _with_first(output: Any, value: Tensor) -> Any:
    return (value, *output[1:]) if isinstance(output, tuple) else value


@contextmanager
def attached(adapter: Adapter, visit: Visit) -> Iterator[None]:
    """Inside, every forward pass takes the visitor to every site but the unembedding (`_Stopped` if that ends it)."""

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

    with ExitStack() as hooks:
        for site in adapter.sites:
            if site.name != "unembed":
                hook = hook_input if site.side == "input" else hook_output
                hooks.callback(hook(site, module_at(adapter.model, site.path)).remove)
        yield


def through_hooks(adapter: Adapter, inputs: Inputs, visit: Visit, skips: Skips | None = None) -> Tensor:
    """Logits `[batch, reads, vocab]` of a forward pass with module hooks; empty if the visitor stopped it.

    `skips`: results of modules that need not run.
    """
    adapter.check_free()
    skips = skips or {}
    blocks = sum(view.path in skips for view in adapter.layers)
    count_forward(len(inputs.ids), 1 - blocks / len(adapter.layers))
    try:
        with ExitStack() as skipped:
            for path, value in skips.items():
                skipped.enter_context(_skipped(module_at(adapter.model, path), adapter.output_forms.get(path), value))
            with attached(adapter, visit):
                return _logits_read(adapter, inputs)
    except _Stopped:
        return torch.empty(0)


@contextmanager
def _skipped(module: nn.Module, form: Any, value: Tensor) -> Iterator[None]:
    """Inside, the module returns this value, in the form of its results, and computes nothing."""
    before = module.__dict__.get("forward")  # nnsight and accelerate put one on the instance: it is restored
    # a clone, because some models (Falcon) add into the result in place
    module.forward = lambda *_, **__: _with_first(form, value.clone())
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _logits_read(adapter: Adapter, inputs: Inputs) -> Tensor:
    """Runs the model and unembeds the read positions only."""
    head = module_at(adapter.model, adapter.head_path)
    handle = head.register_forward_pre_hook(lambda _, args: (read_rows(args[0], inputs), *args[1:]))
    try:
        logits: Tensor = adapter.model(**adapter.keywords(inputs)).logits
        return logits
    finally:
        handle.remove()


def through_nnsight(adapter: Adapter, inputs: Inputs, visit: Visit) -> Tensor:
    """One forward pass in an nnsight trace; result as for `through_hooks`."""
    adapter.check_free()
    envoy, keywords = adapter.envoy, adapter.keywords(inputs)
    count_forward(len(inputs.ids))
    box: list[Tensor] = []
    with envoy.trace(**keywords) as tracer:
        if _drive(envoy, adapter.sites, visit):
            tracer.stop()
        else:
            head = module_at(envoy, adapter.head_path)
            head.input = read_rows(head.input, inputs)
            box.append(nnsight.save(envoy.output.logits))
    return box[0] if box else torch.empty(0)


def _drive(envoy: Any, sites: list[Site], visit: Visit) -> bool:
    """Takes the visitor to every site, in order of execution; true if it stopped the pass."""
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
    """One forward pass through the backend that the adapter names."""
    return BACKENDS[adapter.backend](adapter, inputs, visit)


def observe(adapter: Adapter) -> None:
    """Finds in one short run the order in which the sites execute, and which modules return tuples."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=adapter.device)
    inputs = Inputs(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids[:, :1]))
    seen: list[tuple[str, int]] = []
    forms: dict[str, Any] = {}
    parts = ((view.path, name) for view in adapter.layers for name in ("", view.family.attn, view.family.mlp))
    paths = [f"{path}.{name}".rstrip(".") for path, name in parts if name is not None]
    with ExitStack() as hooks, torch.no_grad(), undisturbed(adapter.model):
        for path in paths:

            def note(_: nn.Module, __: Any, output: Any, path: str = path) -> None:
                forms[path] = (None, *output[1:]) if isinstance(output, tuple) else None

            hooks.callback(module_at(adapter.model, path).register_forward_hook(note).remove)
        through_hooks(adapter, inputs, lambda name, layer, _: seen.append((name, layer)))
    if seen.count(last := ("final", len(adapter.layers))) > 1:  # nanochat norms the embeddings with it, too
        adapter.sites = [site for site in adapter.sites if site.name != "final"]
        adapter.sites.append(Site(*last, adapter.layers[-1].path, "output"))
        seen = [key for key in seen if key != last] + [last]
    missing = [site.path for site in adapter.sites if site.name != "unembed" and (site.name, site.layer) not in seen]
    if missing:
        raise ModelError(f"module '{missing[0]}' did not run in a forward pass: this form of the family is not covered")
    position = {key: i for i, key in enumerate(seen)}
    adapter.sites.sort(key=lambda site: position.get((site.name, site.layer), len(position)))
    adapter.output_forms = forms
