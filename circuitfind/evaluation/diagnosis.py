"""What is wrong with a task, in words, before anything expensive runs on it.

1. The task meets the model. What cannot be used (an answer of several tokens, a pair of unequal length) is an error.
2. Both sides of the pairs run once. Does the model do the behaviour more often than by guessing
   (`circuitfind.evaluation.summary`)?
3. Does the corrupted prompt take the behaviour away: is the metric lower there, on average beyond noise, and in more
   pairs than by a throw of a coin?
4. What may mislead without being wrong: an answer that continues the prompt's last word, one answer for all pairs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from circuitfind.engine.experiment import Experiment
from circuitfind.errors import TaskError
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.evaluation.summary import DOUBT, TaskSummary, at_least, summary_of
from circuitfind.metrics import Function, Metric
from circuitfind.models.load import Model
from circuitfind.remote.call import remotable
from circuitfind.tasks.task import BoundTask, Task


class Finding(NamedTuple):
    """`severity`: "error" (nothing can be run), "warning" (results would mean little), "note" (know this)."""

    severity: str
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """What was found, gravest first; `summary` is None where nothing could be run."""

    name: str
    findings: tuple[Finding, ...]
    summary: TaskSummary | None

    @property
    def ok(self) -> bool:
        """Whether there is nothing to warn of."""
        return not self.warnings

    @property
    def warnings(self) -> tuple[str, ...]:
        """Errors and warnings as lines."""
        return tuple(finding.text for finding in self.findings if finding.severity != "note")

    def to_dict(self) -> dict[str, object]:
        """JSON values."""
        summary = None if self.summary is None else self.summary._asdict()
        return {**asdict(self), "findings": [finding._asdict() for finding in self.findings], "summary": summary}

    def __str__(self) -> str:
        lines = [f"{finding.severity}: {finding.text}" for finding in self.findings]
        return "\n".join([f"{self.name}: {'nothing to warn of' if self.ok else 'look at this first'}", *lines])


@remotable
def diagnose(
    model: Model,
    task: Task | BoundTask,
    *,
    metric: str | Metric | Function | None = None,
    batch_size: int | None = None,
) -> Diagnosis:
    """Says in words whether a model does a task, and whether the task's pairs can show how.

    Args:
        metric, batch_size: as everywhere; see `circuitfind.attribute`.

    Returns:
        A `Diagnosis`; a task that the model cannot be given is its one error and is not raised.

    Raises:
        ModelError: `model` did not come from `load` or `wrap`.
    """
    try:
        experiment = Experiment.of(model, task, {"metric": metric, "batch_size": batch_size})
    except TaskError as error:
        return Diagnosis(getattr(task, "name", "task"), (Finding("error", str(error)),), None)
    evaluator, bound = Evaluator(experiment), experiment.bound
    summary = summary_of(evaluator, warn=False)
    found = [*_behaviour(summary), *_contrast(evaluator), *_answers(bound, model.tokenizer)]
    found.sort(key=lambda finding: finding.severity == "note")
    return Diagnosis(bound.name, tuple(found), summary)


# -------------------------------------------------------------------- does the model do it?
def _behaviour(summary: TaskSummary) -> list[Finding]:
    if failing := summary.warning():
        return [Finding("warning", failing)]
    if at_least(summary.n, summary.n, summary.chance) > DOUBT:
        text = f"{summary.n} pairs are too few to tell 100% accuracy from guessing ({summary.chance:.0%})"
        return [Finding("note", text)]
    return []


# -------------------------------------------------------------------- does the corrupted prompt take it away?
def _contrast(evaluator: Evaluator) -> list[Finding]:
    clean, corrupted = evaluator.full, evaluator.empty
    lost, size = clean - corrupted, len(clean)
    means = f"mean metric {clean.mean():.4g} on clean, {corrupted.mean():.4g} on corrupted prompts"
    if lost.mean() <= 0:
        as_before = evaluator.ends.accurate[1].mean() <= evaluator.ends.accurate[0].mean()
        ask = ("does the corruption leave the answer as it is, or " if as_before else "") + "are the sides exchanged?"
        return [Finding("warning", f"the corrupted prompts do not lower the metric ({means}): {ask}")]
    noise = lost.std(ddof=1) / size**0.5 if size > 1 else 0.0
    if lost.mean() <= max(2 * noise, evaluator.rounding_of_contrast):
        text = f"the corrupted prompts do not lower the metric beyond noise ({means}, standard error {noise:.2g})"
        return [Finding("warning", f"{text}: make the pairs differ in what matters, or give more of them")]
    lowered = int((lost > 0).sum())
    if at_least(lowered, size, 0.5) > DOUBT and lowered < size:
        text = f"the corrupted prompt lowers the metric in only {lowered} of {size} pairs: a few pairs make the mean"
        return [Finding("warning", f"{text} ({means})")]
    if evaluator.bound.flips and evaluator.bound.metric.wrong and corrupted.mean() >= 0:
        return [Finding("note", f"the corrupted prompts make the other answer right, but not for this model ({means})")]
    return []


# -------------------------------------------------------------------- are the answers what they seem?
def _answers(bound: BoundTask, tokenizer: Any) -> list[Finding]:
    found = []
    answers, wrong = bound.batch.answers, bound.batch.wrong
    if len(bound) > 1 and wrong.shape[-1] and bool((answers == answers[:1]).all() & (wrong == wrong[:1]).all()):
        text = f"all pairs have the same answers ({bound.answer_texts[0]}), so a constant preference passes for the"
        found.append(Finding("note", f"{text} behaviour: add pairs with the answers exchanged"))
    if tokenizer is None or bound.bos == "ids given" or not answers.shape[-1]:
        return found
    ids, read = bound.batch.clean.ids.tolist(), bound.batch.clean.read[:, -1].tolist()
    for row, (tokens, at) in enumerate(zip(ids, read, strict=True)):
        for answer in (int(token) for side in (answers, wrong) for token in side[row, -1] if token >= 0):
            last = tokenizer.decode([tokens[at]])
            glued = tokenizer.decode([tokens[at], answer]).removeprefix(last)
            if last[-1:].isalpha() and glued[:1].isalpha():
                word = bound.prompts[row].split()[-1]
                text = f"row {row}: the answer {glued!r} has no space before it and continues the word {word!r}"
                remedy = "choose answers that are one token after a space, or end the prompt before the word"
                return [*found, Finding("warning", f"{text}: {remedy}")]
    return found
