"""Named spans of a prompt, such as the subject and the indirect object, as token positions; alignment by spans.

1. A span is a text that occurs once in its prompt; `(text, n)`, the n-th occurrence of a text, counted from 1; or token
   positions `(start, stop)`, not counting a BOS token that the tokenizer adds. In prompts given as ids every id counts.
2. To locate a text, the prompt is tokenised up to where the text begins and up to where it ends. Both results must be
   prefixes of the prompt's ids; otherwise the span begins or ends inside a token.
3. If the prompts of a pair differ in length, spans with the same name correspond, and must come in the same order in
   both prompts. The parts before, between and after the spans must have equal lengths; they correspond token by token.
4. Within corresponding spans, tokens are matched from the end, because heads attend to the last token of a word. If the
   clean span is longer, its first tokens all correspond to the first token of the corrupted span. If it is shorter, the
   first tokens of the corrupted span have no counterpart.
5. In a chat (`chat.py`), texts are searched for in the messages only, and (start, stop) counts the tokens of the whole
   rendered prompt. The template's tokens that begin the answer are the span "generation" of the clean prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from numbers import Integral
from typing import Any, NamedTuple

from circuitfind.errors import TaskError
from circuitfind.tasks.chat import GENERATION, Rendered
from circuitfind.tasks.tokens import PromptTokenizer

Span = tuple[int, int]  # first position, and the one after the last


def locate(
    spans: Sequence[Mapping[str, Any]],
    prompts: Sequence[str] | None,
    ids: Sequence[list[int]],
    tokenizer: Any,
    side: str = "clean",
) -> tuple[dict[str, Span], ...]:
    """Return, for each row, name -> (start, stop) in the prompt's tokens, with a BOS token counted.

    Args:
        spans: for each row, name -> text, (text, n) or (start, stop).
        prompts: one side's prompts as text; None for prompts as ids.
        ids: the ids of each prompt, without padding.
        tokenizer: a `PromptTokenizer`, for prompts as text.
        side: "clean" or "corrupted", for error messages.

    Raises:
        TaskError: naming the row and the span.
    """
    texts = [None] * len(ids) if prompts is None else prompts
    before = 0 if prompts is None else len(tokenizer([""])[0])  # a BOS token
    found: list[dict[str, Span]] = []
    for number, (named, text, own) in enumerate(zip(spans, texts, ids, strict=True)):
        if not isinstance(named, Mapping):
            wanted = "name -> text, (text, n) or (start, stop)"
            raise TaskError(f"row {number}: spans are a mapping, {wanted}, not {named!r}")
        prompt = _Prompt(text, own, before, tokenizer, side)
        found.append({})
        for name, given in named.items():
            try:
                found[-1][str(name)] = prompt.span(given)
            except ValueError as error:
                raise TaskError(f"row {number}: span '{name}': {error}") from None
    return tuple(found)


def locatable(
    spans: Sequence[Mapping[str, tuple[str, int]]], prompts: Sequence[str], tokenizer: PromptTokenizer
) -> list[dict[str, tuple[str, int]]] | None:
    """Return the spans, each given as (text, n), that consist of whole tokens; None if no prompt has any."""
    kept: list[dict[str, tuple[str, int]]] = []
    for row, prompt, ids in zip(spans, prompts, tokenizer(prompts), strict=True):
        kept.append({})
        for name, given in row.items():
            with suppress(ValueError):
                _Prompt(prompt, ids, 0, tokenizer, "clean").of_text(*given)
                kept[-1][name] = given
    return kept if any(kept) else None


def occurrences(prompt: str, text: str) -> list[int]:
    """Return where a text begins in a prompt (in a chat: in its messages). Occurrences may overlap ("22" in "222")."""
    found = [one.start() for one in re.finditer(f"(?={re.escape(text)})", prompt)]
    return [at for at in found if not isinstance(prompt, Rendered) or prompt.holds(at, at + len(text))]


def generation(prompts: Sequence[str], tokenizer: PromptTokenizer) -> tuple[dict[str, Span], ...]:
    """Return, for each row, the span of the tokens with which a chat template begins the answer; () without chats."""
    found: list[dict[str, Span]] = []
    for prompt in prompts:
        found.append({})
        if isinstance(prompt, Rendered) and prompt.asks is not None:
            head, whole = tokenizer([prompt[: prompt.asks], prompt])
            if len(head) < len(whole) and whole[: len(head)] == head:
                found[-1][GENERATION] = (len(head), len(whole))
    return tuple(found) if any(found) else ()


class _Prompt(NamedTuple):
    """One prompt, in which spans are located. before: the number of tokens that the tokenizer puts before the text."""

    text: str | None
    ids: list[int]
    before: int
    tokenizer: PromptTokenizer
    side: str

    def span(self, given: Any) -> Span:
        """Return the token positions of a span in any of its forms; raise ValueError if there are none."""
        pair = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2
        if isinstance(given, str) or (pair and isinstance(given[0], str)):
            text, number = given if pair else (given, None)
            return self.of_text(text, number)
        own = len(self.ids) - self.before
        if not pair or not all(isinstance(at, Integral) for at in given) or not 0 <= given[0] < given[1] <= own:
            raise ValueError(f"{given!r} is not a (start, stop) within the {own} tokens of the prompt")
        return int(given[0]) + self.before, int(given[1]) + self.before

    def of_text(self, text: str, number: Any = None) -> Span:
        """Return the token positions of the n-th occurrence of a text; without `number`, it must occur once."""
        if self.text is None:
            raise ValueError("prompts as ids have no text: give (start, stop)")
        starts = occurrences(self.text, text) if text.strip() else []
        where = f"the {self.side} prompt"
        if isinstance(self.text, Rendered):
            others = "" if starts or text not in self.text else " (the chat template's own words are not searched)"
            where = f"the messages of {where}{others}"
        times = f"{text!r} occurs {len(starts)} times in {where}"
        if number is None and len(starts) != 1:
            which = "the n-th as (text, n), or (start, stop)" if starts else "(start, stop)"
            raise ValueError(f"{times}: give {which} in tokens instead")
        if number is not None and number not in range(1, len(starts) + 1):
            raise ValueError(
                f"{times}, so there is no number {number!r}: give another, or leave spans out (spans=None);"
                " task.exchanged() exchanges the two sides together with their spans"
            )
        at = starts[(number or 1) - 1] + len(text) - len(text.lstrip())
        head, whole = self.tokenizer([self.text[:at].rstrip(" "), self.text[: at + len(text.strip())]])
        if not len(head) < len(whole) or self.ids[: len(head)] != head or self.ids[: len(whole)] != whole:
            raise ValueError(f"{text!r} begins or ends inside a token: give (start, stop) in tokens instead")
        return len(head), len(whole)


def counterparts(clean: Mapping[str, Span], corrupted: Mapping[str, Span], lengths: tuple[int, int]) -> list[int]:
    """Return, for each position of the clean prompt, the corresponding position of the corrupted prompt.

    Args:
        clean, corrupted: spans by name; spans of the clean prompt alone are ignored.
        lengths: of the two prompts, in tokens.

    Raises:
        ValueError: the prompts cannot be aligned; the message says why.
    """
    if only := sorted(set(corrupted) - set(clean)):
        raise ValueError(f"span '{only[0]}' is named in the corrupted prompt only: name it in the clean one, too")
    names = sorted(corrupted, key=lambda name: clean[name])
    for side, spans in (("clean", clean), ("corrupted", corrupted)):
        for first, second in pairwise(names):
            if spans[second][0] < spans[first][1]:
                raise ValueError(
                    f"span '{second}' begins before span '{first}' ends in the {side} prompt: aligned spans must not"
                    " overlap, and must come in the same order in both prompts"
                )
    index: list[int] = []
    before, end = "", 0  # the previous span's name, and where it stops in the corrupted prompt
    for name in names:
        span, other = clean[name], corrupted[name]
        where = f"between spans '{before}' and '{name}'" if before else f"before span '{name}'"
        _extend(index, span[0], end, other[0], f"the text {where}")
        longest = other[1] - other[0]
        index += [other[1] - min(span[1] - at, longest) for at in range(*span)]
        before, end = name, other[1]
    _extend(index, lengths[0], end, lengths[1], f"the text after span '{before}'" if before else "the prompt")
    return index


def _extend(index: list[int], stop: int, other_start: int, other_stop: int, what: str) -> None:
    """Append the counterparts of the clean prompt's tokens up to `stop`, which lie between two spans."""
    size, other_size = stop - len(index), other_stop - other_start
    if size != other_size:
        raise ValueError(
            f"{what} has {size} tokens in the clean prompt, {other_size} in the corrupted one: only spans named in both"
            " may differ in length, so name the parts that differ in spans and corrupted_spans"
        )
    index += range(other_start, other_stop)
