"""`load`, `wrap`, `task` and `bind`: how a model and a behaviour come in, and meet."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from circuitfind.engine.identities import Identity, check_identities, require_identities
from circuitfind.errors import ModelError, TaskError
from circuitfind.models.load import Model, adapt, fetch
from circuitfind.remote.call import remotable
from circuitfind.remote.model import remote_model
from circuitfind.tasks.behaviour import Behaviour
from circuitfind.tasks.builtin import behaviour
from circuitfind.tasks.spans import locatable
from circuitfind.tasks.task import BoundTask, Task
from circuitfind.tasks.tokens import PromptTokenizer
from circuitfind.tasks.words import SingleTokens


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: Any = None,
    check: bool = True,
    backend: str = "nnsight",
    remote: bool | str = False,
    **keywords: Any,
) -> Model:
    """Loads an unmodified Hugging Face model and checks that circuitfind computes what it computes.

    Args:
        name: "tiny" (embedded), a hub id such as "openai-community/gpt2", or a folder.
        dtype: such as "float32"; by default the precision that the weights are stored in.
        device: a torch device; by default the accelerator if there is one.
        check: run the three identities of `circuitfind.engine.identities` on a short random prompt.
        backend: "nnsight" or "hooks", what single passes run through; the results are the same to the bit.
        remote: run on an NDIF server, which has the weights: True for the host that nnsight is configured for, a URL
            for another, "local" to try it out here. Every call is one job there; see `circuitfind.remote`.
        keywords: passed on to `from_pretrained` (revision, token, attn_implementation, ...).

    Raises:
        ModelError: it cannot be loaded, is not covered, or fails the check.
    """
    if not isinstance(name, (str, os.PathLike)):
        remedy = "; a model in memory goes to cf.wrap(hf_model, tokenizer)" if isinstance(name, nn.Module) else ""
        raise ModelError(f"a model is loaded by its name or folder, not by a {type(name).__name__}{remedy}")
    name = os.fspath(name)
    if remote:
        if dtype is not None or device is not None:
            raise ModelError("dtype= and device= are the server's to choose: leave them out with remote=")
        return remote_model(name, remote, check, **keywords)
    hf, tokenizer = fetch(name, dtype, device, **keywords)
    return wrap(hf, tokenizer, name=name, check=check, backend=backend)


def wrap(
    hf: nn.Module, tokenizer: Any = None, *, name: str | None = None, check: bool = True, backend: str = "nnsight"
) -> Model:
    """Takes a Hugging Face model that is already in memory; it is left as it is.

    Args:
        tokenizer: None means that tasks are given as token ids.

    Raises:
        ModelError: it is not covered, or fails the check.
    """
    if isinstance(hf, Model):
        raise ModelError(f"model '{hf.name}' is wrapped already: use it as it is, or wrap the model inside: its .hf")
    if isinstance(hf, str):
        raise _no_model(hf)
    model = adapt(
        name or getattr(getattr(hf, "config", None), "name_or_path", "") or type(hf).__name__, hf, tokenizer, backend
    )
    if check:
        require_identities(model.adapter)
    return model


@remotable
def identities(model: Model) -> list[Identity]:
    """The three identities of `circuitfind.engine.identities`, computed where the model is."""
    return check_identities(model.adapter)


def task(
    name: str,
    model: Model,
    *,
    n: int = 64,
    seed: int = 0,
    corruption: str | None = None,
    template: str | int | None = None,
    metric: Any = None,
    bos: bool | None = None,
) -> Task:
    """A built-in behaviour in words that the model's tokenizer has as single tokens.

    Args:
        n: number of pairs.
        corruption: one of the behaviour's named corruptions; the first by default.
        template: only sentences of this name or part of a name: "abba-3", "abba" or 3 for IOI; by default all.
        metric: overrides the behaviour's own.

    Raises:
        TaskError: no such behaviour, corruption or template, or the tokenizer cannot express it.
    """
    if not isinstance(name, str):
        raise TaskError(f"a built-in task is named by text such as 'ioi', not by a {type(name).__name__}")
    check_model(model)
    found = behaviour(name)
    if model.tokenizer is None:
        raise TaskError(f"'{found.name}' is made of words, and this model has no tokenizer: give a Task of token ids")
    rows = found.make(SingleTokens(model.tokenizer), n, seed, corruption, template)
    distinct = len({row.clean for row in rows})
    if distinct < n:
        warnings.warn(
            f"'{found.name}' has only {distinct} distinct prompts with this tokenizer; {n} were asked for", stacklevel=2
        )
    clean = [row.clean for row in rows]
    return Task(
        clean=clean,
        corrupted=[row.corrupted for row in rows],
        answers=[list(row.answers) for row in rows],
        wrong_answers=[list(row.wrong) for row in rows],
        metric=metric or found.metric,
        bos=bos,
        name=_named(found, corruption, template),
        flips=all(row.flips for row in rows),
        spans=locatable([row.spans for row in rows], clean, PromptTokenizer(model.tokenizer, bos)),
    )


def _named(found: Behaviour, corruption: str | None, template: str | int | None) -> str:
    """The behaviour's name with what was chosen: "ioi", "ioi:abc", "ioi:abc [abba]"."""
    name = found.name if corruption is None else f"{found.name}:{found.corruption(corruption)}"
    return name if template is None else f"{name} [{template}]"


def check_model(model: Any) -> None:
    """Refuses what did not come from `load` or `wrap`.

    Raises:
        ModelError: naming what it is.
    """
    if not isinstance(model, Model):
        raise _no_model(model)


def bind(model: Model, task: Task | BoundTask) -> BoundTask:
    """The task in the model's tokens, on its device; one that is bound to this model already stays as it is.

    Raises:
        ModelError: `model` did not come from `load` or `wrap`.
        TaskError: `task` is no task, was bound to another model, or does not fit this one.
    """
    check_model(model)
    if isinstance(task, Task):
        return task.on(model)
    if not isinstance(task, BoundTask):
        what = f"the text '{task}'" if isinstance(task, str) else f"a {type(task).__name__}"
        named = repr(task) if isinstance(task, str) else "'ioi'"
        raise TaskError(f"task is {what}: make a task of it with cf.task({named}, model), cf.Task or cf.Task.from_file")
    if (task.model, task.vocabulary) != (model.name, model.vocabulary):
        raise TaskError(
            f"task '{task.name}' was bound to model '{task.model}' ({task.vocabulary} token ids), this one is"
            f" '{model.name}' ({model.vocabulary}): give the unbound task, or bind it with task.on(model)"
        )
    if task.batch.answers.device != model.device:  # bound to the model before it was moved, or to one on a server
        return replace(task, batch=task.batch.to(model.device))
    return task


def _no_model(model: Any) -> ModelError:
    if isinstance(model, str):
        return ModelError(f"model is the text '{model}': load it: cf.load('{model}')")
    if isinstance(model, nn.Module):
        return ModelError(f"model is a bare {type(model).__name__}: wrap it: cf.wrap(hf_model, tokenizer)")
    return ModelError(f"model is a {type(model).__name__}: give what cf.load or cf.wrap returned")
