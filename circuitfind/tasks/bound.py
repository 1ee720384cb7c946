"""A task in a model's tokens: padded ids, answer ids and a metric, validated, ready for the engine.

1. Messages become text (`chat.py`). Prompts and answers become ids (`given.py`, `tokens.py`, `spelling.py`), or are
   taken as the ids that they are.
2. Every row is checked (`tokens.py`); an error names the first that cannot be used.
3. Of an answer of several tokens the first one that differs is read, or all of them (`answers.py`).
4. With `unusable="drop"` such rows are left out instead, and a note and a warning say how many. The answers are then
   spelled in the way that serves the most rows.
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
    by_place,
    by_read,
    faults,
    pad,
    piece,
    places,
    validate,
)


@dataclass(frozen=True, repr=False)
class BoundTask(NoFile):
    """A task in a model's tokens, validated.

    Attributes:
        batch: all pairs, padded on the right to one length.
        tokens: by row, the clean prompt's tokens as text (ids as text without a tokenizer).
        model, vocabulary: the name of the model that the tokens belong to, and how many ids it has.
        weights: "float32 from GGUF Q4_1" where the model's were de-quantised, for records.
        notes: choices that move results (answer spelling, BOS, rows left out), for records and reports.
        spans: by row, name -> (start, stop) positions of the clean prompt, and of the corrupted one unless the batch
            has an alignment; empty where the task names none.
        appended: by row, how many tokens of an answer of several end both prompts; empty where answers have one.
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
        """`[pairs]`: the same number for pairs of the same prompts, whatever is asked of them: they are no further
        evidence. Numbers count from 0, in the order of the first of each."""
        sides = self.batch.clean, self.batch.corrupted
        prompts = torch.cat([torch.where(side.mask, side.ids, -1) for side in sides], dim=1)
        return numbered(map(tuple, prompts.tolist()))

    @property
    def first(self) -> np.ndarray:
        """`[distinct pairs]`: rows, the first of all copies."""
        return np.unique(self.copies, return_index=True)[1]

    def distinct(self) -> BoundTask:
        """The first of all copies."""
        return self if len(self.first) == len(self) else self.subset(self.first.tolist())

    def subset(self, rows: Sequence[int]) -> BoundTask:
        """Some of the pairs.

        Raises:
            TaskError: no row is given, or one that does not exist.
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
        """Two disjoint parts, drawn with a seed; the first has this fraction of the pairs.

        Copies stay on one side, so that with copies a part may differ from this by some pairs.

        Raises:
            TaskError: one part would be empty, or the seed is not a whole number, 0 or more.
        """
        check_seed(seed)
        size = round(len(self) * fraction) if isinstance(fraction, Real) and 0 < fraction < 1 else 0
        if not 0 < size < len(self):
            raise TaskError(f"{len(self)} pairs cannot be split at {fraction}: each side needs at least one pair")
        sizes = np.bincount(self.copies)
        if len(sizes) < 2:
            raise TaskError(f"all {len(self)} pairs have the same prompts: one side would know what the other has seen")
        order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).numpy()
        ends = sizes[order].cumsum()[:-1]
        first = np.isin(self.copies, order[: 1 + int(abs(ends - size).argmin())])
        return self.subset(np.flatnonzero(first).tolist()), self.subset(np.flatnonzero(~first).tolist())

    def held_out(self, holdout: float = 0.5, seed: int = 0) -> tuple[BoundTask, BoundTask]:
        """Pairs to search with, and the part of the pairs (`holdout`) that is held out to judge with.

        One pair is both, with a warning: what is found is that prompt's own circuit.

        Raises:
            TaskError: `holdout` leaves a side empty.
        """
        if not isinstance(holdout, Real) or not 0 < holdout < 1:
            raise TaskError(f"holdout={holdout!r}: a part of the pairs is needed, between 0 and 1")
        if len(self) == 1:
            warn("there is one pair, to search with and to judge with: what is found is of that prompt alone")
            return self, self
        if not 0 < round(len(self) * (1 - holdout)) < len(self):
            raise TaskError(f"holdout={holdout:g}: of {len(self)} pairs that leaves none on one side; give more pairs")
        return self.split(1 - holdout, seed)

    def with_metric(self, metric: str | Metric | Function | None) -> BoundTask:
        """The same pairs with another metric; None changes nothing."""
        return self if metric is None else replace(self, metric=_usable(metric_of(metric), self.batch))

    def record(self, method: str, ablation: str, direction: str, seed: int, **settings: Any) -> Record:
        """The record of a result on this task."""
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
    """The metric, if the task has the answers that it needs."""
    sides = (("answers", metric.answers, batch.answers), ("wrong_answers", metric.wrong, batch.wrong))
    for side, needed, given in sides:
        if needed and not given.shape[-1]:
            if side == "wrong_answers" and batch.summed is not None:
                raise TaskError(
                    f"metric '{metric.name}' compares answers place by place, and this task has no wrong answers of as"
                    " many tokens: use metric='logprob', or answer='first'"
                )
            raise TaskError(f"metric '{metric.name}' needs {side}, the task has none: give them, or use metric='kl'")
    return metric


def bind_pairs(task: Given, model: ModelLike) -> BoundTask:
    """In the model's tokens; raises TaskError where a row (with `unusable="drop"`: every row) cannot be used."""
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
        task.name,
        batch,
        _usable(metric_of(task.metric), batch),
        words.prompts(task.clean, tokens.clean),
        words.prompts(task.corrupted, tokens.corrupted),
        tuple(map(words.answers, tokens.answers, tokens.wrong)),
        tuple(tuple(map(words.piece, ids)) for ids in tokens.clean),
        bos,
        getattr(model, "name", ""),
        model.vocabulary,
        tuple(notes),
        task.flips,
        _spans(task, tokens, tokenizer, "clean"),
        getattr(model, "dequantised", ""),
        getattr(model, "row", ""),
        tuple(tokens.appended) if task.answer is not None else (),
    )


def _batch(task: Given, tokens: Tokens, tokenizer: PromptTokenizer | None, model: ModelLike) -> Batch:
    """The ids, padded, with what is read of them, and where."""
    device, length = model.device, max(map(len, (*tokens.clean, *tokens.corrupted)))
    clean, corrupted = (pad(rows, length, device) for rows in (tokens.clean, tokens.corrupted))
    most = max(map(len, tokens.answers), default=0) if tokens.whole else 0
    read = places(tokens.answers, [*map(len, tokens.clean)], most) if most else task.read_positions(tokens.clean)
    read, alignment = read.to(device), None
    if task.align:
        index, failed = _counterparts(task, tokens, tokenizer)
        for number, why in failed.items():
            raise TaskError(f"row {number}: {why}")
        # padding corresponds to itself
        alignment = torch.tensor([[*row, *range(len(row), length)] for row in index], device=device)
    both = tokens.answers, tokens.wrong
    answers, wrong = (by_place(side, most) if most else answer_tensor(side, read) for side in both)
    if task.is_ids and read.shape[1] > 1:
        answers, wrong = by_read(task.answers, task.wrong_answers, read, model.vocabulary)
    sides = Inputs(*clean, read), Inputs(*corrupted, read if alignment is None else alignment.gather(1, read))
    counted = [[at < len(row) for at in range(most)] for row in tokens.answers]
    summed = torch.tensor(counted, device=device) if most else None
    return Batch(*sides, answers.to(device), wrong.to(device), alignment=alignment, summed=summed).plain()


class _Words(NamedTuple):
    """A task's ids as text; without a tokenizer, as numbers."""

    tokenizer: Any
    tokens: Tokens

    def text(self, ids: list[int]) -> str:
        return " ".join(map(str, ids)) if self.tokenizer is None else str(self.tokenizer.decode(ids))

    def piece(self, token: int) -> str:
        return str(token) if self.tokenizer is None else piece(self.tokenizer, token)

    def prompts(self, given: Prompts, rows: list[list[int]]) -> tuple[str, ...]:
        """As given, with what of the answer ends them."""
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
    """What is read of answers of several tokens."""
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
    """The rows that cannot be used, and why."""
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
    """By row, one side's spans in tokens; empty where there are none."""
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
    """By row, the corrupted position for each clean one; and the rows that cannot be aligned, with the reason."""
    rows, failed = [], {}
    clean, corrupted = (_spans(task, tokens, tokenizer, side) for side in ("clean", "corrupted"))
    for number, (own, twin) in enumerate(zip(clean, corrupted, strict=True)):
        try:
            rows.append(counterparts(own, twin, (len(tokens.clean[number]), len(tokens.corrupted[number]))))
        except ValueError as error:
            failed[number] = str(error)
    return rows, failed
