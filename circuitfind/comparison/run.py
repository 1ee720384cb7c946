"""`compare`: many methods on one model and task, evaluated in the same way on held-out pairs.

1. Split the pairs: rankings are made on one part, circuits are run on the held-out part.
2. Make each method's ranking, and measure its passes, CPU time and memory. With a folder, each method's scores are kept
   as `METHOD.safetensors`, so that a stopped comparison can continue.
3. Cut circuits of the ten sizes of the benchmark MIB (or of given sizes) from each ranking, by signed score and by
   magnitude, and run them exactly: faithfulness curves with intervals, CPR and CMD.
4. Compare rankings with a reference circuit (AUROC) and with exact effects (rank correlation), and circuits of equal
   size with each other (Jaccard similarity).

A method that cannot run here (a metric that is flat at the clean run, an unsuitable ablation, too little memory) is
listed with the reason, and the others continue. So is a ranking whose circuits do nothing (`evaluation/curve.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import NamedTuple, Unpack

import numpy as np

from circuitfind import processes
from circuitfind.attribution.method import Method
from circuitfind.calls import model_call
from circuitfind.checkpoint import key_of
from circuitfind.comparison.methods import Entrant, Given, chosen
from circuitfind.comparison.result import Comparison, Entry
from circuitfind.costs import Costs, measuring
from circuitfind.engine.batches import within_memory
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import FileError, ModelError, ScoreError, TaskError
from circuitfind.evaluation.agreement import PERCENTAGES, Level, agreement, check_same_graph
from circuitfind.evaluation.curve import Curve, Mib, curve_of, idle, sizes_of
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.models.load import Model
from circuitfind.progress import track
from circuitfind.references.published import reference as named
from circuitfind.references.reference import Reference
from circuitfind.scores import By, Scores
from circuitfind.setting import JudgeKeywords
from circuitfind.statistics import rank_correlation
from circuitfind.tasks.task import BoundTask, Task
from circuitfind.version import __version__

KEY, COSTS = "comparison", "costs"  # in the settings of a kept ranking's record
BOTH: tuple[By, By] = ("signed", "absolute")


@model_call
def compare(
    model: Model,
    task: Task | BoundTask,
    methods: Sequence[str | Method] | Mapping[str, Given] | None = None,
    *,
    reference: Reference | str | None = None,
    holdout: float = 0.5,
    percentages: Iterable[float] = PERCENTAGES,
    folder: str | PathLike[str] | None = None,
    **asked: Unpack[JudgeKeywords],
) -> Comparison:
    """Compare methods on one model and task.

    Args:
        methods: names of `circuitfind.comparison.methods.METHODS` (default: all), "package.module:name" of your
            own method, `Method` records, or `{name: Scores, function or Method}`.
        reference: a known circuit of this model, or its name (`circuitfind.reference`).
        holdout: fraction of pairs held out: circuits are run on them, rankings are made on the others.
        percentages: sizes, as fractions of all edges. CPR and CMD equal MIB's only at the default.
        folder: where each method's scores are kept (`METHOD.safetensors`); a repeated call reads them.
        asked: metric, ablation, batch_size, seed; see `circuitfind.setting`.

    Raises:
        ScoreError: an unknown method, a reference circuit of another model, invalid percentages, or undefined
            faithfulness on this task.
        TaskError: too few pairs.
    """
    experiment = Experiment.of(model, task, asked, direction=False)
    search, judge = experiment.bound.held_out(holdout, experiment.setting.seed)
    target = named(reference) if isinstance(reference, str) else reference
    entrants = chosen(methods)
    if target is not None:
        check_same_graph(model.graph, target)
    _, fractions = sizes_of(model.graph.n_edges, None, percentages)  # raises before any work is done
    sizes = tuple(fractions)
    evaluator = Evaluator(experiment.on(judge))
    evaluator.check_contrast()
    # the metric on the pairs identifies the weights; both ends, because under `kl` one of them is always 0
    asked_again = {name: getattr(experiment.setting, name) for name in ("ablation", "batch_size", "seed")}
    made = (evaluator.full, evaluator.empty, experiment.metric.name)
    shelf = _Shelf(folder, key_of(model.name, search.prompts, search.corrupted_prompts, *made, asked_again))
    rankings: dict[str, _Ranking] = {}
    refused: dict[str, str] = {}
    for name, entrant in track(list(entrants.items()), "methods"):
        try:
            rankings[name] = _ranking(experiment.on(search), name, entrant, shelf)
        except (ModelError, ScoreError, TaskError) as error:
            refused[name] = str(error)
    curves: dict[str, Mib] = {}
    for name, (scores, _) in track(list(rankings.items()), "curves"):
        signed, absolute = (curve_of(evaluator, scores, percentages=sizes, by=by) for by in BOTH)
        curves[name] = Mib(signed, absolute)
    exact = rankings["exact"].scores if "exact" in rankings else None
    entries = {name: Entry(name, entrants[name].summary, refused=why) for name, why in refused.items()}
    for name, ranking in rankings.items():
        entries[name] = _entry(name, entrants[name].summary, ranking, curves[name], exact, target)
    return Comparison(
        entries=tuple(entries[name] for name in entrants),
        overlap=_overlap([curve.absolute for curve in curves.values()]),
        n_edges=model.graph.n_edges,
        n_search=len(search),
        n_judge=len(judge),
        reference=None if target is None else target.name,
        record=evaluator.record.with_settings(holdout=holdout, percentages=list(sizes)),
    )


class _Ranking(NamedTuple):
    """A method's scores and their costs; passes are counted in passes of all pairs."""

    scores: Scores
    costs: Costs


def kept_at(folder: Path, name: str) -> Path:
    """File that keeps a method's scores."""
    return folder / f"{name.replace('/', '_')}.safetensors"


class _Shelf:
    """A folder that keeps rankings; without a folder, nothing is kept.

    The record of kept scores holds their costs, and a key of everything that determines them: pairs, metric of the
    model on them, ablation, seed. A file with another key is replaced.
    """

    def __init__(self, folder: str | PathLike[str] | None, key: str) -> None:
        self.folder, self.key = None if folder is None else Path(folder), f"{__version__} {key}"

    def take(self, name: str) -> _Ranking | None:
        """The ranking kept by an earlier run with the same key; None if there is none."""
        if self.folder is None or not (path := kept_at(self.folder, name)).is_file():
            return None
        try:
            scores = Scores.open(path)
        except FileError:
            return None  # written by another program or version
        if scores.record.settings.get(KEY) != self.key:
            return None
        return _Ranking(scores, Costs(**scores.record.settings[COSTS]))

    def put(self, name: str, ranking: _Ranking) -> None:
        if self.folder is not None:
            scores, costs = ranking
            record = scores.record.with_settings(**{KEY: self.key, COSTS: asdict(costs)})
            Scores(scores.graph, np.asarray(scores.values), record).save(kept_at(self.folder, name))


def _ranking(search: Experiment, name: str, entrant: Entrant, shelf: _Shelf) -> _Ranking:
    """A method's ranking, read from the shelf if it is kept there."""
    if entrant.kept and (kept := processes.of_first(lambda: shelf.take(name))) is not None:
        return kept
    with within_memory(search.adapter), measuring() as costs:
        scores = entrant.rank(search)
    per_pair = replace(costs, forwards=costs.forwards / len(search), backwards=costs.backwards / len(search))
    ranking = _Ranking(scores, per_pair)
    if entrant.kept:
        shelf.put(name, ranking)
    return ranking


def _entry(
    name: str, summary: str, ranking: _Ranking, curves: Mib, exact: Scores | None, reference: Reference | None
) -> Entry:
    levels: tuple[Level, ...] = ("edge", "head")
    aurocs = [None if reference is None else agreement(ranking.scores, reference, level=at).auroc for at in levels]
    return Entry(
        method=name,
        summary=summary,
        cpr=curves.cpr,
        cpr_interval=curves.signed.cpr_interval,
        cmd=curves.cmd,
        cmd_interval=curves.absolute.cmd_interval,
        signed=curves.signed.points,
        absolute=curves.absolute.points,
        auroc=aurocs[0],
        auroc_heads=aurocs[1],
        rank_correlation=None if exact is None else _rank_correlation(ranking.scores, exact),
        costs=ranking.costs,
        idle=tuple(said for said in (_idle(ranking.scores, by, getattr(curves, by)) for by in BOTH) if said),
    )


def _idle(scores: Scores, by: By, curve: Curve) -> str | None:
    """Why a selection does nothing; None if it does something."""
    return idle(scores, by, ((point.asked, point.faithfulness) for point in curve.points))


def _rank_correlation(scores: Scores, exact: Scores) -> float:
    """Spearman's rho of magnitudes over all edges."""
    real = exact.graph.real
    return rank_correlation(np.abs(scores.values[real]), np.abs(exact.values[real]))


def _overlap(curves: list[Curve]) -> dict[int, list[list[float]]]:
    """For each size, Jaccard similarities of the circuits of all pairs of methods; 1 for two empty circuits."""
    sizes = [point.asked for point in curves[0].points] if curves else []
    cuts = {size: [curve.circuits[at] for curve in curves] for at, size in enumerate(sizes)}
    return {size: [[one.jaccard(other) for other in circuits] for one in circuits] for size, circuits in cuts.items()}
