"""A second device for a machine that has one: tensors that say they are elsewhere and meet no tensor from here.

1. `Elsewhere` wraps a tensor and calls its device "meta": of all kinds of device, autograd runs this one's way back on
   the processor's thread, so nothing of torch is missing.
2. Inside `second_device()` what is made on, or moved to, "meta" is wrapped, and moving to "cpu" unwraps it.
3. Any other operation on tensors of both places fails, as it does between a processor and an accelerator: numbers
   (tensors without axes) may come from here, and so may indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

THERE = torch.device("meta")


class Elsewhere(Tensor):
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=THERE,
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Elsewhere({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::")
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    there = any(isinstance(one, Elsewhere) for one in tensors)
    here = [one for one in tensors if not isinstance(one, Elsewhere) and one.ndim]
    indexed = name.startswith(("index", "_index_put")) and isinstance(args[0], Elsewhere)
    if indexed:
        here = [one for one in here if one.dtype not in (torch.long, torch.bool)]
    if there and here and name not in ("_to_copy", "copy_"):
        told = ", ".join(f"{one.device} {list(one.shape)}" for one in tensors)
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {told}")
    asked = kwargs.get("device")
    if asked is not None:
        there, kwargs = torch.device(asked).type == THERE.type, {**kwargs, "device": torch.device("cpu")}
    bare_args, bare_kwargs = tree_map(lambda one: one.held if isinstance(one, Elsewhere) else one, (args, kwargs))
    result = func(*bare_args, **bare_kwargs)
    if not there or name == "_local_scalar_dense":
        return result
    if name.endswith("_"):
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    return tree_map(lambda one: Elsewhere(one) if isinstance(one, Tensor) else one, result)


@contextmanager
def second_device() -> Iterator[None]:
    with _Mode():
        yield


def put_there(model: nn.Module, path: str) -> None:
    """Moves a module to the second device; every module is given what it needs on its own, by accelerate's hooks."""
    model.get_submodule(path).to(THERE)
    for name, module in model.named_modules():
        if name == path or [*module.parameters(recurse=False)]:
            at = THERE if f"{name}.".startswith(f"{path}.") else torch.device("cpu")
            add_hook_to_module(module, _Aligned(at))
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True))


class _Aligned(AlignDevicesHook):
    def init_hook(self, module: nn.Module) -> nn.Module:
        return module  # its weights are there already
