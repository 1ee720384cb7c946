"""`Record`: how a result was made (model, task, method, sign, seed, versions). Every file has it."""

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
ONCE_NO_EFFECT = "no effect: "  # the same prefix in older files
ONCE_BOS = {"tokenizer's own: added": "added by the tokenizer", "tokenizer's own: none": "none"}  # in older files
PAIR_DIGITS = 8
LIBRARIES = ("torch", "transformers", "nnsight", "numpy", "scipy")


def library_versions() -> dict[str, str]:
    """Return the versions of Python, circuitfind and the libraries that a result depends on."""
    own = {"python": platform.python_version(), "circuitfind": __version__}
    return own | {name: _version(name) for name in LIBRARIES}


@cache  # package metadata are files: reading them takes 30 ms
def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def fingerprints(clean: Iterable[str], corrupted: Iterable[str]) -> list[str]:
    """Return a hash of eight hexadecimal digits for each pair of prompts, by which results find their shared pairs."""
    texts = (f"{len(a)} {a}{b}".encode("utf-8", "replace") for a, b in zip(clean, corrupted, strict=True))
    return [blake2b(text, digest_size=PAIR_DIGITS // 2).hexdigest() for text in texts]


def numbered(keys: Iterable[Hashable]) -> np.ndarray:
    """Number the keys from 0 by first occurrence, equal keys alike, `[keys]`."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in keys], dtype=np.int64)


@dataclass(frozen=True)
class Record(NoFile):
    """How a result was made. `pairs`: the joined `fingerprints` of the pairs that were used, empty if these are not
    known; `settings`: options that only some methods have (steps, rule, tolerance, ...)."""

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
        """Return a copy with further settings."""
        return replace(self, settings={**self.settings, **more})

    def each_pair(self) -> list[str]:
        """Return the fingerprints of all pairs that were used."""
        return [self.pairs[start : start + PAIR_DIGITS] for start in range(0, len(self.pairs), PAIR_DIGITS)]

    @property
    def copies(self) -> np.ndarray | None:
        """`[pairs]`, as `BoundTask.copies`; None if the pairs are not known."""
        pairs = self.each_pair()
        return numbered(pairs) if len(pairs) == self.n_examples > 0 else None

    @property
    def n_distinct(self) -> int:
        """Number of pairs, with pairs of the same prompts counted once."""
        copies = self.copies
        return self.n_examples if copies is None else int(copies.max()) + 1

    def seen(self, judged: Record) -> int | None:
        """Return how many pairs of `judged` are among this record's pairs; None if either's pairs are not known."""
        mine = set(self.each_pair())
        return sum(pair in mine for pair in judged.each_pair()) if self.pairs and judged.pairs else None

    def seeing(self, other: Record) -> Record:
        """Return a copy with the pairs of both records; they are unknown if either's are."""
        both = dict.fromkeys([*self.each_pair(), *other.each_pair()])
        return replace(self, pairs="".join(both) if self.pairs and other.pairs else "")
