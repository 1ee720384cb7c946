"""Errors for bad input. Each message names what is wrong, and the remedy."""

from __future__ import annotations

import re
import shlex
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from numbers import Integral
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

_LISTED = 40  # names that a message lists at most
_OWN = (__name__.partition(".")[0], "contextlib")  # a block's `with` enters the package through contextlib


class CircuitfindError(Exception):
    """Base class of all errors due to bad input; the command line prints them without a traceback."""


class TaskError(CircuitfindError):
    """A task, prompt, answer or metric cannot be used as given."""


class ModelError(CircuitfindError):
    """A model cannot be loaded, is not covered, or failed its self-check."""


class FileError(CircuitfindError):
    """A file is missing, has another format, or has invalid content."""


class ScoreError(CircuitfindError):
    """Scores cannot be computed or used: NaN values, a vanishing gradient, a graph that does not fit."""


class ProcessError(CircuitfindError):
    """One of the processes that divide a call is lost, or they cannot connect. `first`: this process is the first of
    those that are left, and reports the error for all."""

    def __init__(self, text: str, first: bool = True) -> None:
        super().__init__(text)
        self.first = first


class CircuitfindWarning(UserWarning):
    """A warning that a result may mislead; the command line prints it as one line."""


class NoFile:
    """Base class of public classes that cannot be saved: `save` raises an error that names what to save (`INSTEAD`).

    Without it, `save` would be nnsight's, which it adds to every Python object, with an unrelated error.
    """

    INSTEAD = "save the scores, circuit or other result that holds it"

    def save(self, *_: Any, **__: Any) -> NoReturn:
        """Raise a FileError that names what to save instead."""
        raise FileError(f"a {type(self).__name__} has no file of its own: {self.INSTEAD}")


def warn(text: str) -> None:
    """Issue a `CircuitfindWarning` at the user's line, the innermost outside of the package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OWN:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, CircuitfindWarning, stacklevel=level)


def plain(name: str) -> str:
    """Return a name in the form in which it is looked up: lower case, with hyphens for underscores and spaces."""
    return "-".join(name.strip().lower().replace("_", " ").split())


def unknown(what: str, name: object, known: Iterable[str], spellings: Mapping[str, Iterable[str]] | None = None) -> str:
    """Return the message for an unknown name. It lists the known names in their order.

    `what`: the kind of thing; `spellings`: for some known names, their names in other tools.

    >>> unknown("method", "eap_ig", ["acdc", "eap-ig-inputs"])
    "method 'eap_ig' is unknown: did you mean 'eap-ig-inputs'? Known: acdc, eap-ig-inputs"
    """
    names = list(known)
    keys = {plain(other): own for own, others in (spellings or {}).items() for other in others}
    keys |= {plain(other): other for other in names}
    close = get_close_matches(plain(str(name)), keys, n=1)
    hint = f": did you mean '{keys[close[0]]}'?" if close else "."
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return f"{what} {name!r} is unknown{hint} Known: {', '.join(names[:_LISTED])}{more}"


def no_character(text: str) -> str:
    """Return what is wrong with text that contains half of a surrogate pair, which tokenizers and files refuse; for
    other text an empty string."""
    found = re.search("[\ud800-\udfff]", text)
    if found is None:
        return ""
    around = ascii(text[max(0, found.start() - 20) : found.end() + 20])
    return f"{around} holds half of a surrogate pair, which is no character: remove it from the text"


def imported(what: str, path: str, kind: type[T], error: type[CircuitfindError]) -> T:
    """Import an object of the user by "package.module:name". Raises `error` if there is none, or it is not a `kind`."""
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as fault:
        raise error(f"{what} '{path}' cannot be imported: {fault}") from None
    if not isinstance(found, kind):
        raise error(f"{what} '{path}' is a {type(found).__name__}, not a circuitfind.{kind.__name__}")
    return found


def entered(
    record: Any,
    kind: type[T],
    registry: dict[str, T],
    error: type[CircuitfindError],
    taken: str,
    name: str | None = None,
    fixed: Collection[str] | None = None,
) -> T:
    """Enter a record of the user into a registry, and return it. Raises `error` if it is not a `kind`, or its name is
    taken.

    Args:
        taken: the message if the name is taken, with `{}` for the name.
        name: by default the record's own.
        fixed: the names that are taken; records with other names are replaced. By default the names of all other
            records are taken.
    """
    if not isinstance(record, kind):
        raise error(f"register: {record!r} is not a circuitfind.{kind.__name__}")
    name = getattr(record, "name", "") if name is None else name
    other_has_it = registry.get(name, record) is not record
    if other_has_it if fixed is None else name in fixed:
        raise error(taken.format(name))
    registry[name] = record
    return record


def count(n: int, what: str) -> str:
    """Return a number with its noun: `1 pair`, `2,000 pairs`."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def installing(*packages: str) -> str:
    """Return the shell command that installs packages into the environment of this process."""
    return f"{shlex.quote(sys.executable)} -m pip install {' '.join(packages)}"


def check_count(name: str, value: object, least: int = 0, most: int | None = None) -> None:
    """Raise a ScoreError if a value is not a whole number from `least` to `most` (None: no limit)."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):  # type: ignore[operator]
        limit = "or more" if most is None else f"to {most:,}"
        raise ScoreError(f"{name}={value!r}: give a whole number, {least} {limit}")
