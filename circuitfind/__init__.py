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
    from circuitfind.circuit import Circuit
    from circuitfind.errors import CircuitfindError, FileError, ModelError, ScoreError, TaskError
    from circuitfind.evaluation.faithfulness import Evaluation, evaluate
    from circuitfind.evaluation.summary import TaskSummary, summarise
    from circuitfind.evaluation.verify import Verification, verify
    from circuitfind.graph import Graph
    from circuitfind.loading import load, task, wrap
    from circuitfind.metrics import METRICS, Metric
    from circuitfind.models.load import Model
    from circuitfind.progress import show_progress
    from circuitfind.record import Record
    from circuitfind.scores import NodeScores, Scores
    from circuitfind.search.acdc import acdc
    from circuitfind.search.find import FindResult, find
    from circuitfind.tasks.task import Task
else:
    # The same list as above, by module; type checkers see only the imports.
    _HOMES = {
        "attribution.attribute": "attribute",
        "circuit": "Circuit",
        "errors": "CircuitfindError FileError ModelError ScoreError TaskError",
        "evaluation.faithfulness": "Evaluation evaluate",
        "evaluation.summary": "TaskSummary summarise",
        "evaluation.verify": "Verification verify",
        "graph": "Graph",
        "loading": "load task wrap",
        "metrics": "METRICS Metric",
        "models.load": "Model",
        "progress": "show_progress",
        "record": "Record",
        "scores": "NodeScores Scores",
        "search.acdc": "acdc",
        "search.find": "FindResult find",
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
        return sorted({*globals(), *__all__})


__all__ = [
    "METRICS",
    "Circuit",
    "CircuitfindError",
    "Evaluation",
    "FileError",
    "FindResult",
    "Graph",
    "Metric",
    "Model",
    "ModelError",
    "NodeScores",
    "Record",
    "ScoreError",
    "Scores",
    "Task",
    "TaskError",
    "TaskSummary",
    "Verification",
    "__version__",
    "acdc",
    "attribute",
    "evaluate",
    "find",
    "load",
    "show_progress",
    "summarise",
    "task",
    "verify",
    "wrap",
]
