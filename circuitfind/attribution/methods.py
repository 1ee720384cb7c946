"""The registry of methods, and the checks of a call's arguments that need no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from circuitfind.attribution import atp_star, baselines, direct, eap, exact, ifr, weights
from circuitfind.attribution.method import LEVELS, Method, Request
from circuitfind.engine.ablation import ablation_of
from circuitfind.errors import ScoreError, entered, imported, unknown
from circuitfind.record import Record
from circuitfind.result import Result
from circuitfind.setting import DIRECTIONS, Keywords

# Default methods by level or kind of place; the first that the ablation allows is used. "eap-ig-inputs" is not the
# default for queries and keys: its estimates for keys are wrong, even in sign (figures in docs/methods.md).
DEFAULTS = {
    "edge": ("eap-ig-inputs",),
    "node": ("eap-ig-inputs", "atp"),
    "place": ("eap-ig-inputs", "atp"),
    "q": ("atp",),
    "k": ("atp",),
}
_EFFECTS = (
    eap.EAP,
    eap.ATP,
    atp_star.QK,
    eap.INPUTS,
    eap.ACTIVATIONS,
    eap.CLEAN_CORRUPTED,
    eap.RELP,
    eap.GIM,
    exact.METHOD,
)
_RANKINGS = (atp_star.STAR, direct.METHOD, baselines.HISP, ifr.METHOD)
_BASELINES = (baselines.ACTIVATION, weights.METHOD, baselines.RANDOM)
METHODS: dict[str, Method] = {method.name: method for method in (*_EFFECTS, *_RANKINGS, *_BASELINES)}


class MethodRow(NamedTuple):
    """A method's name, the levels that it scores, whether its scores are effects (if not, they only rank), its options
    with their defaults, its cost in passes through the model, its source and summary, and the calls that take it."""

    name: str
    levels: str
    effects: bool
    options: str
    cost: str
    source: str
    summary: str
    calls: str = ""

    @classmethod
    def of(cls, method: Method, level: str, calls: str) -> MethodRow:
        """Return a method's row; `effects` is about its scores at `level`."""
        options = ", ".join(f"{name}={value!r}" for name, value in method.options.items())
        about = (method.cost, method.source, method.summary, calls)
        return cls(method.name, ", ".join(method.levels), method.is_effect(level), options, *about)


@dataclass(frozen=True, eq=False, repr=False)
class Methods(Result):
    """A table of methods."""

    FORMAT, ROWS, SHOWN = "circuitfind.methods", "methods", ("names",)

    methods: tuple[MethodRow, ...]

    @property
    def names(self) -> str:
        return ", ".join(row.name for row in self.methods)

    def __repr__(self) -> str:
        return f"Methods({self.names})"


def register(method: Method) -> Method:
    """Register a method under its name, and return it. ScoreError if the name is taken, a level is unknown, or the
    method has neither score= nor points=."""
    if isinstance(method, Method) and not (set(method.levels) <= set(LEVELS) and (method.score or method.points)):
        raise ScoreError(f"method '{method.name}' needs score= or points=, and levels out of {', '.join(LEVELS)}")
    return entered(method, Method, METHODS, ScoreError, "method '{}' exists: give yours another name")


def names(level: str) -> list[str]:
    """Return the names of the methods that score a level: "edge", "node" or "place"."""
    return [name for name, method in METHODS.items() if level in method.levels]


def default_of(kind: str, ablation: str | None = None) -> str:
    """Return the name of the default method for a level ("edge", "node") or a kind of place, under an ablation."""
    twin, known = ablation_of(ablation or "corrupted").twin, DEFAULTS.get(kind, DEFAULTS["place"])
    return next((name for name in known if twin or not METHODS[name].twin), known[0])


def method_of(
    method: str | Method | None, level: str = "edge", what: str | None = None, ablation: str | None = None
) -> Method:
    """Return the method of a name or of "package.module:name"; if `method` is None, the default under the ablation.
    ScoreError if there is no such method, or it does not score this level or kind of place."""
    if level not in ("edge", "node"):
        raise ScoreError(f"level '{level}' is unknown: use 'edge' or 'node'")
    if what is not None and level != "node":
        raise ScoreError(f"what='{what}' scores places of a sweep: use level='node'")
    kind = "place" if what is not None else level
    if isinstance(method, str) and ":" in method:
        method = imported("method", method, Method, ScoreError)
    found = method if isinstance(method, Method) else METHODS.get(method or default_of(what or level, ablation))
    if found is None:
        spellings = {one.name: one.spellings for one in METHODS.values() if kind in one.levels}
        raise ScoreError(unknown("method", method, names(kind), spellings))
    if kind not in found.levels:
        scored = f"{level}s" if what is None else f"places of a sweep (what='{what}')"
        known = f"{', '.join(names(kind))}{_elsewhere(found, kind)}"
        raise ScoreError(f"method '{found.name}' does not score {scored}: use one of {known}")
    if what is not None and found.whats is not None and what not in found.whats:
        kinds = " and ".join(f"'{kind}'" for kind in found.whats)
        raise ScoreError(f"method '{found.name}' scores only {kinds}: use method='atp' for what='{what}'")
    return found


def _elsewhere(method: Method, kind: str) -> str:
    """Return the end of an error message: the level at which this method does have scores."""
    if kind != "place" and method.levels == ("place",):
        whats = " or ".join(f"'{what}'" for what in method.whats or ())
        return f", or ask it for places: level='node' and what={whats}"
    if kind == "edge" and "node" in method.levels:
        return ", or level='node' for its scores of nodes"
    return ", or level='edge' for its scores of edges" if kind == "node" and "edge" in method.levels else ""


def request_of(
    method: Method, level: str, what: str | None, asked: Mapping[str, Any], **ways: Any
) -> tuple[Request, Keywords]:
    """Check a call's arguments as far as possible without a model; return its `Request` and the keywords of the run.

    `asked`: keywords of the run and options of the method; `ways`: further fields of `Request`. ScoreError if the
    method cannot do what is asked, TypeError for a keyword that no method has.
    """
    setting = {name: value for name, value in asked.items() if name in Keywords.__annotations__}
    given = {name: value for name, value in asked.items() if name not in setting and value is not None}
    for name, value in given.copy().items():
        if name not in method.options:
            owners = [other.name for other in METHODS.values() if name in other.options]
            if not owners:
                known = [*method.options, *Keywords.__annotations__]
                raise TypeError(f"method '{method.name}': {unknown('keyword', name, known)}")
            if value is False:  # the same as not given
                del given[name]
                continue
            raise ScoreError(f"{name}={value!r} is an option of {', '.join(owners)}: method '{method.name}' has none")
    options = {**method.options, **given}
    if method.check is not None:
        method.check(options)
    if ways.get("layers") is not None and what is None:
        raise ScoreError("layers= belongs to the places of a sweep: give what=, such as what='resid'")
    if ways.get("by_span") and what is None and level == "node":
        raise ScoreError("by_span=True is for edges and for places of a sweep: give what=, such as what='resid'")
    if ways.get("ungrouped"):
        _check_ungrouped(method, level)
    if level == "edge":
        _check_places(method, ways)
    elif ways.get("by_position") and what is None and not method.by_position:
        known = [one.name for one in METHODS.values() if one.by_position and "node" in one.levels]
        raise ScoreError(f"method '{method.name}' has no scores by position that add up: use one of {', '.join(known)}")
    _check_setting(method, setting)
    return Request("place" if what is not None else level, options, what or "", **ways), Keywords(**setting)  # type: ignore[typeddict-item]


def _check_places(method: Method, ways: Mapping[str, Any]) -> None:
    """Raise ScoreError if edge scores by position or span are asked of a method that has none."""
    if ways.get("by_position") and ways.get("by_span"):
        raise ScoreError("by_position=True and by_span=True are two ways to divide the prompts: give one")
    if (ways.get("by_position") or ways.get("by_span")) and method.points is None:
        known = [one.name for one in METHODS.values() if "edge" in one.levels and one.points]
        raise ScoreError(f"method '{method.name}' has no scores of edges by position: use one of {', '.join(known)}")


def _check_ungrouped(method: Method, level: str) -> None:
    if level != "edge":
        raise ScoreError("ungrouped=True splits the edges into shared keys and values: leave level='node' out")
    if method.points is None and not method.ungrouped:
        known = [one.name for one in METHODS.values() if level in one.levels and (one.points or one.ungrouped)]
        raise ScoreError(
            f"method '{method.name}' does not score keys and values by query head (ungrouped=True): use one of"
            f" {', '.join(known)}"
        )


def check_made(record: Record, asked: Mapping[str, Any]) -> Keywords:
    """Check that scores were made with the method and options in `asked` (`method`, its options, keywords of the run),
    and return the keywords of the run. ScoreError names the first difference."""
    for name, value in asked.items():
        made = record.method if name == "method" else record.settings.get(name)
        value = value.name if isinstance(value, Method) else value
        if value not in (None, made) and name not in Keywords.__annotations__:
            raise ScoreError(f"these scores were made with {name}={made!r}, not {value!r}: leave one of them out")
    rest: Any = {name: value for name, value in asked.items() if name in Keywords.__annotations__}
    run: Keywords = rest
    return run


def _check_setting(method: Method, asked: Mapping[str, Any]) -> None:
    """Raise ScoreError if the method cannot be used with the ablation, or the ablation with the direction."""
    ablation = ablation_of(asked.get("ablation") or "corrupted")
    direction = asked.get("direction") or DIRECTIONS[0]
    if direction in DIRECTIONS:
        ablation.check_direction(direction)
    if method.twin and not ablation.twin:
        between = "interpolates between the clean and the corrupted run"
        raise ScoreError(f"method '{method.name}' {between}: it needs ablation='corrupted'")
