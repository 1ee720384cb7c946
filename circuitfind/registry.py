"""`register`: make a record of your own known by its name, in this process.

| record | used by |
|---|---|
| `Method` | `attribute(..., method=name)` |
| `Ablation` | `ablation=name` |
| `Kind` | `patch(..., what=name)`, and `attribute(..., level="node", what=name)` |
| `Metric` | `metric=name` |
| `TaskBuilder` | `task(name, model)` |
| `Family` | models whose config has the `model_type` |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from circuitfind import metrics
from circuitfind.attribution import methods
from circuitfind.attribution.method import Method
from circuitfind.engine import ablation
from circuitfind.engine.ablation import Ablation
from circuitfind.errors import CircuitfindError
from circuitfind.metrics import Metric
from circuitfind.models import families
from circuitfind.models.families import Family
from circuitfind.patching import places
from circuitfind.patching.places import Kind
from circuitfind.tasks import builtin
from circuitfind.tasks.builder import TaskBuilder

T = TypeVar("T")
HOMES: dict[type, Callable[[Any], Any]] = {
    Method: methods.register,
    Ablation: ablation.register,
    Kind: places.register,
    Metric: metrics.register,
    TaskBuilder: builtin.register,
}


def register(record: T, model_type: str | None = None) -> T:
    """Register a record under its name, in this process, and return it.

    Args:
        record: a `Method`, `Ablation`, `Kind`, `Metric`, `TaskBuilder` or `Family`.
        model_type: for a family, the `model_type` of the configs that it covers.

    Raises:
        CircuitfindError: the record is of another type, its name is taken, or a family has no `model_type`.
    """
    if isinstance(record, Family):
        if model_type is None:
            raise CircuitfindError("register: a family is found by its config's model_type: give model_type=")
        families.register(model_type, record)
        return record
    home = next((file for kind, file in HOMES.items() if isinstance(record, kind)), None)
    if home is None:
        kinds = ", ".join(kind.__name__ for kind in HOMES)
        raise CircuitfindError(f"register: a {type(record).__name__} is not one of {kinds} or Family")
    if model_type is not None:
        raise CircuitfindError(f"register: model_type= is for a Family, not for a {type(record).__name__}")
    home(record)
    return record
