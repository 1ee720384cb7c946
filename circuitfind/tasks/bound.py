"""A task in a model's tokens: padded ids, answer ids and a metric, validated, ready for the engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from circuitfind.batch import Batch
from circuitfind.errors import TaskError
from circuitfind.metrics import Function, Metric, metric_of
from circuitfind.record import Record, fingerprints


def check_seed(seed: int) -> None:
    """Refuses what some generators take for another seed (-1 for 1, None for the time of day) and others refuse.

    Raises:
        TaskError: `seed` is not a whole number, 0 or more.
    """
    if not isinstance(seed, Integral) or seed < 0:
        raise TaskError(f"seed={seed!r} is no seed: give a whole number, 0 or more")


@dataclass(frozen=True)
class BoundTask:
    """A task in a model's tokens, validated.

    Attributes:
        batch: all pairs, padded on the right to one length.
        tokens: by row, the clean prompt's tokens as text (ids as text without a tokenizer).
        model, vocabulary: the name of the model that the tokens belong to, and how many ids it has.
        notes: choices made on the way that move results (answer spelling, BOS, rows left out), for records and reports.
        spans: by row, name -> (start, stop) positions of the clean prompt, and of the corrupted one where the batch has
            no alignment; empty where the task names none.
    """

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
    spans: tuple[Mapping[str, tuple[int, int]], ...] = ()

    def __len__(self) -> int:
        return len(self.batch)

    def subset(self, rows: Sequence[int]) -> BoundTask:
        """Some of the pairs.

        Raises:
            TaskError: no row is asked for, or one that is not there.
        """
        if not isinstance(rows, Iterable):
            raise TaskError(f"subset: rows are a list, such as [0], not {rows!r}")
        rows = list(rows)
        if not rows:
            raise TaskError(f"subset: no rows are asked for; there are {len(self)}, counted from 0")
        for row in rows:
            if isinstance(row, bool) or not isinstance(row, Integral) or not -len(self) <= row < len(self):
                raise TaskError(f"subset: there is no row {row!r}; there are {len(self)}, counted from 0")
        index = torch.tensor(list(rows), dtype=torch.long)
        pick = lambda values: tuple(values[i] for i in rows)  # noqa: E731
        return replace(
            self,
            batch=self.batch.rows(index.to(self.batch.answers.device)).trimmed().plain(),
            prompts=pick(self.prompts),
            corrupted_prompts=pick(self.corrupted_prompts),
            answer_texts=pick(self.answer_texts),
            tokens=pick(self.tokens),
            spans=pick(self.spans) if self.spans else (),
        )

    def split(self, fraction: float = 0.5, seed: int = 0) -> tuple[BoundTask, BoundTask]:
        """Two disjoint parts, drawn with a seed; the first has this fraction of the pairs.

        Raises:
            TaskError: one part would be empty, or `seed` is no seed.
        """
        check_seed(seed)
        size = round(len(self) * fraction) if isinstance(fraction, Real) and 0 < fraction < 1 else 0
        if not 0 < size < len(self):
            raise TaskError(
                f"{len(self)} pairs cannot be split at {fraction}: at least one pair on each side is needed"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return self.subset(sorted(order[:size])), self.subset(sorted(order[size:]))

    def with_metric(self, metric: str | Metric | Function | None) -> BoundTask:
        """The same pairs measured otherwise; None changes nothing."""
        if metric is None:
            return self
        return replace(self, metric=usable(metric_of(metric), self.batch.answers, self.batch.wrong))

    def record(self, method: str, ablation: str, direction: str, seed: int, **settings: Any) -> Record:
        """The record of a result on this task."""
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
            settings={**settings, "notes": list(self.notes)},
        )


def usable(metric: Metric, answers: Tensor, wrong: Tensor) -> Metric:
    """The metric, if the task has the answers that it needs."""
    for side, needed, given in (("answers", metric.answers, answers), ("wrong_answers", metric.wrong, wrong)):
        if needed and not given.shape[-1]:
            raise TaskError(f"metric '{metric.name}' needs {side}, the task has none: give them, or use metric='kl'")
    return metric
