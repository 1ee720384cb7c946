"""Prompts and answers as token ids, checked and padded.

1. The tokenizer decides whether a prompt begins with a BOS token, unless `bos` is True or False. An EOS token that the
   tokenizer appends is dropped, because the model continues the prompt. Special tokens that the tokenizer puts before a
   text are dropped if the text itself begins with them, as the text of a chat does. A prompt made by a chat template
   (`chat.py`) has the special tokens of the template and no others.
2. `spelling.py` describes how answers are spelled, and `answers.py` which of their tokens are read.
3. Rows that no method can use are refused; the others are padded on the right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from circuitfind.errors import TaskError

# byte-level vocabularies write these bytes as the character of the same number, all others as characters from 256 on
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _PRINTABLE}
_BYTES |= {chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)}
Ids = list[int]
MOST_FIRST = 3  # the most special tokens that any tokenizer puts before a text
REPLACED = "\ufffd"  # the character that decoding puts in place of invalid bytes


def piece(tokenizer: Any, token: int) -> str:
    """Return a token as text; bytes that are only part of a character are written as `<0xE2>`."""
    text = str(tokenizer.decode([token]))
    if REPLACED not in text:
        return text
    name = tokenizer.convert_ids_to_tokens(token)
    if isinstance(name, str) and set(name) <= set(_BYTES):
        name = bytes(_BYTES[letter] for letter in name)
    if isinstance(name, bytes):
        text = re.sub(r"\\x(..)", lambda found: f"<0x{found[1].upper()}>", name.decode("utf-8", "backslashreplace"))
    return text.replace(REPLACED, "<0xEF><0xBF><0xBD>")


class Tokens(NamedTuple):
    """A task's ids.

    clean, corrupted, answers, wrong: by row. spelling: how answers were spelled, in words. appended: by row, how many
    tokens of the answer were appended to both prompts. whole: a row's `answers` are the successive tokens of one
    answer, and not a set of alternatives.
    """

    clean: list[Ids]
    corrupted: list[Ids]
    answers: list[Ids]
    wrong: list[Ids]
    spelling: str
    appended: Ids
    whole: bool = False


class PromptTokenizer:
    """A Hugging Face tokenizer with a rule for the BOS token.

    templated: whether a chat template has already written the special tokens into the texts.
    """

    def __init__(self, tokenizer: Any, bos: bool | None, templated: bool = False) -> None:
        self.tokenizer, self.bos, self.templated = tokenizer, bos, templated
        if bos and tokenizer.bos_token_id is None:
            raise TaskError("bos=True, but the tokenizer has no BOS token: leave bos out or pass bos=False")

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text."""
        special = self.bos is not False and not self.templated
        rows = self._rows(texts, special)
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        out = []
        for text, ids in zip(texts, rows, strict=True):
            own = bool(self.tokenizer.eos_token) and text.endswith(self.tokenizer.eos_token)
            closed = special and last is not None and len(ids) > 1 and ids[-1] == last and not own
            ids = list(ids[:-1] if closed else ids)
            ids = self._once(text, ids) if special else ids
            out.append([first, *ids] if self.bos and ids[:1] != [first] else ids)
        return out

    def _rows(self, texts: Sequence[str], special: bool) -> list[Ids]:
        found = self.tokenizer(list(texts), add_special_tokens=special, padding=False, truncation=False)
        return list(found["input_ids"])

    def _once(self, text: str, ids: Ids) -> Ids:
        """Drop the special tokens that the tokenizer put before a text that begins with them itself."""
        for size in range(1, MOST_FIRST + 1):
            if ids[:size] == ids[size : 2 * size] and list(self._rows([text], special=False)[0]) == ids[size:]:
                return ids[size:]
        return ids

    def describe(self, texts: Sequence[str], rows: Sequence[Ids]) -> str:
        """Say how the BOS token was handled, for records."""
        token = self.tokenizer.bos_token
        own = [bool(token) and text.startswith(str(token)) for text in texts]
        if all(own):
            return "in the prompt's text"
        if self.templated and self.bos is None:
            rule = "none, as the chat template has it"
        elif self.bos is not None:
            rule = "forced" if self.bos else "left out"
        else:
            has = rows[own.index(False)][:1] == [self.tokenizer.bos_token_id]
            rule = "added by the tokenizer" if has else "none"
        return f"{rule}, but in the text of {sum(own)} of {len(own)} prompts" if any(own) else rule

    def added(self, prompt: str, prompt_ids: Ids, answers: Sequence[str]) -> list[Ids | None]:
        """Return the ids that each answer adds after the prompt, or None if the prompt's own ids change."""
        size = len(prompt_ids)
        rows = self([prompt + answer for answer in answers])
        return [row[size:] if row[:size] == prompt_ids else None for row in rows]


_EQUAL_LENGTH = (
    "; a pair must have equal length: replace words by others with the same number of tokens, leave such pairs out with"
    " unusable='drop', or name the parts that differ in spans and corrupted_spans and give align='spans'"
)


def unpadded(ids: Tensor, mask: Any) -> list[Ids]:
    """Return the rows of `ids [batch, pos]` without padding. `mask`: a tensor or lists, true at real tokens."""
    if ids.ndim != 2:
        raise TaskError(f"prompts as ids have shape {list(ids.shape)}: [batch, pos] is needed")
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TaskError(f"prompts as ids are a tensor of {ids.dtype}: token ids are whole numbers (torch.long)")
    if mask is None:
        return ids.tolist()
    try:
        mask = torch.as_tensor(mask)
    except (ValueError, TypeError, RuntimeError):
        raise TaskError("attention_mask is not a table of numbers: give [batch, pos], true at real tokens") from None
    if mask.shape != ids.shape:
        raise TaskError(f"attention_mask has shape {list(mask.shape)}, the prompts {list(ids.shape)}")
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]


def validate(tokens: Tokens, model: Any, aligned: bool = False) -> None:
    """Raise TaskError for the first row that no method can use, such as a pair of unequal length unless `aligned`."""
    for number, fault in faults(tokens, model, aligned).items():
        unequal = not aligned and len(tokens.clean[number]) != len(tokens.corrupted[number])
        raise TaskError(f"row {number}: {fault}{_EQUAL_LENGTH if unequal else ''}")


def runnable(prompts: Tokens, model: Any, aligned: bool) -> Any:
    """Return the model if it can run these prompts; otherwise raise the TaskError of `validate`."""
    validate(prompts, model, aligned)
    return model


def faults(tokens: Tokens, model: Any, aligned: bool = False) -> dict[int, str]:
    """Return the rows that no method can use, each with the reason."""
    found: dict[int, str] = {}
    for number, row in enumerate(zip(tokens.clean, tokens.corrupted, tokens.answers, tokens.wrong, strict=True)):
        sizes = len(row[0]), len(row[1])
        if not aligned and sizes[0] != sizes[1]:
            found[number] = f"the clean prompt has {sizes[0]} tokens, the corrupted one {sizes[1]}"
        elif fault := _fault(*row, model, tokens.whole):
            found[number] = fault
    return found


def _longest(model: Any) -> int | None:
    """Return the length of the model's context in tokens, or None if its config does not have it."""
    longest = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    return None if longest is None else int(longest)


def _fault(clean: Ids, corrupted: Ids, answers: Ids, wrong: Ids, model: Any, whole: bool) -> str | None:
    if not clean or not corrupted:
        return "the prompt is empty"
    if clean == corrupted:
        return "the clean and the corrupted prompt are identical: every effect would be 0"
    length, longest = max(len(clean), len(corrupted)), _longest(model)
    if longest and length > longest:
        return f"the prompt has {length} tokens, the model's context holds {longest}"
    for token in (*clean, *corrupted, *answers, *wrong):
        if not 0 <= token < model.vocabulary:
            return f"token id {token} is outside the model's vocabulary of {model.vocabulary}"
    if not whole and (both := set(answers) & set(wrong)):
        text = "" if model.tokenizer is None else f" ({piece(model.tokenizer, min(both))!r})"
        return f"token {min(both)}{text} is among both the answers and the wrong answers"
    return None


def pad(rows: list[Ids], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask `[batch, length]`, padded on the right with id 0; the mask is true at real tokens."""
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)


def whole_reads(rows: list[Ids], lengths: Ids, length: int) -> Tensor:
    """Return the positions `[batch, reads]` that predict a whole answer's tokens: the last ones of each prompt.

    rows: the answers' ids. lengths: of the prompts. length: of the longest answer. Shorter answers repeat the last
    position as padding.
    """
    return torch.tensor(
        [[min(end - len(row) + at, end - 1) for at in range(length)] for row, end in zip(rows, lengths, strict=True)]
    )


def whole_answers(rows: list[Ids], length: int) -> Tensor:
    """Return each answer's successive tokens, `[batch, reads, 1]`, with the last one repeated as padding.

    If no row has an answer, the shape is `[batch, reads, 0]`.
    """
    padded = [[row[min(at, len(row) - 1)] for at in range(length)] for row in rows if row]
    return torch.tensor(padded).unsqueeze(-1) if padded else torch.zeros(len(rows), length, 0, dtype=torch.long)


def answer_tensor(rows: list[Ids], read: Tensor) -> Tensor:
    """Return the same answers at every read position, `[batch, reads, answers]`, padded with -1."""
    width = max(map(len, rows), default=0)
    padded = torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.long).view(len(rows), width)
    return padded.unsqueeze(1).expand(-1, read.shape[1], -1)


def by_read(answers: Any, wrong: Any, read: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return right and wrong answers, each `[batch, reads, answers]` padded with -1, from ids given by read position.

    Raises:
        TaskError: wrong shape, an id outside the vocabulary, or an id on both sides.
    """
    right, other = _by_read(answers, read, vocabulary, "answers"), _by_read(wrong, read, vocabulary, "wrong_answers")
    same = (right.unsqueeze(-1) == other.unsqueeze(-2)) & (right >= 0).unsqueeze(-1)
    for number in same.flatten(1).any(-1).nonzero().flatten().tolist()[:1]:
        raise TaskError(f"row {number}: a token is among both the answers and the wrong answers of a position")
    return right, other


def _by_read(answers: Any, read: Tensor, vocabulary: int, side: str) -> Tensor:
    if answers is None:
        return read.new_zeros(*read.shape, 0)
    try:
        given = torch.as_tensor(answers, device=read.device)
    except (ValueError, TypeError):
        given = torch.tensor(0.5)
    given = given.unsqueeze(-1) if given.ndim == 2 else given
    if given.ndim != 3 or given.shape[:2] != read.shape or given.is_floating_point() or given.dtype == torch.bool:
        raise TaskError(
            f"{side} must be token ids for each read position, [batch, reads] or [batch, reads, answers] with"
            f" [batch, reads] = {list(read.shape)}; pad smaller sets of answers with -1"
        )
    rows = given.tolist()
    for number, row in enumerate(rows):
        for at, ids in enumerate(row):
            real = [token for token in ids if token != -1]
            if not real or not all(0 <= token < vocabulary for token in real):
                raise TaskError(f"row {number}: {side} {ids} hold no id, or one outside the vocabulary of {vocabulary}")
            once = list(dict.fromkeys(real))
            row[at] = [*once, *[-1] * (len(ids) - len(once))]
    return torch.tensor(rows, device=read.device)
