"""From rows of token ids to padded tensors, and the checks that every row must pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from circuitfind.errors import TaskError
from circuitfind.tasks.tokens import Tokens

EQUAL_LENGTH = (
    "; a pair must have equal length: replace words by others of as many tokens, or leave such pairs out with"
    " unusable='drop', or name what differs in spans and corrupted_spans and give align='spans'"
)


def unpadded(ids: Tensor, mask: Any) -> list[list[int]]:
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
        raise TaskError("attention_mask is no table of numbers: give [batch, pos], true at real tokens") from None
    if mask.shape != ids.shape:
        raise TaskError(f"attention_mask has shape {list(mask.shape)}, the prompts {list(ids.shape)}")
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]


def validate(tokens: Tokens, model: Any, aligned: bool = False) -> None:
    """Refuses rows that no method can use; those of unequal length, too, unless they are aligned.

    Raises:
        TaskError: naming the first of them, and why.
    """
    for number, fault in faults(tokens, model, aligned).items():
        unequal = not aligned and len(tokens.clean[number]) != len(tokens.corrupted[number])
        raise TaskError(f"row {number}: {fault}{EQUAL_LENGTH if unequal else ''}")


def faults(tokens: Tokens, model: Any, aligned: bool = False) -> dict[int, str]:
    """The rows that no method can use, and why."""
    found: dict[int, str] = {}
    longest = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    for number, row in enumerate(zip(tokens.clean, tokens.corrupted, tokens.answers, tokens.wrong, strict=True)):
        unequal = not aligned and len(row[0]) != len(row[1])
        fault = _unequal(*row[:2]) if unequal else _fault(*row, longest, model)
        if fault is not None:
            found[number] = fault
    return found


def _unequal(clean: list[int], corrupted: list[int]) -> str:
    return f"the clean prompt has {len(clean)} tokens, the corrupted one {len(corrupted)}"


def _fault(
    clean: list[int], corrupted: list[int], answers: list[int], wrong: list[int], longest: int | None, model: Any
) -> str | None:
    if not clean or not corrupted:
        return "the prompt is empty"
    if clean == corrupted:
        return "the clean and the corrupted prompt are identical: every effect would be 0"
    length = max(len(clean), len(corrupted))
    if longest and length > longest:
        return f"the prompt has {length} tokens, the model's context holds {longest}"
    vocabulary = model.vocabulary
    for token in (*clean, *corrupted, *answers, *wrong):
        if not 0 <= token < vocabulary:
            return f"token id {token} is outside the model's vocabulary of {vocabulary}"
    both = set(answers) & set(wrong)
    if both:
        text = "" if model.tokenizer is None else f" ({model.tokenizer.decode([min(both)])!r})"
        return f"token {min(both)}{text} is among both the answers and the wrong answers"
    return None


def pad(rows: list[list[int]], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask `[batch, length]`, padded on the right (with id 0: masked, so any id would do)."""
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)


def answer_tensor(rows: list[list[int]], read: Tensor) -> Tensor:
    """`[batch, reads, answers]`, the same answers at every read position, padded with -1."""
    width = max(map(len, rows), default=0)
    padded = torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.long).view(len(rows), width)
    return padded.unsqueeze(1).expand(-1, read.shape[1], -1)


def by_read(answers: Any, read: Tensor, vocabulary: int, side: str) -> Tensor:
    """`[batch, reads, answers]` from ids given by read position; sets of unequal size are padded with -1."""
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
            once = list(dict.fromkeys(real))  # an id that is listed twice counts once
            row[at] = [*once, *[-1] * (len(ids) - len(once))]
    return torch.tensor(rows, device=read.device)


def validate_disjoint(answers: Tensor, wrong: Tensor) -> None:
    """Refuses a token that is right and wrong at the same read position."""
    same = (answers.unsqueeze(-1) == wrong.unsqueeze(-2)) & (answers >= 0).unsqueeze(-1)
    for number in same.flatten(1).any(-1).nonzero().flatten().tolist()[:1]:
        raise TaskError(f"row {number}: a token is among both the answers and the wrong answers of a position")
