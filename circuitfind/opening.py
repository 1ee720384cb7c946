"""`open`: read any file of circuitfind or a supported tool; the kind is recognised from the file. Needs no model.

1. A `.safetensors` file names its format in its header: scores of edges or nodes, a sweep.
2. A `.json` result names its format, and `HOMES` the class that reads it. Older files without a format are recognised
   by their keys.
3. The folder of a search or a comparison is recognised by the name of a `.json` in it. A folder of MIB's circuit track
   holds EAP-IG files: one of scores, or circuits of several sizes.
4. Anything else is a circuit or scores: circuit.json, or a file of EAP-IG, ACDC or auto-circuit (`export/foreign.py`).
"""

from __future__ import annotations

from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from circuitfind.circuit import Circuit
from circuitfind.errors import FileError
from circuitfind.export import eap_ig, foreign
from circuitfind.export.files import check_file, json_object
from circuitfind.export.pickled import ENDINGS
from circuitfind.graph import Graph
from circuitfind.placed_scores import PlacedScores
from circuitfind.scores import NodeScores, Scores

READS = (
    "a sweep's or scores' .safetensors, circuit.json, verify.json, compare.json, paths.json, approximation.json,"
    " attention-HEAD.json, the .json of any other result, EAP-IG's .json or .pt, ACDC's .pth or .pkl, or a cache of"
    " auto-circuit's scores"
)
HOMES = {  # by the format that a JSON file names: the module and the class that opens it
    "circuitfind.agreement": "evaluation.agreement:Agreement",
    "circuitfind.approximation": "evaluation.approximation:Approximation",
    "circuitfind.attention": "patching.attention:AttentionPattern",
    "circuitfind.attention-attribution": "patching.attention_attribution:AttentionAttribution",
    "circuitfind.certified": "evaluation.certified:Certified",
    "circuitfind.checks": "evaluation.check:Checks",
    "circuitfind.clusters": "evaluation.clusters:Clusters",
    "circuitfind.comparison": "comparison.result:Comparison",
    "circuitfind.completeness": "evaluation.completeness:Completeness",
    "circuitfind.curve": "evaluation.curve:Curve",
    "circuitfind.diagnosis": "evaluation.diagnosis:Diagnosis",
    "circuitfind.direct": "attribution.direct:DirectEffects",
    "circuitfind.evaluation": "evaluation.faithfulness:Evaluation",
    "circuitfind.find": "search.found:FindResult",
    "circuitfind.hypotheses": "evaluation.hypotheses:HypothesisTests",
    "circuitfind.learned": "search.learn:LearnedMasks",
    "circuitfind.methods": "attribution.methods:Methods",
    "circuitfind.mib": "evaluation.curve:Mib",
    "circuitfind.minimality": "evaluation.minimality:Minimality",
    "circuitfind.paths": "patching.path:PathEffects",
    "circuitfind.recovery": "comparison.recovery:Recovery",
    "circuitfind.stability": "evaluation.stability:Stability",
    "circuitfind.task-summary": "evaluation.diagnosis:TaskSummary",
    "circuitfind.verification": "evaluation.verify:Verification",
}
FOLDERS = {"find.json": True, "learning.json": True, "compare.json": False}  # whether its class opens the folder
OLDER = (  # formats of older files without a format name, by their keys
    ({"points", "cpr"}, "circuitfind.curve"),
    ({"edges", "correlation", "circuit"}, "circuitfind.verification"),
)
UNREAD = (  # older files that are no longer read, by their keys: the command that makes them again
    ({"senders", "effects"}, "circuitfind patch --path"),
    ({"kinds", "places"}, "circuitfind approximation"),
    ({"head", "tokens", "pattern"}, "circuitfind attention"),
)
MOST_KEYS = 6  # keys of an unknown object that an error names


def open(path: str | PathLike[str], graph: Graph | None = None) -> Any:
    """Read the result in a file or folder: scores, a circuit, a sweep, a comparison, a result of `find`, ...

    Args:
        graph: the model's graph, for a file of another tool; see `Circuit.open`.

    Returns:
        The result; for a folder of circuits (MIB's circuit track) a list of circuits, smallest first; for a cache of
        several sets of scores (auto-circuit) a dict of scores by name.

    Raises:
        FileError: there is no such file, or it holds no result; the error says what it holds.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    check_file(path)
    if path.suffix.lower() == ".safetensors":
        return _tensors(path)
    if path.suffix.lower() in ENDINGS:
        several = foreign.read_several(path)
        if len(several) > 1:
            return {name: Scores(*one) for name, one in several.items()}
        return _foreign(path, graph)
    if path.suffix.lower() != ".json":
        raise FileError(f"{path}: no result: give {READS}")
    found = foreign.read(path)  # before other JSON, because scores in these files may be NaN or infinite
    return _json(path) if found is None else _foreign(path, graph)


def _foreign(path: Path, graph: Graph | None) -> Any:
    """Return the circuit of another tool's file, or its scores if it has no circuit."""
    found = foreign.read(path, graph=graph)
    assert found is not None, "its ending, or its parts, say that it is one"
    scored = found.scores is not None and found.scores.any()
    if found.mask.any() or not (scored or found.node_scores is not None):
        return Circuit.open(path, graph=graph)
    return Scores.open(path, graph=graph) if scored else NodeScores.open(path, graph=graph)


def _folder(path: Path) -> Any:
    for file, whole in ((path / name, whole) for name, whole in FOLDERS.items()):
        if file.is_file():
            return _class(json_object(file).get("format"), file).open(path if whole else file)
    inside = sorted(one for one in path.iterdir() if one.suffix.lower() in eap_ig.ENDINGS)
    if len(inside) == 1:
        return open(inside[0])
    if not inside or any(one.suffix.lower() == ".json" for one in inside):
        check_file(path)  # says that it is a folder
    return sorted(map(Circuit.open, inside), key=len)


def _class(name: Any, path: Path) -> Any:
    home, _, kind = HOMES.get(name, "").partition(":")
    if not home:
        raise FileError(f"{path}: holds '{name}', no result: give {READS}")
    return getattr(import_module(f"circuitfind.{home}"), kind)


def _tensors(path: Path) -> Any:
    try:
        with safe_open(str(path), framework="numpy") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise FileError(f"{path}: no safetensors file: {error}") from None
    name = header.get("format", "")
    if name == "circuitfind.sweep":
        return import_module("circuitfind.patching.sweep").Sweep.open(path)
    if name == "circuitfind.scores":
        kinds: dict[str, Any] = {kind.LEVEL: kind for kind in (Scores, NodeScores, PlacedScores)}
        return kinds.get(header.get("level", ""), Scores).open(path)
    other = "the checkpoint of a stopped run" if set(header) == {"key"} else "tensors of something else"
    raise FileError(f"{path}: holds {name if name.startswith('circuitfind.') else other}, no result: give {READS}")


def _json(path: Path) -> Any:
    content = json_object(path)
    name = content.get("format")
    if name is None:
        if command := next((command for keys, command in UNREAD if keys <= content.keys()), None):
            raise FileError(f"{path}: written by an older version of circuitfind: make it again with '{command}'")
        name = next((format for keys, format in OLDER if keys <= content.keys()), None)
    if name in HOMES:
        return _class(name, path).open(path.parent if FOLDERS.get(path.name) else path)
    if content and not content.keys() & {"edges", "nodes"}:  # not a circuit of this package or of another tool
        found = f"'{name}'" if name else f"a JSON object of {', '.join(list(content)[:MOST_KEYS])}"
        raise FileError(f"{path}: holds {found}, no result: give {READS}")
    try:
        return Circuit.open(path)
    except FileError as error:
        if "format" in content:  # it says what it is: the reader's own words fit
            raise
        raise FileError(f"{error}. Read are: {READS}") from None
