"""`model_call`: the decorator of every public function that takes a model.

1. A call with a `RemoteModel` is sent to its server (`remote/call.py`), which calls the same function.
2. A model runs one call at a time, because runs put hooks on its modules. Calls from other threads wait.
3. The user's contexts do not change the numbers: autocast, inference mode, the default dtype and compiled code are
   switched off inside.
4. Cached weights are updated if the model's weights have changed since the last call. If modules or hooks are new, the
   identities are checked again with them in place, on random pairs here and later on the call's pairs
   (`engine/identities.py`).
5. If a call does not fit in memory even with the smallest batches, it ends with a one-line error (`engine/batches.py`).
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import ParamSpec, TypeVar

import torch

from circuitfind import processes
from circuitfind.engine.batches import within_memory
from circuitfind.engine.identities import require_identities
from circuitfind.errors import ModelError
from circuitfind.models.backends import at_rest, observe
from circuitfind.models.load import Model
from circuitfind.remote.call import RemoteModel, call

P = ParamSpec("P")
R = TypeVar("R")


def model_call(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a public function whose first argument is a model: make it `ready`, or send the call to its server."""

    @functools.wraps(function)
    def called(*arguments: P.args, **keywords: P.kwargs) -> R:
        model = arguments[0] if arguments else keywords.get("model")
        if isinstance(model, RemoteModel):
            others = {name: value for name, value in keywords.items() if name != "model"}
            return processes.of_first(lambda: call(model, function, arguments[1:], others))  # one job on the server
        if not isinstance(model, Model):
            return function(*arguments, **keywords)  # raises an error that says what was passed
        with ready(model):
            return function(*arguments, **keywords)

    return called


@contextmanager
def ready(model: Model) -> Iterator[None]:
    """Inside this context, the model is used by this thread alone, and what is cached of it is up to date.

    Raises:
        ModelError: torch's default device is "meta", an identity fails with new modules or hooks, or memory runs out.
    """
    adapter = model.adapter
    divided = nullcontext() if adapter.processes is None else processes.in_step(adapter.processes)
    with adapter.lock, own_arithmetic(), divided, within_memory(adapter), at_rest(adapter.model):
        if adapter.held_by is None:
            if adapter.refresh():
                observe(adapter)
                adapter.unproven = None if adapter.unproven is None else True
            if adapter.unproven:
                require_identities(adapter)
                adapter.unproven, adapter.proven_length = False, 0
        yield


@contextmanager
def own_arithmetic() -> Iterator[None]:
    """Switch off the user's contexts that would change results; ModelError if torch's default device is "meta", where
    tensors have no values."""
    if torch.get_default_device().type == "meta":
        raise ModelError("torch's default device is 'meta', where tensors have no values: call this outside of it")
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    with ExitStack() as contexts:
        contexts.enter_context(torch.inference_mode(False))
        for kind in kinds:
            contexts.enter_context(torch.autocast(kind, enabled=False))
        contexts.enter_context(_PROCESS.eager())
        yield


class _Process:
    """Torch settings that all threads share: set by the first call that begins, restored by the last that ends."""

    def __init__(self) -> None:
        self.lock, self.calls, self.before = threading.Lock(), 0, ExitStack()

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Inside this context, compiled code runs eagerly, and the default dtype is float32."""
        with self.lock:
            if not self.calls:
                self.before.callback(torch.set_default_dtype, torch.get_default_dtype())
                if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes two seconds
                    self.before.enter_context(torch.compiler.set_stance("force_eager"))
                torch.set_default_dtype(torch.float32)
            self.calls += 1
        try:
            yield
        finally:
            with self.lock:
                self.calls -= 1
                if not self.calls:
                    self.before.close()


_PROCESS = _Process()
