"""What a built-in behaviour is: a name, a source, a default metric, and a seeded maker of rows.

A behaviour knows text only. It asks `SingleTokens` which of its words the model's tokenizer says in one
token, draws rows with `random.Random(seed)` (the same on every machine) and leaves tokenising, answers' ids
and metrics to the task.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable
from dataclasses import dataclass

from circuitfind.errors import TaskError
from circuitfind.tasks.rows import Row
from circuitfind.tasks.words import SingleTokens

Draw = Callable[[random.Random, int], Row]
"""Draws one row; the number counts the rows kept so far (used to alternate orders and templates)."""

_TRIES_FOR_A_NEW_ROW = 50


@dataclass(frozen=True)
class Behaviour:
    """One behaviour a language model can show, as pairs of prompts.

    `corruptions` names the ways to make the corrupted twin, the default first. `prepare` looks up the words
    the tokenizer can say, once, and returns the function that draws single rows.
    """

    name: str
    summary: str
    source: str
    metric: str
    corruptions: tuple[str, ...]
    prepare: Callable[[SingleTokens, str], Draw]

    def make(self, words: SingleTokens, n: int, seed: int = 0, corruption: str | None = None) -> list[Row]:
        """`n` rows, distinct as far as there are enough of them; the same seed gives the same rows.

        Raises TaskError when `n` is below 1, the corruption is unknown, or the tokenizer lacks the words.
        """
        chosen = self.corruptions[0] if corruption is None else corruption
        if chosen not in self.corruptions:
            raise TaskError(
                f"{self.name}: no corruption {chosen!r}{did_you_mean(chosen, self.corruptions)};"
                f" there are {', '.join(self.corruptions)}"
            )
        if n < 1:
            raise TaskError(f"{self.name}: n must be at least 1, not {n}")
        draw = self.prepare(words, chosen)
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


def did_you_mean(name: str, known: tuple[str, ...] | list[str]) -> str:
    """A hint like " (did you mean 'ioi'?)", or nothing when no known name is close."""
    close = difflib.get_close_matches(name.lower().replace("_", "-"), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
