"""From prompts and answers as text to token ids, checked and padded.

1. A prompt is tokenised as the tokenizer does it (`bos=None`), or with its first token forced to be, or not to be, the
   BOS token. A closing special token that the tokenizer appends is dropped, since the model continues the prompt. What
   it puts before a text that begins with the same already, as a rendered chat prompt does, is dropped, too.
   A prompt that a chat template made (`chat.py`) has the special tokens that the template writes, and no others.
2. How answers are spelled and which of their tokens are read is told in `spelling.py` and `answers.py`.
3. Every row is checked for what no method can use, and padded on the right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from circuitfind.errors import TaskError

# byte-level vocabularies write these bytes as they are, all others as letters from 256 on
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _PRINTABLE}
_BYTES |= {chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)}
Ids = list[int]
MOST_FIRST = 3  # special tokens that a tokenizer puts before a text
REPLACED = "\ufffd"  # what decoding puts in place of bytes that are no character


def piece(tokenizer: Any, token: int) -> str:
    """A token as text; bytes that are no character by themselves as `<0xE2>`."""
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
    """A task's ids: prompts by row, answers and wrong answers by row, and how answers were spelled.

    appended: by row, how many ids of an answer of several tokens end both prompts. whole: the answers are the tokens at
    each place of one answer, and not a set of them.
    """

    clean: list[Ids]
    corrupted: list[Ids]
    answers: list[Ids]
    wrong: list[Ids]
    spelling: str
    appended: Ids
    whole: bool = False


class PromptTokenizer:
    """A Hugging Face tokenizer with a rule for the BOS token; `templated`: a chat template wrote the special tokens."""

    def __init__(self, tokenizer: Any, bos: bool | None, templated: bool = False) -> None:
        self.tokenizer, self.bos, self.templated = tokenizer, bos, templated
        if bos and tokenizer.bos_token_id is None:
            raise TaskError("bos=True, but the tokenizer has no BOS token: leave bos out or pass bos=False")

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text."""
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
        """Without the special tokens at the beginning that the text has itself."""
        for size in range(1, MOST_FIRST + 1):
            if ids[:size] == ids[size : 2 * size] and list(self._rows([text], special=False)[0]) == ids[size:]:
                return ids[size:]
        return ids

    def describe(self, texts: Sequence[str], rows: Sequence[Ids]) -> str:
        """How the BOS token was handled, for records."""
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
        """By answer, the ids that it adds after the prompt; None where the prompt's own ids change."""
        size = len(prompt_ids)
        rows = self([prompt + answer for answer in answers])
        return [row[size:] if row[:size] == prompt_ids else None for row in rows]


_EQUAL_LENGTH = (
    "; a pair must have equal length: replace words by others of as many tokens, or leave such pairs out with"
    " unusable='drop', or name what differs in spans and corrupted_spans and give align='spans'"
)


def unpadded(ids: Tensor, mask: Any) -> list[Ids]:
    """Rows of ids without what `mask` (a tensor or lists, true at real tokens) marks as padding."""
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
    """Raises TaskError naming the first row that no method can use; pairs have equal length unless aligned."""
    for number, fault in faults(tokens, model, aligned).items():
        unequal = not aligned and len(tokens.clean[number]) != len(tokens.corrupted[number])
        raise TaskError(f"row {number}: {fault}{_EQUAL_LENGTH if unequal else ''}")


def runnable(prompts: Tokens, model: Any, aligned: bool) -> Any:
    """The model, which can be run on these prompts; raises TaskError as `validate` does."""
    validate(prompts, model, aligned)
    return model


def faults(tokens: Tokens, model: Any, aligned: bool = False) -> dict[int, str]:
    """The rows that no method can use, with the reason."""
    found: dict[int, str] = {}
    for number, row in enumerate(zip(tokens.clean, tokens.corrupted, tokens.answers, tokens.wrong, strict=True)):
        sizes = len(row[0]), len(row[1])
        if not aligned and sizes[0] != sizes[1]:
            found[number] = f"the clean prompt has {sizes[0]} tokens, the corrupted one {sizes[1]}"
        elif fault := _fault(*row, model, tokens.whole):
            found[number] = fault
    return found


def _longest(model: Any) -> int | None:
    """How many tokens the model's context holds, where its config says so."""
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
    """Ids and mask `[batch, length]`, padded on the right with id 0, which the mask hides."""
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)


def places(rows: list[Ids], lengths: Ids, length: int) -> Tensor:
    """`[batch, reads]`: the last tokens of a prompt, one for each of the answer's, the last one repeated as padding."""
    return torch.tensor(
        [[min(end - len(row) + at, end - 1) for at in range(length)] for row, end in zip(rows, lengths, strict=True)]
    )


def by_place(rows: list[Ids], length: int) -> Tensor:
    """`[batch, reads, 1]`: the token at each place, the last one repeated as padding; no column if there are none."""
    padded = [[row[min(at, len(row) - 1)] for at in range(length)] for row in rows if row]
    return torch.tensor(padded).unsqueeze(-1) if padded else torch.zeros(len(rows), length, 0, dtype=torch.long)


def answer_tensor(rows: list[Ids], read: Tensor) -> Tensor:
    """`[batch, reads, answers]`, the same answers at every read position, padded with -1."""
    width = max(map(len, rows), default=0)
    padded = torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.long).view(len(rows), width)
    return padded.unsqueeze(1).expand(-1, read.shape[1], -1)


def by_read(answers: Any, wrong: Any, read: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """`[batch, reads, answers]` of either side from ids given by read position, padded with -1; both are checked."""
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
            f" [batch, reads] = {list(read.shape)}, and -1 where a set is smaller than the others"
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
