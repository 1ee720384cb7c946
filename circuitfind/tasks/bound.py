"""`BoundTask`: a task tokenised for one model. It holds padded ids, answer ids and a metric, ready for the engine.

1. Messages become text (`chat.py`). Prompts and answers become ids, unless they are given as ids (`given.py`,
   `tokens.py`, `spelling.py`).
2. Of an answer of several tokens, the first one that differs is read, or all of them (`answers.py`).
3. Every row is checked (`tokens.py`). An error names the first row that cannot be used.
4. With `unusable="drop"` such rows are left out instead, and a note and a warning say how many. The spelling of answers
   is then the one with which the fewest rows fail.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuitfind.batch import Batch, Inputs
from circuitfind.errors import NoFile, TaskError, warn
from circuitfind.metrics import Function, Metric, metric_of
from circuitfind.record import Record, fingerprints, numbered
from circuitfind.setting import check_seed
from circuitfind.tasks.given import Given, ModelLike, Prompts
from circuitfind.tasks.spans import Span, counterparts, generation, locate
from circuitfind.tasks.spelling import BY_TEXT
from circuitfind.tasks.tokens import (
    PromptTokenizer,
    Tokens,
    answer_tensor,
    by_read,
    faults,
    pad,
    piece,
    validate,
    whole_answers,
    whole_reads,
)


@dataclass(frozen=True, repr=False)
class BoundTask(NoFile):
    """A task tokenised for one model, and validated.

    Attributes:
        batch: all pairs, padded on the right to one length.
        answer_texts: for each row, right and wrong answers as one text, to show.
        tokens: for each row, the clean prompt's tokens as text; without a tokenizer, the ids as text.
        bos: how the BOS token was handled, in words.
        model, vocabulary: the model's name, and the size of its vocabulary.
        weights: for records, such as "float32 from GGUF Q4_1" if the model's weights were de-quantised.
        family: for records, how the model's family was found, such as "inferred as llama"; else empty.
        notes: choices that affect results (spelling of answers, BOS token, rows left out), for records and reports.
        spans: for each row, name -> (start, stop) positions in the clean prompt, which are also those in the corrupted
            prompt unless the batch has an alignment; empty if the task names none.
        appended: for each row, how many tokens of the answer are appended to both prompts; empty unless the task's
            `answer` is set.
    """

    INSTEAD = "save the cf.Task that was bound"

    name: str
    batch: Batch
    metric: Metric
    prompts: tuple[str, ...]
    corrupted_prompts: tuple[str, ...]
    answer_texts: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    bos: str
    model: str
    vocabulary: int
    notes: tuple[str, ...] = ()
    flips: bool = False
    spans: tuple[Mapping[str, Span], ...] = ()
    weights: str = ""
    family: str = ""
    appended: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.batch)

    def __repr__(self) -> str:
        return f"BoundTask({self.name}: {len(self)} pairs on {self.model}, {self.metric.name})"

    @cached_property
    def copies(self) -> np.ndarray:
        """`[pairs]`: a number that is the same for pairs with the same prompts, even if their answers differ.

        Such copies add no evidence. Numbers count from 0, in the order in which they first occur.
        """
        sides = self.batch.clean, self.batch.corrupted
        prompts = torch.cat([torch.where(side.mask, side.ids, -1) for side in sides], dim=1)
        return numbered(map(tuple, prompts.tolist()))

    @property
    def first(self) -> np.ndarray:
        """`[distinct pairs]`: the first row of each set of copies."""
        return np.unique(self.copies, return_index=True)[1]

    def distinct(self) -> BoundTask:
        """Return the task without copies: the first pair of each set of copies."""
        return self if len(self.first) == len(self) else self.subset(self.first.tolist())

    def subset(self, rows: Sequence[int]) -> BoundTask:
        """Return a task with these rows, in this order.

        Raises:
            TaskError: no row is given, or a row does not exist.
        """
        if not isinstance(rows, Iterable):
            raise TaskError(f"subset: rows are a list, such as [0], not {rows!r}")
        if not (rows := list(rows)):
            raise TaskError(f"subset: no rows are given; there are {len(self)}, counted from 0")
        for row in rows:
            if isinstance(row, bool) or not isinstance(row, Integral) or not -len(self) <= row < len(self):
                raise TaskError(f"subset: there is no row {row!r}; there are {len(self)}, counted from 0")
        index = torch.tensor(rows, dtype=torch.long, device=self.batch.answers.device)
        by_row = ("prompts", "corrupted_prompts", "answer_texts", "tokens", "spans", "appended")
        given = {name: values for name in by_row if (values := getattr(self, name))}
        picked: dict[str, Any] = {name: tuple(values[row] for row in rows) for name, values in given.items()}
        return replace(self, batch=self.batch.rows(index).trimmed().plain(), **picked)

    def split(self, fraction: float = 0.5, seed: int = 0) -> tuple[BoundTask, BoundTask]:
        """Return two disjoint random parts of the pairs; the first has this fraction of them.

        Copies stay together, so if there are copies the sizes may differ from this by some pairs.

        Raises:
            TaskError: a part would be empty, all pairs are copies, or the seed is not a whole number, 0 or more.
        """
        check_seed(seed)
        size = round(len(self) * fraction) if isinstance(fraction, Real) and 0 < fraction < 1 else 0
        if not 0 < size < len(self):
            raise TaskError(f"{len(self)} pairs cannot be split at {fraction}: each side needs at least one pair")
        sizes = np.bincount(self.copies)
        if len(sizes) < 2:
            raise TaskError(f"all {len(self)} pairs have the same prompts: both parts would hold the same pair")
        order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).numpy()
        ends = sizes[order].cumsum()[:-1]
        first = np.isin(self.copies, order[: 1 + int(abs(ends - size).argmin())])
        return self.subset(np.flatnonzero(first).tolist()), self.subset(np.flatnonzero(~first).tolist())

    def held_out(self, holdout: float = 0.5, seed: int = 0) -> tuple[BoundTask, BoundTask]:
        """Return the search pairs and the held-out pairs. `holdout`: the fraction of the pairs that is held out.

        If there is only one pair, it is both, with a warning.

        Raises:
            TaskError: `holdout` leaves a side empty.
        """
        if not isinstance(holdout, Real) or not 0 < holdout < 1:
            raise TaskError(f"holdout={holdout!r}: give the fraction of the pairs to hold out, between 0 and 1")
        if len(self) == 1:
            warn("there is only one pair, so no pair is held out: the result holds for that prompt alone")
            return self, self
        if not 0 < round(len(self) * (1 - holdout)) < len(self):
            raise TaskError(f"holdout={holdout:g}: of {len(self)} pairs that leaves none on one side; give more pairs")
        return self.split(1 - holdout, seed)

    def with_metric(self, metric: str | Metric | Function | None) -> BoundTask:
        """Return the same pairs with another metric; None changes nothing."""
        return self if metric is None else replace(self, metric=_usable(metric_of(metric), self.batch))

    def record(self, method: str, ablation: str, direction: str, seed: int, **settings: Any) -> Record:
        """Return the record of a result on this task."""
        family = [f"family: {self.family}"] if self.family else []
        return Record(
            model=self.model,
            task=self.name,
            n_examples=len(self),
            metric=self.metric.name,
            method=method,
            ablation=ablation,
            direction=direction,
            seed=seed,
            bos=self.bos,
            pairs="".join(fingerprints(self.prompts, self.corrupted_prompts)),
            settings={
                **settings,
                "notes": [*self.notes, *family],
                **({"weights": self.weights} if self.weights else {}),
            },
        )


def _usable(metric: Metric, batch: Batch) -> Metric:
    """Return the metric; raise TaskError if the task lacks answers that it needs."""
    sides = (("answers", metric.answers, batch.answers), ("wrong_answers", metric.wrong, batch.wrong))
    for side, needed, given in sides:
        if needed and not given.shape[-1]:
            if side == "wrong_answers" and batch.summed is not None:
                raise TaskError(
                    f"metric '{metric.name}' compares answers token by token, and this task has no wrong answers with"
                    " equally many tokens: use metric='logprob', or answer='first'"
                )
            raise TaskError(f"metric '{metric.name}' needs {side}, the task has none: give them, or use metric='kl'")
    return metric


def bind_pairs(task: Given, model: ModelLike) -> BoundTask:
    """Tokenise a task for a model.

    Raises:
        TaskError: a row cannot be used; with `unusable="drop"`: none can.
    """
    task = task.rendered(model)
    left_out = _unusable(task, model) if task.unusable == "drop" else {}
    if not left_out:
        return _bound(task, model)
    size, (first, why) = len(task), min(left_out.items())
    kept = [row for row in range(size) if row not in left_out]
    if not kept:
        raise TaskError(f"none of the {size} pairs can be used on this model; row {first}: {why}")
    note = f"{len(left_out)} of {size} pairs left out, such as row {first}: {why}"
    warnings.warn(f"'{task.name}': {note}", stacklevel=3)
    rest = _bound(task.subset(kept), model)
    return replace(rest, notes=(*rest.notes, note))


def _bound(task: Given, model: ModelLike) -> BoundTask:
    tokenizer = task.tokenizer(model)
    tokens, bos = task.tokens(tokenizer, model), "ids given"
    notes: list[str] = []
    if tokenizer is not None:
        bos = tokenizer.describe(task.texts("clean"), tokens.clean)
        if task.answers is not None:
            notes.append(f"answers spelled {tokens.spelling}")
        if task.answer is not None:
            notes.append(_of_several(task, tokens))
        notes.append(f"BOS token: {bos}")
    validate(tokens, model, aligned=task.align is not None)
    batch, words = _batch(task, tokens, tokenizer, model), _Words(model.tokenizer, tokens)
    if batch.alignment is not None:
        differ = sum(len(a) != len(b) for a, b in zip(tokens.clean, tokens.corrupted, strict=True))
        notes.append(f"prompts aligned by spans: {differ} of {len(batch)} pairs differ in length")
    return BoundTask(
        name=task.name,
        batch=batch,
        metric=_usable(metric_of(task.metric), batch),
        prompts=words.prompts(task.clean, tokens.clean),
        corrupted_prompts=words.prompts(task.corrupted, tokens.corrupted),
        answer_texts=tuple(map(words.answers, tokens.answers, tokens.wrong)),
        tokens=tuple(tuple(map(words.piece, ids)) for ids in tokens.clean),
        bos=bos,
        model=getattr(model, "name", ""),
        vocabulary=model.vocabulary,
        notes=tuple(notes),
        flips=task.flips,
        spans=_spans(task, tokens, tokenizer, "clean"),
        weights=getattr(model, "dequantised", ""),
        family=getattr(model, "row", ""),
        appended=tuple(tokens.appended) if task.answer is not None else (),
    )


def _batch(task: Given, tokens: Tokens, tokenizer: PromptTokenizer | None, model: ModelLike) -> Batch:
    """Return the batch: padded ids, read positions, answer ids and, for aligned pairs, the alignment."""
    device, length = model.device, max(map(len, (*tokens.clean, *tokens.corrupted)))
    clean, corrupted = (pad(rows, length, device) for rows in (tokens.clean, tokens.corrupted))
    most = max(map(len, tokens.answers), default=0) if tokens.whole else 0
    read = whole_reads(tokens.answers, [*map(len, tokens.clean)], most) if most else task.read_positions(tokens.clean)
    read, alignment = read.to(device), None
    if task.align:
        index, failed = _counterparts(task, tokens, tokenizer)
        for number, why in failed.items():
            raise TaskError(f"row {number}: {why}")
        # padding corresponds to itself
        alignment = torch.tensor([[*row, *range(len(row), length)] for row in index], device=device)
    both = tokens.answers, tokens.wrong
    answers, wrong = (whole_answers(side, most) if most else answer_tensor(side, read) for side in both)
    if task.is_ids and read.shape[1] > 1:
        answers, wrong = by_read(task.answers, task.wrong_answers, read, model.vocabulary)
    sides = Inputs(*clean, read), Inputs(*corrupted, read if alignment is None else alignment.gather(1, read))
    counted = [[at < len(row) for at in range(most)] for row in tokens.answers]
    summed = torch.tensor(counted, device=device) if most else None
    return Batch(*sides, answers.to(device), wrong.to(device), alignment=alignment, summed=summed).plain()


class _Words(NamedTuple):
    """A task's ids as text or, without a tokenizer, as numbers."""

    tokenizer: Any
    tokens: Tokens

    def text(self, ids: list[int]) -> str:
        return " ".join(map(str, ids)) if self.tokenizer is None else str(self.tokenizer.decode(ids))

    def piece(self, token: int) -> str:
        return str(token) if self.tokenizer is None else piece(self.tokenizer, token)

    def prompts(self, given: Prompts, rows: list[list[int]]) -> tuple[str, ...]:
        """Return the prompts as given, each with the tokens of the answer that were appended to it."""
        if isinstance(given, Tensor):
            return tuple(map(self.text, rows))
        sizes = zip(rows, self.tokens.appended, strict=True)
        ends = (self.text(ids).removeprefix(self.text(ids[:-n])) if n else "" for ids, n in sizes)
        return tuple(f"{text}{end}" for text, end in zip(map(str, given), ends, strict=True))

    def answers(self, right: list[int], wrong: list[int]) -> str:
        return f"{self._side(right)} / {self._side(wrong)}" if wrong else self._side(right)

    def _side(self, ids: list[int], most: int = 3) -> str:
        if self.tokens.whole:
            return "".join(map(self.piece, ids)).strip()
        shown = ", ".join(self.piece(token).strip() for token in ids[:most])
        return shown + (f", … ({len(ids)})" if len(ids) > most else "")


def _of_several(task: Given, tokens: Tokens) -> str:
    """Say which tokens of the answers are read, for the notes."""
    longer = sum(map(bool, tokens.appended))
    if tokens.whole:
        text = "the whole answer is read by teacher forcing, the metric summed over its tokens"
        left_out = task.wrong_answers is not None and not any(tokens.wrong)
        return text + ("; wrong answers of other lengths are left out" if left_out else "")
    text = (
        f"answers are read at the first token that differs: in {longer} of {len(task)} pairs it is not the first one,"
    )
    return f"{text} and the tokens before it end both prompts" if longer else "answers are read at their first token"


def _unusable(task: Given, model: ModelLike) -> dict[int, str]:
    """Return the rows that cannot be used, each with the reason."""
    left_out: dict[int, str] = {}
    tokenizer = task.tokenizer(model)
    if tokenizer is not None and not task.answers_are_ids():
        found = task.spelled(tokenizer, None, dropping=True)
        left_out = found.failed | task.readings(tokenizer, found)[1]
    rows = [row for row in range(len(task)) if row not in left_out]
    if not rows:
        return left_out
    some = replace(task.subset(rows), spelling=BY_TEXT if task.spelling is None else task.subset(rows).spelling)
    tokens = some.tokens(tokenizer, model)
    found_faults = faults(tokens, model, aligned=task.align is not None)
    if task.align:
        found_faults |= _counterparts(some, tokens, tokenizer)[1]
    return left_out | {rows[at]: fault for at, fault in found_faults.items()}


def _spans(task: Given, tokens: Tokens, tokenizer: PromptTokenizer | None, side: str) -> tuple[dict[str, Span], ...]:
    """Return one side's spans in tokens, by row; empty if there are none."""
    given = task.spans if side == "clean" else task.corrupted_spans
    prompts = None if task.is_ids else task.texts(side)
    found = () if given is None else locate(given, prompts, getattr(tokens, side), tokenizer, side)
    asking = generation(prompts, tokenizer) if side == "clean" and prompts and tokenizer is not None else ()
    if not asking:
        return found
    return tuple({**part, **own} for part, own in zip(asking, found or [{}] * len(asking), strict=True))


def _counterparts(
    task: Given, tokens: Tokens, tokenizer: PromptTokenizer | None
) -> tuple[list[list[int]], dict[int, str]]:
    """Return the corrupted position for each clean one, by row, and the rows that cannot be aligned, with the reason.

    Rows that fail are missing from the first list.
    """
    rows, failed = [], {}
    clean, corrupted = (_spans(task, tokens, tokenizer, side) for side in ("clean", "corrupted"))
    for number, (own, twin) in enumerate(zip(clean, corrupted, strict=True)):
        try:
            rows.append(counterparts(own, twin, (len(tokens.clean[number]), len(tokens.corrupted[number]))))
        except ValueError as error:
            failed[number] = str(error)
    return rows, failed
