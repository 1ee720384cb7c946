"""`load`, `wrap` and `task`: how a model and a task come in."""

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
    """Loads an unmodified Hugging Face model and checks that circuitfind decomposes it exactly.

    Args:
        name: "tiny" (embedded), a hub id such as "openai-community/gpt2", a folder, or a file that ends in ".gguf" (a
            hub id and a file: "owner/name/file.gguf"). Weights of a GGUF file are de-quantised: what is measured is the
            quantised model, computed in floats.
        dtype: such as "float32"; by default the precision in which the weights are stored, float32 for a GGUF file.
        device: a torch device; by default the accelerator if there is one. Over several devices, or with weights kept
            in memory or on disk until they are needed: `device_map="auto"` or a dictionary, as in `from_pretrained`
            (`offload_folder=` for weights on disk; needs accelerate: `pip install 'circuitfind[devices]'`). Its heads
            divided among the processes of `torchrun`, which all make the same calls: `tp_plan="auto"`.
        check: test the identities of `circuitfind.engine.identities` on a short random prompt; where the family's row
            was inferred they are always tested.
        backend: "nnsight" or "hooks", what single passes run through; the results are bitwise equal.
        remote: run on an NDIF server, which has the weights: True for the host that nnsight is configured for, a URL
            for another one, "local" to simulate a server here. Every call is one job there; see `circuitfind.remote`.
        family: names of the architecture's modules, used in place of the built-in row for its model type: a `Family`,
            the name of a built-in row, or "package.module:NAME". Without it, and without a row for the model type, one
            is inferred (`circuitfind.models.inference`); the model's repr says which.
        allow_missing: take a checkpoint that lacks weights, which transformers fills in at random, with a warning.
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
    """Refuses a built-in task's name as a model's: the hub may take half a minute to answer that there is none."""
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
    """Wraps a Hugging Face model that is already in memory, without changing it.

    Args:
        tokenizer: None means that tasks are given as token ids.
        check, backend, family: as in `load`.

    Raises:
        ModelError: the model is not covered, or fails the check.
    """
    if isinstance(hf, Model):
        raise ModelError(f"model '{hf.name}' is wrapped already: use it as it is, or wrap the model inside: its .hf")
    if isinstance(hf, str):
        check_model(hf)
    hf = getattr(hf, "_orig_mod", hf)  # what torch.compile was given
    name = name or getattr(getattr(hf, "config", None), "name_or_path", "") or type(hf).__name__
    model = adapt(name, hf, tokenizer, backend, family)
    if not check and not model.adapter.inferred:
        model.adapter.unproven = None
    with ready(model):
        return model


@model_call
def identities(model: Model) -> list[Identity]:
    """The identities of `circuitfind.engine.identities`, computed where the model is."""
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
    """A built-in task, made of words that the model's tokenizer has as single tokens.

    Args:
        name: a built-in task, or one that you registered (`circuitfind.tasks.builtin.register`); a `TaskBuilder`, or
            "package.module:name" of one.
        n: number of pairs.
        corruption: one of the task's named corruptions; the first by default.
        template: only sentences with this name or part of a name: "abba-3", "abba" or 3 for IOI; by default all.
        metric: overrides the task's own.
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
