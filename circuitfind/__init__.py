"""Which heads, MLPs and connections of an unmodified Hugging Face model do a behaviour, and how sure that is.

import circuitfind as cf

model = cf.load("tiny")
task = cf.task("ioi", model, n=64)
result = cf.find(model, task)
result.circuit.render("ioi.svg")

Names are imported when they are first used: reading a circuit or asking for help does not wait for torch.
"""

from typing import TYPE_CHECKING

from circuitfind.version import __version__ as __version__

if TYPE_CHECKING:
    from circuitfind import processes as processes, testbed as testbed
    from circuitfind.attribution.attribute import attribute as attribute
    from circuitfind.attribution.direct import DirectEffects as DirectEffects, direct_effects as direct_effects
    from circuitfind.attribution.method import Method as Method
    from circuitfind.attribution.methods import Methods as Methods
    from circuitfind.circuit import Circuit as Circuit
    from circuitfind.comparison.recovery import Recovery as Recovery, recovery as recovery
    from circuitfind.comparison.result import Comparison as Comparison
    from circuitfind.comparison.run import compare as compare
    from circuitfind.engine.ablation import Ablation as Ablation
    from circuitfind.errors import (
        CircuitfindError as CircuitfindError,
        FileError as FileError,
        ModelError as ModelError,
        ScoreError as ScoreError,
        TaskError as TaskError,
    )
    from circuitfind.evaluation.agreement import Agreement as Agreement, agreement as agreement
    from circuitfind.evaluation.approximation import Approximation as Approximation, approximation as approximation
    from circuitfind.evaluation.certified import Certified as Certified, certified as certified
    from circuitfind.evaluation.check import Checks as Checks, check as check
    from circuitfind.evaluation.clusters import Clusters as Clusters, clusters as clusters
    from circuitfind.evaluation.completeness import Completeness as Completeness, completeness as completeness
    from circuitfind.evaluation.curve import Curve as Curve, Mib as Mib, curve as curve, mib as mib
    from circuitfind.evaluation.diagnosis import (
        Diagnosis as Diagnosis,
        TaskSummary as TaskSummary,
        diagnose as diagnose,
        summarise as summarise,
    )
    from circuitfind.evaluation.faithfulness import Evaluation as Evaluation, evaluate as evaluate
    from circuitfind.evaluation.hypotheses import HypothesisTests as HypothesisTests, hypotheses as hypotheses
    from circuitfind.evaluation.minimality import Minimality as Minimality, minimality as minimality
    from circuitfind.evaluation.stability import Stability as Stability, stability as stability
    from circuitfind.evaluation.variants import by_seed as by_seed, by_template as by_template, unseen as unseen
    from circuitfind.evaluation.verify import Verification as Verification, verify as verify
    from circuitfind.graph import Graph as Graph
    from circuitfind.loading import load as load, task as task, wrap as wrap
    from circuitfind.metrics import METRICS as METRICS, Metric as Metric
    from circuitfind.models.families import Family as Family
    from circuitfind.models.load import Model as Model
    from circuitfind.opening import open as open
    from circuitfind.patching.attention import AttentionPattern as AttentionPattern, attention as attention
    from circuitfind.patching.attention_attribution import (
        AttentionAttribution as AttentionAttribution,
        attention_attribution as attention_attribution,
    )
    from circuitfind.patching.only import CircuitModel as CircuitModel, only as only
    from circuitfind.patching.patch import patch as patch
    from circuitfind.patching.path import PathEffects as PathEffects, path_patch as path_patch
    from circuitfind.patching.places import Kind as Kind
    from circuitfind.patching.sweep import Sweep as Sweep
    from circuitfind.placed_scores import PlacedScores as PlacedScores
    from circuitfind.plots.page import save_page as save_page
    from circuitfind.plots.plot import plot as plot
    from circuitfind.progress import show_progress as show_progress
    from circuitfind.record import Record as Record
    from circuitfind.references.published import reference as reference
    from circuitfind.references.reference import Reference as Reference
    from circuitfind.registry import register as register
    from circuitfind.scores import NodeScores as NodeScores, Scores as Scores
    from circuitfind.search.acdc import acdc as acdc, acdc_scores as acdc_scores
    from circuitfind.search.find import find as find
    from circuitfind.search.found import FindResult as FindResult
    from circuitfind.search.learn import LearnedMasks as LearnedMasks, learn_masks as learn_masks
    from circuitfind.search.methods import methods as methods
    from circuitfind.tasks.builder import Pair as Pair, TaskBuilder as TaskBuilder
    from circuitfind.tasks.task import Task as Task
else:
    # The same names as above, by module; type checkers see only the imports.
    _HOMES = {
        "attribution.attribute": "attribute",
        "attribution.direct": "DirectEffects direct_effects",
        "attribution.method": "Method",
        "attribution.methods": "Methods",
        "circuit": "Circuit",
        "comparison.recovery": "Recovery recovery",
        "comparison.result": "Comparison",
        "comparison.run": "compare",
        "engine.ablation": "Ablation",
        "errors": "CircuitfindError FileError ModelError ScoreError TaskError",
        "evaluation.agreement": "Agreement agreement",
        "evaluation.approximation": "Approximation approximation",
        "evaluation.certified": "Certified certified",
        "evaluation.check": "Checks check",
        "evaluation.clusters": "Clusters clusters",
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
        "patching.attention_attribution": "AttentionAttribution attention_attribution",
        "patching.only": "CircuitModel only",
        "patching.patch": "patch",
        "patching.path": "PathEffects path_patch",
        "patching.places": "Kind",
        "patching.sweep": "Sweep",
        "plots.page": "save_page",
        "plots.plot": "plot",
        "processes": "processes",
        "progress": "show_progress",
        "record": "Record",
        "references.published": "reference",
        "references.reference": "Reference",
        "registry": "register",
        "placed_scores": "PlacedScores",
        "scores": "NodeScores Scores",
        "search.acdc": "acdc acdc_scores",
        "search.find": "find",
        "search.found": "FindResult",
        "search.learn": "LearnedMasks learn_masks",
        "search.methods": "methods",
        "tasks.builder": "Pair TaskBuilder",
        "tasks.task": "Task",
        "testbed": "testbed",
    }
    _MODULE_OF = {name: module for module, names in _HOMES.items() for name in names.split()}
    __all__ = sorted([*_MODULE_OF, "__version__"])

    def __getattr__(name):
        """PEP 562: imports what is asked for, once."""
        from importlib import import_module

        if name not in _MODULE_OF:
            raise AttributeError(f"module 'circuitfind' has no attribute '{name}'")
        home = import_module(f"circuitfind.{_MODULE_OF[name]}")
        value = home if _MODULE_OF[name] == name else getattr(home, name)
        globals()[name] = value
        return value

    def __dir__():
        return __all__
