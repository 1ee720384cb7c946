"""Where a model's weights are, and where they are computed with: one device, several, or one that loads them.

Accelerate spreads a model (`device_map`) and puts a hook on its modules, which moves what they are given to their
device. Weights kept in memory or on disk (*offloaded*) are on the meta device until their module runs.

1. circuitfind computes at *home*, the device that token ids go to. What a module elsewhere holds moves home as a
   visitor is shown it, and what the visitor returns moves back (`backends.py`); a weight moves when it is read.
2. `held` is the one way to a weight's values, wherever they are.
3. Under tensor parallelism (`tp_plan="auto"`, one process a device) each process holds some heads' weights. All of them
   run the same calls: a visitor is shown all heads, gathered from the processes, and its own part goes on in each.
4. The way back needs the weights again: in place of an offloaded weight, autograd keeps where it is held (`reloading`).
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
    """Accelerate's hooks on a module."""
    hook = vars(module).get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _offload(module: nn.Module) -> Any:
    """The hook that loads a module's weights, if one does."""
    return next((hook for hook in _hooks(module) if getattr(hook, "offload", False)), None)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes."""
    for part in module.modules():
        for hook in _hooks(part):
            if (device := getattr(hook, "execution_device", None)) is not None:
                return torch.empty(0, device=device).device  # of "cuda" the one it stands for
        for weight in part.parameters(recurse=False):
            return weight.device
    return torch.device("cpu")


def sent(values: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device, copied without waiting for the work that is queued there."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)


def is_spread(model: nn.Module) -> bool:
    """Whether weights are on several devices or in several processes, or loaded as they are needed."""
    return (
        hasattr(model, "_hf_hook")
        or len({weight.device for weight in model.parameters()}) > 1
        or processes_of(model) is not None
    )


def is_shard(weight: Tensor) -> bool:
    """Whether this process holds a part of the weight (a `DTensor`, whose class is imported only where it is used)."""
    return hasattr(weight, "full_tensor")


def processes_of(model: nn.Module) -> Any:
    """The process group that a model's weights are divided among; None if they are not."""
    weight: Any = next(filter(is_shard, model.parameters()), None)
    return None if weight is None else weight.device_mesh.get_group()


def gathered(value: Tensor, features: int | None, group: Any) -> Tensor:
    """The features of all processes, from this one's part of them: the last axis. Differentiable."""
    if group is None or features in (None, value.shape[-1]):
        return value
    if value.shape[-1] * distributed.get_world_size(group) != features:
        raise ModelError(
            f"a projection of {features} features has {value.shape[-1]} in this process: its heads are divided in a way"
            " that is not covered; spread the model with device_map='auto' instead of tp_plan"
        )
    return mapped(value, lambda part: _gather(part, group), lambda gradient: _part(gradient, group))


def as_given(module: nn.Module, value: Tensor) -> Tensor:
    """What a module gives, from the whole of it: on its device, and of divided features this process's."""
    value, weight = value.to(device_of(module)), getattr(module, "weight", None)
    if weight is None or not is_shard(weight) or not weight.placements[0].is_shard(0):
        return value
    return _part(value, weight.device_mesh.get_group())


def own_part(value: Tensor, size: int, group: Any) -> Tensor:
    """This process's part of all features; `gathered` backwards, in both directions."""
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
    """`forth(x)`; a gradient at it becomes `back(gradient)` at x."""
    found: Tensor = _Mapped.apply(x, forth, back)  # type: ignore[no-untyped-call]  # torch has no types for it
    return found


def held(module: nn.Module, name: str = "weight") -> Tensor | None:
    """A weight of a module, where it is computed with; None if it has none."""
    weight: Tensor | None = getattr(module, name, None)
    if weight is not None and is_shard(weight):
        whole: Tensor = weight.detach().full_tensor()  # type: ignore[attr-defined]  # asks the other processes
        return whole
    if weight is None or not weight.is_meta or (hook := _offload(module)) is None:
        return None if weight is None else weight.detach()
    loaded: Tensor = hook.weights_map[name]
    return loaded.to(hook.execution_device)


def weights_of(module: nn.Module) -> Iterator[Tensor]:
    """All weights of a module and of its parts, one at a time, in the order of `parameters`."""
    seen: set[int] = set()
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if id(parameter) not in seen and (weight := held(part, name)) is not None:
                seen.add(id(parameter))
                yield weight


def without_weights(model: nn.Module) -> str | None:
    """The name of a weight that is nowhere, if there is one."""
    for path, part in model.named_modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight.is_meta and type(weight) is nn.Parameter and _offload(part) is None:
                return f"{path}.{name}".lstrip(".")
    return None


def twin(module: nn.Module) -> nn.Module:
    """A copy of a module that holds its weights itself."""
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
    """The forward that the user put on a module in place of its class's, if any: accelerate's does not count."""
    forward = vars(module).get("forward")
    if getattr(forward, "__module__", "") == "transformers.distributed.tensor_parallel":
        return None
    if _hooks(module) and isinstance(forward, functools.partial):
        forward = vars(module).get("_old_forward")
    return None if getattr(forward, "__func__", None) is type(module).forward else forward


@contextmanager
def reloading(model: nn.Module) -> Iterator[None]:
    """Inside, autograd keeps no offloaded weights: they are loaded again on the way back."""
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
            raise ModelError(f"the weight '{name}' of a {type(part).__name__} was taken away during a run")
        return weight.as_strided(*shape)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
