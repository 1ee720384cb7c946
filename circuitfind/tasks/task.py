"""`Task`: pairs of prompts with answers, from the user or from a file.

`Task.on(model)` tokenises and validates all pairs and returns a `BoundTask`. Every error names the row and how to fix
it. With `unusable="drop"`, pairs that the model cannot use are left out, and a warning says how many.
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
        answers, wrong_answers: for each pair one string or token id, or a list of them; `[batch, reads]` or
            `[batch, reads, answers]` ids if several positions are read. Optional for `kl` and callables.
        metric: a name of `circuitfind.metrics.METRICS`, or a callable `(logits, batch) -> [batch]`.
        positions: where the logits are read, counted in the prompt's tokens without padding (negative: from the end):
            one number for all pairs, one per pair, or `[batch, reads]`. Default: the last token.
        bos: True: every prompt begins with a BOS token; False: none is added; None: the tokenizer decides.
        flips: whether the wrong answers are right after the corrupted prompt.
        spans: for each pair, named parts of the clean prompt: name -> a text that occurs once, the n-th occurrence of
            a text (text, n), or token positions (start, stop) (`circuitfind.tasks.spans`).
        unusable: what happens to a pair that the model cannot use (unequal lengths, an answer of several tokens, ...):
            "error" raises an error that names the row, "drop" leaves such rows out and says how many.
        corrupted_spans: the same as `spans`, for the corrupted prompt.
        align: "spans" accepts pairs of unequal length; spans of the same name correspond (`circuitfind.tasks.spans`).
        chat: whether prompts given as strings become a chat with one message of the user.
        answer: how answers of several tokens are read: "first", at the first token that tells right from wrong, or
            "all", the whole answer by teacher forcing with the metric summed over its tokens
            (`circuitfind.tasks.answers`). None refuses such answers.
        spelling: whether answers given as text get a leading space, for all pairs or by row: "space", "none", "given"
            (unchanged), or "text" (as the prompts and answers suggest). None: what the model itself finds more likely
            (`circuitfind.tasks.spelling`).
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
        """Read pairs from a jsonl, csv or json file; `circuitfind.tasks.formats` describes the columns.

        Args:
            model: if given, the task is validated on it at once.
            counterfactual: which of a MIB row's counterfactuals is the corrupted prompt, such as "abc".
            split: read only the rows whose column `split` has this value.
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
        """Do what `from_file` does with mappings of column to value: dictionaries, or a split of a `datasets` dataset.

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
        """Write the pairs as jsonl that `from_file` opens, and return the path.

        Prompts (text or messages), answers, spelling and spans are stored; all other fields (name, metric, positions,
        bos, flips, unusable, align, answer) are not.

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
        """Tokenise the pairs for a model and validate them.

        Raises:
            TaskError: naming the row: unequal lengths, an answer of several tokens, identical prompts, ...
        """
        return bind_pairs(self, model)

    def exchanged(self) -> Task:
        """Return the task with the two sides exchanged: clean and corrupted prompts, right and wrong answers, spans.

        Denoising a task is noising the exchanged task.

        Raises:
            TaskError: the task has answers but no wrong answers, or `align` and `positions` are both given.
        """
        if self.answers is not None and self.wrong_answers is None:
            raise TaskError("the corrupted prompts have no answers: give the task wrong_answers")
        if self.align and self.positions is not None:
            raise TaskError("positions= counts in the clean prompts: make a task of the exchanged pairs with its own")
        own, other = self.attention_mask, self.corrupted_attention_mask
        if other is None:  # both sides have the same mask
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
