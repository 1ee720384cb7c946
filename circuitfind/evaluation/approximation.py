"""Attribution patching against activation patching: how well estimates agree with exact effects, and where they fail.

1. Each kind of place is swept twice: estimated (`circuitfind.attribute`) and patched exactly (`circuitfind.patch`).
2. Both are compared over all places of a kind and over each of its layers (`Fit`).
3. If estimates fail, two measurements may explain why (`approximation_fit.py`): how much flatter the gradient is at the
   run where it was taken than at the other run, and how large the change is relative to the activation that it changes:

       size = root of (sum of |change|^2 over tokens and units) / (sum of |whole|^2 over the same tokens and units)

   over the real tokens at which anything changes. The whole is the residual stream that the change is added to
   (`attn`, `mlp`, `attn-out`, `mlp-out`, `heads`, `neurons`), or the replaced value itself (`resid`, `resid-mid`, `q`,
   `k`, `v`, `pattern`), in the run that is patched: clean in noising, corrupted in denoising.

Nanda 2023: the approximation is good for heads and poor for the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Self, Unpack

import numpy as np
import torch
from torch import Tensor

from circuitfind.attribution.attribute import ScoreKeywords, score
from circuitfind.attribution.method import Method, Request
from circuitfind.attribution.methods import method_of, request_of
from circuitfind.batch import Batch
from circuitfind.calls import model_call
from circuitfind.engine.capture import capture_corrupted
from circuitfind.engine.experiment import Experiment
from circuitfind.engine.writers import Writers
from circuitfind.errors import ScoreError
from circuitfind.evaluation.approximation_fit import Fit, fit, remarks
from circuitfind.export import files
from circuitfind.graph import Graph
from circuitfind.models.load import Model
from circuitfind.patching.patch import Sides, SweepPlan, planned, swept
from circuitfind.patching.sweep import Axis, Sweep
from circuitfind.record import Record
from circuitfind.result import Result, as_json, build
from circuitfind.tasks.task import BoundTask, Task

KINDS = ("resid", "attn", "mlp", "heads")


class EstimatedPlace(NamedTuple):
    """A place: its kind, layer, name, position or span (empty if all positions are patched together), estimate, and
    exact effect with its 95% interval over examples."""

    kind: str
    layer: int
    name: str
    position: str
    estimate: float
    exact: float
    low: float
    high: float


class Compared(NamedTuple):
    """Estimates and exact effects of one kind of place. `sizes`: by layer, size of the change relative to the
    activation that it changes. `other_end`: sum of |estimates| with the gradient at the other run, divided by the same
    sum with the gradient used; None if the estimates do not come from a single gradient between two runs."""

    estimated: Sweep
    exact: Sweep
    sizes: dict[int, float]
    other_end: float | None

    @property
    def layers(self) -> list[int]:
        return [int(label) for label in self.exact.axes[0].labels]

    def fit(self, layer: int | None = None) -> Fit:
        """Return the fit over all places, or over those of one layer."""
        at = slice(None) if layer is None else self.layers.index(layer)
        return fit(self.estimated.effects[at], self.exact.effects[at])

    def to_dict(self) -> dict[str, Any]:
        layers = {str(layer): {**self.fit(layer)._asdict(), "change": self.sizes[layer]} for layer in self.layers}
        return {**self.fit()._asdict(), "other_end": self.other_end, "layers": layers}

    def sweeps(self) -> dict[str, Any]:
        """Return both sweeps by example, as JSON values."""
        kept = ("per_example", "full", "empty", "record")
        each = {"estimated": self.estimated, "exact": self.exact}
        sides = {side: {name: as_json(getattr(sweep, name)) for name in kept} for side, sweep in each.items()}
        return {"axes": self.exact.axes, "sizes": self.sizes, "other_end": self.other_end, **sides}

    @classmethod
    def of(cls, what: str, graph: Graph, content: dict[str, Any]) -> Compared:
        """Return one kind of place from the content that `sweeps` returned."""
        axes, sizes = build(tuple[Axis, ...], content["axes"]), build(dict[int, float], content["sizes"])

        def sweep(side: dict[str, Any]) -> Sweep:
            values, full, empty = (files.numbers(side[name]) for name in ("per_example", "full", "empty"))
            return Sweep(what, graph, axes, values, full, empty, Record(**side["record"]))

        return cls(sweep(content["estimated"]), sweep(content["exact"]), sizes, content["other_end"])


@dataclass(frozen=True, eq=False, repr=False)
class Approximation(Result):
    """Estimates and exact effects of places; rows are the places. Files also hold both sweeps by example.

    Attributes:
        compared: by kind of place.
        remarks: sentences that say which estimates are reliable, where they fail, and why if that was measured.
        record: of the estimates; in its settings `what` lists the kinds, `by_position` those swept by position.
    """

    FORMAT, ROWS = "circuitfind.approximation", "places"

    compared: dict[str, Compared]
    remarks: tuple[str, ...]
    record: Record

    @property
    def by_kind(self) -> dict[str, Fit]:
        """The fit over all places of each kind."""
        return {what: compared.fit() for what, compared in self.compared.items()}

    @property
    def by_layer(self) -> dict[tuple[str, int], Fit]:
        """The fit over the places of each kind in each layer."""
        return {(what, layer): one.fit(layer) for what, one in self.compared.items() for layer in one.layers}

    def places(self) -> Iterator[EstimatedPlace]:
        """Yield every place with its estimate and its exact effect."""
        for what, (estimated, exact, _, _) in self.compared.items():
            labels, names, each = exact.positions, exact.names(), exact.effects[0].size
            ends = exact.intervals().reshape(-1, 2).tolist()
            values = zip(estimated.effects.ravel().tolist(), exact.effects.ravel().tolist(), ends, strict=True)
            for at, (estimate, effect, (low, high)) in enumerate(values):
                layer = int(exact.axes[0].labels[at // each])
                yield EstimatedPlace(what, layer, names[at], labels[at % len(labels)], estimate, effect, low, high)

    def shown(self) -> dict[str, Any]:
        fits = {f"r_{what.replace('-', '_')}": one.r for what, one in self.by_kind.items()}
        return {"method": self.record.method, "direction": self.record.direction, **fits}

    def rows(self) -> tuple[EstimatedPlace, ...]:
        return tuple(self.places())

    def to_dict(self) -> dict[str, Any]:
        return {
            "kinds": {what: one.to_dict() for what, one in self.compared.items()},
            "remarks": list(self.remarks),
            "places": [place._asdict() for place in self.places()],
            "record": asdict(self.record),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        graph = Graph(**content["graph"])
        compared = {what: Compared.of(what, graph, one) for what, one in content["sweeps"].items()}
        return cls(compared, tuple(content["remarks"]), Record(**content["record"]))

    def save(self, path: str | PathLike[str], **more: Any) -> Path:
        """Write everything as `.json`, or the places as `.csv`; see `Result.save`."""
        graph = next(iter(self.compared.values())).exact.graph.as_dict()
        sweeps = {what: one.sweeps() for what, one in self.compared.items()}
        return super().save(path, **more, graph=graph, sweeps=sweeps)


@model_call
def approximation(
    model: Model,
    task: Task | BoundTask,
    what: str | Iterable[str] = KINDS,
    *,
    method: str | Method | None = None,
    by_position: bool | None = None,
    by_span: bool = False,
    layers: int | Iterable[int] | None = None,
    **asked: Unpack[ScoreKeywords],
) -> Approximation:
    """Estimate and measure the effect of every place of some kinds, and report where the two disagree.

    Args:
        what: one or several kinds of place. what, by_position, by_span and layers are as for `circuitfind.patch`.
        method: the method that estimates; by default that of `circuitfind.attribute(level="node", what=...)`.
        asked: keywords of the run and options of the method, as for `circuitfind.attribute`.

    Raises:
        ScoreError, TaskError, ModelError: as from `circuitfind.attribute` and `circuitfind.patch`.
    """
    given = [what] if isinstance(what, str) else list(what) if isinstance(what, Iterable) else []
    if not given or not all(isinstance(kind, str) for kind in given):
        raise ScoreError(f"what={what!r} names no kind of place: give one or several, such as {', '.join(KINDS)}")
    if method == "atp-star":
        raise ScoreError("method='atp-star': its scores have no sign: compare 'atp', or 'atp-qk', with exact effects")
    if method == "exact":
        raise ScoreError("method='exact' is what estimates are compared with: name a method that estimates")
    layers = list(layers) if isinstance(layers, Iterator) else layers  # read once for every kind
    ways = {"by_position": by_position, "by_span": by_span, "layers": layers}
    experiment, requests = None, {}
    for kind in dict.fromkeys(given):  # raise for any invalid kind before the first is measured
        chosen = method_of(method, "node", kind, asked.get("ablation"))
        request, setting = request_of(chosen, "node", kind, asked, **ways)
        experiment = experiment or Experiment.of(model, task, setting)
        requests[kind] = chosen, request, planned(experiment, request.where)
    assert experiment is not None, "a kind is given"
    compared = {kind: _compared(experiment, *request) for kind, request in requests.items()}
    records = {kind: one.estimated.record for kind, one in compared.items()}
    by_itself = [kind for kind, record in records.items() if record.settings["by_position"]]
    methods = ", ".join(dict.fromkeys(one.method for one in records.values()))
    record = replace(records[given[0]], method=methods).with_settings(what=list(records), by_position=by_itself)
    direction = experiment.setting.direction
    said = [remarks({kind: one}, records[kind].method, direction)[0] for kind, one in compared.items()]
    return Approximation(compared, tuple(said), record)


def _compared(experiment: Experiment, method: Method, request: Request, plan: SweepPlan) -> Compared:
    def estimate(experiment: Experiment) -> Sweep:
        found = score(experiment, method, request)
        assert isinstance(found, Sweep), "places are asked for"
        return found

    def size(estimates: Sweep) -> float:
        return float(np.abs(estimates.effects).sum())

    estimated, other_end = estimate(experiment), None
    exact = swept(experiment, request.where)
    has_other = experiment.interchange and experiment.ablation.twin and not experiment.metric.flat_at_clean
    if method.name == "atp" and has_other and size(estimated):
        turned = "denoising" if experiment.setting.noising else "noising"
        other_end = size(estimate(experiment.set(direction=turned))) / size(estimated)
    return Compared(estimated, exact, change_sizes(plan), other_end)


def change_sizes(plan: SweepPlan) -> dict[int, float]:
    """Return the relative size of the changes by layer of a sweep; defined in the module docstring."""
    experiment = plan.experiment
    _ = plan.means  # of all pairs, so by all processes together

    def one(part: Batch, _: slice) -> Tensor:
        sides = plan.capture(part, whole=True)
        corrupted = sides.corrupted
        if sides.batch.alignment is not None:
            corrupted = capture_corrupted(experiment.adapter, sides.batch, stop=True)
        delta = sides.clean.writers.minus(experiment.ablated(sides.clean, corrupted))
        return torch.stack([_sums(plan, layer, sides, delta) for layer in plan.layers])

    totals = torch.stack([sums for _, sums in experiment.in_batches(one, "sizes of changes")]).sum(0)
    change, whole = totals.double().cpu().unbind(1)
    return dict(zip(plan.layers, (change / whole.clamp(min=1e-30)).sqrt().tolist(), strict=True))


def _sums(plan: SweepPlan, layer: int, sides: Sides, delta: Writers) -> Tensor:
    """Return the sums of squares of the change and of the whole, `[2]`. `delta`: clean minus ablated writer outputs."""
    adapter, noising = plan.experiment.adapter, plan.experiment.setting.noising
    what, work = plan.what, adapter.work
    base, base_batch = (sides.clean, sides.batch.clean) if noising else (sides.corrupted, sides.batch.corrupted)
    here, there = (sides.own, sides.other) if noising else (sides.other, sides.own)
    own, stream = here[layer].to(work), what in ("resid", "resid-mid")
    difference = own - there[layer].to(work)
    if what == "heads":
        change = adapter.head_outputs(layer, delta.heads[layer]).pow(2).sum(-1).movedim(0, -1)
    elif what in ("attn", "attn-out"):
        change = adapter.head_outputs(layer, delta.heads[layer]).sum(0).pow(2).sum(-1, keepdim=True)
    elif what in ("mlp", "mlp-out"):
        change = delta.mlps[layer].pow(2).sum(-1, keepdim=True)
    elif what == "neurons":
        view = adapter.layers[layer]
        change = difference.pow(2) * view.mlp_weights()[1].pow(2).sum(-1)
        if view.post_mlp_norm is not None:
            change = change * view.post_mlp_norm.scale(base.mlp_out[layer].to(work)).pow(2)
    else:  # one unit, or one per head
        change = difference.pow(2).sum(-1, keepdim=stream)
    if what in ("q", "k", "v", "pattern"):
        whole = own.pow(2).sum(-1)
    else:
        whole = (own if stream else base.resid[layer + 1].to(work)).pow(2).sum(-1, keepdim=True)
    changed = (change.sum(-1) > 0) & base_batch.mask.to(change.device)
    return torch.stack([change[changed].sum(), whole.expand_as(change)[changed].sum()])
