"""A behaviour as pairs of prompts with answers, and what it becomes when it meets a model.

1. `Task` holds what the user gave: strings or id tensors, answers, a metric, read positions.
2. `Task.on(model)` tokenises and validates all of it, and returns a `BoundTask`: padded ids, answer ids, a metric.
   Every error names the row that is at fault and what to do about it. With `unusable="drop"` such rows are left out,
   and how many is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from circuitfind.errors import TaskError
from circuitfind.metrics import Function, Metric, metric_of
from circuitfind.tasks import binding, files
from circuitfind.tasks.bound import BoundTask
from circuitfind.tasks.given import answer_sets, are_ids, is_list, kind

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
        spans: by example, names for stretches of the prompt: name -> text of the clean prompt, its n-th occurrence
            (text, n), or (start, stop) tokens (`circuitfind.tasks.spans`).
        unusable: what becomes of a pair that the model cannot be given (unequal lengths, an answer of several tokens,
            ...): "error" refuses the task and names the row, "drop" leaves such rows out and says how many.
        corrupted_spans: as `spans`, of the corrupted prompt.
        align: "spans" takes pairs of unequal length; spans of one name correspond (`circuitfind.tasks.alignment`).
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
    spans: Sequence[Mapping[str, Any]] | None = None
    unusable: str = "error"
    corrupted_spans: Sequence[Mapping[str, Any]] | None = None
    align: str | None = None

    def __post_init__(self) -> None:
        for side in ("clean", "corrupted", "answers", "wrong_answers", "spans", "corrupted_spans"):
            given = getattr(self, side)
            if isinstance(given, str):  # it has a length, and would pass for a list of letters
                raise TaskError(f"{side} is one string: give a list with one entry per pair")
            if isinstance(given, Iterator):
                setattr(self, side, list(given))
            elif not is_list(given) and (given is not None or side in ("clean", "corrupted")):
                raise TaskError(f"{side} is {kind(given)}: give a list or tensor with one entry per pair")
        sizes = {"clean": len(self.clean), "corrupted": len(self.corrupted)}
        for side in ("answers", "wrong_answers", "spans", "corrupted_spans"):
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
            raise TaskError(f"metric is {kind(self.metric)}: give one name or a callable (logits, batch)")
        metric_of(self.metric)
        if self.unusable not in ("error", "drop"):
            raise TaskError(f"unusable is {self.unusable!r}: use 'error' or 'drop'")
        if self.align not in (None, "spans"):
            raise TaskError(f"align is {self.align!r}: use 'spans', or None for pairs of equal length")
        if self.align and (self.spans is None or self.corrupted_spans is None):
            raise TaskError(
                "align='spans' needs spans and corrupted_spans: name in both prompts what differs in length, such as"
                " spans=[{'who': 'Mary'}], corrupted_spans=[{'who': 'the old man'}]"
            )

    @classmethod
    def from_file(
        cls,
        path: str | PathLike[str],
        model: ModelLike | None = None,
        *,
        counterfactual: str | None = None,
        split: str | None = None,
        **keywords: Any,
    ) -> Task:
        """Pairs from a jsonl, csv or json file; `circuitfind.tasks.formats` describes the columns that are known.

        Args:
            model: if given, the task is validated on it at once.
            counterfactual: which of a MIB row's counterfactuals is the corrupted prompt, such as "abc".
            split: only the rows whose column `split` says so.
            keywords: further fields of `Task` (metric, bos, positions, ...).

        Raises:
            FileError: naming file and line.
        """
        cls._check(keywords, "from_file")
        pairs = files.read_pairs(path, counterfactual=counterfactual, split=split)
        return cls._of(pairs, model, keywords)

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        model: ModelLike | None = None,
        *,
        counterfactual: str | None = None,
        split: str | None = None,
        **keywords: Any,
    ) -> Task:
        """Pairs from mappings of column to value: dictionaries, or one split of a `datasets` dataset.

        Arguments as in `from_file`.

        Raises:
            TaskError: naming the row, counted from 0.
        """
        cls._check(keywords, "from_rows")
        return cls._of(files.pairs_from_rows(rows, counterfactual=counterfactual, split=split), model, keywords)

    @classmethod
    def _check(cls, keywords: dict[str, Any], what: str) -> None:
        known = [field.name for field in fields(cls)]
        for keyword in keywords:
            if keyword not in known:
                raise TaskError(f"{what}: keyword '{keyword}' is unknown: use one of {', '.join(known)}")

    @classmethod
    def _of(cls, pairs: dict[str, Any], model: ModelLike | None, keywords: dict[str, Any]) -> Task:
        task = cls(**{**pairs, **keywords})
        if model is not None:
            task.on(model)
        return task

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes the pairs as jsonl that `from_file` opens; metric, positions, bos and align are not part of it.

        Raises:
            TaskError: the prompts are token ids.
            FileError: the place cannot be written to.
        """
        if isinstance(self.clean, Tensor):
            raise TaskError("prompts as token ids have no text to write: save the tensors with safetensors")
        names = ("correct_idx", "incorrect_idx") if self.answers_are_ids() else ("answers", "wrong_answers")
        given = (self.answers, self.wrong_answers)
        sets = [None if side is None else answer_sets(side, len(self.clean)) for side in given]
        columns: dict[str, Any] = {
            "clean": self.clean,
            "corrupted": self.corrupted,
            **dict(zip(names, sets, strict=True)),
        }
        spans = {"spans": self.spans, "corrupted_spans": self.corrupted_spans}
        return files.write_pairs(path, {**columns, **spans})

    def on(self, model: ModelLike) -> BoundTask:
        """Tokenises and validates on a model.

        Raises:
            TaskError: naming the row: unequal lengths, an answer of several tokens, an identical pair, ...
        """
        return binding.without_unusable(self, model) if self.unusable == "drop" else binding.bound(self, model)

    def subset(self, rows: Sequence[int]) -> Task:
        """Some of the pairs, as given."""

        def pick(given: Any) -> Any:
            one_for_all = given is None or not hasattr(given, "__len__") or getattr(given, "ndim", 1) == 0
            return given if one_for_all else given[list(rows)] if hasattr(given, "ndim") else [given[i] for i in rows]

        names = ("clean", "corrupted", "answers", "wrong_answers", "positions", "spans", "corrupted_spans")
        masks = ("attention_mask", "corrupted_attention_mask")
        return replace(self, **{name: pick(getattr(self, name)) for name in (*names, *masks)})

    def exchanged(self) -> Task:
        """The pairs the other way round: the corrupted prompts are the clean ones, and what was wrong is the answer.

        Denoising of a task is noising of the exchanged one. Spans go with their prompts.

        Raises:
            TaskError: there are answers but no wrong ones, or positions in pairs of unequal length.
        """
        if self.answers is not None and self.wrong_answers is None:
            raise TaskError("the corrupted prompts have no answers to be asked for: give the task wrong_answers")
        if self.align and self.positions is not None:
            raise TaskError("positions= counts in the clean prompts: make a task of the exchanged pairs with its own")
        own, other = self.attention_mask, self.corrupted_attention_mask
        if other is None:  # one mask is that of both sides
            own, other = None, own
        elif own is None:
            own = torch.ones_like(torch.as_tensor(other))
        return replace(
            self,
            clean=self.corrupted,
            corrupted=self.clean,
            answers=self.wrong_answers,
            wrong_answers=self.answers,
            attention_mask=other,
            corrupted_attention_mask=own,
            spans=self.corrupted_spans,
            corrupted_spans=self.spans,
        )

    def answers_are_ids(self) -> bool:
        """Whether there are answers, and all of them, on both sides, are token ids."""
        given = [answers for answers in (self.answers, self.wrong_answers) if answers is not None]
        return bool(given) and all(are_ids(answer_sets(answers, len(self.clean))) for answers in given)
