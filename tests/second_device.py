"""A second device for a machine that has one: tensors that say they are elsewhere and meet no tensor from here.

1. `Elsewhere` wraps a tensor and calls its device "meta": of all kinds of device, autograd runs this one's way back on
   the processor's thread, so nothing of torch is missing.
2. Inside `second_device()` what is made on, or moved to, "meta" is wrapped, and moving to "cpu" unwraps it.
3. Inside `no_waiting()` nothing may ask for a value of the second device, or for a size that depends on values, or send
   one without `non_blocking` (as an array that indexes is): on an accelerator the processor would wait until all that
   was asked of it before is done.
4. Any other operation on tensors of both places fails, as it does between a processor and an accelerator: numbers
   (tensors without axes) may come from here, and so may indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

THERE = torch.device("meta")
WAITS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount")
WAITS += ("unique_consecutive", "unique_dim", "_unique2", "unique_dim_consecutive")
_at_work: list[bool] = [False]


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

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a tensor of the second device to numpy: use .cpu() first")

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
    sends = name == "_to_copy" and asked is not None and (torch.device(asked).type == THERE.type) != there
    sends |= name == "copy_" and isinstance(args[0], Elsewhere) != isinstance(args[1], Elsewhere)
    blocks = sends and not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
    indices = tree_leaves(args[1]) if indexed and name.endswith(("index", "put", "put_", "impl_")) else []
    by_values = any(
        isinstance(one, Tensor) and (one.dtype == torch.bool or not isinstance(one, Elsewhere)) for one in indices
    )
    by_values |= name == "repeat_interleave" and kwargs.get("output_size") is None
    if _at_work[0] and (blocks or (there and (name in WAITS or by_values))):
        raise RuntimeError(f"{func} waits for the device")
    if asked is not None:
        there, kwargs = torch.device(asked).type == THERE.type, {**kwargs, "device": torch.device("cpu")}
    if (
        name == "copy_"
        and there
        and len({one.held.data_ptr() for one in tensors if isinstance(one, Elsewhere)}) == 1 == len(here) + 1
    ):
        return args[0]  # what `matmul` was given to write into: it is there already
    bare_args, bare_kwargs = tree_map(lambda one: one.held if isinstance(one, Elsewhere) else one, (args, kwargs))
    result = func(*bare_args, **bare_kwargs)
    if not there or name == "_local_scalar_dense":
        return result
    if name.endswith("_"):
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    return tree_map(lambda one: Elsewhere(one) if isinstance(one, Tensor) else one, result)


class _Made(TorchFunctionMode):
    """`torch.tensor(values, device="meta")` would not look at the values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in (torch.tensor, torch.as_tensor) or kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = kwargs.pop("device")
        return func(*args, **kwargs).to(device)


@contextmanager
def second_device() -> Iterator[None]:
    with _Mode(), _Made():
        yield


@contextmanager
def no_waiting() -> Iterator[None]:
    before, _at_work[0] = _at_work[0], True
    try:
        yield
    finally:
        _at_work[0] = before


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
