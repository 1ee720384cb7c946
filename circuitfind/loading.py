"""`load`, `wrap` and `task`: open a model, wrap one in memory, build a task."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import nn

from circuitfind.calls import model_call, own_arithmetic, ready
from circuitfind.engine.experiment import check_model
from circuitfind.engine.identities import Identity, check_identities
from circuitfind.errors import ModelError, TaskError, plain
from circuitfind.models.families import Family
from circuitfind.models.gguf_files import SUFFIX
from circuitfind.models.load import Model, adapt, fetch
from circuitfind.remote.call import remote_model
from circuitfind.tasks.builder import SingleTokens, TaskBuilder
from circuitfind.tasks.builtin import TASKS, builder_of
from circuitfind.tasks.spans import locatable
from circuitfind.tasks.spelling import BY_TEXT
from circuitfind.tasks.task import Task
from circuitfind.tasks.tokens import PromptTokenizer


@own_arithmetic()
def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: Any = None,
    check: bool = True,
    backend: str = "nnsight",
    remote: bool | str = False,
    family: Family | str | None = None,
    allow_missing: bool = False,
    **keywords: Any,
) -> Model:
    """Load an unmodified Hugging Face model and check that circuitfind decomposes it exactly.

    Args:
        name: "tiny" (embedded), a hub id such as "openai-community/gpt2", a folder, or a GGUF file: a path that ends in
            ".gguf", or "owner/name/file.gguf" on the hub. Weights of a GGUF file are de-quantised: results are about
            the quantised model, computed in floats.
        dtype: such as "float32"; by default the precision of the stored weights, float32 for a GGUF file.
        device: a torch device; by default the accelerator if there is one. To spread a model over several devices, or
            keep its weights in memory or on disk until they are needed, give `device_map="auto"` or a dictionary, as in
            `from_pretrained` (`offload_folder=` for weights on disk; needs accelerate: `pip install
            'circuitfind[devices]'`). To divide its heads among the processes of `torchrun`, which must all make the
            same calls, give `tp_plan="auto"`.
        check: check the identities of `circuitfind.engine.identities` on a short random prompt. They are always checked
            if the family's row was inferred.
        backend: "nnsight" or "hooks", the backend of single passes; results are bitwise equal.
        remote: run on an NDIF server, which has the weights: True for the host that nnsight is configured for, a URL
            for another host, "local" to simulate a server on this machine. Every call is one job on the server; see
            `circuitfind.remote`.
        family: names of the architecture's modules, in place of the built-in row of its model type: a `Family`, the
            name of a built-in row, or "package.module:NAME". By default, a row is inferred for model types that have
            none (`circuitfind.models.inference`); the model's repr shows which.
        allow_missing: accept a checkpoint that lacks weights, with a warning; transformers fills in random numbers.
        keywords: passed on to `from_pretrained` (revision, token, attn_implementation, gguf_file, device_map, ...).

    Raises:
        ModelError: the model cannot be loaded, is not covered, or fails the check.
    """
    if isinstance(name, str):
        check_name(name)
    if not isinstance(name, (str, os.PathLike)):
        remedy = "; a model in memory goes to cf.wrap(hf_model, tokenizer)" if isinstance(name, nn.Module) else ""
        raise ModelError(f"a model is loaded by its name or folder, not by a {type(name).__name__}{remedy}")
    name = os.fspath(name)
    if file := keywords.pop("gguf_file", None):
        name = os.path.join(name, file)
    if remote and name.lower().endswith(SUFFIX):
        raise ModelError(
            f"with remote= the server has the weights, and '{name}' is a file here: load it without remote="
        )
    if remote:
        if dtype is not None or device is not None or keywords.get("device_map") is not None:
            raise ModelError("with remote= the server chooses dtype=, device= and device_map=: leave them out")
        if allow_missing or backend != "nnsight":
            ours = "allow_missing=True" if allow_missing else f"backend='{backend}'"
            raise ModelError(
                f"{ours} is for a model that is loaded here, and with remote= the server has it: leave it out"
            )
        return remote_model(name, remote, check, family, **keywords)
    hf, tokenizer, origin = fetch(name, dtype, device, family, allow_missing, **keywords)
    model = wrap(hf, tokenizer, name=name, check=check, backend=backend, family=family)
    model.adapter.origin = origin
    return model


def check_name(name: str) -> None:
    """Raise ModelError for an empty name or the name of a built-in task, before the hub is asked for such a model."""
    task = plain(name)
    if not name.strip():
        raise ModelError("the model's name is empty: give 'tiny', a hub id, or a folder")
    if task in TASKS and not os.path.exists(name):
        verbs = f"circuitfind find tiny --task {task}, circuitfind tasks --show {task}"
        raise ModelError(f"'{name}' is a built-in task, not a model: cf.task('{task}', model); {verbs}")


@own_arithmetic()
def wrap(
    hf: nn.Module,
    tokenizer: Any = None,
    *,
    name: str | None = None,
    check: bool = True,
    backend: str = "nnsight",
    family: Family | str | None = None,
) -> Model:
    """Wrap a Hugging Face model that is already in memory, without changing it.

    Args:
        tokenizer: the model's tokenizer; with None, tasks must be given as token ids.
        name: the model's name in results and messages; by default the one in its config, or else its class.
        check, backend, family: as in `load`.

    Raises:
        ModelError: the model is not covered, or fails the check.
    """
    if isinstance(hf, Model):
        raise ModelError(f"model '{hf.name}' is wrapped already: use it as it is, or wrap the model inside, its .hf")
    if isinstance(hf, str):
        check_model(hf)
    hf = getattr(hf, "_orig_mod", hf)  # the module inside torch.compile's wrapper
    name = name or getattr(getattr(hf, "config", None), "name_or_path", "") or type(hf).__name__
    model = adapt(name, hf, tokenizer, backend, family)
    if not check and not model.adapter.inferred:
        model.adapter.unproven = None
    with ready(model):
        return model


@model_call
def identities(model: Model) -> list[Identity]:
    """Check the identities of `circuitfind.engine.identities`; for a remote model, on its server."""
    return check_identities(model.adapter)


def task(
    name: str | TaskBuilder,
    model: Model,
    *,
    n: int = 64,
    seed: int = 0,
    corruption: str | None = None,
    template: str | int | None = None,
    metric: Any = None,
    bos: bool | None = None,
) -> Task:
    """Build a task from words that are single tokens of the model's tokenizer.

    Args:
        name: a built-in task, one that you registered (`circuitfind.tasks.builtin.register`), a `TaskBuilder`, or
            "package.module:name" of one.
        n: the number of pairs.
        corruption: one of the task's named corruptions; the first by default.
        template: use only templates with this name or part of a name: "abba-3", "abba" or 3 for IOI; by default all.
        metric: replaces the task's own metric.
        bos: as in `circuitfind.Task`.

    Raises:
        TaskError: the task, corruption or template is unknown, or the tokenizer lacks the words.
    """
    found = builder_of(name)
    check_model(model)
    if model.tokenizer is None:
        raise TaskError(f"'{found.name}' is made of words, and this model has no tokenizer: give a Task of token ids")
    pairs = found.make(SingleTokens(model.tokenizer), n, seed, corruption, template)
    clean = [pair.clean for pair in pairs]
    if (distinct := len(set(clean))) < n:
        few = f"'{found.name}' has only {distinct} distinct prompts with this tokenizer; {n} were asked for"
        warnings.warn(few, stacklevel=2)
    name = found.name if corruption is None else f"{found.name}:{found.corruption(corruption)}"
    return Task(
        clean=clean,
        corrupted=[pair.corrupted for pair in pairs],
        answers=[list(pair.answers) for pair in pairs],
        wrong_answers=[list(pair.wrong) for pair in pairs],
        metric=metric or found.metric,
        bos=bos,
        name=name if template is None else f"{name} [{template}]",  # "ioi", "ioi:abc", "ioi:abc [abba]"
        flips=all(pair.flips for pair in pairs),
        spelling=BY_TEXT,  # the words were chosen as they follow a space
        spans=locatable([pair.spans for pair in pairs], clean, PromptTokenizer(model.tokenizer, bos)),
    )
