"""Cells of tables: numbers as short text, a dash for unknown values, and the columns of results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.text import Text

from circuitfind.errors import count as count

Cell = str | Text


class Right(str):
    """A cell of a table that is aligned to the right, as numbers are."""

    __slots__ = ()


DASH = Right("–")


def number(value: float | None) -> Right:
    """Three significant digits, never in exponents where a plain number is as short."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 2
        return Right(f"{value:.{min(digits, 4)}f}")
    return Right(f"{value:.1e}" if abs(value) < 1 else f"{value:,.0f}")


def fixed(value: float | None, digits: int = 3) -> Right:
    """A number with fixed decimals, for faithfulness and correlations."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{value:.{digits}f}"
    return Right(text.removeprefix("-") if not float(text) else text)  # no -0.000


def whole(value: int) -> Right:
    return Right(f"{value:,}")


def percent(value: float, digits: int = 0) -> Right:
    return Right(f"{value:.{digits}%}") if math.isfinite(value) else DASH


def interval(ends: Sequence[float], digits: int = 3) -> Right:
    """`0.771 to 0.879`."""
    return DASH if not all(map(math.isfinite, ends)) else Right(" to ".join(fixed(end, digits) for end in ends))


def chance(value: float) -> Right:
    return DASH if math.isnan(value) else Right(f"{value:.3f}" if value >= 1e-3 else f"{value:.1e}")


def effect(value: float, digits: int) -> Text:
    """An effect with its sign; negative ones in red."""
    text = fixed(value, digits)
    signed = text if text.startswith(("-", DASH)) else f"+{text}"
    return Text(signed, style="red" if value < 0 else "", justify="right")


def digits_for(values: Iterable[float]) -> int:
    """Decimals that show four digits of the largest value, so that a column is aligned."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return min(max(3 - math.floor(math.log10(largest)), 0), 8) if largest else 3


def size(n_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"


def some(shown: int, total: int) -> str:
    """Ending of a title if the table does not show all rows."""
    return f"; {shown} of {total:,}" if total > shown else ""


# -------------------------------------------------------------------- columns of results
BETWEEN = "95% interval"
EFFECTS = {"effect", "estimate", "exact", "difference", "there"}
PLAIN = {"circuit", "model"}  # metrics, with the decimals of the effects beside them
NAMED = 6  # names shown of a set
HEADINGS = {"interval": BETWEEN, "wrong_sign": "", "verdict": "", "superfluous": ""}


def _verdict(supports: bool | None) -> Text:
    if supports is None:
        return Text("not tested", style="dim")
    return Text("for the circuit", style="green") if supports else Text("against it", style="red")


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names[:NAMED]) + (f", and {len(names) - NAMED} more" if len(names) > NAMED else "")


FORMS: dict[str, Callable[[Any], Cell]] = {
    **dict.fromkeys(("asked", "n_edges", "n_pairs", "opposing"), whole),
    **dict.fromkeys(("p_value", "adjusted"), chance),
    **dict.fromkeys(("accuracy", "frequency"), percent),
    "fraction": lambda value: percent(value, 1),
    "share": lambda value: fixed(value, 2),
    "kl": number,
    "removed": _names,
    "supports": _verdict,
    "wrong_sign": lambda value: Text("wrong sign" if value else "", style="yellow"),
    "verdict": lambda value: Text(value, style="yellow"),
    "superfluous": lambda value: Text("superfluous" if value else "", style="yellow"),
}
