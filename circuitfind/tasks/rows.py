"""One example of a behaviour as plain text, before any tokenizer has seen it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

NO_SPANS: Mapping[str, tuple[str, int]] = MappingProxyType({})


class Row(NamedTuple):
    """A pair of prompts and what the model should and should not say after the clean one.

    `clean` shows the behaviour; `corrupted` is its minimally different twin, of the same token length.
    `answers` and `wrong` are continuations (one or several); with `flips=True` the corrupted prompt
    makes the wrong answers right, so the metric should change its sign there, not only fall. `spans` name words of
    the clean prompt: name -> (word, which of its occurrences, from 1), as `circuitfind.tasks.filled` makes them.
    """

    clean: str
    corrupted: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]
    flips: bool = False
    spans: Mapping[str, tuple[str, int]] = NO_SPANS
