"""The spelling of answers given as text: with or without a space between prompt and answer.

1. An answer's ids are those that tokenising `prompt + answer` adds to the prompt's own ids. A spelling is rejected if
   it changes the prompt's ids, or if it adds more than one and the task does not allow answers of several tokens.
2. Two spellings are tried, in an order that the text suggests (`_preference`): a word after a word needs a space,
   digits after digits do not. A task, or one of its rows, may name its own spelling (`SPELLINGS`).
3. If both work for every answer of the task, the model decides by a forward pass over the clean prompts: the spelling
   is the one with the larger probability, summed over the first tokens of all right and wrong answers and averaged over
   prompts. With "text", or if the model's weights are on a server, the first spelling of step 2 is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from circuitfind.batch import Inputs, log_probabilities
from circuitfind.errors import TaskError, warn
from circuitfind.tasks.tokens import PromptTokenizer, pad

Texts = Sequence[str]
Lists = Sequence[Texts]  # by row
SPELLINGS = {"space": "with a leading space", "none": "without a leading space", "given": "as given"}
BY_TEXT = "text"
RARE = 0.01  # a warning is given if the answers have less than this probability
TOKENS_AT_ONCE, PROMPTS_AT_ONCE = 4096, 64
_SPELL: dict[str, Callable[[str], str]] = {"space": lambda one: " " + one.lstrip(), "none": str.lstrip, "given": str}
_SEVERAL = (
    "Give answer='first' (the first token that tells right from wrong is measured) or answer='all' (the whole answer),"
    " choose answers that are one token after the prompt, or leave such rows out with unusable='drop'"
)


class Wanted(NamedTuple):
    """What a task allows.

    spellings: by row, a name of `SPELLINGS`, "text" or None. several: whether answers may have several tokens.
    dropping: whether rows may fail, because they are then left out.
    """

    spellings: Sequence[str | None]
    several: bool
    dropping: bool


class Spelled(NamedTuple):
    """Answers in one spelling.

    names: the spelling of each row. ids: for each row, answer -> its ids. failed: rows for which the spelling fails,
    with the reason. how: the spelling in words, and why it was chosen.
    """

    names: list[str]
    ids: list[dict[str, list[int]]]
    failed: dict[int, str]
    how: str = ""

    def text(self, row: int, answer: str) -> str:
        """Return an answer in this row's spelling."""
        return _SPELL[self.names[row]](answer)

    def sequences(self, row: int, answers: Sequence[str]) -> list[list[int]]:
        """Return the ids of each of these answers of a row, without repeats."""
        known = self.ids[row]
        return [list(ids) for ids in dict.fromkeys(tuple(known[answer]) for answer in answers)]

    @property
    def said(self) -> str:
        return " or ".join(SPELLINGS[name] for name in dict.fromkeys(self.names))


def spelled(
    tokenizer: PromptTokenizer,
    clean: Texts,
    answers: Lists,
    wrong: Lists,
    wanted: Wanted,
    model: Callable[[], Any] | None = None,
) -> Spelled:
    """Return the answers in the spelling that works for all rows or, if rows may fail, for the most rows.

    Args:
        model: returns the model that decides between two such spellings; called only if needed. None: the text decides.

    Raises:
        TaskError: no spelling works; the message names the row and the answer.
    """
    tried = _attempts(tokenizer, clean, answers, wrong, wanted)
    fewest = min(len(one.failed) for one in tried)
    if fewest and not wanted.dropping:
        failures = [f"{one.said}: row {row}, {why}" for one in tried for row, why in [next(iter(one.failed.items()))]]
        rule, remedy = (
            ("be text that adds tokens", "Choose others") if wanted.several else ("be one token each", _SEVERAL)
        )
        raise TaskError(f"answers must {rule}. {'; '.join(failures)}. {remedy}")
    tried = [one for one in tried if len(one.failed) == fewest]
    chosen, why = tried[0], ""
    if len(tried) > 1 and fewest < len(clean) and None in wanted.spellings and model is not None:
        chosen, why = _preferred(tokenizer, clean, tried, model())
    each = ((row, one) for row, side in enumerate(answers) for one in side)
    doubled = any(clean[row][-1:] == chosen.text(row, one)[:1] == " " for row, one in each)
    after = ", after a prompt that ends in a space" if doubled else ""
    return chosen._replace(how=f"{chosen.said}{after}{why}")


def _attempts(tokenizer: PromptTokenizer, clean: Texts, answers: Lists, wrong: Lists, wanted: Wanted) -> list[Spelled]:
    """Return the answers in each spelling, in the order of preference, without those that give the same ids."""
    prompts = tokenizer(clean)
    sets = [list(dict.fromkeys([*a, *w])) for a, w in zip(answers, wrong, strict=True)]
    undecided = any(one in (None, BY_TEXT) for one in wanted.spellings)
    found: list[Spelled] = []
    for name in _preference(clean, sets) if undecided else ["given"]:
        attempt = Spelled([name if one in (None, BY_TEXT) else one for one in wanted.spellings], [], {})
        for number, (prompt, ids, texts) in enumerate(zip(clean, prompts, sets, strict=True)):
            row: dict[str, list[int]] = {}
            given = [attempt.text(number, text) for text in texts]
            added = tokenizer.added(prompt, ids, given) if texts else []
            for text, own, extra in zip(texts, given, added, strict=True):
                if fault := _fault(tokenizer, own, extra, wanted.several):
                    attempt.failed[number] = fault
                    break
                row[text] = extra or []
            attempt.ids.append(row)
        if all((attempt.ids, attempt.failed) != (other.ids, other.failed) for other in found):
            found.append(attempt)
    return found


def _fault(tokenizer: PromptTokenizer, answer: str, extra: list[int] | None, several: bool) -> str:
    if extra is None:
        return f"{answer!r} merges with the prompt's last token"
    if not extra or (len(extra) > 1 and not several):
        return f"{answer!r} is {len(extra)} tokens {tokenizer.tokenizer.convert_ids_to_tokens(extra)}"
    return ""


def _preference(clean: Texts, sets: list[list[str]]) -> list[str]:
    """Return the names of the spellings to try, the preferred one first."""
    given = [answer for row in sets for answer in row]
    if any(answer[:1].isspace() for answer in given):
        order = ["given", "none"]
        return order[::-1] if any(prompt[-1:] == " " for prompt in clean) else order  # rather no second space
    continues = any(prompt[-1:].isspace() or prompt[-1:] in "([{'\"-/" for prompt in clean)
    number = all(prompt[-1:].isdigit() for prompt in clean) and all(answer[:1].isdigit() for answer in given)
    return ["given", "space"] if continues or number else ["space", "given"]


# -------------------------------------------------------------------- what the model prefers
def _preferred(tokenizer: PromptTokenizer, clean: Texts, tried: list[Spelled], model: Any) -> tuple[Spelled, str]:
    """Return the spelling to which the model gives the most probability, and the reason in words."""
    if getattr(model, "remote", True):
        return tried[0], ", by the text: the model's weights are not here to ask"
    rows = [row for row in range(len(clean)) if not any(row in one.failed for one in tried)]
    prompts = dict(zip(rows, tokenizer([clean[row] for row in rows]), strict=True))
    sets = [{row: {ids[0] for ids in one.ids[row].values()} for row in rows} for one in tried]
    masses = _masses(model, prompts, sets)
    best = masses.index(max(masses))  # the first of equals
    if masses[best] < RARE:
        warn(rare(masses[best]))
    others = ", ".join(
        f"{percent(mass)} {one.said}" for one, mass in zip(tried, masses, strict=True) if one is not tried[best]
    )
    return tried[best], f", which the model prefers ({percent(masses[best])}; {others})"


def _masses(model: Any, prompts: dict[int, list[int]], sets: Sequence[dict[int, set[int]]]) -> list[float]:
    """Return, for each of `sets`, the mean over prompts of the probability that the next token is in that row's set.

    prompts: row -> ids. sets: for each spelling, row -> ids of the answers' first tokens.
    """
    order = sorted(prompts, key=lambda row: len(prompts[row]))
    totals = [0.0] * len(sets)
    while order:
        size = max(1, min(PROMPTS_AT_ONCE, TOKENS_AT_ONCE // len(prompts[order[-1]])))
        part, order = order[:size], order[size:]
        ids, mask = pad([prompts[row] for row in part], len(prompts[part[-1]]), model.device)
        logits = model.logits(Inputs(ids, mask, mask.sum(1, keepdim=True) - 1))[:, 0]
        chances = log_probabilities(logits).exp().double().cpu()
        for number, rows in enumerate(sets):
            totals[number] += sum(float(own[sorted(rows[row])].sum()) for own, row in zip(chances, part, strict=True))
    return [total / len(prompts) for total in totals]


def percent(part: float) -> str:
    """Write a probability such as 34%, 1.7% or 0.0056%."""
    return f"{part:.0%}" if part >= 0.1 else f"{100 * part:.2g}%"


def rare(mass: float) -> str:
    """Return the warning that the model gives the answers little probability."""
    return (
        f"the model gives the answers {percent(mass)} of its probability on average, and would say something else"
        " (cf.diagnose shows what): are the prompt (a chat template?) and the answers' spelling as it knows them?"
    )
