"""The part that runs on the server, where circuitfind is not installed.

1. The package is sent as source text and imported from memory for the duration of one call. Nothing is written, and any
   version of it that the server had imported is restored afterwards.
2. The server's model is wrapped, the request is unpickled, the function is called. References to the model in the
   request, in a user's metric for instance, become this model.
3. The answer is sent back as bytes, pickled as the request was; no tensor leaves unless it is part of the result.

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
    """Pickles the package's own objects by name, because both ends have its source, and a user's functions as source.

    The model is replaced by a reference, and tensors are moved to the CPU: the other end has neither.
    """

    def __init__(self, file: io.BytesIO, package: str, model: Any) -> None:
        CustomCloudPickler.__init__(self, file, protocol=4)  # no super(): methods travel as functions
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
    """Reads what `Pickler` wrote; references to the model become this end's model."""

    def __init__(self, content: bytes, model: Any) -> None:
        pickle.Unpickler.__init__(self, io.BytesIO(content))
        self.model = model

    def persistent_load(self, name: str) -> Any:
        return self.model


def run(envoy: Any, package: str, texts: dict[str, str], wrapped: dict[str, Any], request: bytes) -> bytes:
    """Calls a function of the package on the model behind an nnsight envoy.

    Args:
        wrapped: keywords of `circuitfind.wrap`, with the fields of `Family` as a dictionary.
        request: a pickled dictionary: `home` and `function`, `arguments`, `keywords`.

    Returns:
        A pickled dictionary, `{"result": ..., "warnings": [text]}`. In place of a result it has "error", a class of
        `circuitfind.errors` and its text; or "lacks", a Python package that is missing, or "failed", any other error,
        each with the traceback; or "weightless" if the weights are not in this process.
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
            outcome["error"] = (next(kinds), str(error))  # for a user's subclass, circuitfind's base class
        except ModuleNotFoundError as error:
            outcome["lacks"] = (error.name, traceback.format_exc())
        except Exception as error:  # in a user's function
            outcome["failed"] = (traceback.format_exception_only(error)[-1].strip(), traceback.format_exc())
        outcome["warnings"] = [str(note.message) for note in heard if issubclass(note.category, UserWarning)]
        Pickler(answer, package, model).dump(outcome)
    return answer.getvalue()
