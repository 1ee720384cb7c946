"""circuitfind: which heads, MLPs and connections of a Hugging Face model do a behaviour, and how sure that is.

import circuitfind as cf

model = cf.load("tiny")
task = cf.task("ioi", model, n=64)
result = cf.find(model, task)
result.circuit.render("ioi.svg")
"""

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
from circuitfind.search.find import FindResult, find
from circuitfind.tasks.task import Task

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

__version__ = "0.1.0"
