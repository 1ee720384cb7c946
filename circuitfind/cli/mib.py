"""`circuitfind mib`: check a folder as a submission to MIB's circuit track."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from circuitfind.cli.options import option
from circuitfind.cli.output import FAILED, Output


@dataclass(frozen=True)
class MibOptions:
    folder: Path = option(
        "Folder with one subfolder for each task and model, such as ioi_gpt2.", MISSING, argument=True, metavar="DIR"
    )


def mib(what: MibOptions, out: Output) -> int:
    """Check a folder as a submission to MIB's circuit track.

    "circuitfind export --to mib" writes such folders. Exit code 1: the submission has errors.

    Example: circuitfind mib submission
    """
    from circuitfind.export import mib as track

    entries = track.check(what.folder)
    rows = [(entry.name, entry.holds, entry.problem or "ok") for entry in entries]
    out.table(f"{what.folder} as a submission to MIB", ("folder", "holds", ""), rows)
    out.document({"folder": str(what.folder), "entries": [entry._asdict() for entry in entries]})
    return FAILED if any(entry.problem for entry in entries) else 0
