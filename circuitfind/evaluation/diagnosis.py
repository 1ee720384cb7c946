"""How well a model does a task, and problems with the task, in words, before anything expensive runs.

1. Bind the task to the model. Unusable pairs (an answer of several tokens, a pair of unequal length) are errors.
2. Is the model right more often than by guessing (binomial test)? With one answer, guessing is right with chance 1 /
   (1 + wrong answers); with sets of answers, if the right set is the larger one. Without wrong answers, the answer has
   to be the most likely token, and guessing counts as 0.
3. Is the metric lower on corrupted prompts, on average beyond noise, and in more pairs than by chance?
4. What would the model answer? If right and wrong answers together have less than 1% probability, or neither is among
   the ten most likely tokens, the metric compares answers that the model would not give.
5. What may mislead: an answer that continues the last word of the prompt, comes after two spaces or is part of a
   character; the same answer for all pairs; copies of pairs (which count once in 2 and 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuitfind import errors
from circuitfind.batch import log_probabilities
from circuitfind.calls import model_call
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.prepare import Prepared
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.metrics import Function, Metric
from circuitfind.models.load import Model
from circuitfind.result import Result
from circuitfind.statistics import at_least, standard_error
from circuitfind.tasks.spelling import RARE, percent, rare
from circuitfind.tasks.task import BoundTask, Task
from circuitfind.tasks.tokens import REPLACED, piece

SPACES = (" ", "Ġ", "▁")  # how a vocabulary writes a leading space
# pairs whose answers are shown; tokens that count as likely; tokens shown
PAIRS_SHOWN, MOST_LIKELY, TOKENS_SHOWN = 3, 10, 5
DOUBT = 0.05  # a result that guessing gives more often than this is no evidence


@dataclass(frozen=True, repr=False)
class TaskSummary(Result):
    """How well a model does a task.

    accuracy: fraction of clean prompts whose answers beat the wrong ones. chance: accuracy of guessing (0 without wrong
    answers, NaN without answers). clean, corrupted: mean metrics. lowered: fraction of pairs whose corrupted prompt has
    the lower metric. failing: rows answered wrong. copies: rows with the same prompts as an earlier row.
    """

    FORMAT = "circuitfind.task-summary"

    name: str
    n: int
    metric: str
    accuracy: float
    top1: float
    clean: float
    corrupted: float
    lowered: float
    failing: tuple[int, ...]
    notes: tuple[str, ...]
    chance: float = math.nan
    copies: tuple[int, ...] = ()

    def warning(self) -> str | None:
        """A sentence if the model does not do the task on some pairs, else None."""
        if not self.failing:
            return None
        rows = ", ".join(map(str, self.failing[:5])) + (", ..." if len(self.failing) > 5 else "")
        failing = f"{len(self.failing)} of {self.n} clean prompts (rows {rows})"
        return f"the model does not prefer the answer on {failing}.{self._doubt()}"

    def _doubt(self) -> str:
        """A second sentence if the accuracy is not better than guessing."""
        wrong, size = len({*self.failing} - {*self.copies}), self.n - len(self.copies)
        if math.isnan(self.chance) or at_least(size - wrong, size, self.chance) <= DOUBT:
            return ""
        than = f"than guessing ({self.chance:.0%}):"
        if self.chance < 1 and at_least(wrong, size, 1 - self.chance) <= DOUBT:
            ask = "are answers and wrong answers, or the two sides, exchanged?"
            return f" An accuracy of {self.accuracy:.0%} is worse {than} {ask}"
        return f" An accuracy of {self.accuracy:.0%} is no better {than} the model may not do this task."


@model_call
def summarise(model: Model, task: Task | BoundTask, *, warn: bool = True, batch_size: int | None = None) -> TaskSummary:
    """Run clean and corrupted prompts once, and summarise how well the model does the task."""
    return summary_of(Evaluator.of(model, task, batch_size=batch_size), warn=warn)


def summary_of(evaluator: Evaluator, warn: bool = True) -> TaskSummary:
    """`summarise` with an evaluator that has already run the pairs."""
    bound = evaluator.bound
    has_answers, has_wrong = (bool(side.shape[-1]) for side in (bound.batch.answers, bound.batch.wrong))
    right, full, empty = evaluator.full_accurate, evaluator.full, evaluator.empty
    accuracy, top1 = (float(each.mean()) if has_answers else math.nan for each in (right, evaluator.full_top1))
    clean, corrupted, lowered = (float(each.mean()) for each in (full, empty, empty < full))
    failing = tuple(np.flatnonzero(~right).tolist()) if has_answers else ()
    copies = tuple(np.setdiff1d(np.arange(len(bound)), bound.first).tolist())
    guessing = float(chances(bound).mean()) if has_wrong else 0.0 if has_answers else math.nan
    values = (accuracy, top1, clean, corrupted, lowered, failing, bound.notes, guessing, copies)
    summary = TaskSummary(bound.name, len(bound), bound.metric.name, *values)
    if warn and (warning := summary.warning()):
        errors.warn(warning)
    return summary


def chances(bound: BoundTask) -> np.ndarray:
    """`[pairs]`: chance that a guessing model is counted as right."""
    batch = bound.batch
    right, wrong = ((ids[:, 0] >= 0).sum(-1).double().cpu() for ids in (batch.answers, batch.wrong))
    single, times = 1 / (1 + wrong), torch.full_like(right, batch.answers.shape[1])
    if batch.summed is not None and batch.wrong.shape[-1]:  # at each place where the two differ
        times = (batch.summed & (batch.answers != batch.wrong).any(-1)).sum(-1).double().cpu()
    chances: np.ndarray = np.where(right == 1, single, (right > wrong).double()) ** times.numpy()
    return chances


class Remark(NamedTuple):
    """`severity`: "error" (nothing can be run), "warning" (results would mean little) or "note"."""

    severity: str
    text: str


class Said(NamedTuple):
    """The model's answer to a clean prompt, at the first read position.

    tokens, probabilities: its most likely tokens. right, wrong: total probability of the right and of the wrong
    answers, NaN if there are none. pair: counts from 0.
    """

    pair: int
    tokens: tuple[str, ...]
    probabilities: tuple[float, ...]
    right: float
    wrong: float

    def __str__(self) -> str:
        tokens = ", ".join(f"{text!r} {percent(p)}" for text, p in zip(self.tokens, self.probabilities, strict=True))
        sides = {"right": self.right, "wrong": self.wrong}
        known = ", ".join(f"{side} {percent(part)}" for side, part in sides.items() if not math.isnan(part))
        return f"{tokens}; {known}" if known else tokens


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis(Result):
    """Findings about a task, most severe first; rows are the findings.

    summary: None if nothing could be run. said: the model's answers on the first pairs.
    """

    FORMAT, ROWS, SHOWN = "circuitfind.diagnosis", "findings", ("name", "ok")

    name: str
    findings: tuple[Remark, ...]
    summary: TaskSummary | None
    said: tuple[Said, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there are no errors and no warnings."""
        return not self.warnings

    @property
    def warnings(self) -> tuple[str, ...]:
        """Errors and warnings as lines."""
        return tuple(finding.text for finding in self.findings if finding.severity != "note")

    def __str__(self) -> str:
        lines = [f"{finding.severity}: {finding.text}" for finding in self.findings]
        lines += [f"pair {one.pair}: the model answers {one}" for one in self.said]
        return "\n".join([f"{self.name}: {'no warnings' if self.ok else 'check this first'}", *lines])


@model_call
def diagnose(
    model: Model,
    task: Task | BoundTask,
    *,
    metric: str | Metric | Function | None = None,
    batch_size: int | None = None,
) -> Diagnosis:
    """Check whether a model does a task, and whether the pairs are suited to study it; findings are sentences.

    If the task does not fit the model, that is a finding of severity "error", not an exception.

    Args:
        metric, batch_size: as for `circuitfind.attribute`.

    Raises:
        ModelError: `model` did not come from `load` or `wrap`.
    """
    try:
        experiment = Experiment.of(model, task, {"metric": metric, "batch_size": batch_size})
    except errors.TaskError as error:
        return Diagnosis(getattr(task, "name", "task"), (Remark("error", str(error)),), None)
    evaluator, bound = Evaluator(experiment), experiment.bound
    summary = summary_of(evaluator, warn=False)
    said, heard = _said(evaluator, model.tokenizer)
    found = [*_doing(evaluator, summary), *heard, *_answers(bound, model.tokenizer)]
    found.sort(key=lambda finding: finding.severity == "note")
    return Diagnosis(bound.name, tuple(found), summary, said)


def _doing(evaluator: Evaluator, summary: TaskSummary) -> Iterator[Remark]:
    """Check that the model does the task, and that the corrupted prompts lower the metric."""
    distinct = summary.n - len(summary.copies)
    if failing := summary.warning():
        yield Remark("warning", failing)
    elif at_least(distinct, distinct, summary.chance) > DOUBT:
        text = f"100% accuracy on only {errors.count(distinct, 'pair')} could be guessing ({summary.chance:.0%})"
        yield Remark("note", text)
    clean, corrupted = evaluator.full, evaluator.empty
    lost = clean - corrupted
    lowered, noise = int((lost > 0)[evaluator.bound.first].sum()), standard_error(lost, evaluator.bound.copies)
    means = f"mean metric {clean.mean():.4g} on clean, {corrupted.mean():.4g} on corrupted prompts"
    if lost.mean() <= 0:
        as_before = evaluator.ends.accurate[1].mean() <= evaluator.ends.accurate[0].mean()
        ask = ("does the corruption leave the answer as it is, or " if as_before else "") + "are the sides exchanged?"
        yield Remark("warning", f"the corrupted prompts do not lower the metric ({means}): {ask}")
    elif lost.mean() <= max(2 * noise, evaluator.rounding_of_contrast):
        text = f"the corrupted prompts do not lower the metric beyond noise ({means}, standard error {noise:.2g})"
        yield Remark("warning", f"{text}: corrupt what the task depends on, or give more pairs")
    elif at_least(lowered, distinct, 0.5) > DOUBT and lowered < distinct:
        text = f"the corrupted prompt lowers the metric in only {lowered} of {distinct} pairs"
        yield Remark("warning", f"{text}: the mean comes from a few pairs ({means})")
    elif evaluator.bound.flips and evaluator.bound.metric.wrong and corrupted.mean() >= 0:
        yield Remark(
            "note",
            f"the corrupted prompts should reverse the answer, but not for this model ({means})",
        )


def _said(evaluator: Evaluator, tokenizer: Any) -> tuple[tuple[Said, ...], list[Remark]]:
    """The model's answers on the first distinct pairs, and findings on all pairs."""
    said: list[Said] = []
    masses: list[float] = []
    silent: list[int] = []  # rows in which neither answer is likely
    others: list[str] = []
    for ids, right, wrong, likely in evaluator.runs.each(_first_token, "first tokens"):
        known = (likely.indices.unsqueeze(-1) == torch.cat(ids, 1).unsqueeze(1)).any(-1).any(-1)
        for row, (tokens, values) in enumerate(zip(likely.indices.tolist(), likely.values.tolist(), strict=True)):
            pair = len(masses)
            masses.append(float(right[row] + wrong[row] * (ids[0][row].tolist() != ids[1][row].tolist())))  # once
            if not known[row]:
                silent.append(pair)
                others += _spelled_otherwise(tokenizer, pair, ids[0][row].tolist(), tokens)
            if pair in evaluator.bound.first[:PAIRS_SHOWN]:
                shown = [str(one) if tokenizer is None else piece(tokenizer, one) for one in tokens[:TOKENS_SHOWN]]
                both = zip((right, wrong), ids, strict=True)
                sides = [float(part[row]) if one.shape[1] else math.nan for part, one in both]
                said.append(Said(pair, tuple(shown), tuple(values[:TOKENS_SHOWN]), *sides))
    if not masses or not evaluator.bound.batch.answers.shape[-1]:
        return tuple(said), []
    found = [Remark("warning", rare(float(np.mean(masses))))] if np.mean(masses) < RARE else []
    if silent:
        rows = ", ".join(map(str, silent[:5])) + (", ..." if len(silent) > 5 else "")
        text = (
            f"in {len(silent)} of {len(masses)} pairs (rows {rows}) neither answer is among the model's {MOST_LIKELY}"
        )
        severity = "warning" if 2 * len(silent) > len(masses) else "note"
        found.append(Remark(severity, f"{text} most likely tokens{''.join(others[:1])}"))
    return tuple(said), found


def _first_token(prepared: Prepared) -> tuple[list[Tensor], Tensor, Tensor, Any]:
    """Ids of right and wrong answers, their probabilities, and the most likely tokens, at the first read position."""
    batch, chances = prepared.batch, log_probabilities(prepared.clean.logits[:, 0]).exp().cpu()
    ids = [side[:, 0].cpu() for side in (batch.answers, batch.wrong)]
    right, wrong = ((chances.gather(1, one.clamp(min=0)) * (one >= 0)).sum(1) for one in ids)
    return ids, right, wrong, chances.topk(min(MOST_LIKELY, chances.shape[1]))


def _spelled_otherwise(tokenizer: Any, row: int, answers: list[int], likely: list[int]) -> Iterator[str]:
    """Yield a sentence for each likely token that is an answer, or the start of one, in another spelling."""
    for own in [] if tokenizer is None else [piece(tokenizer, answer) for answer in answers if answer >= 0]:
        for other in (piece(tokenizer, token) for token in likely):
            begins = own.strip().startswith(other.strip()) and len(other.strip()) > 1
            if begins and (other[:1] == " ") != (own[:1] == " "):
                remedy = "use spelling=, and answer='first' if answers then have several tokens"
                yield f"; in row {row}, {other!r} is among them, the answer {own!r} in another spelling: {remedy}"


def _answers(bound: BoundTask, tokenizer: Any) -> Iterator[Remark]:
    """Check the answers: constant ones, copies of pairs, and spelling."""
    answers, wrong = bound.batch.answers, bound.batch.wrong
    if len(bound) > 1 and wrong.shape[-1] and bool((answers == answers[:1]).all() & (wrong == wrong[:1]).all()):
        text = f"all pairs have the same answers ({bound.answer_texts[0]}), so a constant preference looks like the"
        yield Remark("note", f"{text} task: add pairs with the two answers exchanged")
    if copies := len(bound) - len(bound.first):
        text = f"{copies} of {len(bound)} pairs are copies of others (the same prompts): they count once in intervals"
        yield Remark("note", f"{text} and stay on the same side of a split")
    if tokenizer is not None and answers.shape[-1]:
        yield from islice(_spellings(bound, tokenizer), 1)


def _spellings(bound: BoundTask, tokenizer: Any) -> Iterator[Remark]:
    """Find answers that do not continue the prompt as text would."""
    clean = bound.batch.clean
    whole = bound.batch.summed is not None
    which = 0 if whole else -1
    ids, read, lengths = clean.ids.tolist(), clean.read[:, which].tolist(), clean.mask.sum(1).tolist()
    for row, (tokens, at, length) in enumerate(zip(ids, read, lengths, strict=True)):
        if not whole and any(bound.appended[row : row + 1]):
            continue  # the answer continues the appended text
        for side in (bound.batch.answers, bound.batch.wrong):
            for answer in (token for token in side[row, which].tolist() if token >= 0):
                shown = piece(tokenizer, answer)
                if not whole and REPLACED in str(tokenizer.decode([answer])):
                    text = f"row {row}: the answer {shown} is only some bytes of a character"
                    yield Remark("warning", f"{text}: choose answers that are one token each")
                if bound.bos == "ids given":
                    continue
                begins = str(tokenizer.convert_ids_to_tokens(answer))[:1]
                if at == length - 1 and bound.prompts[row][-1:] == " " and begins in SPACES:
                    text = f"row {row}: the prompt ends in a space and the answer {shown!r} begins with one"
                    yield Remark("warning", f"{text}: end the prompt before the space")
                last = tokenizer.decode([tokens[at]])
                glued = tokenizer.decode([tokens[at], answer]).removeprefix(last)
                if last[-1:].isalpha() and glued[:1].isalpha():
                    word = str(tokenizer.decode(tokens[: at + 1])).split()[-1]
                    text = f"row {row}: the answer {glued!r} has no space before it and continues the word {word!r}"
                    remedy = "choose answers that are one token after a space, or end the prompt before the word"
                    yield Remark("warning", f"{text}: {remedy}")
