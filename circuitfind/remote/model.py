"""A model that runs on a server: its graph and tokenizer are here, its weights are there.

The config is enough to know every node and edge, so tasks, circuits, files and pictures need no server. A call that
needs the weights goes there as one job (`circuitfind.remote.call`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

import nnsight
import torch

from circuitfind.errors import ModelError
from circuitfind.models.adapter import Adapter, graph_of
from circuitfind.models.families import FAMILIES, Family, family_of
from circuitfind.models.load import Model, config_of, fetch_tokenizer, source_of

_SIMULATED = "local"
_SECRETS = ("token", "use_auth_token", "cache_dir")


@dataclass(frozen=True, eq=False, repr=False)
class RemoteModel(Model):
    """A model on an NDIF server; `hf` has its modules, without weights.

    Attributes:
        envoy: nnsight's wrapper, from which the server knows the model.
        where: nnsight's `remote`: True, the URL of a server, or "local".
        check: the server tests the three identities before each job.
        family: names of its modules; it travels with each job, because the server may not know it.
    """

    envoy: Any
    where: bool | str
    check: bool
    family: Family

    @property
    def wrapping(self) -> dict[str, Any]:
        """Keywords of `circuitfind.wrap` on the server, as plain data."""
        return {"name": self.name, "check": self.check, "backend": "hooks", "family": asdict(self.family)}

    @property
    def place(self) -> str:
        return "NDIF" if self.where is True else str(self.where)

    @property
    def remote(self) -> bool:
        return True


class _Outline:
    """The part of an `Adapter` that needs no weights; everything else raises an error that says where they are."""

    def __init__(self, name: str, hf: Any, family: Family) -> None:
        self.name, self.config, self.graph = name, hf.config.get_text_config(), graph_of(hf, family)
        self.device, self.dtype = torch.device("cpu"), next(hf.parameters()).dtype

    def __getattr__(self, attribute: str) -> Any:
        where = f"the weights of '{self.name}' here, and they are on a server"
        raise ModelError(f"this needs {where}: load it without remote=")


def remote_model(
    name: str, where: bool | str, check: bool = True, family: Family | None = None, **keywords: Any
) -> RemoteModel:
    """A model on a server; nothing is sent yet.

    Args:
        where: True for the host that nnsight is configured for, a URL, or "local" to try a job out: the weights are
            loaded here, and everything else works as with a server.
        family: used in place of the table's row.
        keywords: passed on to nnsight (revision, ...).
    """
    if where is not True and where != _SIMULATED and not (isinstance(where, str) and "://" in where):
        remedy = "give True (NDIF), the URL of a server such as http://host:8001, or 'local'"
        raise ModelError(f"remote={where!r}: {remedy}")
    config = config_of(name, **keywords).get_text_config()
    family_of(config, family)
    tokenizer = fetch_tokenizer(name, **keywords)
    if tokenizer is None:
        raise ModelError(f"'{name}' has no tokenizer, which NDIF needs to run a language model")
    envoy = nnsight.TransformersModel(source_of(name), task="text-generation", tokenizer=tokenizer, **keywords)
    if where == _SIMULATED:
        envoy.dispatch()
    for secret in _SECRETS:  # nnsight would send them with every job
        envoy.kwargs.pop(secret, None)
    family = family or FAMILIES[config.model_type]
    outline = cast(Adapter, _Outline(name, envoy._module, family))
    return RemoteModel(name, envoy._module, tokenizer, outline, envoy, where, check, family)
