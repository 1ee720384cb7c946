"""The registry of methods: what there is, and what can be asked of each; known before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from circuitfind.attribution import (
    activation,
    clean_corrupted,
    direct,
    eap,
    eap_ig_activations,
    eap_ig_inputs,
    exact,
    grad_drop,
    hisp,
    ifr,
    qk_fix,
    random_scores,
    relp,
    weights,
)
from circuitfind.attribution.method import LEVELS, Method, Request
from circuitfind.engine.ablation import ablation_of
from circuitfind.errors import ScoreError
from circuitfind.setting import DIRECTIONS, Keywords

DEFAULTS = {"edge": "eap-ig-inputs", "node": "atp", "place": "atp"}
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        eap.EAP,
        eap.ATP,
        qk_fix.METHOD,
        eap_ig_inputs.METHOD,
        eap_ig_activations.METHOD,
        clean_corrupted.METHOD,
        relp.METHOD,
        exact.METHOD,
        grad_drop.METHOD,
        direct.METHOD,
        hisp.METHOD,
        ifr.METHOD,
        activation.METHOD,
        weights.METHOD,
        random_scores.METHOD,
    )
}


def register(method: Method) -> Method:
    """Gives a method of your own its name, in this process.

    Raises:
        ScoreError: the name is taken, or the method scores nothing.
    """
    if METHODS.get(method.name, method) is not method:
        raise ScoreError(f"method '{method.name}' exists: give yours another name")
    if not set(method.levels) <= set(LEVELS) or (method.score is None and method.points is None):
        raise ScoreError(f"method '{method.name}': levels are of {', '.join(LEVELS)}, and it needs score= or points=")
    return METHODS.setdefault(method.name, method)


def names(level: str) -> list[str]:
    """The methods that score an "edge", a "node" or a "place"."""
    return [name for name, method in METHODS.items() if level in method.levels]


def method_of(method: str | Method | None, level: str = "edge", what: str | None = None) -> Method:
    """The method of a name, or of "package.module:name" in code of your own; the default one where none is named.

    Raises:
        ScoreError: there is none, or it has no scores at this level.
    """
    if level not in ("edge", "node"):
        raise ScoreError(f"level '{level}' is unknown: use 'edge' or 'node'")
    if what is not None and level != "node":
        raise ScoreError(f"what='{what}' scores places of a sweep: use level='node'")
    kind = "place" if what is not None else level
    if isinstance(method, str) and ":" in method:
        method = _imported(method)
    found = method if isinstance(method, Method) else METHODS.get(method or DEFAULTS[kind])
    if found is None or kind not in found.levels:
        scored = f"{level}s" if what is None else f"places of a sweep (what='{what}')"
        name = method.name if isinstance(method, Method) else method
        raise ScoreError(
            f"method '{name}' does not score {scored}: use one of {', '.join(names(kind))}{_elsewhere(found, kind)}"
        )
    if what is not None and found.whats is not None and what not in found.whats:
        kinds = " and ".join(f"'{kind}'" for kind in found.whats)
        raise ScoreError(f"method '{found.name}' mends the estimates of {kinds}: use method='atp' for what='{what}'")
    return found


def _imported(path: str) -> Method:
    home, _, name = path.partition(":")
    try:
        found = getattr(import_module(home), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ScoreError(f"method '{path}' cannot be imported: {error}") from None
    if not isinstance(found, Method):
        raise ScoreError(f"method '{path}' is a {type(found).__name__}, not a circuitfind.Method")
    return found


def _elsewhere(method: Method | None, kind: str) -> str:
    """What else to ask of a method that has scores of another kind."""
    if method is None:
        return ""
    if kind != "place" and method.levels == ("place",):
        whats = " or ".join(f"'{what}'" for what in method.whats or ())
        return f", or ask it for places: level='node' and what={whats}"
    if kind == "edge" and "node" in method.levels:
        return ", or level='node' for its scores of nodes"
    return ", or level='edge' for its scores of edges" if kind == "node" and "edge" in method.levels else ""


def request_of(
    method: Method, level: str, what: str | None, asked: Mapping[str, Any], **ways: Any
) -> tuple[Request, Keywords]:
    """What is asked of a method, checked as far as it can be without a model, and the keywords of the run.

    Args:
        asked: keywords of the run and options of the method.
        ways: further fields of `Request`.

    Raises:
        ScoreError: naming what the method cannot do.
        TypeError: a keyword that no method has.
    """
    setting = {name: value for name, value in asked.items() if name in Keywords.__annotations__}
    given = {k: v for k, v in asked.items() if k not in setting and v is not None and v is not False}
    for name, value in given.items():
        if name not in method.options:
            owners = [other.name for other in METHODS.values() if name in other.options]
            if not owners:
                raise TypeError(f"keyword '{name}' is unknown to method '{method.name}'")
            raise ScoreError(f"{name}={value!r} is an option of {', '.join(owners)}: method '{method.name}' has none")
    options = {**method.options, **given}
    if method.check is not None:
        method.check(options)
    for name, given_here in (("layers=", ways.get("layers") is not None), ("by_span=True", ways.get("by_span"))):
        if given_here and what is None:
            raise ScoreError(f"{name} belongs to the places of a sweep: give what=, such as what='resid'")
    if ways.get("by_position") and level == "edge":
        raise ScoreError("by_position=True scores nodes: use level='node'")
    if ways.get("by_position") and what is None and not method.by_position:
        known = [one.name for one in METHODS.values() if one.by_position and "node" in one.levels]
        raise ScoreError(f"method '{method.name}' has no scores by position that add up: use one of {', '.join(known)}")
    _check_setting(method, setting)
    return Request("place" if what is not None else level, options, what or "", **ways), Keywords(**setting)  # type: ignore[typeddict-item]


def _check_setting(method: Method, asked: Mapping[str, Any]) -> None:
    """Refuses an ablation or direction that the method cannot do."""
    ablation = ablation_of(asked.get("ablation") or "corrupted")
    direction = asked.get("direction") or DIRECTIONS[0]
    if direction in DIRECTIONS:
        ablation.check_direction(direction)
    if method.twin and not ablation.twin:
        raise ScoreError(
            f"method '{method.name}' goes between the clean and the corrupted run: it needs ablation='corrupted'"
        )
