"""`RemoteModel`, a model on a server, and `call`, which runs a function on it as one job of the server.

The graph and the tokenizer of a `RemoteModel` are local, only its weights are on the server. So tasks, circuits, files
and pictures need no server.

1. A call becomes one nnsight session on the server: it gets the package's source, the function's name and the
   arguments, and sends back the result (`circuitfind.remote.server`). A search with thousands of passes is one job, and
   no activations cross the network.
2. The user's own functions (metrics, methods) are sent, too, also from modules that are not installed.
3. circuitfind's errors and warnings on the server are raised here.
"""

from __future__ import annotations

import functools
import importlib.resources
import inspect
import io
import os
import pickle
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

import nnsight
import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from nnsight.modeling import huggingface

import circuitfind.errors
from circuitfind.errors import ModelError, warn
from circuitfind.models.adapter import Adapter, graph_of
from circuitfind.models.families import FAMILIES, Family, family_of, named
from circuitfind.models.load import Model, config_of, fetch_tokenizer, source_of
from circuitfind.progress import progress
from circuitfind.remote.server import Pickler, Unpickler, run

_PACKAGE = __name__.partition(".")[0]
R = TypeVar("R")
_SIMULATED = "local"
_SECRETS = ("token", "use_auth_token", "cache_dir")


# -------------------------------------------------------------------- the model
@dataclass(frozen=True, eq=False, repr=False)
class RemoteModel(Model):
    """A model on an NDIF server; `hf` has its modules, without weights.

    Attributes:
        envoy: nnsight's wrapper, from which the server knows the model.
        where: nnsight's `remote`: True, the URL of a server, or "local".
        check: whether the server checks the model's identities before each job.
        family: names of its modules; sent with each job, because the server may not know the family.
    """

    envoy: Any
    where: bool | str
    check: bool
    family: Family

    @property
    def wrapping(self) -> dict[str, Any]:
        """Keyword arguments of `circuitfind.wrap` on the server, as plain data."""
        return {"name": self.name, "check": self.check, "backend": "hooks", "family": asdict(self.family)}

    @property
    def place(self) -> str:
        return "NDIF" if self.where is True else str(self.where)

    @property
    def remote(self) -> bool:
        return True


class _Outline:
    """The attributes of an `Adapter` that need no weights. Any other attribute raises a ModelError."""

    def __init__(self, name: str, hf: Any, family: Family) -> None:
        self.name, self.config, self.graph = name, hf.config.get_text_config(), graph_of(hf, family)
        self.row = ""
        self.device, self.dtype, self.origin = torch.device("cpu"), next(hf.parameters()).dtype, ""

    def __getattr__(self, attribute: str) -> Any:
        raise ModelError(f"this needs the weights of '{self.name}', which are on a server: load it without remote=")


def remote_model(
    name: str, where: bool | str, check: bool, family: Family | str | None, **keywords: Any
) -> RemoteModel:
    """Return a model on a server. Nothing is sent yet.

    Args:
        where: True for the host in nnsight's configuration, a URL, or "local" to test a job: the weights are loaded
            here, and everything else works as with a server.
        family: used in place of the row in circuitfind's table of families.
        keywords: passed on to nnsight (revision, ...).

    Raises:
        ModelError: `where` is none of these, or the model has no tokenizer or is of no known family.
    """
    if where is not True and where != _SIMULATED and not (isinstance(where, str) and "://" in where):
        remedy = "give True (NDIF; --remote ndif), the URL of a server such as http://host:8001, or 'local'"
        raise ModelError(f"remote={where!r}: {remedy}")
    config = config_of(name, **keywords).get_text_config()
    family_of(config, family)  # raises an error before anything is built
    tokenizer = fetch_tokenizer(name, **keywords)
    if tokenizer is None:
        raise ModelError(f"'{name}' has no tokenizer, which NDIF needs to run a language model")
    envoy = nnsight.TransformersModel(source_of(name)[0], task="text-generation", tokenizer=tokenizer, **keywords)
    if where == _SIMULATED:
        envoy.dispatch()
    spelled, folder = envoy.repo_id, Path(envoy.repo_id).is_dir()
    if folder or HF_HUB_OFFLINE:
        # nnsight would ask the hub for the spelling of the name, with no public way to prevent this; a later version
        # without this cache would ask
        getattr(huggingface, "_ID_CACHE", {})[spelled] = os.path.abspath(spelled) if folder else spelled
    for secret in _SECRETS:  # nnsight would send them with every job
        envoy.kwargs.pop(secret, None)
    family = named(family) if isinstance(family, str) else family or FAMILIES[config.model_type]
    outline = cast(Adapter, _Outline(name, envoy._module, family))
    return RemoteModel(name, envoy._module, tokenizer, outline, envoy, where, check, family)


# -------------------------------------------------------------------- a call on it
def call(model: RemoteModel, function: Callable[..., R], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> R:
    """Call a function on the server and return its result. Raises the function's errors, or a ModelError if the job
    fails."""
    try:
        inspect.signature(function).bind(model, *arguments, **keywords)
    except TypeError as error:
        raise TypeError(f"{function.__name__}() {error}") from None
    _check_keywords(function, arguments, keywords)
    for name in ("checkpoint", "folder"):
        if keywords.get(name) is not None:
            raise ModelError(f"{function.__name__}: a job on a server writes no files: leave {name}= out")
    asked = {name: _listed(value) for name, value in keywords.items()}
    given = {"arguments": list(map(_listed, arguments)), "keywords": asked}
    request = _pickled({"home": function.__module__, "function": function.__name__, **given}, model)
    with progress(f"{function.__name__} on {model.place}", 1):
        answer = _sent(model, request)
    outcome = Unpickler(answer, model).load()
    for text in outcome["warnings"]:
        warn(text)
    if "error" in outcome:
        kind, text = outcome["error"]
        raise getattr(circuitfind.errors, kind)(text)
    if "lacks" in outcome:
        package, trace = outcome["lacks"]
        remedy = "install it there; circuitfind itself needs einops and scipy there (NDIF: ndif[ext])"
        raise _noted_error(f"{function.__name__} needs '{package}', which {model.place} does not have: {remedy}", trace)
    if "failed" in outcome:
        text, trace = outcome["failed"]
        raise _noted_error(f"{function.__name__} failed on {model.place}: {text}", trace)
    if "weightless" in outcome:
        raise ModelError(
            f"the server runs this job without the weights of '{model.name}', which are in another process (NDIF's"
            " sandbox), but circuitfind needs them: use a key that the server trusts, or a server of your own"
        )
    result: R = outcome["result"]
    return result


def _check_keywords(function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Raise a TypeError for keywords that the function's `**asked` does not have, before anything is sent."""
    parameters = inspect.signature(function).parameters
    for parameter in parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            continue
        (asked,) = get_args(get_type_hints(function)[parameter.name])  # Unpack[a TypedDict]
        own = [getattr(value, "options", ()) for value in (*arguments, *keywords.values())]  # of the user's methods
        known = {*parameters, *asked.__annotations__, *(name for options in own for name in options)}
        if strange := [name for name in keywords if name not in known]:
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument '{strange[0]}'")


def _noted_error(text: str, note: str) -> ModelError:
    """Return a ModelError with a note."""
    error = ModelError(text)
    error.add_note(note)
    return error


def _sent(model: RemoteModel, request: bytes) -> bytes:
    """Run the request in one session on the server; return the answer. ModelError if this fails, with the last line of
    the error's text as message, and the whole text as note."""
    envoy, package, texts, wrapped = model.envoy, _PACKAGE, _texts(), model.wrapping
    nnsight.register(f"{_PACKAGE}.remote.server")
    try:
        with envoy.session(remote=model.where):
            answer: bytes = nnsight.save(run(envoy, package, texts, wrapped, request))
    except Exception as error:  # the network, the hub, the server and nnsight have their own classes
        said = str(error).strip().rstrip(".") or type(error).__name__
        raise _noted_error(
            f"the job for '{model.name}' on {model.place} failed: {said.splitlines()[-1]}. NDIF needs a key in"
            " NDIF_API_KEY and a model that it runs: see nnsight.ndif_status()",
            said,
        ) from None
    return answer


class _Pickler(Pickler):
    def reducer_override(self, obj: Any) -> Any:
        home = str(getattr(obj, "__module__", "")).partition(".")[0]
        if home != _PACKAGE and _is_users(home):
            nnsight.register(home)  # from now on its objects are pickled by value
        return super().reducer_override(obj)


@functools.cache
def _is_users(package: str) -> bool:
    """Whether a package that is imported here is the user's own, not an installed one, so that no server has it."""
    file = getattr(sys.modules.get(package), "__file__", None)
    installed = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return file is not None and not any(Path(file).is_relative_to(folder) for folder in installed)


def _listed(value: Any) -> Any:
    """Return a list in place of a generator, which cannot be pickled."""
    return list(value) if isinstance(value, Iterator) else value


def _pickled(value: Any, model: RemoteModel) -> bytes:
    """Return a value in pickled form. ModelError if it cannot be pickled."""
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, _PACKAGE, model).dump(value)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise ModelError(f"an argument cannot be sent to {model.place}: {error}") from None
    return buffer.getvalue()


@functools.cache
def _texts() -> dict[str, str]:
    """Return the package's source, by module name."""
    texts: dict[str, str] = {}

    def collect(folder: Any, name: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir() and entry.joinpath("__init__.py").is_file():
                collect(entry, f"{name}.{entry.name}")
            elif entry.name.endswith(".py"):
                module = f"{name}.{entry.name.removesuffix('.py')}".removesuffix(".__init__")
                texts[module] = entry.read_text(encoding="utf-8")

    collect(importlib.resources.files(_PACKAGE), _PACKAGE)
    return texts
