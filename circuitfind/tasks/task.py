"""A behaviour as pairs of prompts with answers, and what it becomes when it meets a model.

1. `Task` holds what the user gave: strings or id tensors, answers, a metric, read positions.
2. `Task.on(model)` tokenises and validates all of it, and returns a `BoundTask`: padded ids, answer ids, a metric.
   Every error names the row that is at fault and what to do about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Protocol

import torch
from torch import Tensor

from circuitfind.batch import Batch, Inputs
from circuitfind.errors import TaskError
from circuitfind.metrics import Function, Metric, metric_of
from circuitfind.tasks import files
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


@dataclass(frozen=True)
class BoundTask:
    """A task in a model's tokens, validated.

    Attributes:
        batch: all pairs, padded on the right to one length.
        tokens: by row, the clean prompt's tokens as text (ids as text without a tokenizer).
        notes: choices made on the way that move results (answer spelling, BOS), for records and reports.
    """

    name: str
    batch: Batch
    metric: Metric
    prompts: tuple[str, ...]
    corrupted_prompts: tuple[str, ...]
    answer_texts: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    bos: str
    notes: tuple[str, ...] = ()
    flips: bool = False

    def __len__(self) -> int:
        return len(self.batch)

    def subset(self, rows: Sequence[int]) -> BoundTask:
        """Some of the pairs."""
        index = torch.tensor(list(rows), dtype=torch.long)
        pick = lambda values: tuple(values[i] for i in rows)  # noqa: E731
        return replace(
            self,
            batch=self.batch.rows(index.to(self.batch.answers.device)).trimmed(),
            prompts=pick(self.prompts),
            corrupted_prompts=pick(self.corrupted_prompts),
            answer_texts=pick(self.answer_texts),
            tokens=pick(self.tokens),
        )

    def split(self, fraction: float = 0.5, seed: int = 0) -> tuple[BoundTask, BoundTask]:
        """Two disjoint parts, drawn with a seed; the first has this fraction of the pairs.

        Raises:
            TaskError: one part would be empty.
        """
        size = round(len(self) * fraction)
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
        return replace(self, metric=_usable(metric_of(metric), self.batch.answers, self.batch.wrong))


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
        if isinstance(self.clean, str) or isinstance(self.corrupted, str):
            raise TaskError("clean and corrupted are lists of prompts: put a single prompt in a list")
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
        _validate(tokens, model)
        device = model.device
        clean, corrupted = _pad(tokens.clean, device), _pad(tokens.corrupted, device)
        read = self._read(tokens.clean).to(device)
        answers, wrong = _answer_tensor(tokens.answers, read), _answer_tensor(tokens.wrong, read)
        if isinstance(self.clean, Tensor) and read.shape[1] > 1:
            answers, wrong = (
                _by_read(self.answers, read, "answers"),
                _by_read(self.wrong_answers, read, "wrong_answers"),
            )
        batch = Batch(Inputs(*clean, read), Inputs(*corrupted, read), answers.to(device), wrong.to(device))
        as_text = _decoder(model.tokenizer)
        rows = zip(tokens.answers, tokens.wrong, strict=True)
        return BoundTask(
            self.name,
            batch,
            _usable(metric_of(self.metric), batch.answers, batch.wrong),
            self._prompt_texts(self.clean, tokens.clean, as_text),
            self._prompt_texts(self.corrupted, tokens.corrupted, as_text),
            tuple(f"{_some(a, as_text)} / {_some(w, as_text)}" if w else _some(a, as_text) for a, w in rows),
            tuple(tuple(as_text([i]) for i in ids) for ids in tokens.clean),
            bos,
            tuple(notes),
            self.flips,
        )

    # ---------------------------------------------------------------- what the user gave
    def _texts(self, answers: Answers | None, side: str) -> list[list[str]]:
        if answers is None:
            return [[] for _ in self.clean]
        rows: list[Any] = [[row] if isinstance(row, str) else list(row) for row in answers]  # type: ignore[arg-type]
        for number, row in enumerate(rows):
            if not row or not all(isinstance(answer, str) and answer for answer in row):
                raise TaskError(f"row {number}: {side} must be a non-empty string or a list of them, not {row!r}")
        return rows

    def _from_ids(self) -> Tokens:
        assert isinstance(self.clean, Tensor) and isinstance(self.corrupted, Tensor)
        sides = (self.clean, self.attention_mask), (self.corrupted, self.corrupted_attention_mask)
        rows = [_unpadded(ids, self.attention_mask if mask is None else mask) for ids, mask in sides]
        several = self.positions is not None and torch.as_tensor(self.positions).ndim == 2
        answers = (
            [[[] for _ in rows[0]]] * 2 if several else [self._id_sets(a) for a in (self.answers, self.wrong_answers)]
        )
        return Tokens(rows[0], rows[1], answers[0], answers[1], "as ids")

    def _id_sets(self, answers: Answers | None) -> list[list[int]]:
        if answers is None:
            return [[] for _ in self.clean]
        rows: list[Any] = answers.tolist() if isinstance(answers, Tensor) else list(answers)
        sets = [list(row) if isinstance(row, (list, tuple)) else [row] for row in rows]
        for number, row in enumerate(sets):
            if not row or not all(isinstance(answer, int) for answer in row):
                raise TaskError(f"row {number}: with prompts as ids, answers are ids too, not {row!r}")
        return sets

    def _read(self, rows: list[list[int]]) -> Tensor:
        """`[batch, reads]` positions, checked against each row's length."""
        if self.positions is None:
            return torch.tensor([[len(row) - 1] for row in rows])
        given = torch.as_tensor(self.positions)
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


# -------------------------------------------------------------------- helpers
def _unpadded(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    if ids.ndim != 2:
        raise TaskError(f"prompts as ids have shape {list(ids.shape)}: [batch, pos] is needed")
    if mask is None:
        return ids.tolist()
    if mask.shape != ids.shape:
        raise TaskError(f"attention_mask has shape {list(mask.shape)}, the prompts {list(ids.shape)}")
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]


def _validate(tokens: Tokens, model: ModelLike) -> None:
    """Refuses rows that no method can use."""
    longest = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    for number, (clean, corrupted) in enumerate(zip(tokens.clean, tokens.corrupted, strict=True)):
        if len(clean) != len(corrupted):
            raise TaskError(
                f"row {number}: the clean prompt has {len(clean)} tokens, the corrupted one {len(corrupted)};"
                " a pair must have equal length: replace words by others of as many tokens"
            )
        if not clean:
            raise TaskError(f"row {number}: the prompt is empty")
        if clean == corrupted:
            raise TaskError(f"row {number}: the clean and the corrupted prompt are identical: every effect would be 0")
        if longest and len(clean) > longest:
            raise TaskError(f"row {number}: the prompt has {len(clean)} tokens, the model's context holds {longest}")
        both = set(tokens.answers[number]) & set(tokens.wrong[number])
        if both:
            raise TaskError(f"row {number}: token {min(both)} is among both the answers and the wrong answers")
        for ids in (clean, corrupted, tokens.answers[number], tokens.wrong[number]):
            if ids and not 0 <= min(ids) <= max(ids) < model.vocabulary:
                raise TaskError(
                    f"row {number}: token id {max(ids)} is outside the model's vocabulary of {model.vocabulary}"
                )


def _usable(metric: Metric, answers: Tensor, wrong: Tensor) -> Metric:
    for side, needed, given in (("answers", metric.answers, answers), ("wrong_answers", metric.wrong, wrong)):
        if needed and not given.shape[-1]:
            raise TaskError(f"metric '{metric.name}' needs {side}, the task has none: give them, or use metric='kl'")
    return metric


def _pad(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask `[batch, pos]`, padded on the right (with id 0: masked, so any id would do)."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)


def _answer_tensor(rows: list[list[int]], read: Tensor) -> Tensor:
    """`[batch, reads, answers]`, the same answers at every read position, padded with -1."""
    width = max(map(len, rows), default=0)
    padded = torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.long).view(len(rows), width)
    return padded.unsqueeze(1).expand(-1, read.shape[1], -1)


def _by_read(answers: Answers | None, read: Tensor, side: str) -> Tensor:
    """`[batch, reads, answers]` from ids given by read position."""
    if answers is None:
        return read.new_zeros(*read.shape, 0)
    given = torch.as_tensor(answers)
    given = given.unsqueeze(-1) if given.ndim == 2 else given
    if given.shape[:2] != read.shape:
        raise TaskError(
            f"{side} have shape {list(given.shape)}, the read positions {list(read.shape)}: they must agree"
        )
    return given


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    if tokenizer is None:
        return lambda ids: " ".join(map(str, ids))
    return lambda ids: tokenizer.decode(ids)


def _some(ids: list[int], as_text: Callable[[list[int]], str], most: int = 3) -> str:
    shown = ", ".join(as_text([i]).strip() for i in ids[:most])
    return shown + (f", … ({len(ids)})" if len(ids) > most else "")
