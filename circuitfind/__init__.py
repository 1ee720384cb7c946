"""Which heads, MLPs and connections of an unmodified Hugging Face model do a behaviour, and how sure that is.

import circuitfind as cf

model = cf.load("tiny")
task = cf.task("ioi", model, n=64)
result = cf.find(model, task)
result.circuit.render("ioi.svg")

Names are imported when they are first used: reading a circuit or asking for help does not wait for torch.
"""

from typing import TYPE_CHECKING

from circuitfind.version import __version__

if TYPE_CHECKING:
    from circuitfind.attribution.attribute import attribute
    from circuitfind.attribution.direct import DirectEffects, direct_effects
    from circuitfind.attribution.method import Method
    from circuitfind.attribution.methods import Methods
    from circuitfind.circuit import Circuit
    from circuitfind.comparison.result import Comparison
    from circuitfind.comparison.run import compare
    from circuitfind.engine.ablation import Ablation
    from circuitfind.errors import CircuitfindError, FileError, ModelError, ScoreError, TaskError
    from circuitfind.evaluation.agreement import Agreement, agreement
    from circuitfind.evaluation.approximation import Approximation, approximation
    from circuitfind.evaluation.completeness import Completeness, completeness
    from circuitfind.evaluation.curve import Curve, Mib, curve, mib
    from circuitfind.evaluation.diagnosis import Diagnosis, TaskSummary, diagnose, summarise
    from circuitfind.evaluation.faithfulness import Evaluation, evaluate
    from circuitfind.evaluation.hypotheses import HypothesisTests, hypotheses
    from circuitfind.evaluation.minimality import Minimality, minimality
    from circuitfind.evaluation.stability import Stability, stability
    from circuitfind.evaluation.variants import by_seed, by_template, unseen
    from circuitfind.evaluation.verify import Verification, verify
    from circuitfind.graph import Graph
    from circuitfind.loading import load, task, wrap
    from circuitfind.metrics import METRICS, Metric
    from circuitfind.models.families import Family
    from circuitfind.models.load import Model
    from circuitfind.opening import open
    from circuitfind.patching.attention import AttentionPattern, attention
    from circuitfind.patching.only import CircuitModel, only
    from circuitfind.patching.patch import patch
    from circuitfind.patching.path import PathEffects, path_patch
    from circuitfind.patching.places import Kind
    from circuitfind.patching.sweep import Sweep
    from circuitfind.plots.page import save_page
    from circuitfind.plots.plot import plot
    from circuitfind.progress import show_progress
    from circuitfind.record import Record
    from circuitfind.references.published import reference
    from circuitfind.references.reference import Reference
    from circuitfind.registry import register
    from circuitfind.scores import NodeScores, Scores
    from circuitfind.search.acdc import acdc, acdc_scores
    from circuitfind.search.find import find
    from circuitfind.search.found import FindResult
    from circuitfind.search.learn import LearnedMasks, learn_masks
    from circuitfind.search.methods import methods
    from circuitfind.tasks.builder import Pair, TaskBuilder
    from circuitfind.tasks.task import Task
else:
    # The same list as above, by module; type checkers see only the imports.
    _HOMES = {
        "attribution.attribute": "attribute",
        "attribution.direct": "DirectEffects direct_effects",
        "attribution.method": "Method",
        "attribution.methods": "Methods",
        "circuit": "Circuit",
        "comparison.result": "Comparison",
        "comparison.run": "compare",
        "engine.ablation": "Ablation",
        "errors": "CircuitfindError FileError ModelError ScoreError TaskError",
        "evaluation.agreement": "Agreement agreement",
        "evaluation.approximation": "Approximation approximation",
        "evaluation.completeness": "Completeness completeness",
        "evaluation.curve": "Curve Mib curve mib",
        "evaluation.diagnosis": "Diagnosis TaskSummary diagnose summarise",
        "evaluation.faithfulness": "Evaluation evaluate",
        "evaluation.hypotheses": "HypothesisTests hypotheses",
        "evaluation.minimality": "Minimality minimality",
        "evaluation.stability": "Stability stability",
        "evaluation.variants": "by_seed by_template unseen",
        "evaluation.verify": "Verification verify",
        "graph": "Graph",
        "loading": "load task wrap",
        "metrics": "METRICS Metric",
        "models.families": "Family",
        "models.load": "Model",
        "opening": "open",
        "patching.attention": "AttentionPattern attention",
        "patching.only": "CircuitModel only",
        "patching.patch": "patch",
        "patching.path": "PathEffects path_patch",
        "patching.places": "Kind",
        "patching.sweep": "Sweep",
        "plots.page": "save_page",
        "plots.plot": "plot",
        "progress": "show_progress",
        "record": "Record",
        "references.published": "reference",
        "references.reference": "Reference",
        "registry": "register",
        "scores": "NodeScores Scores",
        "search.acdc": "acdc acdc_scores",
        "search.find": "find",
        "search.found": "FindResult",
        "search.learn": "LearnedMasks learn_masks",
        "search.methods": "methods",
        "tasks.builder": "Pair TaskBuilder",
        "tasks.task": "Task",
    }
    _MODULE_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

    def __getattr__(name):
        """PEP 562: imports what is asked for, once."""
        from importlib import import_module

        if name not in _MODULE_OF:
            raise AttributeError(f"module 'circuitfind' has no attribute '{name}'")
        value = getattr(import_module(f"circuitfind.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted(__all__)


__all__ = [
    "METRICS",
    "Ablation",
    "Agreement",
    "Approximation",
    "AttentionPattern",
    "Circuit",
    "CircuitModel",
    "CircuitfindError",
    "Comparison",
    "Completeness",
    "Curve",
    "Diagnosis",
    "DirectEffects",
    "Evaluation",
    "Family",
    "FileError",
    "FindResult",
    "Graph",
    "HypothesisTests",
    "Kind",
    "LearnedMasks",
    "Method",
    "Methods",
    "Metric",
    "Mib",
    "Minimality",
    "Model",
    "ModelError",
    "NodeScores",
    "Pair",
    "PathEffects",
    "Record",
    "Reference",
    "ScoreError",
    "Scores",
    "Stability",
    "Sweep",
    "Task",
    "TaskBuilder",
    "TaskError",
    "TaskSummary",
    "Verification",
    "__version__",
    "acdc",
    "acdc_scores",
    "agreement",
    "approximation",
    "attention",
    "attribute",
    "by_seed",
    "by_template",
    "compare",
    "completeness",
    "curve",
    "diagnose",
    "direct_effects",
    "evaluate",
    "find",
    "hypotheses",
    "learn_masks",
    "load",
    "methods",
    "mib",
    "minimality",
    "only",
    "open",
    "patch",
    "path_patch",
    "plot",
    "reference",
    "register",
    "save_page",
    "show_progress",
    "stability",
    "summarise",
    "task",
    "unseen",
    "verify",
    "wrap",
]
