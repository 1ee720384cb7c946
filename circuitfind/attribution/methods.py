"""Which method scores what, and what can be asked of it; known before a model is loaded."""

from __future__ import annotations

from circuitfind.attribution import qk_fix
from circuitfind.engine.ablation import check_direction
from circuitfind.errors import ScoreError

AVERAGED = ("eap-ig-inputs", "eap-ig-activations", "clean-corrupted")
EDGE_METHODS = ("eap", *AVERAGED, "relp", "exact", "ifr", "activation", "weights", "random")
NODE_METHODS = ("atp", *AVERAGED, "relp", "exact", "atp-star", "direct", "hisp", "activation", "random")
PLACE_METHODS = ("atp", "atp-qk", "atp-star", "eap-ig-inputs", "clean-corrupted", "relp", "exact")
ONE_GRADIENT = ("eap", "atp", "atp-qk", "atp-star", "relp", "hisp")
BY_POSITION = ("atp", *AVERAGED, "relp", "exact", "activation")


def check_method(
    method: str | None,
    level: str,
    what: str | None,
    ablation: str,
    direction: str,
    by_position: bool | None,
    normalise: bool,
) -> str:
    """The method, the default one if none is named, where it can do what is asked of it.

    Raises:
        ScoreError: naming what it cannot.
    """
    method = method or ("eap-ig-inputs" if level == "edge" else "atp")
    if level not in ("edge", "node"):
        raise ScoreError(f"level '{level}' is unknown: use 'edge' or 'node'")
    if what is not None and level != "node":
        raise ScoreError(f"what='{what}' scores places of a sweep: use level='node'")
    known = EDGE_METHODS if level == "edge" else NODE_METHODS if what is None else PLACE_METHODS
    if method not in known:
        scored = f"{level}s" if what is None else f"places of a sweep (what='{what}')"
        raise ScoreError(
            f"method '{method}' does not score {scored}: use one of {', '.join(known)}{_elsewhere(method, level, what)}"
        )
    if method == "atp-qk" and what not in qk_fix.KINDS:
        raise ScoreError(f"method 'atp-qk' mends the estimates of 'q' and 'k': use method='atp' for what='{what}'")
    check_direction(direction, ablation)
    if ablation != "corrupted" and method in AVERAGED:
        raise ScoreError(
            f"method '{method}' goes between the clean and the corrupted run: it needs ablation='corrupted'"
        )
    if by_position and level == "edge":
        raise ScoreError("by_position=True scores nodes: use level='node'")
    if by_position and what is None and method not in BY_POSITION:
        raise ScoreError(
            f"method '{method}' has no scores by position that add up: use one of {', '.join(BY_POSITION)}"
        )
    if normalise and method != "hisp":
        raise ScoreError(f"normalise=True divides 'hisp' scores by their layer's norm: '{method}' has no such form")
    return method


def _elsewhere(method: str, level: str, what: str | None) -> str:
    """What else to ask of a method that has scores of another kind."""
    if what is None and method in PLACE_METHODS and method not in NODE_METHODS:
        return ", or ask it for places: level='node' and what=" + " or ".join(f"'{kind}'" for kind in qk_fix.KINDS)
    if level == "edge" and method in NODE_METHODS:
        return ", or level='node' for its scores of nodes"
    return ", or level='edge' for its scores of edges" if level == "node" and method in EDGE_METHODS else ""
