"""How well a model does a behaviour, in plain transformers without circuitfind's engine: figures.json."""

from __future__ import annotations

from typing import Any

import torch

from circuitfind.tasks.builder import Pair

BATCH = 250


def answer_ids(tokenizer: Any, prompt_ids: list[int], prompt: str, answer: str) -> int:
    """The one id that the answer adds to the prompt, with or without a space before it."""
    for text in (prompt + " " + answer, prompt + answer):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == len(prompt_ids) + 1 and ids[:-1] == prompt_ids:
            return ids[-1]
    raise ValueError(f"{answer!r} is not one token after {prompt!r}")


@torch.no_grad()
def last_logits(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Logits at each prompt's last token, `[row, vocab]`; right padding, which a causal model never sees."""
    out = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        length = max(map(len, part))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in part])
        last = torch.tensor([len(row) - 1 for row in part])
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits
        out.append(logits[torch.arange(len(part)), last])
    return torch.cat(out).float()


def measure(model: Any, tokenizer: Any, rows: list[Pair], metric: str) -> dict[str, float]:
    """Accuracy, the mean metric on both prompts, and how often the corrupted prompt lowers and flips it."""
    clean = [tokenizer.encode(row.clean, add_special_tokens=False) for row in rows]
    corrupted = [tokenizer.encode(row.corrupted, add_special_tokens=False) for row in rows]
    on_clean, on_corrupted = last_logits(model, clean), last_logits(model, corrupted)
    known: dict[tuple[str, str], int] = {}

    def ids(row: Pair, prompt_ids: list[int], answers: tuple[str, ...]) -> list[int]:
        keys = [(row.clean[-4:], answer) for answer in answers]  # what precedes an answer decides its id
        for key in keys:
            if key not in known:
                known[key] = answer_ids(tokenizer, prompt_ids, row.clean, key[1])
        return [known[key] for key in keys]

    answers = [ids(row, prompt, row.answers) for row, prompt in zip(rows, clean, strict=True)]
    wrong = [ids(row, prompt, row.wrong) for row, prompt in zip(rows, clean, strict=True)]

    def score(logits: torch.Tensor, kind: str) -> torch.Tensor:
        probabilities = logits.softmax(-1)
        values = []
        for i, (right, false) in enumerate(zip(answers, wrong, strict=True)):
            if kind == "prob_diff":
                values.append(probabilities[i, right].sum() - probabilities[i, false].sum())
            else:
                values.append(logits[i, right].mean() - logits[i, false].mean())
        return torch.stack(values)

    m_clean, m_corrupted = score(on_clean, metric), score(on_corrupted, metric)
    top = on_clean.argmax(-1).tolist()
    return {
        "n": len(rows),
        "accuracy": round((score(on_clean, "prob_diff") > 0).float().mean().item(), 4),
        "top1": round(sum(t in a for t, a in zip(top, answers, strict=True)) / len(rows), 4),
        "metric_clean": round(m_clean.mean().item(), 4),
        "metric_corrupted": round(m_corrupted.mean().item(), 4),
        "lowered": round((m_corrupted < m_clean).float().mean().item(), 4),
        "flipped": round((m_corrupted < 0).float().mean().item(), 4),
    }
