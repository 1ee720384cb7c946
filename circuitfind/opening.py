"""`open`: whatever circuitfind or a supported tool wrote, found out from the file itself; needs no model.

1. A `.safetensors` file names its format in its header: scores of edges or nodes, a sweep.
2. A `.json` result names its format, which `HOMES` leads to the class that reads it.
3. Files of before results named their format are told by their keys.
4. Anything else is a circuit: circuit.json, or EAP-IG's `.json` and `.pt`; a folder is an entry of MIB's circuit track.
"""

from __future__ import annotations

from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from circuitfind.circuit import Circuit
from circuitfind.errors import FileError
from circuitfind.export.files import check_file, json_object
from circuitfind.scores import NodeScores, Scores

READS = (
    "a sweep's or scores' .safetensors, circuit.json, verify.json, compare.json, paths.json, approximation.json,"
    " attention-HEAD.json, the .json of any other result, or EAP-IG's .json or .pt"
)
HOMES = {  # by the format that a JSON file names: the module and the class that opens it
    "circuitfind.comparison": ("comparison.result", "Comparison"),
    "circuitfind.paths": ("patching.path", "PathEffects"),
    "circuitfind.direct": ("attribution.direct", "DirectEffects"),
    "circuitfind.attention": ("patching.attention", "AttentionPattern"),
    "circuitfind.evaluation": ("evaluation.faithfulness", "Evaluation"),
    "circuitfind.curve": ("evaluation.curve", "Curve"),
    "circuitfind.mib": ("evaluation.curve", "Mib"),
    "circuitfind.verification": ("evaluation.verify", "Verification"),
    "circuitfind.completeness": ("evaluation.completeness", "Completeness"),
    "circuitfind.minimality": ("evaluation.minimality", "Minimality"),
    "circuitfind.hypotheses": ("evaluation.hypotheses", "HypothesisTests"),
    "circuitfind.stability": ("evaluation.stability", "Stability"),
    "circuitfind.approximation": ("evaluation.approximation", "Approximation"),
    "circuitfind.agreement": ("evaluation.agreement", "Agreement"),
    "circuitfind.diagnosis": ("evaluation.diagnosis", "Diagnosis"),
    "circuitfind.task-summary": ("evaluation.diagnosis", "TaskSummary"),
}
UNNAMED = (  # by the keys of files written before they named their format: the format
    ({"points", "cpr"}, "circuitfind.curve"),
    ({"edges", "correlation", "circuit"}, "circuitfind.verification"),
)
OLDER = (  # of other such files: which verb makes them again
    ({"senders", "effects"}, "circuitfind patch --path"),
    ({"kinds", "places"}, "circuitfind approximation"),
    ({"head", "tokens", "pattern"}, "circuitfind attention"),
)
MOST_KEYS = 6  # of an unknown object, to name it by


def open(path: str | PathLike[str]) -> Any:
    """The result that a file holds: scores, a circuit, a sweep, a comparison, a verification, ...

    Raises:
        FileError: there is no such file, or it holds nothing that is read here; the error says what it holds.
    """
    path = Path(path)
    check_file(path)
    if path.suffix.lower() == ".safetensors":
        return _tensors(path)
    if path.suffix.lower() not in (".json", ".pt"):
        raise FileError(f"{path}: no result: give {READS}")
    return _json(path)


def _tensors(path: Path) -> Any:
    try:
        with safe_open(str(path), framework="numpy") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise FileError(f"{path}: no safetensors file: {error}") from None
    if header.get("format") == "circuitfind.sweep":
        from circuitfind.patching.sweep import Sweep

        return Sweep.open(path)
    if header.get("format") != "circuitfind.scores":
        raise FileError(f"{path}: holds {_named(header)}, no result: give {READS}")
    return NodeScores.open(path) if header.get("level") == "node" else Scores.open(path)


def _named(header: dict[str, str]) -> str:
    """What a safetensors file that holds no result says of itself."""
    if header.get("format", "").startswith("circuitfind."):
        return header["format"]
    return "the checkpoint of a stopped run" if set(header) == {"key"} else "tensors of something else"


def _json(path: Path) -> Any:
    content = json_object(path) if path.suffix.lower() == ".json" else {}
    name = content.get("format")
    if name is None:
        name = next((format for keys, format in UNNAMED if keys <= content.keys()), None)
    if isinstance(name, str) and name in HOMES:
        home, result = HOMES[name]
        return getattr(import_module(f"circuitfind.{home}"), result).open(path)
    for keys, command in OLDER if name is None else ():
        if keys <= content.keys():
            raise FileError(f"{path}: written by an older version of circuitfind: make it again with '{command}'")
    if content and not content.keys() & {"edges", "nodes"}:  # no circuit either, of this package or another
        found = f"'{name}'" if name else f"a JSON object of {', '.join(list(content)[:MOST_KEYS])}"
        raise FileError(f"{path}: holds {found}, no result: give {READS}")
    try:
        return Circuit.open(path)
    except FileError as error:
        if "format" in content:  # it says what it is: the reader's own words fit
            raise
        raise FileError(f"{error}. Read are: {READS}") from None
