"""Which heads, MLPs and connections of an unmodified Hugging Face model do a behaviour, and how sure that is.

import circuitfind as cf

model = cf.load("tiny")
task = cf.task("ioi", model, n=64)
result = cf.find(model, task)
result.circuit.render("ioi.svg")

Names are imported when they are first used: reading a circuit or asking for help does not wait for torch. The imports
below are for type checkers; at run time they are read, to know where each name is.
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
    from ast import ImportFrom, parse, walk
    from importlib import import_module

    _IMPORTS = [node for node in walk(parse(__spec__.loader.get_source(__name__))) if isinstance(node, ImportFrom)]
    _MODULE_OF = {name.asname: node.module for node in _IMPORTS for name in node.names if name.asname}
    __all__ = sorted(_MODULE_OF)

    def __getattr__(name):
        """PEP 562: imports what is asked for, once."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'circuitfind' has no attribute '{name}'")
        if _MODULE_OF[name] == "circuitfind":
            value = import_module(f"circuitfind.{name}")
        else:
            value = getattr(import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value

    def __dir__():
        return __all__
