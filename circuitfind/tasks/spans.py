"""Named stretches of a prompt, such as the subject and the indirect object, as token positions.

1. A span is text that occurs once in its prompt, or `(text, n)`, the n-th occurrence of a text, counted from 1, or
   `(start, stop)` counted in the text's own tokens (a BOS token that the tokenizer puts before it is not counted; for
   prompts as ids every id counts).
2. Text is located by tokenising what stands before it, and what stands before it and itself: both must be beginnings of
   the prompt's ids, or the span cuts a token in two.

Where both prompts of a pair have one length, a position means the same in both; `alignment.py` is for those of two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from typing import Any

from circuitfind.errors import TaskError
from circuitfind.tasks.tokens import PromptTokenizer

Span = tuple[int, int]
"""First position, and the one after the last."""


def locate(
    spans: Sequence[Mapping[str, Any]],
    prompts: Sequence[str] | None,
    ids: Sequence[list[int]],
    tokenizer: Any,
    side: str = "clean",
) -> tuple[dict[str, Span], ...]:
    """By row, name -> (start, stop) in the prompt's tokens, as the task's positions count them.

    Args:
        prompts: one side's prompts as text; None for prompts as ids.
        ids: by row, the prompt's ids, without padding.
        tokenizer: a `PromptTokenizer`, for prompts as text.
        side: "clean" or "corrupted", for errors.

    Raises:
        TaskError: naming the row and the span.
    """
    if prompts is None:
        pairs = enumerate(zip(spans, ids, strict=True))
        return tuple(_row(n, row, None, own, 0, tokenizer, side) for n, (row, own) in pairs)
    before = len(tokenizer([""])[0])  # a BOS token
    rows = zip(spans, prompts, ids, strict=True)
    return tuple(_row(number, *row, before, tokenizer, side) for number, row in enumerate(rows))


def locatable(
    spans: Sequence[Mapping[str, tuple[str, int]]], prompts: Sequence[str], tokenizer: PromptTokenizer
) -> list[dict[str, tuple[str, int]]] | None:
    """Those of the spans, each a text's n-th occurrence, that are whole tokens; None where no prompt has any."""
    kept: list[dict[str, tuple[str, int]]] = []
    for row, prompt, ids in zip(spans, prompts, tokenizer(prompts), strict=True):
        kept.append({})
        for name, given in row.items():
            with suppress(ValueError):
                _of_text(*given, prompt, ids, tokenizer)
                kept[-1][name] = given
    return kept if any(kept) else None


def occurrences(prompt: str, text: str) -> list[int]:
    """Where a text begins in a prompt; occurrences may overlap, as those of "22" in "1222"."""
    return [found.start() for found in re.finditer(f"(?={re.escape(text)})", prompt)]


def _row(
    number: int, spans: Any, prompt: str | None, ids: list[int], before: int, tokenizer: PromptTokenizer, side: str
) -> dict[str, Span]:
    if not isinstance(spans, Mapping):
        raise TaskError(f"row {number}: spans are a mapping, name -> text, (text, n) or (start, stop), not {spans!r}")
    found = {}
    for name, given in spans.items():
        try:
            found[str(name)] = _span(given, prompt, ids, before, tokenizer, side)
        except ValueError as error:
            raise TaskError(f"row {number}: span '{name}': {error}") from None
    return found


def _span(given: Any, prompt: str | None, ids: list[int], before: int, tokenizer: PromptTokenizer, side: str) -> Span:
    pair = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2
    if isinstance(given, str) or (pair and isinstance(given[0], str)):
        if prompt is None:
            raise ValueError("prompts as ids have no text: give (start, stop)")
        text, number = given if pair else (given, None)
        return _of_text(text, number, prompt, ids, tokenizer, side)
    whole = pair and all(isinstance(at, Integral) for at in given)
    if not whole or not 0 <= given[0] < given[1] <= len(ids) - before:
        raise ValueError(f"{given!r} is no (start, stop) within the {len(ids) - before} tokens of the prompt")
    return int(given[0]) + before, int(given[1]) + before


def _of_text(
    text: str, number: Any, prompt: str, ids: list[int], tokenizer: PromptTokenizer, side: str = "clean"
) -> Span:
    """Of the occurrence of this number; without one, of the only occurrence."""
    starts = occurrences(prompt, text) if text.strip() else []
    if number is None and len(starts) != 1:
        which = "the n-th as (text, n), or (start, stop)" if starts else "(start, stop)"
        raise ValueError(f"{text!r} occurs {len(starts)} times in the {side} prompt: give {which} in tokens instead")
    if number is not None and number not in range(1, len(starts) + 1):
        raise ValueError(
            f"{text!r} occurs {len(starts)} times in the {side} prompt, so there is no number {number!r}: name another,"
            " or leave spans away (spans=None); task.exchanged() exchanges the sides with their spans"
        )
    at = starts[(number or 1) - 1] + len(text) - len(text.lstrip())
    head, whole = tokenizer([prompt[:at].rstrip(" "), prompt[: at + len(text.strip())]])
    if not len(head) < len(whole) or ids[: len(head)] != head or ids[: len(whole)] != whole:
        raise ValueError(f"{text!r} begins or ends inside a token: give (start, stop) in tokens instead")
    return len(head), len(whole)
