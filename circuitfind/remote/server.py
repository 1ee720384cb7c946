"""The part that runs on the server, where circuitfind is not installed.

1. The package is sent as source text, and imported from memory for one call. Nothing is written to disk, and a version
   that the server had imported before is restored afterwards.
2. The server's model is wrapped, the request unpickled, and the function called. References to the model in the
   request, in a user's metric for instance, become the server's model.
3. The answer is sent back as bytes, pickled like the request. Only tensors in the result leave the server.

Only `run` and what it uses in this module are sent by value, so the module imports nothing from circuitfind.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import pickle
import sys
import traceback
import warnings
from types import ModuleType
from typing import Any

import torch
from nnsight.intervention.serialization import CustomCloudPickler


class Sources(importlib.abc.MetaPathFinder, importlib.abc.ExecutionLoader):
    """A context in which a package is imported from the source texts of its modules."""

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
        names = [name for name in list(sys.modules) if name == self.package or name.startswith(f"{self.package}.")]
        return {name: sys.modules.pop(name) for name in names}

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name in self.texts else None

    def is_package(self, name: str) -> bool:
        return any(other.startswith(f"{name}.") for other in self.texts)

    def get_filename(self, name: str) -> str:
        return f"{name.replace('.', '/')}{'/__init__' if self.is_package(name) else ''}.py"

    def get_source(self, name: str) -> str:
        return self.texts[name]


class Pickler(CustomCloudPickler):  # type: ignore[misc, unused-ignore]  # nnsight is not typed
    """Pickles the package's own objects by name, because both sides have its source, and a user's functions by value.

    The model becomes a reference, because each side has its own, and tensors are moved to the CPU.
    """

    def __init__(self, file: io.BytesIO, package: str, model: Any) -> None:
        CustomCloudPickler.__init__(self, file, protocol=4)  # no super(): methods are sent as functions
        self.package, self.model = package, model

    def persistent_id(self, obj: Any) -> str | None:
        return "model" if self.model is not None and obj is self.model else None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and obj.device.type != "cpu":
            return obj.detach().cpu().__reduce_ex__(4)
        home = str(getattr(obj, "__name__" if isinstance(obj, ModuleType) else "__module__", ""))
        if home.partition(".")[0] == self.package and "<locals>" not in getattr(obj, "__qualname__", ""):
            return (importlib.import_module, (home,)) if isinstance(obj, ModuleType) else NotImplemented
        return CustomCloudPickler.reducer_override(self, obj)


class Unpickler(pickle.Unpickler):
    """Reads what `Pickler` wrote; references to the model become `model`."""

    def __init__(self, content: bytes, model: Any) -> None:
        pickle.Unpickler.__init__(self, io.BytesIO(content))
        self.model = model

    def persistent_load(self, name: str) -> Any:
        return self.model


def run(envoy: Any, package: str, texts: dict[str, str], wrapped: dict[str, Any], request: bytes) -> bytes:
    """Call a function of the package on the model of an nnsight envoy.

    Args:
        wrapped: keyword arguments of `circuitfind.wrap`, with the fields of `Family` as a dictionary.
        request: a pickled dictionary: `home` (the module), `function` (its name), `arguments`, `keywords`.

    Returns:
        A pickled dictionary, `{"result": ..., "warnings": [text]}`. If the call failed, it has in place of "result"
        one of "error" (name of a class in `circuitfind.errors`, text), "lacks" (a missing Python package, traceback),
        "failed" (any other error, traceback), or "weightless" (True: the weights are not in this process).
    """
    hf, answer = envoy._module, io.BytesIO()
    if hf is None or any(parameter.is_meta for parameter in hf.parameters()):
        return pickle.dumps({"weightless": True, "warnings": []}, protocol=4)
    outcome: dict[str, Any] = {}
    with Sources(package, texts), warnings.catch_warnings(record=True) as heard, torch.enable_grad():
        warnings.simplefilter("always")
        errors, model = importlib.import_module(f"{package}.errors"), None
        try:
            family = importlib.import_module(f"{package}.models.families").Family(**wrapped["family"])
            loading = importlib.import_module(f"{package}.loading")
            model = loading.wrap(hf, envoy.tokenizer, **{**wrapped, "family": family})
            asked = Unpickler(request, model).load()
            function = getattr(importlib.import_module(asked["home"]), asked["function"])
            outcome["result"] = function(model, *asked["arguments"], **asked["keywords"])
        except errors.CircuitfindError as error:
            kinds = (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
            outcome["error"] = (next(kinds), str(error))  # for a user's subclass, its base class in circuitfind
        except ModuleNotFoundError as error:
            outcome["lacks"] = (error.name, traceback.format_exc())
        except Exception as error:  # in a user's function
            outcome["failed"] = (traceback.format_exception_only(error)[-1].strip(), traceback.format_exc())
        outcome["warnings"] = [str(note.message) for note in heard if issubclass(note.category, UserWarning)]
        Pickler(answer, package, model).dump(outcome)
    return answer.getvalue()
