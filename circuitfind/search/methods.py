"""ACDC and learned masks as `Method` records, which rank edges by name like the methods of attribution.

By default they use the KL divergence from the whole model, as in their papers, whatever the metric of the call
(`matryoshka`: the metric of the call). The options `prune_by` and `learn_by` name another metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from circuitfind.attribution import methods as attribution
from circuitfind.attribution.method import LEVELS, Method, Request
from circuitfind.attribution.methods import MethodRow, Methods
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import ScoreError, unknown
from circuitfind.scores import NodeScores, Scores
from circuitfind.search.acdc import SIGN as ACDC_SIGN, acdc_scores
from circuitfind.search.learn import LEARNERS, SIGN as LEARNED_SIGN, TRAINING, learn_masks
from circuitfind.setting import Keywords


def _acdc(experiment: Experiment, request: Request) -> Scores:
    return acdc_scores(experiment.model, experiment.bound, **_call_keywords(experiment, request, "prune_by"))


def _sign(level: str, options: Mapping[str, Any]) -> str:  # a named function, as it is sent to servers
    return ACDC_SIGN


def _learned(experiment: Experiment, request: Request, name: str) -> Scores | NodeScores:
    asked = _call_keywords(experiment, request, "learn_by")
    # only the ranking is used, so a warning that its circuit is empty would mislead
    return learn_masks(experiment.model, experiment.bound, name, level=request.level, prune=False, **asked).scores


def _call_keywords(experiment: Experiment, request: Request, metric: str) -> dict[str, Any]:
    """Return the keywords of the public call for this request. `metric`: the option that names its metric."""
    setting, options = experiment.setting, dict(request.options)
    if not setting.noising:
        raise ScoreError("ACDC and learned masks run circuits on the clean prompts: leave direction='denoising' out")
    same = {name: getattr(setting, name) for name in ("ablation", "batch_size", "seed")}
    return {"metric": options.pop(metric), "checkpoint": request.checkpoint, **same, **options}


def _learner_method(name: str, summary: str, source: str) -> Method:
    return Method(
        name,
        summary,
        source,
        "1 forward and backward a step",
        ("edge", "node"),
        score=partial(_learned, name=name),
        options={"learn_by": LEARNERS[name].metric, "sparsity": LEARNERS[name].sparsity, **TRAINING},
        sign=lambda level, options: LEARNED_SIGN,
    )


SEARCHES: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            "acdc",
            "greedy exact pruning at a grid of thresholds",
            "Conmy et al. 2023",
            "about half a forward an edge and threshold",
            ("edge",),
            score=_acdc,
            options={
                "prune_by": "kl",
                "thresholds": None,
                "order": "reverse-topological",
                "absolute": False,
                "remove_dangling": None,
            },
            sign=_sign,
        ),
        _learner_method("edge-pruning", "hard-concrete masks with a target size", "Bhaskar et al. 2024"),
        _learner_method("subnetwork-probing", "hard-concrete masks with a penalty", "Cao et al. 2021"),
        _learner_method("ugs", "uniform gradient sampling of masks", "Li and Janson 2024"),
        _learner_method("matryoshka", "masks of k expected edges, k drawn anew at each step", "2609.25518, and ours"),
    )
}


def method_of(method: str | Method | None, level: str = "edge") -> Method:
    """As `circuitfind.attribution.methods.method_of`, but ACDC and learned masks are known, too."""
    found = SEARCHES.get(method, method) if isinstance(method, str) else method
    return attribution.method_of(found, level)


def request_of(method: Method, asked: Mapping[str, Any]) -> tuple[Request, Keywords]:
    """As `circuitfind.attribution.methods.request_of` for edge scores. For ACDC and learned masks, an option given as
    None is None, not its default."""
    request, setting = attribution.request_of(method, "edge", None, asked)
    unset = {name: None for name in method.options if method.name in SEARCHES and asked.get(name, ...) is None}
    return replace(request, options={**request.options, **unset}), setting


# -------------------------------------------------------------------- listing
def methods(level: str | None = None) -> Methods:
    """List all methods, with those that you registered.

    Args:
        level: only methods that score an "edge", a "node" or a "place"; None: all.

    Raises:
        ScoreError: the level is unknown.
    """
    if level is not None and level not in LEVELS:
        raise ScoreError(unknown("level", level, LEVELS))
    known = [(one, _calls(one)) for one in attribution.METHODS.values()]
    known += [(one, f"find, compare, {'acdc' if one.name == 'acdc' else 'learn_masks'}") for one in SEARCHES.values()]
    rows = (MethodRow.of(one, level or one.levels[0], calls) for one, calls in known if level in (None, *one.levels))
    return Methods(tuple(rows))


def _calls(method: Method) -> str:
    """Return the public calls that take this attribution method by name."""
    levels = {"find": {"edge"}, "compare": {"edge", "node"}, "stability": {"edge"}, "approximation": {"place"}}
    return ", ".join(["attribute", *(call for call, scored in levels.items() if scored & set(method.levels))])
