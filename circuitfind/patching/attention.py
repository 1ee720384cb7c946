"""Attention patterns as the model computes them: how much each token of a prompt attends to itself and earlier tokens.

They are read from the attention modules under transformers' "eager" implementation, to which the model is switched for
this pass. A pattern is accepted only if it gives the head outputs of the same pass (`engine/sites.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, NamedTuple, overload

import numpy as np
import torch

from circuitfind.batch import Inputs
from circuitfind.calls import model_call
from circuitfind.engine.experiment import bind, check_model
from circuitfind.engine.sites import capture_site
from circuitfind.errors import ScoreError, TaskError
from circuitfind.export import html
from circuitfind.graph import Graph
from circuitfind.models.load import Model
from circuitfind.patching.spans import position_labels
from circuitfind.record import NO_EFFECT, Record
from circuitfind.result import Result
from circuitfind.tasks.bound import BoundTask
from circuitfind.tasks.task import Task
from circuitfind.tasks.tokens import PromptTokenizer, piece

RECORD = Record(method="attention", ablation="", direction="", sign=f"{NO_EFFECT}share of a query's attention, 0 to 1")


class Attended(NamedTuple):
    """The attention weight from one token (the query) to another, both named "position token"."""

    query: str
    key: str
    weight: float


@dataclass(frozen=True, eq=False, repr=False)
class AttentionPattern(Result):
    """One head's attention on one prompt.

    Attributes:
        tokens: the prompt's tokens as text (without a tokenizer, ids as text).
        pattern: weights `[query, key]` between 0 and 1; a row sums to 1, or to less in a model with attention sinks.
        record: its settings name the prompt: `example`, and for a task `side`, clean or corrupted.
    """

    FORMAT = "circuitfind.attention"

    head: str
    tokens: tuple[str, ...]
    pattern: np.ndarray
    record: Record = field(default=RECORD)

    def rows(self) -> tuple[Attended, ...]:
        """Return the weights from every query to itself and to every key before it."""
        names, cells = position_labels(self.tokens), zip(*np.tril_indices(len(self.tokens)), strict=True)
        return tuple(Attended(names[query], names[key], float(self.pattern[query, key])) for query, key in cells)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> AttentionPattern:
        found = super().from_dict(content)
        return replace(found, pattern=found.pattern.astype(np.float32))

    def _repr_html_(self) -> str:
        names = position_labels(self.tokens)
        return html.block(repr(self), html.heat(self.pattern, names, names, "attention (query, key)", limit=1.0))


Prompts = Task | BoundTask | str | Sequence[str]


@overload
def attention(  # type: ignore[overload-overlap]  # a string is also an iterable of strings
    model: Model, prompts: Prompts, head: str, *, example: int = 0, corrupted: bool = False
) -> AttentionPattern: ...
@overload
def attention(
    model: Model, prompts: Prompts, head: Iterable[str], *, example: int = 0, corrupted: bool = False
) -> list[AttentionPattern]: ...
@model_call
def attention(
    model: Model, prompts: Prompts, head: str | Iterable[str], *, example: int = 0, corrupted: bool = False
) -> AttentionPattern | list[AttentionPattern]:
    """Return the attention patterns of one or several heads on a prompt, without padding, from one forward pass.

    `cf.plot` draws them.

    Args:
        prompts: a task, a prompt, or several.
        head: a head such as "a5.h5", or several.
        example: number of the prompt, or of the task's pair, from 0.
        corrupted: for a task, use the corrupted prompt instead of the clean one.

    Returns:
        The pattern of a head; for several heads, a list.

    Raises:
        ScoreError: there is no such head or example.
        TaskError: there is no prompt, it has no tokens, or it is text and the model has no tokenizer.
        ModelError: the model does not return its attention patterns.
    """
    check_model(model)
    names = [head] if isinstance(head, str) or not isinstance(head, Iterable) else list(head)
    if not names:
        raise ScoreError("no head is named: give one or several, such as 'a0.h1'")
    places = [place_of(model.graph, name) for name in names]
    inputs, tokens, record = one_prompt(model, prompts, example, corrupted)
    _, patterns = capture_site(model.adapter, inputs, "pattern", sorted({layer for layer, _ in places}))
    values = [patterns[layer][0, :, unit].float().cpu().numpy() for layer, unit in places]
    found = [AttentionPattern(name, tokens, each, record) for name, each in zip(names, values, strict=True)]
    return found[0] if isinstance(head, str) else found


def place_of(graph: Graph, name: str) -> tuple[int, int]:
    """Return the layer and number of a head, given its name. ScoreError if there is none."""
    layer, _, unit = str(name).removeprefix("a").partition(".h")
    if name not in graph.writer_names or not unit:
        heads = tuple(name for name in graph.writer_names if ".h" in name)
        raise ScoreError(f"{graph.not_named('head', name, heads)} Heads are a0.h0 to {heads[-1]}")
    return int(layer), int(unit)


def one_prompt(model: Model, prompts: Prompts, example: int, corrupted: bool) -> tuple[Inputs, tuple[str, ...], Record]:
    """Return one of the prompts without padding, its tokens as text, and the record that names it."""
    prompt, record = _prompt(model, prompts, example, corrupted)
    ids = prompt.unsqueeze(0).to(model.device)
    decode = str if model.tokenizer is None else lambda token: piece(model.tokenizer, token)
    tokens = tuple(decode(token) for token in ids[0].tolist())
    return Inputs(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids[:, :1])), tokens, record


def _prompt(model: Model, prompts: Prompts, example: int, corrupted: bool) -> tuple[torch.Tensor, Record]:
    """Return the prompt's ids without padding, and the record that names it."""
    if isinstance(prompts, (Task, BoundTask)):
        bound, name = bind(model, prompts), "corrupted" if corrupted else "clean"
        _check_example(example, len(bound))
        side = getattr(bound.batch, name)
        record = bound.subset([example]).record(RECORD.method, "", "", 0, example=example, side=name)
        return side.ids[example][side.mask[example]], replace(record, sign=RECORD.sign, metric="")
    if corrupted:
        raise ScoreError("corrupted=True asks for the corrupted side of a task: prompts as text have none")
    if model.tokenizer is None:
        raise TaskError("this model has no tokenizer: give a task of token ids")
    texts = [prompts] if isinstance(prompts, str) or not isinstance(prompts, Iterable) else list(prompts)
    for text in texts:
        if not isinstance(text, str):
            raise TaskError(f"prompts: {text!r} is not text: give a task (of text or token ids), a prompt, or several")
    _check_example(example, len(texts))
    ids = PromptTokenizer(model.tokenizer, None)([texts[example]])[0]
    if not len(ids):
        raise TaskError(f"prompt {texts[example]!r} has no tokens: give a longer one")
    settings = {"example": example, **({"weights": model.dequantised} if model.dequantised else {})}
    return torch.tensor(ids), replace(RECORD, model=model.name, n_examples=1, settings=settings)


def _check_example(example: int, count: int) -> None:
    if isinstance(example, bool) or not isinstance(example, Integral) or not 0 <= example < count:
        raise ScoreError(f"example={example!r}: there are {count} prompts, counted from 0")
