"""`model_call`: what every public function of a model does before it runs.

1. A call with a `RemoteModel` is sent to its server (`remote/call.py`), where the same function is called.
2. A model runs one call at a time, because runs put hooks on its modules; other threads wait.
3. The user's contexts do not change the numbers: autocast, inference mode, a default dtype and compiled code are off
   inside.
4. What is kept of the weights is read again where they have changed since the last call. Where modules or hooks are
   new, the identities are proved again with them in place, here and on the pairs (`engine/identities.py`).
5. What does not fit in memory, even in the smallest batches, ends in one line (`engine/batches.py`).
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
    """Makes the model, a public function's first argument, ready for the call, or sends the call to its server."""

    @functools.wraps(function)
    def called(*arguments: P.args, **keywords: P.kwargs) -> R:
        model = arguments[0] if arguments else keywords.get("model")
        if isinstance(model, RemoteModel):
            others = {name: value for name, value in keywords.items() if name != "model"}
            return processes.of_first(lambda: call(model, function, arguments[1:], others))  # one job on the server
        if not isinstance(model, Model):
            return function(*arguments, **keywords)  # which says what it is instead
        with ready(model):
            return function(*arguments, **keywords)

    return called


@contextmanager
def ready(model: Model) -> Iterator[None]:
    """Inside, the model is this thread's alone, and what is kept of it is up to date; ModelError where torch's default
    device is "meta", new modules or hooks break an identity, or memory runs out."""
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
    """Switches off the user's contexts that would change what is computed; ModelError where torch's default device is
    "meta", on which nothing has a value."""
    if torch.get_default_device().type == "meta":
        raise ModelError("torch's default device is 'meta', where nothing has a value: call this outside that context")
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    with ExitStack() as contexts:
        contexts.enter_context(torch.inference_mode(False))
        for kind in kinds:
            contexts.enter_context(torch.autocast(kind, enabled=False))
        contexts.enter_context(_PROCESS.eager())
        yield


class _Process:
    """What torch has once for all threads: the first call sets it, and the last one that ends sets it back."""

    def __init__(self) -> None:
        self.lock, self.calls, self.before = threading.Lock(), 0, ExitStack()

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Inside, compiled code runs as written, and new tensors are float32."""
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
