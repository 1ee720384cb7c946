"""Folders for MIB's circuit track (Mueller et al. 2025): one per task and model, named `{task}_{model}`.

1. A folder holds either one file of scores (positive = keep), `importances.pt`, or nine circuits of at most 0.1, 0.2,
   0.5, 1, 2, 5, 10, 20 and 50% of the edges. Both are files of the EAP-IG library. A tenth, empty circuit is accepted
   (the track's page says nine and lists ten). MIB also accepts JSON, which is ten times as large.
2. These files have a key and a value per query head, so an edge into a shared head counts once for every query head of
   the group. A circuit takes the best edges as long as they fit. Scores are by query head, too: for a grouped-query
   model use `attribute(ungrouped=True)`.
3. A submission needs at least two tasks and two models.
"""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from circuitfind.errors import FileError, count
from circuitfind.export import eap_ig, foreign
from circuitfind.export.eap_ig import Foreign
from circuitfind.graph import Graph

PERCENT = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
SHAPES = {"gpt2": (12, 12), "qwen2.5": (24, 14), "gemma2": (26, 8), "llama3": (32, 32)}  # layers, query heads
MODELS_OF = {
    "ioi": ("gpt2", "qwen2.5", "gemma2", "llama3"),
    "mcqa": ("qwen2.5", "gemma2", "llama3"),
    "arithmetic-addition": ("llama3",),
    "arithmetic-subtraction": ("llama3",),
    "arc-easy": ("gemma2", "llama3"),
    "arc-challenge": ("llama3",),
}


class Folder(NamedTuple):
    """One folder of a submission: what it holds, and what is wrong with it ("" if nothing is)."""

    name: str
    holds: str
    problem: str


def task_and_model(name: str) -> tuple[str, str]:
    """Return the task and the model in a folder's name; raise FileError if MIB does not have them together."""
    task, _, model = name.partition("_")
    if task not in MODELS_OF:
        raise FileError(f"'{name}' is not a folder of MIB's: write TASK_MODEL, the task one of {', '.join(MODELS_OF)}")
    if model not in MODELS_OF[task]:
        raise FileError(f"'{name}': MIB has the task {task} on {', '.join(MODELS_OF[task])}, not on '{model}'")
    return task, model


def _check_graph(name: str, graph: Graph) -> None:
    shape = SHAPES[task_and_model(name)[1]]
    if (graph.n_layers, graph.n_heads) != shape:
        raise FileError(f"'{name}' needs a model of {shape[0]} layers and {shape[1]} heads, this is {graph}")


# -------------------------------------------------------------------- writing
def write_importances(root: str | PathLike[str], name: str, content: Foreign) -> list[Path]:
    """Write scores as `root/name/importances.pt`; for a grouped-query model they must be by query head."""
    _check_graph(name, content.graph)
    return [eap_ig.write(Path(root, name, "importances.pt"), content)]


def write_circuits(root: str | PathLike[str], name: str, graph: Graph, ranked: np.ndarray) -> list[Path]:
    """Write nine circuits cut from a ranking, as `root/name/0.1.pt` to `50.pt`.

    ranked: `[edges, 2]` (writer, reader), best first.
    """
    _check_graph(name, graph)
    masks = zip(PERCENT, circuits(graph, ranked), strict=True)
    return [eap_ig.write(Path(root, name, f"{percent:g}.pt"), Foreign(graph, mask)) for percent, mask in masks]


def circuits(graph: Graph, ranked: np.ndarray) -> Iterator[np.ndarray]:
    """Yield a mask `[writers, readers]` for each of MIB's sizes, with as many of the best edges as fit."""
    copies = np.bincount(eap_ig.columns(graph), minlength=graph.n_readers)
    cost = np.cumsum(copies[ranked[:, 1]])
    for percent in PERCENT:
        best = ranked[: np.searchsorted(cost, _budget(graph, percent), side="right")]
        mask = np.zeros((graph.n_writers, graph.n_readers), dtype=bool)
        mask[best[:, 0], best[:, 1]] = True
        yield mask


def _budget(graph: Graph, percent: float) -> int:
    return int(percent / 100 * graph.ungrouped().n_edges)


# -------------------------------------------------------------------- checking
def check(root: str | PathLike[str]) -> list[Folder]:
    """Return what every folder of a submission holds and what is wrong with it; problems of the whole come last."""
    root = Path(root)
    if not root.is_dir():
        raise FileError(f"{root}: no such folder")
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    entries = [_checked(folder) for folder in folders]
    good = [task_and_model(entry.name) for entry in entries if not entry.problem]
    for column, what in zip(zip(*good, strict=True), ("task", "model"), strict=False):
        if (n := len(set(column))) < 2:
            entries.append(Folder(".", f"{n} {what}", f"a submission needs at least two {what}s"))
    return entries if good else [*entries, Folder(".", "nothing", "no folder that MIB could evaluate")]


def _checked(folder: Path) -> Folder:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in eap_ig.ENDINGS)
    try:
        task_and_model(folder.name)
        contents = []
        for path in files:
            if (content := foreign.read(path)) is None:
                raise FileError(f"{path.name} is not a file of the EAP-IG library")
            _check_graph(folder.name, content.graph)
            contents.append(content)
        if len(contents) == 1:
            _check_importances(contents[0])
            return Folder(folder.name, "importances", "")
        _check_circuits(contents)
        return Folder(folder.name, f"{len(contents)} circuits", "")
    except FileError as error:
        return Folder(folder.name, count(len(files), "file"), str(error))


def _check_importances(content: Foreign) -> None:
    scores = content.scores
    if scores is not None and np.isnan(scores).any():
        raise FileError("some scores are not finite numbers")
    if (scores is None or np.isin(scores, (0, 1)).all()) and content.node_scores is None:
        raise FileError("the one file holds no scores, only a circuit: give a file of scores, or nine circuits")


def _check_circuits(contents: list[Foreign]) -> None:
    sizes = sorted(int(content.mask.sum()) for content in contents)
    sizes = sizes[1:] if len(sizes) == len(PERCENT) + 1 and sizes[0] == 0 else sizes
    if len(sizes) != len(PERCENT):
        raise FileError(f"{len(contents)} files: MIB takes one file of scores, or {len(PERCENT)} circuits")
    for size, percent in zip(sizes, PERCENT, strict=True):
        if size > (most := _budget(contents[0].graph, percent)):
            raise FileError(f"a circuit has {size:,} edges, but at most {percent:g}% are allowed, {most:,}")
