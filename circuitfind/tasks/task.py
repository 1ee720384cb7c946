"""`Task`: pairs of prompts with answers as a user gives them, or as a file holds them.

`Task.on(model)` tokenises and validates all of it and returns a `BoundTask`. Every error names the row at fault and
what to do about it. With `unusable="drop"` such rows are left out, and a warning says how many.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from circuitfind.errors import TaskError, unknown
from circuitfind.tasks.bound import BoundTask, bind_pairs
from circuitfind.tasks.files import pairs_from_rows, read_pairs, write_pairs
from circuitfind.tasks.given import Given, ModelLike

__all__ = ["BoundTask", "Task"]


@dataclass(repr=False)
class Task(Given):
    """Pairs of prompts that show a behaviour on one side and not on the other.

    Attributes:
        clean, corrupted: strings; lists of messages `{"role": ..., "content": ...}`, which the tokenizer's chat
            template renders (`circuitfind.tasks.chat`); or `[batch, pos]` token ids (`attention_mask`: real tokens).
        answers, wrong_answers: by example one string or id, or a list of them; `[batch, reads]` or
            `[batch, reads, answers]` ids where several positions are read. Optional for `kl` and callables.
        metric: a name of `circuitfind.metrics.METRICS`, or a callable `(logits, batch) -> [batch]`.
        positions: where the logits are read, counted in the prompt's own tokens (negative: from its end): one number
            for all, one an example, or `[batch, reads]`. Default: the last token.
        bos: True or False force a BOS token to be there or not; None leaves that to the tokenizer.
        flips: the wrong answers are right after the corrupted prompt.
        spans: by example, named parts of the prompt: name -> text of the clean prompt, its n-th occurrence
            (text, n), or (start, stop) tokens (`circuitfind.tasks.spans`).
        unusable: what happens to a pair that cannot be used on the model (unequal lengths, an answer of several tokens,
            ...): "error" refuses the task and names the row, "drop" leaves such rows out and says how many.
        corrupted_spans: as `spans`, of the corrupted prompt.
        align: "spans" accepts pairs of unequal length; spans of one name correspond (`circuitfind.tasks.spans`).
        chat: prompts that are strings become one turn of the user each.
        answer: how answers of several tokens are read: "first", the first token that tells right from wrong, or "all",
            the whole answer by teacher forcing, the metric summed over its tokens (`circuitfind.tasks.answers`). None
            refuses them.
        spelling: of answers as text, for all or by row: "space" (with one before it), "none", "given", or "text" (as
            the text around suggests). None: the one that the model itself prefers (`circuitfind.tasks.spelling`).
    """

    def __repr__(self) -> str:
        metric = getattr(self.metric, "name", None) or getattr(self.metric, "__name__", self.metric)
        return f"Task({self.name}: {len(self)} pairs, {metric})"

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
        """Pairs from a jsonl, csv or json file; `circuitfind.tasks.formats` describes the columns.

        Args:
            model: if given, the task is validated on it at once.
            counterfactual: which of a MIB row's counterfactuals is the corrupted prompt, such as "abc".
            split: only the rows whose column `split` has this value.
            keywords: further fields of `Task` (metric, bos, positions, ...).

        Raises:
            FileError: naming file and line.
        """
        return cls._of(read_pairs(path, counterfactual=counterfactual, split=split), model, keywords)

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
        """As `from_file`, from mappings of column to value: dictionaries, or one split of a `datasets` dataset.

        Raises:
            TaskError: naming the row, counted from 0.
        """
        return cls._of(pairs_from_rows(rows, counterfactual=counterfactual, split=split), model, keywords)

    @classmethod
    def _of(cls, pairs: dict[str, Any], model: ModelLike | None, keywords: dict[str, Any]) -> Task:
        known = [field.name for field in fields(cls)]
        for keyword in keywords:
            if keyword not in known:
                raise TaskError(unknown("keyword", keyword, known))
        task = cls(**{**pairs, **keywords})
        if model is not None:
            task.on(model)
        return task

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes the pairs, messages too, as jsonl that `from_file` opens; metric, positions, bos, align and answer are
        not stored.

        Raises:
            TaskError: the prompts are token ids.
            FileError: the file cannot be written.
        """
        if self.is_ids:
            raise TaskError("prompts as token ids have no text to write: save the tensors with safetensors")
        names = ("correct_idx", "incorrect_idx") if self.answers_are_ids() else ("answers", "wrong_answers")
        answers = dict(zip(names, self.answer_lists(), strict=True))
        spans = {"spans": self.spans, "corrupted_spans": self.corrupted_spans}
        spelling = [self.spelling] * len(self) if isinstance(self.spelling, str) else self.spelling
        sides = {"clean": list(self.clean), "corrupted": list(self.corrupted)}
        return write_pairs(path, {**sides, **answers, "spelling": spelling, **spans})

    def on(self, model: ModelLike) -> BoundTask:
        """Tokenises and validates on a model.

        Raises:
            TaskError: naming the row: unequal lengths, an answer of several tokens, an identical pair, ...
        """
        return bind_pairs(self, model)

    def exchanged(self) -> Task:
        """The pairs with their sides exchanged, spans included: corrupted becomes clean, and wrong answers right.

        Denoising of a task is noising of the exchanged one.

        Raises:
            TaskError: there are answers but no wrong ones, or positions in pairs of unequal length.
        """
        if self.answers is not None and self.wrong_answers is None:
            raise TaskError("the corrupted prompts have no answers: give the task wrong_answers")
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
