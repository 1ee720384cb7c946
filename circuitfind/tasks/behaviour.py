"""What a built-in behaviour is: a name, a source, a default metric, and a seeded maker of rows.

A behaviour knows text only. It asks `SingleTokens` which of its words the model's tokenizer says in one
token, draws rows with `random.Random(seed)` (the same on every machine) and leaves tokenising, answers' ids
and metrics to the task.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import NamedTuple

from circuitfind.errors import TaskError
from circuitfind.tasks.bound import check_seed
from circuitfind.tasks.rows import Row
from circuitfind.tasks.words import SingleTokens

Draw = Callable[[random.Random, int], Row]
"""Draws one row; the number counts the rows kept so far (used to alternate orders and templates)."""

_TRIES_FOR_A_NEW_ROW = 50


class Choice(NamedTuple):
    """What was asked for: one corruption, and the templates to draw from (name -> pattern, all by default)."""

    corruption: str
    templates: Mapping[str, str]

    @property
    def patterns(self) -> tuple[str, ...]:
        """The chosen sentence patterns, in their order."""
        return tuple(self.templates.values())


@dataclass(frozen=True)
class Behaviour:
    """One behaviour a language model can show, as pairs of prompts.

    `corruptions` names the ways to make the corrupted twin, the default first; `templates` names the sentence
    patterns. `prepare` looks up the words the tokenizer can say, once, and returns the function that draws single rows.
    """

    name: str
    summary: str
    source: str
    metric: str
    corruptions: tuple[str, ...]
    prepare: Callable[[SingleTokens, Choice], Draw]
    templates: Mapping[str, str] = field(default_factory=dict)

    def make(
        self,
        words: SingleTokens,
        n: int,
        seed: int = 0,
        corruption: str | None = None,
        template: str | int | None = None,
    ) -> list[Row]:
        """`n` rows, distinct as far as there are enough of them; the same seed gives the same rows.

        Raises TaskError when `n` or `seed` is no such number, the corruption or template is unknown, or the tokenizer
        lacks the words.
        """
        choice = Choice(self.corruption(corruption), self._chosen(template))
        if not isinstance(n, Integral) or n < 1:
            raise TaskError(f"{self.name}: n must be a whole number, at least 1, not {n!r}")
        check_seed(seed)
        draw = self.prepare(words, choice)
        rng = random.Random(seed)
        rows: list[Row] = []
        seen: set[str] = set()
        for number in range(n):
            row = draw(rng, number)
            for _ in range(_TRIES_FOR_A_NEW_ROW):
                if row.clean not in seen:
                    break
                row = draw(rng, number)
            seen.add(row.clean)
            rows.append(row)
        return rows

    def corruption(self, name: str | None) -> str:
        """The corruption of this name (underscores count as hyphens), or the default."""
        if name is None:
            return self.corruptions[0]
        key = plain(name).removesuffix("-counterfactual").replace("ioi-flip", "io-flip")  # as MIB's data spell them
        if key not in self.corruptions:
            raise TaskError(
                f"{self.name}: no corruption {name!r}{did_you_mean(key, self.corruptions)};"
                f" there are {', '.join(self.corruptions)}"
            )
        return key

    def _chosen(self, template: str | int | None) -> Mapping[str, str]:
        """The templates of this name, or of this part of a name: "abba-3", "abba", 3."""
        if template is None:
            return self.templates
        key = plain(str(template))
        found = {name: pattern for name, pattern in self.templates.items() if key == name or key in name.split("-")}
        if not found:
            known = tuple(self.templates)
            there = f"there are {', '.join(known)}" if known else "it has one form only: leave template out"
            raise TaskError(f"{self.name}: no template {template!r}{did_you_mean(key, known)}; {there}")
        return found


def numbered(patterns: Iterable[str], prefix: str = "") -> dict[str, str]:
    """Names for sentence patterns: their numbers, from 1."""
    return {f"{prefix}{number}": pattern for number, pattern in enumerate(patterns, start=1)}


def plain(name: str) -> str:
    """A name as it is looked up."""
    return name.strip().lower().replace("_", "-")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """A hint like " (did you mean 'ioi'?)", or nothing when no known name is close."""
    close = difflib.get_close_matches(plain(name), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
