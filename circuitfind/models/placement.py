"""Models whose weights are on several devices, offloaded, or divided among processes.

Accelerate spreads a model (`device_map`) and puts a hook on its modules that moves their inputs to their device.
*Offloaded* weights are kept in memory or on disk, and are on the meta device until their module runs.

1. circuitfind computes on one device, the one that token ids go to. A value from another device is moved there for a
   visitor, and the visitor's result is moved back (`backends.py`). A weight is moved when it is read.
2. `held` is the only function that reads a weight's values, wherever they are.
3. Under tensor parallelism (`tp_plan="auto"`, one process per device), each process holds some heads' weights. All
   processes make the same calls: a visitor gets all heads, gathered from the processes, and each process goes on with
   its own part of the result.
4. The backward pass needs the weights again. Instead of an offloaded weight, autograd keeps a reference to where it is
   stored (`reloading`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from circuitfind.errors import ModelError

Map = Callable[[Tensor], Tensor]


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Return accelerate's hooks on a module."""
    hook = vars(module).get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _offload(module: nn.Module) -> Any:
    """Return the hook that loads a module's offloaded weights, or None."""
    return next((hook for hook in _hooks(module) if getattr(hook, "offload", False)), None)


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module computes."""
    for part in module.modules():
        for hook in _hooks(part):
            if (device := getattr(hook, "execution_device", None)) is not None:
                return torch.empty(0, device=device).device  # turns "cuda" into the current "cuda:N"
        for weight in part.parameters(recurse=False):
            return weight.device
    return torch.device("cpu")


def sent(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device without waiting for the work that is queued there."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)


def is_spread(model: nn.Module) -> bool:
    """Whether weights are on several devices, in several processes, or loaded when they are needed."""
    return (
        hasattr(model, "_hf_hook")
        or len({weight.device for weight in model.parameters()}) > 1
        or processes_of(model) is not None
    )


def is_shard(weight: Tensor) -> bool:
    """Whether this process holds only a part of the weight (a `DTensor`; its class is not imported for this test)."""
    return hasattr(weight, "full_tensor")


def processes_of(model: nn.Module) -> Any:
    """Return the process group that a model's weights are divided among, or None."""
    weight: Any = next(filter(is_shard, model.parameters()), None)
    return None if weight is None else weight.device_mesh.get_group()


def gathered(value: Tensor, features: int | None, group: Any) -> Tensor:
    """Gather the features (last axis) of all processes from this process's part. Differentiable. ModelError if the
    parts do not add up to `features`."""
    if group is None or features in (None, value.shape[-1]):
        return value
    if value.shape[-1] * distributed.get_world_size(group) != features:
        raise ModelError(
            f"a projection of {features} features has {value.shape[-1]} in this process: this way to divide its heads"
            " is not covered; spread the model with device_map='auto' instead of tp_plan"
        )
    return mapped(value, lambda part: _gather(part, group), lambda gradient: _part(gradient, group))


def as_given(module: nn.Module, value: Tensor) -> Tensor:
    """Turn the whole output of a module into what it returns in this process: on its device and, if the module's output
    features are divided, this process's part."""
    value, weight = value.to(device_of(module)), getattr(module, "weight", None)
    if weight is None or not is_shard(weight) or not weight.placements[0].is_shard(0):
        return value
    return _part(value, weight.device_mesh.get_group())


def own_part(value: Tensor, size: int, group: Any) -> Tensor:
    """Return this process's part of all features, the inverse of `gathered`. Differentiable."""
    if group is None or value.shape[-1] == size:
        return value
    return mapped(value, lambda whole: _part(whole, group), lambda gradient: _gather(gradient, group))


def _gather(value: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(group.size())]
    distributed.all_gather(parts, value.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def _part(value: Tensor, group: Any) -> Tensor:
    part: Tensor = value.chunk(group.size(), dim=-1)[group.rank()]
    return part.clone()


class _Mapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forth: Map, back: Map) -> Tensor:
        ctx.back, ctx.at = back, x.device
        return forth(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradients[0]).to(ctx.at, gradients[0].dtype), None, None


def mapped(x: Tensor, forth: Map, back: Map) -> Tensor:
    """Return `forth(x)`; the backward pass turns a gradient at it into `back(gradient)` at x."""
    found: Tensor = _Mapped.apply(x, forth, back)  # type: ignore[no-untyped-call]  # torch has no types for it
    return found


def held(module: nn.Module, name: str = "weight") -> Tensor | None:
    """Return a weight of a module, detached and whole, on the device where the module computes; None if the module has
    no such weight."""
    weight: Tensor | None = getattr(module, name, None)
    if weight is not None and is_shard(weight):
        whole: Tensor = weight.detach().full_tensor()  # type: ignore[attr-defined]  # asks the other processes
        return whole
    if weight is None or not weight.is_meta or (hook := _offload(module)) is None:
        return None if weight is None else weight.detach()
    loaded: Tensor = hook.weights_map[name]
    return loaded.to(hook.execution_device)


def weights_of(module: nn.Module) -> Iterator[Tensor]:
    """Yield all weights of a module and its submodules, one at a time, in the order of `parameters`."""
    seen: set[int] = set()
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if id(parameter) not in seen and (weight := held(part, name)) is not None:
                seen.add(id(parameter))
                yield weight


def without_weights(model: nn.Module) -> str | None:
    """Return the name of a weight that is on the meta device and not offloaded, or None."""
    for path, part in model.named_modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight.is_meta and type(weight) is nn.Parameter and _offload(part) is None:
                return f"{path}.{name}".lstrip(".")
    return None


def twin(module: nn.Module) -> nn.Module:
    """Return a copy of a module, without accelerate's hooks, that holds its own weights."""
    if not _hooks(module):
        return copy.deepcopy(module)
    alone = copy.copy(module)
    left_out = ("_hf_hook", "_old_forward", "forward")
    alone.__dict__ = {name: value for name, value in vars(module).items() if name not in left_out}
    alone._parameters = {
        name: None if (weight := held(module, name)) is None else nn.Parameter(weight, requires_grad=False)
        for name in module._parameters
    }
    return copy.deepcopy(alone)


def own_forward(module: nn.Module) -> Any:
    """Return the forward that a user put on a module in place of its class's, or None. Those of accelerate and of
    transformers' tensor parallelism do not count."""
    forward = vars(module).get("forward")
    if getattr(forward, "__module__", "") == "transformers.distributed.tensor_parallel":
        return None
    if _hooks(module) and isinstance(forward, functools.partial):
        forward = vars(module).get("_old_forward")
    return None if getattr(forward, "__func__", None) is type(module).forward else forward


@contextmanager
def reloading(model: nn.Module) -> Iterator[None]:
    """Inside the block, autograd keeps no offloaded weights; they are loaded again in the backward pass."""
    places = [(part, name) for part in model.modules() if _offload(part) for name in part._parameters]
    if not places:
        yield
        return

    def pack(value: Tensor) -> Any:
        if value.requires_grad or value.is_meta:
            return value
        address = value.untyped_storage().data_ptr()
        for part, name in places:
            weight = part._parameters[name]
            if weight is not None and not weight.is_meta and weight.untyped_storage().data_ptr() == address:
                return part, name, value.size(), value.stride(), value.storage_offset()
        return value

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        part, name, *shape = packed
        weight = held(part, name)
        if weight is None:
            raise ModelError(f"the weight '{name}' of a {type(part).__name__} was removed during a run")
        return weight.as_strided(*shape)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
