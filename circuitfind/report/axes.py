"""Axes of the page's plots: from values to pixels, with round ticks, as SVG text.

A scale is `linear`, `log` (positive values only) or `root` (sign times square root, for effects that fall off steeply).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Literal

Scale = Literal["linear", "log", "root"]
STEPS = (1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Axis:
    """Maps `low..high` to the pixels `start..end`."""

    low: float
    high: float
    start: float
    end: float
    scale: Scale = "linear"

    def at(self, value: float) -> float:
        """The pixel of a value; a value beyond the axis lies at its end."""
        low, high, here = (_warp(v, self.scale) for v in (self.low, self.high, min(max(value, self.low), self.high)))
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values on the axis, at least 40 pixels apart; 0 is one of them where it is on the axis."""
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
    """Lowest and highest value with a margin, never of zero width."""
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    if scale == "log":
        return low / 1.3, high * 1.3
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def frame(x: Axis, y: Axis, x_label: str, y_label: str = "") -> list[str]:
    """Grid lines, tick labels and titles of a pair of axes."""
    parts = []
    for value in x.ticks():
        at = x.at(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{y.start:.1f}" y2="{y.end:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{y.start + 15:.1f}" text-anchor="middle">{short(value)}</text>'
        )
    if y_label:
        for value in y.ticks():
            at = y.at(value)
            parts.append(f'<line class="grid" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(
                f'<text class="tick" x="{x.start - 7:.1f}" y="{at + 4:.1f}" text-anchor="end">{short(value)}</text>'
            )
        middle = (y.start + y.end) / 2
        place = f'transform="translate(13 {middle:.1f}) rotate(-90)"'
        parts.append(f'<text class="title" {place} text-anchor="middle">{escape(y_label)}</text>')
    place = f'x="{(x.start + x.end) / 2:.1f}" y="{y.start + 34:.1f}"'
    parts.append(f'<text class="title" {place} text-anchor="middle">{escape(x_label)}</text>')
    return parts


def short(value: float) -> str:
    """A tick's label: `0.05`, `1,000`, `-2`."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if value else "0"


def _warp(value: float, scale: Scale) -> float:
    if scale == "log":
        return math.log(value)
    return math.copysign(math.sqrt(abs(value)), value) if scale == "root" else value


def _round_numbers() -> list[float]:
    return [float(f"{step:g}e{power}") for power in range(-9, 13) for step in STEPS]
