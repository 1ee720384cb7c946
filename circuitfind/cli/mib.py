"""`circuitfind export --to mib`: scores as an entry of MIB's circuit track; a folder is checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from circuitfind.cli.output import Output
from circuitfind.cli.verbs import FAILED
from circuitfind.cli.words import count
from circuitfind.errors import FileError

if TYPE_CHECKING:
    from circuitfind.scores import By, Scores


def write(scores: Scores, root: Path, name: str | None, by: By, out: Output) -> None:
    """Writes `root/name`: the scores, or nine circuits where query heads share keys and values."""
    from circuitfind.export import mib
    from circuitfind.export.eap_ig_forms import EapIgFile

    if name is None:
        raise FileError("--to mib: give --entry TASK_MODEL, such as --entry ioi_gpt2")
    graph = scores.graph
    if graph.group > 1:
        files = mib.write_circuits(root, name, graph, scores.ranked(by))
    else:
        files = mib.write_importances(root, name, EapIgFile(graph, graph.real & False, scores.values))
    out.say(f"Written: {root / name} ({count(len(files), 'file')})")
    out.document({"folder": str(root / name), "files": [str(file) for file in files]})


def check(root: Path, out: Output) -> int:
    """Says what each folder of a submission holds and what is wrong with it."""
    from circuitfind.export import mib

    entries = mib.check(root)
    rows = [(entry.name, entry.holds, entry.problem or "ok") for entry in entries]
    out.table(f"{root} as a submission to MIB", (("folder", "left"), ("holds", "left"), ("", "left")), rows)
    out.document({"folder": str(root), "entries": [entry._asdict() for entry in entries]})
    return FAILED if any(entry.problem for entry in entries) else 0
