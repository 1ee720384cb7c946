"""Options that hold a number or one of a few words: what they may be, in the package's own words.

1. Typer is told that such an option is text (`as_text`), with what it may be as its metavar.
2. The text becomes the value that the group declares (`value_of`) where a verb's errors are caught, so a wrong one is
   said like any other bad input, in JSON too, and not in the words of the version of typer that happens to be there.
"""

from __future__ import annotations

import math
from copy import copy
from enum import StrEnum
from inspect import Parameter
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

from circuitfind.errors import CircuitfindError, unknown


def as_text(hint: Any, default: Any) -> tuple[Any, Any]:
    """An option's annotation and default as typer is told of them."""
    kind, option = _kind(hint), get_args(hint)[1]
    if kind is None:
        return hint, default
    told = copy(option)
    if option.metavar is None:
        told.metavar = "|".join(kind) if issubclass(kind, StrEnum) else "N" if kind is int else "X"
        told.metavar += "" if option.min is None else f">={option.min}"
    told.min = None
    text = str | None if get_origin(get_args(hint)[0]) is UnionType else str
    return Annotated[text, told], default if default in (None, Parameter.empty) else str(default)


def value_of(name: str, hint: Any, text: Any) -> Any:
    """What an option of this field and annotation holds, from what typer read.

    Raises:
        CircuitfindError: naming the option, what was given, and what may be.
    """
    kind = _kind(hint)
    if kind is None or text is None:
        return text
    option = get_args(hint)[1]
    spelled = next((word for word in option.param_decls if word.startswith("--")), f"--{name.replace('_', '-')}")
    if issubclass(kind, StrEnum):
        if text not in list(kind):
            raise CircuitfindError(unknown(spelled, text, [word.value for word in kind]))
        return kind(text)
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (option.min is not None and value < option.min):
        limit = "" if option.min is None else f", {option.min} or more"
        raise CircuitfindError(f"{spelled} {text}: give a {'whole ' if kind is int else ''}number{limit}")
    return value


def _kind(hint: Any) -> Any:
    """int, float or a set of words, where an annotation is one of these; else None."""
    declared = get_args(hint)[0]
    (kind, *others) = [each for each in (get_args(declared) or (declared,)) if each is not type(None)]
    known = isinstance(kind, type) and (kind in (int, float) or issubclass(kind, StrEnum))
    return kind if known and not others else None
