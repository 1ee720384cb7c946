"""Models of the same code, weights and row are proved once a process, not each time that a test wraps one.

The identities cost a tenth of a second, and the tests wrap thousands of models, most of them copies of a few dozen.
What counts as the same is all that the identities depend on: each module's class and plain attributes, the config,
every parameter and buffer by value, and the family's row. Models with hooks, large ones, and those that are not all in
this machine's memory are always proved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from circuitfind.batch import Batch
from circuitfind.models.adapter import Adapter

LARGEST = 4_000_000  # weights; above, reading them all costs about as much as the proof
PLAIN = (int, float, str, bool, type(None), tuple)


def once(prove: Callable[..., Any]) -> Callable[..., Any]:
    """`require_identities` for tests."""
    proved: set[Hashable] = set()

    @functools.wraps(prove)
    def require(adapter: Adapter, batch: Batch | None = None) -> Any:
        weights = list(adapter.model.parameters())
        elsewhere = adapter.processes is not None or any(weight.device.type != "cpu" for weight in weights)
        if batch is not None or adapter.state.hooks or elsewhere or sum(one.numel() for one in weights) > LARGEST:
            return prove(adapter, batch)
        key = _content(adapter)
        if key in proved:
            return []
        found = prove(adapter)
        proved.add(key)
        return found

    return require


def _content(adapter: Adapter) -> Hashable:
    model = adapter.model
    modules = dict(model.named_modules())
    code = tuple((path, type(one), type(one).forward, _attributes(one)) for path, one in modules.items())
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    values = tuple((name, tensor.dtype, tuple(tensor.shape), _bytes(tensor)) for name, tensor in tensors)
    return code, hash(values), repr(model.config), repr(adapter.family), adapter.row, adapter.backend


def _attributes(module: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}={value!r}" for name, value in vars(module).items() if isinstance(value, PLAIN))


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
