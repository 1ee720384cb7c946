"""What a result says of its own making: model, task, method, sign, seed, versions. Kept in every file."""

from __future__ import annotations

import platform
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from circuitfind.errors import NoFile
from circuitfind.version import __version__

SIGN = "effect: metric without ablation - metric with the edge ablated; positive = the edge supports the behaviour"
NO_EFFECT = "not an effect: "  # how the sign of all other scores begins
ONCE_NO_EFFECT = "no effect: "  # the same in older files
ONCE_BOS = {"tokenizer's own: added": "added by the tokenizer", "tokenizer's own: none": "none"}  # in older files
PAIR_DIGITS = 8
LIBRARIES = ("torch", "transformers", "nnsight", "numpy", "scipy")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on."""
    own = {"python": platform.python_version(), "circuitfind": __version__}
    return own | {name: _version(name) for name in LIBRARIES}


@cache  # package metadata are files: reading them takes 30 ms
def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def fingerprints(clean: Iterable[str], corrupted: Iterable[str]) -> list[str]:
    """Eight hexadecimal digits for each pair of prompts: enough to tell which pairs two results share."""
    texts = (f"{len(a)} {a}{b}".encode("utf-8", "replace") for a, b in zip(clean, corrupted, strict=True))
    return [blake2b(text, digest_size=PAIR_DIGITS // 2).hexdigest() for text in texts]


def numbered(keys: Iterable[Hashable]) -> np.ndarray:
    """A number for each key, the same for equal ones, in the order of their first."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in keys], dtype=np.int64)


@dataclass(frozen=True)
class Record(NoFile):
    """Where a number comes from. `pairs`: `fingerprints` of the pairs that were seen, end to end, empty where that is
    not known; `settings`: what only some methods have (steps, rule, tolerance, ...)."""

    model: str = ""
    task: str = ""
    n_examples: int = 0
    metric: str = ""
    method: str = ""
    ablation: str = "corrupted"
    direction: str = "noising"
    sign: str = SIGN
    seed: int = 0
    bos: str = ""
    pairs: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=library_versions)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bos", ONCE_BOS.get(self.bos, self.bos))

    @property
    def is_effect(self) -> bool:
        """Whether the scores are effects, in units of the metric; if not, `sign` says what they are."""
        return not self.sign.startswith((NO_EFFECT, ONCE_NO_EFFECT))

    def with_settings(self, **more: Any) -> Record:
        """A copy with further settings."""
        return replace(self, settings={**self.settings, **more})

    def each_pair(self) -> list[str]:
        """The fingerprint of every pair that was seen."""
        return [self.pairs[start : start + PAIR_DIGITS] for start in range(0, len(self.pairs), PAIR_DIGITS)]

    @property
    def copies(self) -> np.ndarray | None:
        """`[pairs]`, as `BoundTask.copies`; None where the pairs are not known."""
        pairs = self.each_pair()
        return numbered(pairs) if len(pairs) == self.n_examples > 0 else None

    @property
    def n_distinct(self) -> int:
        """How many pairs, those of the same prompts counted once."""
        copies = self.copies
        return self.n_examples if copies is None else int(copies.max()) + 1

    def seen(self, judged: Record) -> int | None:
        """How many of the pairs that `judged` holds are among this record's; None where either is not known."""
        mine = set(self.each_pair())
        return sum(pair in mine for pair in judged.each_pair()) if self.pairs and judged.pairs else None

    def seeing(self, other: Record) -> Record:
        """A copy that has seen the other record's pairs, too; what is unknown of either stays unknown."""
        both = dict.fromkeys([*self.each_pair(), *other.each_pair()])
        return replace(self, pairs="".join(both) if self.pairs and other.pairs else "")
