"""`Given`: the fields of a `circuitfind.Task`, checked, and their token ids. Errors about one pair name its row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from circuitfind.errors import TaskError, no_character
from circuitfind.metrics import Function, Metric, metric_of
from circuitfind.tasks import answers as answering
from circuitfind.tasks.chat import Message, Rendered, are_messages, check_messages, one_turn, render
from circuitfind.tasks.spelling import BY_TEXT, SPELLINGS, Spelled, Wanted, spelled
from circuitfind.tasks.tokens import PromptTokenizer, Tokens, runnable, unpadded

Prompts = Sequence[str] | Sequence[Sequence[Message]] | Tensor
Answers = Sequence[str] | Sequence[Sequence[str]] | Sequence[int] | Sequence[Sequence[int]] | Tensor


class ModelLike(Protocol):
    """What a task needs of a model. A model with `remote=False` also has `logits(inputs)`, to choose the spelling."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def config(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def vocabulary(self) -> int: ...


@dataclass
class Given:
    """The fields of a task, described in `circuitfind.Task`; their lengths and types are checked."""

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
    chat: bool = False
    answer: str | None = None
    spelling: str | Sequence[str | None] | None = None

    def __post_init__(self) -> None:
        lists: tuple[str, ...] = ("clean", "corrupted", "answers", "wrong_answers", "spans", "corrupted_spans")
        lists += ("spelling",) * (not isinstance(self.spelling, str))
        for side in lists:
            given = getattr(self, side)
            if isinstance(given, str):  # would pass for a list of letters
                raise TaskError(f"{side} is one string: give a list with one entry per pair")
            if isinstance(given, Iterator):
                setattr(self, side, list(given))
            elif not _is_list(given) and (given is not None or side in ("clean", "corrupted")):
                raise TaskError(f"{side} is {_kind(given)}: give a list or tensor with one entry per pair")
        sizes = {side: len(getattr(self, side)) for side in lists if getattr(self, side) is not None}
        if len(set(sizes.values())) > 1:
            raise TaskError(f"the lists differ in length: {', '.join(f'{k} {v}' for k, v in sizes.items())}")
        if not len(self):
            raise TaskError("the task holds no pairs")
        if self.is_ids != isinstance(self.corrupted, Tensor):
            raise TaskError("clean and corrupted must both be strings or both be id tensors")
        if self.is_ids and self.bos is not None:
            raise TaskError("bos is for prompts as text: put the BOS token's id into the prompts yourself")
        self._check_characters(lists)
        if not self.is_ids:
            self._check_prompts()
        masks = (self.attention_mask, self.corrupted_attention_mask)
        if not self.is_ids and any(mask is not None for mask in masks):
            raise TaskError("attention_mask is for prompts as token ids: strings are padded and masked by the task")
        if not isinstance(self.metric, (str, Metric)) and not callable(self.metric):
            raise TaskError(f"metric is {_kind(self.metric)}: give one name or a callable (logits, batch)")
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
        self._check_answer()

    def _check_characters(self, sides: Sequence[str]) -> None:
        for side in sides:
            given = getattr(self, side)
            for number, one in enumerate(() if given is None or isinstance(given, Tensor) else given):
                said = one if isinstance(one, str) else json.dumps(one, ensure_ascii=False, skipkeys=True, default=str)
                if why := no_character(said):
                    raise TaskError(f"row {number}: {side}: {why}")

    def _check_prompts(self) -> None:
        """Check that prompts are all text or all messages; `chat` turns text into messages."""
        if self.chat:
            self.clean, self.corrupted = (list(map(one_turn, side)) for side in (self.clean, self.corrupted))
        for number, prompts in enumerate(zip(self.clean, self.corrupted, strict=True)):
            for side, prompt in zip(("clean", "corrupted"), prompts, strict=True):
                if isinstance(prompt, str):
                    continue
                if not are_messages(prompt):
                    ids = "or all of them one [batch, pos] tensor of ids"
                    raise TaskError(f"row {number}: prompts are strings, lists of messages, {ids}")
                try:
                    check_messages(prompt)
                except ValueError as error:
                    raise TaskError(f"row {number}: {side}: {error}") from None
            if any(isinstance(prompt, str) != isinstance(self.clean[0], str) for prompt in prompts):
                remedy = "give all as messages, or all as text with chat=True"
                raise TaskError(f"row {number}: some prompts are text and some are messages: {remedy}")

    def _check_answer(self) -> None:
        """Check that `spelling`, `answer` and `chat` fit the prompts and answers."""
        chosen = [self.spelling] if isinstance(self.spelling, str) else [one for one in self.spelling or []]
        for number, one in enumerate(chosen):
            if one not in (None, BY_TEXT, *SPELLINGS):
                row = "" if isinstance(self.spelling, str) else f"row {number}: "
                known = ", ".join(f"'{name}' ({what})" for name, what in SPELLINGS.items())
                raise TaskError(f"{row}spelling is {one!r}: use {known}, or leave it out (what the model prefers)")
        if self.answer not in (None, answering.FIRST, answering.ALL):
            raise TaskError(f"answer is {self.answer!r}: use 'first' (first token that differs) or 'all' (every token)")
        if self.is_ids and self.chat:
            raise TaskError("chat=True is for prompts as text: apply the chat template before you tokenise")
        if self.answer is None:
            return
        about = f"answer='{self.answer}' is for answers as text"
        if self.answers is None:
            raise TaskError(f"{about}, and the task has none: give answers, or leave it out")
        if self.is_ids or self.answers_are_ids():
            raise TaskError(f"{about}: with ids give positions=, [batch, reads], and answers for each position")
        if self.positions is not None:
            raise TaskError(f"answer='{self.answer}' and positions= both say where the logits are read: leave one out")

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def is_ids(self) -> bool:
        return isinstance(self.clean, Tensor)

    def answer_lists(self) -> list[list[list[Any]] | None]:
        """Return `[answers, wrong answers]`, each with a list per row, or None if the task has none."""
        sides: list[Any] = [self.answers, self.wrong_answers]
        given = [side.tolist() if hasattr(side, "tolist") else side for side in sides]  # tensors and arrays
        return [rows and [list(one) if isinstance(one, (list, tuple)) else [one] for one in rows] for rows in given]

    def answers_are_ids(self) -> bool:
        """Whether there are answers, and all of them, right and wrong, are token ids."""
        given = [lists for lists in self.answer_lists() if lists is not None]
        return bool(given) and all(_is_id(answer) for lists in given for row in lists for answer in row)

    def subset(self, rows: Sequence[int]) -> Self:
        """Return a task with these rows only."""

        def pick(given: Any) -> Any:
            one_for_all = given is None or not hasattr(given, "__len__") or getattr(given, "ndim", 1) == 0
            return given if one_for_all else given[list(rows)] if hasattr(given, "ndim") else [given[i] for i in rows]

        names = ["clean", "corrupted", "answers", "wrong_answers", "positions", "spans", "corrupted_spans"]
        names += ["attention_mask", "corrupted_attention_mask", *(["spelling"] * (not isinstance(self.spelling, str)))]
        return replace(self, **{name: pick(getattr(self, name)) for name in names})

    def rendered(self, model: ModelLike) -> Self:
        """Return the task with messages rendered as text by the tokenizer's chat template.

        Raises:
            TaskError: naming the row: the template does not accept its messages.
        """
        if self.is_ids or isinstance(self.clean[0], str):
            return self
        tokenizer = self.tokenizer(model)
        sides: dict[str, list[Rendered]] = {"clean": [], "corrupted": []}
        assert tokenizer is not None, "only prompts as ids have no tokenizer"
        for side, texts in sides.items():
            for number, messages in enumerate(getattr(self, side)):
                try:
                    texts.append(render(tokenizer.tokenizer, messages))
                except ValueError as error:
                    raise TaskError(f"row {number}: {side}: {error}") from None
        return replace(self, clean=sides["clean"], corrupted=sides["corrupted"], chat=False)

    def tokenizer(self, model: ModelLike) -> PromptTokenizer | None:
        """Return the tokenizer of the prompts, or None for prompts as ids; raise TaskError if the model has none."""
        if self.is_ids:
            return None
        if model.tokenizer is None:
            remedy = "give token ids, or wrap it with one: cf.wrap(model, tokenizer)"
            raise TaskError(f"this model has no tokenizer: {remedy}")
        return PromptTokenizer(model.tokenizer, self.bos, isinstance(self.clean[0], Rendered))

    def answer_texts(self) -> tuple[list[list[str]], list[list[str]]]:
        """Return answers and wrong answers as text, by row, without repeats; raise TaskError if one is not text."""
        wanted = "must be a non-empty string or a list of them"
        return self._checked(lambda one: isinstance(one, str) and one != "", wanted)

    def answer_ids(self) -> tuple[list[list[int]], list[list[int]]]:
        """Return answers and wrong answers as ids, by row, without repeats; raise TaskError if one is not an id."""
        return self._checked(_is_id, "must be token ids, as the prompts are")

    def _checked(self, fits: Callable[[Any], bool], wanted: str) -> tuple[list[list[Any]], list[list[Any]]]:
        right, wrong = self.answer_lists()
        for side, lists in (("answers", right), ("wrong_answers", wrong)):
            for number, row in enumerate(lists or []):
                if not row or not all(map(fits, row)):
                    raise TaskError(f"row {number}: {side} {wanted}, not {row!r}")
        first, second = ([list(dict.fromkeys(row)) for row in lists or [[]] * len(self)] for lists in (right, wrong))
        return first, second

    def spelled(
        self, tokenizer: PromptTokenizer, model: Callable[[], ModelLike] | None, dropping: bool = False
    ) -> Spelled:
        """Return the answers' ids by row.

        model: returns the model that chooses the spelling, or None to choose by the text. dropping: rows may fail.
        """
        rows = [self.spelling] * len(self) if self.spelling is None or isinstance(self.spelling, str) else self.spelling
        wanted = Wanted(rows, self.answer is not None, dropping)
        asked = None if self.answers is None else model
        return spelled(tokenizer, self.texts("clean"), *self.answer_texts(), wanted, asked)

    def readings(
        self, tokenizer: PromptTokenizer, found: Spelled
    ) -> tuple[dict[int, answering.Reading], dict[int, str]]:
        """Return what is read of each row's answers, and the rows for which that is not defined, with the reason."""
        made: dict[int, answering.Reading] = {}
        failed: dict[int, str] = {}
        compared, corrupted = metric_of(self.metric).wrong, self.texts("corrupted")
        for row, (right, wrong) in enumerate(zip(*self.answer_texts(), strict=True)):
            if row in found.failed:
                continue
            sides = found.sequences(row, right), found.sequences(row, wrong)
            try:
                if self.answer is None:
                    made[row] = answering.Reading([], *([ids[0] for ids in side] for side in sides))
                    continue
                read = answering.first(*sides) if self.answer == answering.FIRST else answering.whole(*sides, compared)
                own = found.text(row, right[0])
                (twin,) = tokenizer.added(corrupted[row], tokenizer([corrupted[row]])[0], [own])
                if read.appended and (twin or [])[: len(read.appended)] != read.appended:
                    raise ValueError(
                        f"{own!r} has other tokens after the corrupted prompt: let both prompts end in the same way"
                    )
                made[row] = read
            except ValueError as error:
                failed[row] = str(error)
        return made, failed

    def tokens(self, tokenizer: PromptTokenizer | None, model: ModelLike) -> Tokens:
        """Return all ids by row; answers given by read position are left to `circuitfind.tasks.tokens.by_read`."""
        none = [0] * len(self)
        if tokenizer is None:
            assert isinstance(self.clean, Tensor) and isinstance(self.corrupted, Tensor)
            sides = (self.clean, self.attention_mask), (self.corrupted, self.corrupted_attention_mask)
            rows = [unpadded(ids, self.attention_mask if mask is None else mask) for ids, mask in sides]
            by_read = (given := _positions(self.positions)).ndim == 2 and given.shape[1] > 1
            answers = ([[]] * len(self), [[]] * len(self)) if by_read else self.answer_ids()
            return Tokens(rows[0], rows[1], *answers, "as ids", none)
        clean, corrupted = (tokenizer(self.texts(side)) for side in ("clean", "corrupted"))
        if self.answers_are_ids():
            return Tokens(clean, corrupted, *self.answer_ids(), "as ids", none)
        empty: list[list[int]] = [[]] * len(self)
        prompts = Tokens(clean, corrupted, empty, empty, "", none)
        found = self.spelled(tokenizer, lambda: runnable(prompts, model, self.align is not None))
        readings, failed = self.readings(tokenizer, found)
        for row, why in failed.items():
            raise TaskError(f"row {row}: {why}")
        read = [readings[row] for row in range(len(self))]
        whole = self.answer == answering.ALL
        comparable = not whole or all(one.wrong for one in read)
        return Tokens(
            [ids + one.appended for ids, one in zip(clean, read, strict=True)],
            [ids + one.appended for ids, one in zip(corrupted, read, strict=True)],
            [one.answers for one in read],
            [one.wrong if comparable else [] for one in read],
            found.how,
            [len(one.appended) for one in read],
            whole,
        )

    def texts(self, side: str) -> list[str]:
        """Return the prompts of a side ("clean" or "corrupted") as a list; prompts must be text."""
        return list(getattr(self, side))

    def read_positions(self, rows: list[list[int]]) -> Tensor:
        """Return read positions `[batch, reads]` in the clean prompts (`rows`), checked and counted from 0."""
        if self.positions is None:
            return torch.tensor([[len(row) - 1] for row in rows])
        given = _positions(self.positions)
        given = given.expand(len(rows)) if given.ndim == 0 else given
        given = given.unsqueeze(1) if given.ndim == 1 else given
        if given.ndim != 2 or given.shape[0] != len(rows):
            shape = list(given.shape)
            raise TaskError(f"positions have shape {shape}: give one number, one per pair, or [batch, reads]")
        read = []
        for number, (wanted, row) in enumerate(zip(given.tolist(), rows, strict=True)):
            if any(not -len(row) <= p < len(row) for p in wanted):
                raise TaskError(f"row {number}: position {wanted} lies outside its {len(row)} tokens")
            read.append([p % len(row) for p in wanted])
        return torch.tensor(read)


def _positions(positions: Any) -> Tensor:
    """Return the positions as a tensor, which is empty for None; raise TaskError unless they are whole numbers."""
    try:
        given = torch.as_tensor([] if positions is None else positions)
    except (ValueError, TypeError):
        given = torch.tensor(0.5)
    empty = given.ndim == 2 and not given.shape[1]
    if empty or given.dtype == torch.bool or (given.numel() and given.is_floating_point()):
        raise TaskError("positions are whole numbers: give one, one per pair, or [batch, reads]")
    return given


def _is_list(given: Any) -> bool:
    """Whether this is a sequence, tensor or array that can hold one entry per pair."""
    return hasattr(given, "__len__") and not isinstance(given, (bytes, dict, set)) and getattr(given, "ndim", 1) > 0


def _kind(given: Any) -> str:
    """Describe a value's type for an error message."""
    if given is None:
        return "None"
    return f"a {type(given).__name__}" + (" without dimensions" if getattr(given, "ndim", 1) == 0 else "")


def _is_id(answer: Any) -> bool:
    return isinstance(answer, Integral) and not isinstance(answer, bool)
