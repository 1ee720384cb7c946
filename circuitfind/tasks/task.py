"""A behaviour as pairs of prompts with answers, and what it becomes when it meets a model.

1. `Task` holds what the user gave: strings or id tensors, answers, a metric, read positions.
2. `Task.on(model)` tokenises and validates all of it, and returns a `BoundTask`: padded ids, answer ids, a metric.
   Every error names the row that is at fault and what to do about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from os import PathLike
from typing import Any, Protocol

import torch
from torch import Tensor

from circuitfind.batch import Batch, Inputs
from circuitfind.errors import TaskError
from circuitfind.metrics import Function, Metric, metric_of
from circuitfind.tasks import files
from circuitfind.tasks.bound import BoundTask, usable
from circuitfind.tasks.padding import answer_tensor, by_read, pad, unpadded, validate, validate_disjoint
from circuitfind.tasks.tokens import PromptTokenizer, Tokens, tokenise

Prompts = Sequence[str] | Tensor
Answers = Sequence[str] | Sequence[Sequence[str]] | Sequence[int] | Sequence[Sequence[int]] | Tensor


class ModelLike(Protocol):
    """What a task needs of a model."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def config(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def vocabulary(self) -> int: ...


@dataclass
class Task:
    """Pairs of prompts that show a behaviour, and its absence.

    Attributes:
        clean, corrupted: strings, or `[batch, pos]` token ids (then `attention_mask` marks real tokens).
        answers, wrong_answers: by example one string or id, or a list of them; `[batch, reads]` or
            `[batch, reads, answers]` ids where several positions are read. Optional for `kl` and callables.
        metric: a name of `circuitfind.metrics.METRICS`, or a callable `(logits, batch) -> [batch]`.
        positions: where the logits are read, counted in the prompt's own tokens (negative: from its end): one number
            for all, one an example, or `[batch, reads]`. Default: the last token.
        bos: True or False force a BOS token to be there or not; None keeps the tokenizer's own behaviour.
        flips: the corrupted prompt makes the wrong answers right.
    """

    clean: Prompts
    corrupted: Prompts
    answers: Answers | None = None
    wrong_answers: Answers | None = None
    metric: str | Metric | Function = "logit_diff"
    positions: int | Sequence[int] | Tensor | None = None
    bos: bool | None = None
    name: str = "task"
    attention_mask: Tensor | None = None
    corrupted_attention_mask: Tensor | None = None
    flips: bool = False

    def __post_init__(self) -> None:
        for side in ("clean", "corrupted", "answers", "wrong_answers"):
            given = getattr(self, side)
            if isinstance(given, str):  # it has a length, and would pass for a list of letters
                raise TaskError(f"{side} is one string: give a list with one entry per pair")
            if isinstance(given, Iterator):
                setattr(self, side, list(given))
            elif not _is_list(given) and (given is not None or side in ("clean", "corrupted")):
                raise TaskError(f"{side} is {_kind(given)}: give a list or tensor with one entry per pair")
        sizes = {"clean": len(self.clean), "corrupted": len(self.corrupted)}
        for side in ("answers", "wrong_answers"):
            if getattr(self, side) is not None:
                sizes[side] = len(getattr(self, side))
        if len(set(sizes.values())) > 1:
            raise TaskError(f"the lists differ in length: {', '.join(f'{k} {v}' for k, v in sizes.items())}")
        if not len(self.clean):
            raise TaskError("the task holds no pairs")
        if isinstance(self.clean, Tensor) != isinstance(self.corrupted, Tensor):
            raise TaskError("clean and corrupted must both be strings or both be id tensors")
        for number, prompts in enumerate(zip(self.clean, self.corrupted, strict=True)):
            if not isinstance(self.clean, Tensor) and not all(isinstance(prompt, str) for prompt in prompts):
                raise TaskError(
                    f"row {number}: prompts are strings, or all of them one [batch, pos] tensor of token ids"
                )
        if isinstance(self.clean, Tensor) and self.bos is not None:
            raise TaskError("bos is for prompts as text: put the BOS token's id into the prompts yourself")
        masks = (self.attention_mask, self.corrupted_attention_mask)
        if not isinstance(self.clean, Tensor) and any(mask is not None for mask in masks):
            raise TaskError("attention_mask is for prompts as token ids: strings are padded and masked by the task")
        if not isinstance(self.metric, (str, Metric)) and not callable(self.metric):
            raise TaskError(f"metric is {_kind(self.metric)}: give one name or a callable (logits, batch)")
        metric_of(self.metric)

    @classmethod
    def from_file(cls, path: str | PathLike[str], model: ModelLike | None = None, **keywords: Any) -> Task:
        """Pairs from a jsonl or csv file (`circuitfind.tasks.files` describes the columns).

        Args:
            model: if given, the task is validated on it at once.
            keywords: further fields of `Task` (metric, bos, positions, ...).

        Raises:
            FileError: naming file and line.
        """
        known = [field.name for field in fields(cls)]
        for keyword in keywords:
            if keyword not in known:
                raise TaskError(f"from_file: keyword '{keyword}' is unknown: use one of {', '.join(known)}")
        task = cls(**{**files.read_pairs(path), **keywords})
        if model is not None:
            task.on(model)
        return task

    def on(self, model: ModelLike) -> BoundTask:
        """Tokenises and validates on a model.

        Raises:
            TaskError: naming the row: unequal lengths, an answer of several tokens, an identical pair, ...
        """
        notes: list[str] = []
        if isinstance(self.clean, Tensor):
            tokens, bos = self._from_ids(), "ids given"
        else:
            if model.tokenizer is None:
                raise TaskError(
                    "this model has no tokenizer: give token ids, or wrap it with one: cf.wrap(model, tokenizer)"
                )
            tokenizer = PromptTokenizer(model.tokenizer, self.bos)
            sets = [self._texts(self.answers, "answers"), self._texts(self.wrong_answers, "wrong_answers")]
            tokens = tokenise(tokenizer, list(self.clean), list(self.corrupted), *sets)
            bos = tokenizer.describe(tokens.clean[0])
            if self.answers is not None:
                notes.append(f"answers spelled {tokens.spelling}")
            notes.append(f"BOS token: {bos}")
        validate(tokens, model)
        device = model.device
        clean, corrupted = pad(tokens.clean, device), pad(tokens.corrupted, device)
        read = self._read(tokens.clean).to(device)
        answers, wrong = answer_tensor(tokens.answers, read), answer_tensor(tokens.wrong, read)
        if isinstance(self.clean, Tensor) and read.shape[1] > 1:
            answers = by_read(self.answers, read, model.vocabulary, "answers")
            wrong = by_read(self.wrong_answers, read, model.vocabulary, "wrong_answers")
            validate_disjoint(answers, wrong)
        batch = Batch(Inputs(*clean, read), Inputs(*corrupted, read), answers.to(device), wrong.to(device))
        as_text = _decoder(model.tokenizer)
        rows = zip(tokens.answers, tokens.wrong, strict=True)
        return BoundTask(
            self.name,
            batch,
            usable(metric_of(self.metric), batch.answers, batch.wrong),
            self._prompt_texts(self.clean, tokens.clean, as_text),
            self._prompt_texts(self.corrupted, tokens.corrupted, as_text),
            tuple(f"{_some(a, as_text)} / {_some(w, as_text)}" if w else _some(a, as_text) for a, w in rows),
            tuple(tuple(as_text([i]) for i in ids) for ids in tokens.clean),
            bos,
            getattr(model, "name", ""),
            model.vocabulary,
            tuple(notes),
            self.flips,
        )

    # ---------------------------------------------------------------- what the user gave
    def _texts(self, answers: Answers | None, side: str) -> list[list[str]]:
        if answers is None:
            return [[] for _ in self.clean]
        rows: list[Any] = [list(row) if isinstance(row, (list, tuple)) else [row] for row in answers]
        for number, row in enumerate(rows):
            if not row or not all(isinstance(answer, str) and answer for answer in row):
                raise TaskError(f"row {number}: {side} must be a non-empty string or a list of them, not {row!r}")
        return rows

    def _from_ids(self) -> Tokens:
        assert isinstance(self.clean, Tensor) and isinstance(self.corrupted, Tensor)
        sides = (self.clean, self.attention_mask), (self.corrupted, self.corrupted_attention_mask)
        rows = [unpadded(ids, self.attention_mask if mask is None else mask) for ids, mask in sides]
        several = self._positions().ndim == 2 and self._positions().shape[1] > 1
        answers = (
            [[[] for _ in rows[0]]] * 2 if several else [self._id_sets(a) for a in (self.answers, self.wrong_answers)]
        )
        return Tokens(rows[0], rows[1], answers[0], answers[1], "as ids")

    def _id_sets(self, answers: Answers | None) -> list[list[int]]:
        if answers is None:
            return [[] for _ in self.clean]
        as_list = getattr(answers, "tolist", None)  # of a tensor or an array
        rows: list[Any] = list(answers) if as_list is None else as_list()
        sets = [list(row) if isinstance(row, (list, tuple)) else [row] for row in rows]
        for number, row in enumerate(sets):
            if not row or not all(isinstance(answer, Integral) and not isinstance(answer, bool) for answer in row):
                raise TaskError(f"row {number}: with prompts as ids, answers are ids too, not {row!r}")
        return [list(dict.fromkeys(row)) for row in sets]  # each counts once

    def _positions(self) -> Tensor:
        """The positions as given, in a tensor; empty where none are."""
        try:
            given = torch.as_tensor([] if self.positions is None else self.positions)
        except (ValueError, TypeError):
            given = torch.tensor(0.5)
        empty = given.ndim == 2 and not given.shape[1]
        if empty or given.dtype == torch.bool or (given.numel() and given.is_floating_point()):
            raise TaskError("positions are whole numbers: one, one an example, or [batch, reads] with as many in each")
        return given

    def _read(self, rows: list[list[int]]) -> Tensor:
        """`[batch, reads]` positions, checked against each row's length."""
        if self.positions is None:
            return torch.tensor([[len(row) - 1] for row in rows])
        given = self._positions()
        if given.ndim == 0:
            given = given.expand(len(rows))
        if given.ndim == 1:
            given = given.unsqueeze(1)
        if given.ndim != 2 or given.shape[0] != len(rows):
            raise TaskError(f"positions have shape {list(given.shape)}: one number, one an example, or [batch, reads]")
        read = []
        for number, (wanted, row) in enumerate(zip(given.tolist(), rows, strict=True)):
            if any(not -len(row) <= p < len(row) for p in wanted):
                raise TaskError(f"row {number}: position {wanted} lies outside its {len(row)} tokens")
            read.append([p % len(row) for p in wanted])
        return torch.tensor(read)

    def _prompt_texts(self, given: Prompts, ids: list[list[int]], as_text: Callable) -> tuple[str, ...]:
        return tuple(as_text(row) for row in ids) if isinstance(given, Tensor) else tuple(given)


def _is_list(given: Any) -> bool:
    """Whether it has one entry per pair, in order."""
    return hasattr(given, "__len__") and not isinstance(given, (bytes, dict, set)) and getattr(given, "ndim", 1) > 0


def _kind(given: Any) -> str:
    if given is None:
        return "None"
    return f"a {type(given).__name__}" + (" of no dimension" if getattr(given, "ndim", 1) == 0 else "")


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    if tokenizer is None:
        return lambda ids: " ".join(map(str, ids))
    return lambda ids: tokenizer.decode(ids)


def _some(ids: list[int], as_text: Callable[[list[int]], str], most: int = 3) -> str:
    shown = ", ".join(as_text([i]).strip() for i in ids[:most])
    return shown + (f", … ({len(ids)})" if len(ids) > most else "")
