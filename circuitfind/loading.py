"""`load`, `wrap` and `task`: how a model and a behaviour come in."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from circuitfind.engine.identities import require_identities
from circuitfind.errors import TaskError
from circuitfind.models.load import Model, adapt, fetch
from circuitfind.tasks.builtin import behaviour
from circuitfind.tasks.task import Task
from circuitfind.tasks.words import SingleTokens


def load(
    name: str,
    *,
    dtype: str | torch.dtype | None = None,
    device: Any = None,
    check: bool = True,
    backend: str = "nnsight",
    **keywords: Any,
) -> Model:
    """Loads an unmodified Hugging Face model and checks that circuitfind computes what it computes.

    Args:
        name: "tiny" (embedded), a hub id such as "openai-community/gpt2", or a folder.
        dtype: such as "float32"; by default the precision that the weights are stored in.
        device: a torch device; by default the accelerator if there is one.
        check: run the three identities of `circuitfind.engine.identities` on a short random prompt.
        backend: "nnsight" or "hooks", what single passes run through; the results are the same to the bit.
        keywords: passed on to `from_pretrained` (revision, token, attn_implementation, ...).

    Raises:
        ModelError: it cannot be loaded, is not covered, or fails the check.
    """
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
    model = adapt(
        name or getattr(getattr(hf, "config", None), "name_or_path", "") or type(hf).__name__, hf, tokenizer, backend
    )
    if check:
        require_identities(model.adapter)
    return model


def task(
    name: str,
    model: Model,
    *,
    n: int = 64,
    seed: int = 0,
    corruption: str | None = None,
    metric: Any = None,
    bos: bool | None = None,
) -> Task:
    """A built-in behaviour in words that the model's tokenizer has as single tokens.

    Args:
        n: number of pairs.
        corruption: one of the behaviour's named corruptions; the first by default.
        metric: overrides the behaviour's own.

    Raises:
        TaskError: no such behaviour or corruption, or the tokenizer cannot express it.
    """
    found = behaviour(name)
    if model.tokenizer is None:
        raise TaskError(f"'{found.name}' is made of words, and this model has no tokenizer: give a Task of token ids")
    rows = found.make(SingleTokens(model.tokenizer), n, seed, corruption)
    distinct = len({row.clean for row in rows})
    if distinct < n:
        warnings.warn(
            f"'{found.name}' has only {distinct} distinct prompts with this tokenizer; {n} were asked for", stacklevel=2
        )
    return Task(
        clean=[row.clean for row in rows],
        corrupted=[row.corrupted for row in rows],
        answers=[list(row.answers) for row in rows],
        wrong_answers=[list(row.wrong) for row in rows],
        metric=metric or found.metric,
        bos=bos,
        name=found.name if corruption is None else f"{found.name}:{corruption}",
        flips=all(row.flips for row in rows),
    )
