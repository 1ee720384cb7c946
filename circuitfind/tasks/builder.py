"""`TaskBuilder`: a generator of prompt pairs, built in or written by the user.

1. `prepare(words, choice)` finds the task's words that are one token in the model's tokenizer, so that both prompts of
   a pair have equal length. It returns a function that draws one pair.
2. `TaskBuilder.make` calls that function for n pairs, and draws again (up to 50 times) if a prompt repeats. It passes
   `random.Random(seed)`, so that a seed gives the same pairs on every machine.

A generator handles text only; `circuitfind.Task` tokenises it, finds the answers' ids and applies the metric.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral
from string import Formatter
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from circuitfind.errors import NoFile, TaskError, plain, unknown
from circuitfind.setting import check_seed
from circuitfind.tasks.spans import occurrences

T = TypeVar("T")
MOST_PAIRS = 1_000_000
_TRIES_FOR_A_NEW_PAIR = 50
_BEFORE = "x"
REMEDY = "choose another task or model, or bring your own pairs in a file"


class Pair(NamedTuple):
    """One example of a task as text.

    Attributes:
        clean, corrupted: the prompt that shows the behaviour, and a minimally different one with equally many tokens.
        answers, wrong: right and wrong continuations of the clean prompt, at least one each.
        flips: whether the wrong answers are right after the corrupted prompt, so that the metric changes its sign.
        spans: named words of the clean prompt: name -> (word, number of the occurrence, counted from 1).
    """

    clean: str
    corrupted: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]
    flips: bool = False
    spans: Mapping[str, tuple[str, int]] = MappingProxyType({})

    @classmethod
    def filled(
        cls,
        pattern: str,
        clean: Mapping[str, str],
        corrupted: Mapping[str, str],
        answers: Sequence[str],
        wrong: Sequence[str],
        *,
        flips: bool = False,
        spans: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> Pair:
        """Return the pair that fills both prompts into one pattern (of `str.format`).

        Args:
            clean: the word of each field in the clean prompt.
            corrupted: the words of the fields that differ in the corrupted prompt.
            spans: for each field, the span names of its first, second, ... occurrence.
        """
        text, found = "", []
        times: dict[str, int] = defaultdict(int)
        for literal, name, _, _ in Formatter().parse(pattern):
            text += literal
            if name is None:
                continue
            if times[name] < len(spans.get(name, ())):
                found.append((spans[name][times[name]], len(text), clean[name]))
            times[name] += 1
            text += clean[name]
        where = {name: (word, occurrences(text, word).index(at) + 1) for name, at, word in found}
        return cls(text, pattern.format(**{**clean, **corrupted}), tuple(answers), tuple(wrong), flips, where)


class SingleTokens:
    """Finds the words that are one token in the middle of a sentence, for a Hugging Face tokenizer.

    A word is tested in running text: the ids of "x word" must be the ids of "x" and one more. This works for byte-level
    BPE (the space is part of the token), sentencepiece (the space is a mark on the token) and tokenizers that drop
    spaces. `pieces` tells how a number is split.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._unknown: int | None = getattr(tokenizer, "unk_token_id", None)
        self._seen: dict[str, list[int]] = {}

    def keep(self, words: Iterable[str]) -> list[str]:
        """Return the words that are one known token after a space, in the given order."""
        return [word for word in words if self._is_single(word)]

    def need(self, words: Sequence[str], least: int, task: str, what: str) -> list[str]:
        """Do what `keep` does; raise TaskError if fewer than `least` words are one token."""
        return self._enough(self.keep(words), len(words), least, task, f"{what} are one token each")

    def need_pairs(self, pairs: Sequence[tuple[str, str]], least: int, task: str, what: str) -> list[tuple[str, str]]:
        """Return the pairs of which both words are one token; raise TaskError if there are fewer than `least`."""
        kept = [pair for pair in pairs if len(self.keep(pair)) == 2]
        return self._enough(kept, len(pairs), least, task, f"{what} are one token each (both of a pair)")

    def pieces(self, text: str) -> tuple[str, ...]:
        """Return the text of each token that `text` adds after a word, such as (" 17", "32") for " 1732".

        The result is empty if a token is unknown, or if it cannot be told which characters belong to which token.
        """
        before, ids = self._ids(_BEFORE), self._ids(_BEFORE + text)
        cuts = [0]
        for at in range(1, len(text) + 1):
            head = self._ids(_BEFORE + text[:at])
            if len(head) == len(before) + len(cuts) and head == ids[: len(head)]:
                cuts.append(at)
        known = ids[: len(before)] == before and self._unknown not in ids[len(before) :]
        split = len(ids) == len(before) + len(cuts) - 1 and cuts[-1] == len(text)
        return tuple(text[start:stop] for start, stop in pairwise(cuts)) if known and split else ()

    def keeps(self, text: str) -> bool:
        """Whether decoding the text's ids gives the text back, without unknown tokens."""
        ids = self._ids(text)
        back: str = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return self._unknown not in ids and back.strip() == text.strip()

    @staticmethod
    def _enough(kept: list[T], there: int, least: int, task: str, what: str) -> list[T]:
        if len(kept) < least:
            raise TaskError(f"{task}: {len(kept)} of {there} {what} with this tokenizer, {least} are needed; {REMEDY}")
        return kept

    def _is_single(self, word: str) -> bool:
        head, ids = self._ids(_BEFORE), self._ids(f"{_BEFORE} {word}")
        return len(ids) == len(head) + 1 and ids[:-1] == head and ids[-1] != self._unknown

    def _ids(self, text: str) -> list[int]:
        if text not in self._seen:
            self._seen[text] = list(self._tokenizer.encode(text, add_special_tokens=False))
        return self._seen[text]


class Choice(NamedTuple):
    """The chosen corruption, and the chosen sentence patterns by name (all of the task's by default)."""

    corruption: str
    templates: Mapping[str, str]

    @property
    def patterns(self) -> tuple[str, ...]:
        """The chosen sentence patterns, in the task's order."""
        return tuple(self.templates.values())


Draw = Callable[[random.Random, int], Pair]  # draws one pair; the number is that of the pairs before it, to alternate


@dataclass(frozen=True)
class TaskBuilder(NoFile):
    """A task that generates its pairs. `circuitfind.task` takes it, or its name once it is registered.

    Attributes:
        prepare: takes the tokenizer's words and the user's choice, and returns the function that draws pairs.
        corruptions: names of the ways to make the corrupted prompt, the default first.
        metric: the default metric.
        templates: the task's sentence patterns by name.
        summary: one line with an example prompt and answer.
        source: the paper that describes the task.
    """

    name: str
    prepare: Callable[[SingleTokens, Choice], Draw]
    corruptions: tuple[str, ...]
    metric: str = "logit_diff"
    templates: Mapping[str, str] = field(default_factory=dict)
    summary: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TaskError(f"TaskBuilder: name is {self.name!r}: give a text such as 'opposites'")
        if not self.corruptions or isinstance(self.corruptions, str):
            named = "name at least one, as in ('other-name',)"
            raise TaskError(f"{self.name}: corruptions is {self.corruptions!r}: {named}")

    def make(
        self,
        words: SingleTokens,
        n: int,
        seed: int = 0,
        corruption: str | None = None,
        template: str | int | None = None,
    ) -> list[Pair]:
        """Return `n` pairs; the same seed gives the same pairs.

        Clean prompts repeat only if 50 further draws give no new one.

        Raises:
            TaskError: `n`, `seed`, the corruption or the template is wrong, or too few words are one token.
        """
        choice = Choice(self.corruption(corruption), self._chosen(template))
        if not isinstance(n, Integral) or n < 1:
            raise TaskError(f"{self.name}: n must be a whole number, at least 1, not {n!r}")
        if n > MOST_PAIRS:
            raise TaskError(f"{self.name}: n={n} is more pairs than can be run: give {MOST_PAIRS:,} at most")
        check_seed(seed)
        draw, rng = self.prepare(words, choice), random.Random(seed)
        pairs: list[Pair] = []
        seen: set[str] = set()
        for number in range(n):
            for _ in range(1 + _TRIES_FOR_A_NEW_PAIR):
                pair = draw(rng, number)
                if not isinstance(pair, Pair):
                    made = type(pair).__name__
                    raise TaskError(f"{self.name}: its generator returned a {made}: return a circuitfind.Pair")
                if pair.clean not in seen:
                    break
            seen.add(pair.clean)
            pairs.append(pair)
        return pairs

    def corruption(self, name: str | None) -> str:
        """Return the corruption of this name in its own spelling, or the default; raise TaskError if there is none."""
        if name is None:
            return self.corruptions[0]
        known = {plain(own).replace("-", ""): own for own in self.corruptions}
        key = plain(name).replace("-", "").removesuffix("counterfactual").replace("ioiflip", "ioflip")  # MIB's spelling
        if key not in known:
            raise TaskError(unknown(f"{self.name}: corruption", name, self.corruptions))
        return known[key]

    def _chosen(self, template: str | int | None) -> Mapping[str, str]:
        """Return the templates with this name ("abba-3") or this part of a name ("abba", 3); None: all."""
        if template is None:
            return self.templates
        key = plain(str(template))
        found = {name: text for name, text in self.templates.items() if key in (plain(name), *plain(name).split("-"))}
        if not self.templates:
            raise TaskError(f"{self.name}: this task has no templates: leave template={template!r} out")
        if not found:
            raise TaskError(unknown(f"{self.name}: template", template, self.templates))
        return found


def numbered(*patterns: str, prefix: str = "") -> dict[str, str]:
    """Name sentence patterns by their numbers, from 1."""
    return {f"{prefix}{number}": pattern for number, pattern in enumerate(patterns, start=1)}
