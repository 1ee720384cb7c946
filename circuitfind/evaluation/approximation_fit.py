"""How well estimates agree with exact effects, in numbers (`Fit`) and in words (`remarks`).

Wrong signs are counted only among places that matter: those whose |exact effect| is at least a twentieth of the
largest. Smaller effects are mostly rounding noise.

A kind of place, or a layer of it, is estimated *well* when r >= 0.9, the mean error is at most half of the mean effect,
and at most one, or one in ten, of the places that matter has the wrong sign. If only the error is larger, the places
are in the right order but their sizes are wrong. Layers are named if their mean |effect| is at least a tenth of the
largest layer's. If a kind of place is not estimated well, a reason is given if it was measured:

* a large change: the change is at least half as large as the activation that it changes. A first-order estimate is
  linear, and norms, attention and MLPs are not linear over such a distance.
* a flatter gradient: the gradient at the other run gives estimates at least twice as large in total, and exact effects
  are larger than the estimates (a slope above 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from circuitfind.statistics import correlation

if TYPE_CHECKING:
    from circuitfind.evaluation.approximation import Compared

MATTERS, LAYER_MATTERS = 0.05, 0.1  # of the largest |exact effect|; of the largest layer's mean
HIGH_R, LARGE_ERROR, MANY_WRONG = 0.9, 0.5, 0.1
LARGE_CHANGE, FLATTER = 0.5, 2.0
NAN = float("nan")
WORDS = {
    "resid": "the residual stream",
    "resid-mid": "the residual stream between attention and MLPs",
    "attn": "attention outputs",
    "mlp": "MLP outputs",
    "attn-out": "outputs of attention modules",
    "mlp-out": "outputs of MLP modules",
    "heads": "heads",
    "q": "queries",
    "k": "keys",
    "v": "values",
    "pattern": "attention patterns",
    "neurons": "neurons",
}
OF = {"q": "queries", "k": "keys", "v": "values", "pattern": "pattern"}


class Fit(NamedTuple):
    """How well estimates agree with exact effects; undefined numbers (no spread, no effect at all) are NaN.

    n: places. r: Pearson's correlation. slope: of exact effects on estimates through the origin (1 = unbiased, above 1
    = underestimated). free_slope, intercept: of the least-squares line. error: mean |estimate - exact| / mean |exact|.
    matter: places with at least `MATTERS` of the largest |exact|; wrong_signs: those of them with a wrong sign.
    """

    n: int
    r: float
    slope: float
    free_slope: float
    intercept: float
    error: float
    matter: int
    wrong_signs: int


def fit(estimates: np.ndarray, exact: np.ndarray) -> Fit:
    """Compare two arrays of the same shape."""
    x, y = (np.asarray(values, dtype=np.float64).ravel() for values in (estimates, exact))
    power, spread, size = float(x @ x), float(x.var()), float(np.abs(y).mean())
    free = float(np.mean((x - x.mean()) * (y - y.mean()))) / spread if spread else NAN
    return Fit(
        n=len(x),
        r=correlation(x, y),
        slope=float(x @ y) / power if power else NAN,
        free_slope=free,
        intercept=float(y.mean() - free * x.mean()),
        error=float(np.abs(x - y).mean()) / size if size else NAN,
        matter=int(matters(y).sum()),
        wrong_signs=int(wrong_signs(x, y).sum()),
    )


def matters(exact: np.ndarray) -> np.ndarray:
    """Return which exact effects are large enough for their sign to mean something."""
    return np.asarray((np.abs(exact) >= MATTERS * np.abs(exact).max()) & (exact != 0))


def wrong_signs(estimates: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Return which places that matter are estimated with the wrong sign."""
    return np.asarray((estimates * exact < 0) & matters(exact))


def well(found: Fit) -> bool:
    """Whether estimates can be relied on."""
    return in_line(found) and found.error <= LARGE_ERROR


def in_line(found: Fit) -> bool:
    """Whether estimates rank the places well, even if their sizes are wrong."""
    aligned = found.r >= HIGH_R or found.n < 3  # through two places there is always a line
    return aligned and found.wrong_signs <= max(1, MANY_WRONG * found.matter)


def remarks(compared: dict[str, Compared], method: str, direction: str) -> tuple[str, ...]:
    """Return a short verdict on each kind of place."""
    return tuple(_remark(what, one, method, direction) for what, one in compared.items())


def _remark(what: str, one: Compared, method: str, direction: str) -> str:
    whole, name = one.fit(), _capital(WORDS[what])
    if not one.exact.effects.any():
        return f"{name}: no place has any effect, there is nothing to estimate"
    sizes = np.abs(one.exact.effects).reshape(len(one.layers), -1).mean(axis=1)
    large = np.array(one.layers)[sizes >= LAYER_MATTERS * sizes.max()].tolist()
    failing = [layer for layer in large if not well(one.fit(layer))]
    counts = f"r {whole.r:.2f}, slope {whole.slope:.2f}, error {whole.error:.0%} of the mean effect, "
    counts += f"{whole.wrong_signs} of {whole.matter} that matter with the wrong sign"
    if well(whole) and not failing:
        return f"{name}: '{method}' is a good estimate ({counts})"
    verdict = "no reliable estimate"
    if in_line(whole):
        verdict = "good on the whole but not everywhere" if well(whole) else "right in order but not in size"
    said = [f"{name}: '{method}' is {verdict} ({counts})"]
    if failing:
        said.append(f"it fails in layer{'s' if len(failing) > 1 else ''} {', '.join(map(str, failing))}")
    reasons = _reasons(what, one, failing or one.layers, direction)
    said.append("; ".join(reasons) if reasons else "neither the size of the change nor a flatter gradient explains it")
    better = " or ".join(f"method='{other}'" for other in _better(what, method))
    remedy = f"try {better}, or measure with cf.patch" if better else "measure these with cf.patch"
    return ". ".join(map(_capital, [*said, remedy]))


def _better(what: str, method: str) -> list[str]:
    """Return methods that usually estimate these places better; docs/methods.md has the figures."""
    if method == "atp":
        return ["atp-qk" if what in ("q", "k") else "relp", "eap-ig-inputs"]
    return ["eap-ig-inputs"] if method == "relp" else []


def _reasons(what: str, one: Compared, layers: list[int], direction: str) -> list[str]:
    reasons = []
    size = float(np.mean([one.sizes[layer] for layer in layers]))
    if size >= LARGE_CHANGE:
        times = f"{size:.2g} times the {OF.get(what, 'stream')} it changes"
        reasons.append(f"what is replaced there is large, {times}: too far for a straight line")
    slope = one.fit().slope
    if one.other_end is not None and one.other_end >= FLATTER and slope > 1:
        taken, other = ("clean", "corrupted") if direction == "noising" else ("corrupted", "clean")
        reasons.append(
            f"the gradient is flatter at the {taken} run, where it was taken, than at the {other} run, which makes"
            f" estimates {one.other_end:.2g} times as large, and exact effects are larger than the estimates"
            f" (slope {slope:.2f})"
        )
    return reasons


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
