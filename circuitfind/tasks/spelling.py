"""How answers given as text are spelled after their prompts: with a space before them, or without.

1. An answer's ids are what tokenising `prompt + answer` adds to the prompt's own ids. A spelling that changes the
   prompt's ids is rejected, and so is one that adds several tokens, unless the task asks for such answers.
2. Two spellings are tried, in an order that the text suggests (`_preference`): a word after a word needs a space,
   digits after digits do not. A task, or a row of it, may name its own (`SPELLINGS`).
3. Where both work for every answer of the task, the model decides: it is the one to which it gives more probability, as
   a mean over the clean prompts, summed over the (first tokens of the) right and wrong answers. That takes one forward
   pass. With "text", and where the weights are not at hand (on a server), it is the first one of 2.
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
RARE = 0.01  # of the model's probability: less than this for the answers is worth a warning
TOKENS_AT_ONCE, PROMPTS_AT_ONCE = 4096, 64
_SPELL: dict[str, Callable[[str], str]] = {"space": lambda one: " " + one.lstrip(), "none": str.lstrip, "given": str}
_SEVERAL = (
    "Give answer='first' (the first token that tells right from wrong is measured) or answer='all' (the whole answer),"
    " choose answers that are one token after the prompt, or leave such rows out with unusable='drop'"
)


class Wanted(NamedTuple):
    """What a task says of its answers: by row a name of `SPELLINGS`, "text" or None; whether they may be of several
    tokens; whether rows may fail, as they are left out."""

    spellings: Sequence[str | None]
    several: bool
    dropping: bool


class Spelled(NamedTuple):
    """Answers in one spelling: by row its name and the ids of each text; the rows for which it fails, with the reason;
    and in words, how."""

    names: list[str]
    ids: list[dict[str, list[int]]]
    failed: dict[int, str]
    how: str = ""

    def text(self, row: int, answer: str) -> str:
        """An answer as it is spelled after this row's prompt."""
        return _SPELL[self.names[row]](answer)

    def sequences(self, row: int, answers: Sequence[str]) -> list[list[int]]:
        """Ids of each of these answers of a row; of those with the same ids the first."""
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
    """The answers in the spelling that serves them all (else, where rows may fail, the most rows).

    Args:
        model: gives the model that is asked for its preference, if need be; None decides by the text.

    Raises:
        TaskError: none does; it names the row and the answer.
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
    """The spellings that differ, in the order in which they are tried."""
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
    """Names of the spellings, in the order in which they are tried."""
    given = [answer for row in sets for answer in row]
    if any(answer[:1].isspace() for answer in given):  # where the prompt ends in a space, not another one
        order = ["given", "none"]
        return order[::-1] if any(prompt[-1:] == " " for prompt in clean) else order
    continues = any(prompt[-1:].isspace() or prompt[-1:] in "([{'\"-/" for prompt in clean)
    number = all(prompt[-1:].isdigit() for prompt in clean) and all(answer[:1].isdigit() for answer in given)
    return ["given", "space"] if continues or number else ["space", "given"]


# -------------------------------------------------------------------- what the model prefers
def _preferred(tokenizer: PromptTokenizer, clean: Texts, tried: list[Spelled], model: Any) -> tuple[Spelled, str]:
    """The spelling to which the model itself gives the most probability, and in words why."""
    if getattr(model, "remote", True):
        return tried[0], ", by the text: the model's weights are not here to ask"
    rows = [row for row in range(len(clean)) if not any(row in one.failed for one in tried)]
    prompts = dict(zip(rows, tokenizer([clean[row] for row in rows]), strict=True))
    sets = [{row: {ids[0] for ids in one.ids[row].values()} for row in rows} for one in tried]
    masses = _masses(model, prompts, sets)
    best = masses.index(max(masses))  # of equals the first
    if masses[best] < RARE:
        warn(rare(masses[best]))
    others = ", ".join(
        f"{percent(mass)} {one.said}" for one, mass in zip(tried, masses, strict=True) if one is not tried[best]
    )
    return tried[best], f", which the model prefers ({percent(masses[best])}; {others})"


def _masses(model: Any, prompts: dict[int, list[int]], sets: Sequence[dict[int, set[int]]]) -> list[float]:
    """Of each spelling, the mean over prompts of the probability of that row's ids as the next token."""
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
    """A probability as it is read: 34%, 1.7%, 0.0056%."""
    return f"{part:.0%}" if part >= 0.1 else f"{100 * part:.2g}%"


def rare(mass: float) -> str:
    """The warning where answers are not what the model would say."""
    return (
        f"the model gives the answers {percent(mass)} of its probability on average, and would say something else"
        " (cf.diagnose shows what): are the prompt (a chat template?) and the answers' spelling as it knows them?"
    )
