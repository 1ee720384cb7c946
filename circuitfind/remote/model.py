"""A model that runs on a server: its graph and its tokenizer are here, its weights are not.

The configuration is enough to know every node and edge, so tasks, circuits, files and pictures need no server. What
needs the weights goes there as one job a call (`circuitfind.remote.call`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import nnsight
import torch
from torch import nn

from circuitfind.errors import ModelError
from circuitfind.models.adapter import Adapter, graph_of
from circuitfind.models.families import family_of
from circuitfind.models.load import Model, config_of, fetch_tokenizer, source_of

SIMULATED = "local"
OURS_ALONE = ("token", "use_auth_token", "cache_dir")


@dataclass(frozen=True, eq=False, repr=False)
class RemoteModel(Model):
    """A model on an NDIF server; `hf` has its modules, without weights.

    Attributes:
        envoy: nnsight's wrapper, which names the model to the server.
        where: what nnsight takes as `remote`: True, the URL of a server, or "local".
        check: the server runs the three identities before each job.
    """

    envoy: Any
    where: bool | str
    check: bool

    @property
    def place(self) -> str:
        return "NDIF" if self.where is True else str(self.where)

    @property
    def remote(self) -> bool:
        return True


class Outline:
    """What an `Adapter` knows without weights; for anything else it says where the weights are."""

    def __init__(self, name: str, hf: Any) -> None:
        self.name = name
        self.config = hf.config.get_text_config()
        self.graph = graph_of(hf)
        self.device = torch.device("cpu")
        self.dtype = next(hf.parameters()).dtype

    def __getattr__(self, attribute: str) -> Any:
        raise ModelError(
            f"this needs the weights of '{self.name}' here, and they are on a server: load it without remote="
        )


def remote_model(name: str, where: bool | str, check: bool = True, **keywords: Any) -> RemoteModel:
    """A model named to a server; nothing is sent yet.

    Args:
        where: True for the host that nnsight is configured for, a URL, or "local": the weights are loaded here and all
            else is as if they were not, to try a job out.
        keywords: passed on to nnsight (revision, ...).

    Raises:
        ModelError: the model is unknown or not covered; `where` is no place.
    """
    if where is not True and where != SIMULATED and not (isinstance(where, str) and "://" in where):
        raise ModelError(
            f"remote={where!r}: give True (NDIF), the URL of a server such as http://host:8001, or 'local'"
        )
    family_of(config_of(name, **keywords).get_text_config())
    tokenizer = fetch_tokenizer(name, **keywords)
    if tokenizer is None:
        raise ModelError(f"'{name}' has no tokenizer, without which NDIF runs no language model")
    envoy = nnsight.TransformersModel(source_of(name), task="text-generation", tokenizer=tokenizer, **keywords)
    if where == SIMULATED:
        envoy.dispatch()
    for secret in OURS_ALONE:  # nnsight would send them along with every job
        envoy.kwargs.pop(secret, None)
    hf: nn.Module = envoy._module
    outline = cast(Adapter, Outline(name, hf))
    return RemoteModel(name, hf, tokenizer, outline, envoy, where, check)
