"""A sentence pattern filled in, and where some of its words stand.

A word may come several times, and inside other words, so a span is named by the word and by which of its occurrences is
meant: `("John", 2)`, as `circuitfind.tasks.spans` reads it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import NamedTuple

from circuitfind.tasks.spans import occurrences


class Filled(NamedTuple):
    """A prompt, and by span's name its text and which occurrence of it, counted from 1."""

    text: str
    spans: dict[str, tuple[str, int]]


def filled(pattern: str, names: Mapping[str, Sequence[str]], **words: str) -> Filled:
    """Fills in a pattern.

    Args:
        pattern: as for `str.format`, with plain fields only.
        names: by field, the span's name for each time that the field occurs.
    """
    text, found = "", []
    times: dict[str, int] = defaultdict(int)
    for literal, field, _, _ in Formatter().parse(pattern):
        text += literal
        if field is None:
            continue
        if times[field] < len(names.get(field, ())):
            found.append((names[field][times[field]], len(text), words[field]))
        times[field] += 1
        text += words[field]
    return Filled(text, {name: (word, occurrences(text, word).index(at) + 1) for name, at, word in found})
