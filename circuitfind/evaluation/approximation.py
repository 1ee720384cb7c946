"""How well attribution patching estimates what patching measures, place by place, and where it does not.

1. Each kind of place is swept twice: estimated (`circuitfind.attribute`) and patched exactly (`circuitfind.patch`).
2. Estimates are held against exact effects over all places of a kind and over each of its layers: Pearson's r, slopes,
   wrong signs, relative error (`Fit`).
3. Where they fail, two measurements say why (`evaluation/approximation_remarks.py`): how large the replaced change is
   beside what it is part of, and how much smaller the gradient is at the end where it was taken than at the other one.

That the approximation is good for heads and poor for the residual stream is Nanda 2023; first-order terms reach as far
as the change is small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np

from circuitfind.attribution.attribute import ScoreKeywords, score
from circuitfind.attribution.method import Method, Request
from circuitfind.attribution.methods import method_of, request_of
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import ScoreError
from circuitfind.evaluation import approximation_file
from circuitfind.evaluation.approximation_fit import Fit, fit
from circuitfind.evaluation.approximation_remarks import remarks
from circuitfind.evaluation.approximation_sizes import change_sizes
from circuitfind.models.load import Model
from circuitfind.patching.patch import SweepPlan, Where, planned, swept
from circuitfind.patching.sweep import Sweep
from circuitfind.record import Record
from circuitfind.remote.call import remotable
from circuitfind.tasks.task import BoundTask, Task

KINDS = ("resid", "attn", "mlp", "heads")


class Place(NamedTuple):
    """A place: its kind, layer, name, position's or span's label (empty where all positions are patched), estimate,
    exact effect and the 95% interval of the latter over examples."""

    kind: str
    layer: int
    name: str
    position: str
    estimate: float
    exact: float
    low: float
    high: float


class Compared(NamedTuple):
    """One kind of place.

    Attributes:
        sizes: by layer, how large the replaced change is beside what it is part of; see `change_sizes`.
        other_end: sum of the estimates' magnitudes with the gradient at the other run, over that of the estimates; None
            where the estimate is no single gradient between two runs.
    """

    estimated: Sweep
    exact: Sweep
    sizes: dict[int, float]
    other_end: float | None

    @property
    def layers(self) -> list[int]:
        return [int(label) for label in self.exact.axes[0].labels]

    def fit(self, layer: int | None = None) -> Fit:
        """Over all places, or over those of one layer."""
        at = slice(None) if layer is None else self.layers.index(layer)
        return fit(self.estimated.effects[at], self.exact.effects[at])


@dataclass(frozen=True, eq=False)
class Approximation:
    """Estimates beside exact effects.

    Attributes:
        compared: by kind of place.
        remarks: in words, what can be relied on and where the estimates fail, with the measured reason.
        record: of the estimates; in its settings `what` lists the kinds, `by_position` those swept by position.
    """

    compared: dict[str, Compared]
    remarks: tuple[str, ...]
    record: Record

    @property
    def by_kind(self) -> dict[str, Fit]:
        """Over all places of each kind."""
        return {what: compared.fit() for what, compared in self.compared.items()}

    @property
    def by_layer(self) -> dict[tuple[str, int], Fit]:
        """Over the places of each kind in each layer."""
        return {(what, layer): one.fit(layer) for what, one in self.compared.items() for layer in one.layers}

    def places(self) -> Iterator[Place]:
        """Every place with both of its effects."""
        for what, (estimated, exact, _, _) in self.compared.items():
            labels = exact.positions
            names, each = exact.names(), exact.effects[0].size
            ends = exact.intervals().reshape(-1, 2).tolist()
            values = zip(estimated.effects.ravel().tolist(), exact.effects.ravel().tolist(), ends, strict=True)
            for at, (estimate, effect, (low, high)) in enumerate(values):
                layer = int(exact.axes[0].labels[at // each])
                yield Place(what, layer, names[at], labels[at % len(labels)], estimate, effect, low, high)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""

        def plain(one: Compared) -> dict[str, Any]:
            layers = {str(layer): {**one.fit(layer)._asdict(), "change": one.sizes[layer]} for layer in one.layers}
            return {**one.fit()._asdict(), "other_end": one.other_end, "layers": layers}

        return {
            "kinds": {what: plain(one) for what, one in self.compared.items()},
            "remarks": list(self.remarks),
            "places": [place._asdict() for place in self.places()],
            "record": asdict(self.record),
        }

    def save(self, path: str | PathLike[str], **more: Any) -> Path:
        """Writes `.json`: `to_dict` and, by example, the sweeps.

        Args:
            more: further entries of the file, which reading passes over.

        Raises:
            FileError: another ending, or the place cannot be written to.
        """
        return approximation_file.write(path, self, more)

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Approximation:
        """Reads what `save` wrote, without any model.

        Raises:
            FileError: the file is missing, or holds no approximation.
        """
        fields = approximation_file.read(path)
        return cls(**{**fields, "compared": {what: Compared(**one) for what, one in fields["compared"].items()}})


@remotable
def approximation(
    model: Model,
    task: Task | BoundTask,
    what: str | Iterable[str] = KINDS,
    *,
    method: str | Method = "atp",
    by_position: bool | None = None,
    by_span: bool = False,
    layers: int | Iterable[int] | None = None,
    **asked: Unpack[ScoreKeywords],
) -> Approximation:
    """Estimates and measures every place of some kinds, and says where the two part.

    Args:
        what: one or several kinds of place, as for `circuitfind.patch`.
        method: of the estimate, as for `circuitfind.attribute(level="node", what=...)`.
        by_position, by_span, layers: as for `circuitfind.patch`.
        asked: keywords of the run and options of the method, as for `circuitfind.attribute`.

    Raises:
        ScoreError, TaskError, ModelError: as from `circuitfind.attribute` and `circuitfind.patch`.
    """
    given = [what] if isinstance(what, str) else list(what) if isinstance(what, Iterable) else []
    if not given or not all(isinstance(kind, str) for kind in given):
        raise ScoreError(f"what={what!r} names no kind of place: give one or several, such as {', '.join(KINDS)}")
    if method == "atp-star":
        raise ScoreError(
            "method='atp-star': its scores rank and have no sign: hold 'atp', or 'atp-qk', against exact effects"
        )
    if method == "exact":
        raise ScoreError("method='exact' is what estimates are held against: name a method that estimates")
    layers = list(layers) if isinstance(layers, Iterator) else layers  # every kind goes through them
    ways = {"by_position": by_position, "by_span": by_span, "layers": layers}
    experiment, requests = None, {}
    for kind in dict.fromkeys(given):  # none is measured before all are known to be possible
        chosen = method_of(method, "node", kind)
        request, setting = request_of(chosen, "node", kind, asked, **ways)
        experiment = experiment or Experiment.of(model, task, setting)
        requests[kind] = request, planned(experiment, Where(kind, by_position, by_span, layers))
    assert experiment is not None, "a kind is given"
    compared = {kind: _compared(experiment, chosen, request, plan) for kind, (request, plan) in requests.items()}
    records = {kind: one.estimated.record for kind, one in compared.items()}
    by_itself = [kind for kind, record in records.items() if record.settings["by_position"]]
    record = records[given[0]].with_settings(what=list(records), by_position=by_itself)
    return Approximation(compared, remarks(compared, chosen.name, experiment.setting.direction), record)


def _compared(experiment: Experiment, method: Method, request: Request, plan: SweepPlan) -> Compared:
    """One kind of place, estimated and measured."""

    def estimate(experiment: Experiment) -> Sweep:
        found = score(experiment, method, request)
        assert isinstance(found, Sweep), "places are asked for"
        return found

    estimated = estimate(experiment)
    exact = swept(experiment, Where(request.what, request.by_position, request.by_span, request.layers))
    other_end = None
    has_other = experiment.interchange and experiment.ablation.twin and not experiment.metric.flat_at_clean
    if method.name == "atp" and has_other:
        turned = "denoising" if experiment.setting.noising else "noising"
        other_end = _ratio(estimate(experiment.set(direction=turned)).effects, estimated.effects)
    return Compared(estimated, exact, change_sizes(plan), other_end)


def _ratio(other: np.ndarray, estimates: np.ndarray) -> float | None:
    size = float(np.abs(estimates).sum())
    return float(np.abs(other).sum()) / size if size else None
