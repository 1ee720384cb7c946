"""Attention patterns as the model computes them: how much each token of a prompt attends to each token before it.

Read from the attention modules under transformers' "eager" implementation, to which the model is switched for the pass
and back; a pattern is accepted only if it makes the heads that the same pass computed (`engine/sites.py`).
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
    """How much one token of a prompt attends to another, each named as "position token"."""

    query: str
    key: str
    weight: float


@dataclass(frozen=True, eq=False, repr=False)
class AttentionPattern(Result):
    """One head's attention on one prompt.

    Attributes:
        tokens: the prompt's, as text (ids as text without a tokenizer).
        pattern: `[query, key]` weights between 0 and 1; a row sums to 1, or to less in a model with attention sinks.
        record: its settings say which of the prompts it is: `example`, and `side`, clean or corrupted, of a task.
    """

    FORMAT = "circuitfind.attention"

    head: str
    tokens: tuple[str, ...]
    pattern: np.ndarray
    record: Record = field(default=RECORD)

    def rows(self) -> tuple[Attended, ...]:
        """Every query with itself and every key before it."""
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
def attention(  # type: ignore[overload-overlap]  # a string is an iterable of strings, too
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
    """The attention patterns of heads on a prompt, without padding; several cost what one costs. `cf.plot` draws them.

    Args:
        prompts: a task, a prompt, or several.
        head: such as "a5.h5", or several.
        example: which of the prompts, or of the task's pairs.
        corrupted: of a task: the corrupted prompt instead of the clean one.

    Returns:
        The pattern; of several heads a list.

    Raises:
        ScoreError: no such head or example.
        TaskError: no prompt, one without tokens, or one as text for a model without tokenizer.
        ModelError: the model does not hand out its attention patterns.
    """
    check_model(model)
    names = [head] if isinstance(head, str) or not isinstance(head, Iterable) else list(head)
    if not names:
        raise ScoreError("no head is named: give one such as 'a0.h1', or several")
    places = [place_of(model.graph, name) for name in names]
    inputs, tokens, record = one_prompt(model, prompts, example, corrupted)
    _, patterns = capture_site(model.adapter, inputs, "pattern", sorted({layer for layer, _ in places}))
    values = [patterns[layer][0, :, unit].float().cpu().numpy() for layer, unit in places]
    found = [AttentionPattern(name, tokens, each, record) for name, each in zip(names, values, strict=True)]
    return found[0] if isinstance(head, str) else found


def place_of(graph: Graph, name: str) -> tuple[int, int]:
    """Layer and number of a head."""
    layer, _, unit = str(name).removeprefix("a").partition(".h")
    if name not in graph.writer_names or not unit:
        heads = tuple(name for name in graph.writer_names if ".h" in name)
        raise ScoreError(f"{graph.not_named('head', name, heads)} Heads are a0.h0 to {heads[-1]}")
    return int(layer), int(unit)


def one_prompt(model: Model, prompts: Prompts, example: int, corrupted: bool) -> tuple[Inputs, tuple[str, ...], Record]:
    """One of the prompts, without padding; its tokens as text, and where it comes from."""
    prompt, record = _prompt(model, prompts, example, corrupted)
    ids = prompt.unsqueeze(0).to(model.device)
    decode = str if model.tokenizer is None else lambda token: piece(model.tokenizer, token)
    tokens = tuple(decode(token) for token in ids[0].tolist())
    return Inputs(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids[:, :1])), tokens, record


def _prompt(model: Model, prompts: Prompts, example: int, corrupted: bool) -> tuple[torch.Tensor, Record]:
    """The ids of the prompt, without padding, and where it comes from."""
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
            raise TaskError(f"prompts: {text!r} is no text: give a task (cf.Task of token ids), a prompt, or several")
    _check_example(example, len(texts))
    ids = PromptTokenizer(model.tokenizer, None)([texts[example]])[0]
    if not len(ids):
        raise TaskError(f"prompt {texts[example]!r} has no tokens: there is nothing to attend to")
    settings = {"example": example, **({"weights": model.dequantised} if model.dequantised else {})}
    return torch.tensor(ids), replace(RECORD, model=model.name, n_examples=1, settings=settings)


def _check_example(example: int, count: int) -> None:
    if isinstance(example, bool) or not isinstance(example, Integral) or not 0 <= example < count:
        raise ScoreError(f"example={example!r}: there are {count} prompts, counted from 0")
