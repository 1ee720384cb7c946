"""What runs beside the weights, on a server that has never heard of circuitfind.

1. The package travels as text, and is imported from memory for the length of one call. Nothing is written there, and
   whatever the server had of it before is there again afterwards.
2. The request is unpickled, the model that the server holds is wrapped, the function called.
3. The answer leaves as bytes; a tensor never does unless it is part of the result.

Only `run` and what it names in this module are sent by value, so the module imports nothing of circuitfind.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import pickle
import sys
import warnings
from typing import Any

import torch


class Sources(importlib.abc.MetaPathFinder, importlib.abc.ExecutionLoader):
    """Imports a package from the texts of its modules."""

    def __init__(self, package: str, texts: dict[str, str]) -> None:
        self.package, self.texts = package, texts
        self.shadowed: dict[str, Any] = {}

    def __enter__(self) -> None:
        self.shadowed = self._forget()
        sys.meta_path.insert(0, self)

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)
        self._forget()
        sys.modules.update(self.shadowed)

    def _forget(self) -> dict[str, Any]:
        names = [name for name in sys.modules if name == self.package or name.startswith(f"{self.package}.")]
        return {name: sys.modules.pop(name) for name in names}

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in self.texts:
            return None
        return importlib.util.spec_from_loader(name, self)

    def is_package(self, name: str) -> bool:
        return any(other.startswith(f"{name}.") for other in self.texts)

    def get_filename(self, name: str) -> str:
        return f"{name.replace('.', '/')}{'/__init__' if self.is_package(name) else ''}.py"

    def get_source(self, name: str) -> str:
        return self.texts[name]


def run(envoy: Any, package: str, texts: dict[str, str], request: bytes) -> bytes:
    """Calls a function of the package on the model behind an nnsight envoy.

    Args:
        request: a pickled dictionary: `home` and `function`, `arguments`, `keywords`, `wrapped` (keywords of `wrap`).

    Returns:
        By `torch.save`: `{"result": ..., "warnings": [text]}`; instead of a result "error", its class's name and text,
        or "weightless" where the weights are not in this process.
    """
    hf, answer = envoy._module, io.BytesIO()
    if any(parameter.is_meta for parameter in hf.parameters()):
        torch.save({"weightless": True, "warnings": []}, answer, pickle_protocol=4)
        return answer.getvalue()
    outcome: dict[str, Any] = {}
    with Sources(package, texts), warnings.catch_warnings(record=True) as heard, torch.enable_grad():
        warnings.simplefilter("always")
        asked = pickle.loads(request)
        expected = importlib.import_module(f"{package}.errors").CircuitfindError
        try:
            wrap = importlib.import_module(f"{package}.loading").wrap
            model = wrap(hf, envoy.tokenizer, **asked["wrapped"])
            function = getattr(importlib.import_module(asked["home"]), asked["function"])
            outcome["result"] = function(model, *asked["arguments"], **asked["keywords"])
        except expected as error:
            outcome["error"] = (type(error).__name__, str(error))
        outcome["warnings"] = [str(note.message) for note in heard if note.category is UserWarning]
        torch.save(outcome, answer, pickle_protocol=4)
    return answer.getvalue()
