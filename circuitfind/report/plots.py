"""The page's plots as SVG: faithfulness by size, exact against estimated effects, random circuits; and their axes.

Every mark has a tooltip with its numbers. Colours come from the page's style sheet. An axis is `linear`, `log`
(positive values only) or `root` (sign times square root, for effects that fall off steeply), with round ticks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from circuitfind.export.arrows import signed

if TYPE_CHECKING:
    from circuitfind.evaluation.verify import EdgeCheck

Scale = Literal["linear", "log", "root"]
STEPS = (1.0, 2.0, 5.0)
WIDTH, HEIGHT = 480, 320
STAGES = ("start", "re-scored", "grid", "bisection", "pruning")


def curve(
    points: Sequence[Any],
    chosen: tuple[int, float] | None,
    tolerance: float | None,
    frontier: Sequence[tuple[int, float]] = (),
) -> str:
    """Faithfulness by number of edges (log scale), a mark for each circuit tried (`n_edges`, `faithfulness`, `stage`).

    Args:
        chosen: edges and faithfulness of the circuit that was chosen.
        tolerance: half the width of the band around 1 that counts as faithful.
        frontier: `(edges, faithfulness)` of the points on the line; by default all circuits tried.
    """
    known = sorted((p for p in points if math.isfinite(p.faithfulness)), key=lambda p: (p.n_edges, p.faithfulness))
    band, all_tried = tolerance or 0.0, [(p.n_edges, p.faithfulness) for p in known] + ([chosen] if chosen else [])
    sizes = [max(n_edges, 1) for n_edges, _ in all_tried]
    values = [faithfulness for _, faithfulness in [*all_tried, *frontier]] + [0.0, 1 - band, 1 + band]
    x = ScaledAxis(*around(sizes or [1, 10], "log"), 52, WIDTH - 12, "log")
    y = ScaledAxis(*around(values), HEIGHT - 46, 12)
    parts = frame(x, y, "edges in the circuit", "faithfulness")
    if band:
        top, bottom = y.at(1 + band), y.at(1 - band)
        size = f'width="{x.end - x.start}" height="{bottom - top:.1f}"'
        parts.append(f'<rect class="tolerance" x="{x.start}" y="{top:.1f}" {size}/>')
    parts.append(_line("reference", (x.start, y.at(1)), (x.end, y.at(1))))
    line = [(n, f) for n, f in frontier if math.isfinite(f)] or [(p.n_edges, p.faithfulness) for p in known]
    trail = " ".join(f"{x.at(max(n_edges, 1)):.1f},{y.at(faithfulness):.1f}" for n_edges, faithfulness in line)
    parts.append(f'<polyline class="trail" points="{trail}"/>')
    for p in known:
        said = f"{p.n_edges:,} edges: faithfulness {p.faithfulness:.3f} ({p.stage})"
        parts.append(_mark(p.stage, x.at(max(p.n_edges, 1)), y.at(p.faithfulness), said))
    if chosen:
        said = f"the circuit: {chosen[0]:,} edges, faithfulness {chosen[1]:.3f}"
        at = f'cx="{x.at(max(chosen[0], 1)):.1f}" cy="{y.at(chosen[1]):.1f}"'
        parts.append(f'<circle class="chosen" {at} r="8"><title>{said}</title></circle>')
    return _svg(parts, HEIGHT, f"Faithfulness of {len(known)} circuits by their number of edges")


def scatter(checks: Sequence[EdgeCheck]) -> str:
    """Exact against estimated effect on square-root scales; red crosses differ in sign."""
    known = [c for c in checks if math.isfinite(c.estimate) and math.isfinite(c.exact)]
    values = [value for c in known for value in (c.estimate, c.exact)]
    low, high = around([0.0, *values])
    x, y = ScaledAxis(low, high, 58, WIDTH - 12, "root"), ScaledAxis(low, high, HEIGHT - 46, 12, "root")
    parts = frame(x, y, "estimated effect", "exact effect")
    parts.append(_line("reference", (x.at(low), y.at(low)), (x.at(high), y.at(high))))
    for c in known:
        said = f"{c.name}: estimate {signed(c.estimate)}, exact {signed(c.exact)}"
        parts.append(_mark("error" if c.wrong_sign else "check", x.at(c.estimate), y.at(c.exact), said))
    return _svg(parts, HEIGHT, f"Exact against estimated effect of {len(known)} edges, square-root scales")


def strip(
    random: Sequence[float], faithfulness: float, interval: tuple[float, float] | None, level: float = 0.95
) -> str:
    """Faithfulness of random circuits of the same size as dots, and above them the circuit's with its interval."""
    known = [value for value in random if math.isfinite(value)]
    x = ScaledAxis(*around([0.0, 1.0, faithfulness, *known, *(interval or ())]), 16, WIDTH - 16)
    y = ScaledAxis(0.0, 1.0, 112, 10)
    parts = frame(x, y, "faithfulness")
    parts.append(_line("reference", (x.at(1), y.start), (x.at(1), y.end)))
    for i, value in enumerate(known):
        height = y.at(0.12 + 0.3 * (i * 0.618034 % 1))  # spread evenly, the same in every run
        parts.append(_mark("random", x.at(value), height, f"random circuit {i + 1}: faithfulness {value:.3f}"))
    said = f"the circuit: faithfulness {faithfulness:.3f}"
    if interval:
        said += f", {level:.0%} interval {interval[0]:.3f} to {interval[1]:.3f}"
        parts.append(_line("interval", (x.at(interval[0]), y.at(0.75)), (x.at(interval[1]), y.at(0.75))))
    parts.append(_mark("circuit", x.at(faithfulness), y.at(0.75), said))
    return _svg(parts, 152, f"{said}; {len(known)} random circuits of the same size")


def symbol(kind: str) -> str:
    """A single mark for a legend."""
    size = 'viewBox="0 0 14 14" width="14" height="14"'
    return f'<svg class="plot symbol" {size} aria-hidden="true">{_mark(kind, 7, 7)}</svg>'


def _line(kind: str, start: tuple[float, float], end: tuple[float, float]) -> str:
    ends = f'x1="{start[0]:.1f}" x2="{end[0]:.1f}" y1="{start[1]:.1f}" y2="{end[1]:.1f}"'
    return f'<line class="{kind}" {ends}/>'


def _mark(kind: str, x: float, y: float, said: str = "") -> str:
    title = f"<title>{escape(said)}</title>" if said else ""
    if kind in ("bisection", "re-scored"):
        return f'<rect class="mark bisection" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8">{title}</rect>'
    if kind == "pruning":
        return f'<path class="mark pruning" d="M{x:.1f} {y - 5:.1f}l5 9h-10z">{title}</path>'
    if kind == "error":
        return f'<path class="mark error" d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8">{title}</path>'
    radius = {"circuit": 6.5, "random": 3.5}.get(kind, 4.2)
    known = kind if kind in (*STAGES, "check", "circuit", "random", "chosen") else "grid"
    return f'<circle class="mark {known}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{title}</circle>'


def _svg(parts: Sequence[str], height: int, label: str) -> str:
    start = f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return "\n".join([start, *parts, "</svg>"])


@dataclass(frozen=True)
class ScaledAxis:
    """Maps `low..high` to the pixels `start..end`."""

    low: float
    high: float
    start: float
    end: float
    scale: Scale = "linear"

    def at(self, value: float) -> float:
        """The pixel of a value; values beyond the axis are clamped to its end."""
        low, high, here = (_warp(v, self.scale) for v in (self.low, self.high, min(max(value, self.low), self.high)))
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values for ticks, including 0 if it is on the axis; on log and root scales at least 40 pixels apart."""
        if self.scale == "linear":
            step = next(s for s in _round_numbers() if s >= (self.high - self.low) / 6)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [i * step for i in range(first, last + 1)]
        largest = max(abs(self.low), abs(self.high))
        wanted = [step for step in reversed(list(_round_numbers())) if step <= largest]
        if self.scale == "root":
            wanted += [-step for step in wanted]
        else:
            wanted.sort(key=lambda value: not math.log10(value).is_integer())  # powers of ten come first
        chosen = [0.0] if self.low <= 0 <= self.high else []
        for value in wanted:
            inside = self.low <= value <= self.high
            if inside and all(abs(self.at(value) - self.at(other)) >= 40 for other in chosen):
                chosen.append(value)
        return sorted(chosen)


def around(values: Iterable[float], scale: Scale = "linear") -> tuple[float, float]:
    """Return the range of the finite values with a margin; it never has zero width."""
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    if scale == "log":
        return low / 1.3, high * 1.3
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def frame(x: ScaledAxis, y: ScaledAxis, x_label: str, y_label: str = "") -> list[str]:
    """Grid lines, tick labels and titles of a pair of axes."""
    parts = []
    for value in x.ticks():
        at, label = x.at(value), f'y="{y.start + 15:.1f}" text-anchor="middle">{short(value)}'
        parts.append(_line("grid", (at, y.start), (at, y.end)))
        parts.append(f'<text class="tick" x="{at:.1f}" {label}</text>')
    if y_label:
        for value in y.ticks():
            at, label = y.at(value), f'text-anchor="end">{short(value)}'
            parts.append(_line("grid", (x.start, at), (x.end, at)))
            parts.append(f'<text class="tick" x="{x.start - 7:.1f}" y="{at + 4:.1f}" {label}</text>')
        place = f'transform="translate(13 {(y.start + y.end) / 2:.1f}) rotate(-90)"'
        parts.append(f'<text class="title" {place} text-anchor="middle">{escape(y_label)}</text>')
    place = f'x="{(x.start + x.end) / 2:.1f}" y="{y.start + 34:.1f}"'
    parts.append(f'<text class="title" {place} text-anchor="middle">{escape(x_label)}</text>')
    return parts


def short(value: float) -> str:
    """A tick's label: `0.05`, `1,000`, `-2`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value or 0:.4g}"


def _warp(value: float, scale: Scale) -> float:
    if scale == "log":
        return math.log(value)
    return math.copysign(math.sqrt(abs(value)), value) if scale == "root" else value


def _round_numbers() -> list[float]:
    return [float(f"{step:g}e{power}") for power in range(-9, 13) for step in STEPS]
