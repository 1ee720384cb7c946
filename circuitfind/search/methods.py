"""ACDC and learned masks as `Method` records, beside those of attribution: whatever ranks edges, by name.

Both prune by the KL divergence from the whole model, as in their papers, whatever metric is measured; the options
`prune_by` and `learn_by` name another.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from circuitfind.attribution import methods as attribution
from circuitfind.attribution.method import Method, Request
from circuitfind.engine.experiment import Experiment
from circuitfind.errors import ScoreError
from circuitfind.scores import NodeScores, Scores
from circuitfind.search.acdc import SIGN as ACDC_SIGN
from circuitfind.search.acdc import acdc_scores
from circuitfind.search.learn import LEARNERS, TRAINING, learn_masks
from circuitfind.search.learn import SIGN as LEARNED_SIGN


def _acdc(experiment: Experiment, request: Request) -> Scores:
    return acdc_scores(experiment.model, experiment.bound, **_asked(experiment, request, "prune_by"))


def _learned(experiment: Experiment, request: Request, name: str) -> Scores | NodeScores:
    asked = _asked(experiment, request, "learn_by")
    return learn_masks(experiment.model, experiment.bound, name, level=request.level, **asked).scores


def _asked(experiment: Experiment, request: Request, metric: str) -> dict[str, Any]:
    """The keywords of a public call that asks for the same; `metric`: the option that names the metric."""
    setting, options = experiment.setting, dict(request.options)
    if not setting.noising:
        raise ScoreError("ACDC and learned masks run circuits on the clean prompts: leave direction='denoising' out")
    same = {name: getattr(setting, name) for name in ("ablation", "batch_size", "seed")}
    return {"metric": options.pop(metric), "checkpoint": request.checkpoint, **same, **options}


def _learner(name: str, summary: str, source: str) -> Method:
    return Method(
        name,
        summary,
        source,
        "1 forward and backward a step",
        ("edge", "node"),
        score=partial(_learned, name=name),
        options={"learn_by": "kl", "sparsity": LEARNERS[name].sparsity, **TRAINING},
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
            sign=lambda level, options: ACDC_SIGN,
        ),
        _learner("edge-pruning", "hard-concrete masks with a target size", "Bhaskar et al. 2024"),
        _learner("subnetwork-probing", "hard-concrete masks with a penalty", "Cao et al. 2021"),
        _learner("ugs", "uniform gradient sampling of masks", "Li and Janson 2024"),
    )
}


def method_of(method: str | Method | None, level: str = "edge") -> Method:
    """As `circuitfind.attribution.methods.method_of`, the searches included."""
    found = SEARCHES.get(method, method) if isinstance(method, str) else method
    return attribution.method_of(found, level)
