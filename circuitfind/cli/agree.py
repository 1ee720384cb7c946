"""`circuitfind agree`: compare scores or a circuit with a published circuit."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

import circuitfind as cf
from circuitfind.cli import options
from circuitfind.cli.cells import DASH, fixed, whole
from circuitfind.cli.options import option
from circuitfind.cli.output import Output
from circuitfind.errors import FileError

if TYPE_CHECKING:
    from circuitfind.evaluation.agreement import Agreement

COLUMNS = ("", "of", "true", "found", "both", "prec.", "recall", "F1", "AUROC", "AP")


@dataclass(frozen=True)
class AgreeOptions:
    file: Path = option(options.SCORES_OR_CIRCUIT, MISSING, argument=True, metavar="FILE")
    reference: str = option(
        "Published circuit: ioi, greater-than, docstring, or a file with a circuit or reference.",
        MISSING,
        metavar="NAME|FILE",
    )
    top: int | None = option("For scores: take this many of the strongest edges as the circuit.", least=0)


def agree(what: AgreeOptions, sign: options.Sign, rank: options.Rank, out: Output) -> None:
    """Compare scores or a circuit with a published circuit.

    AUROC and AP (average precision) judge the ranking, over all thresholds; precision, recall and F1 the circuit, which
    is taken as it is, not pruned. Heads and nodes rank by their best edge.

    Example: circuitfind agree circuitfind-out/scores.safetensors --reference circuitfind-out/circuit.json
    """
    from circuitfind.evaluation.agreement import agreement, levels_of
    from circuitfind.references.published import reference

    kind: Any = sign.sign
    by: Any = rank.by
    target, given = reference(what.reference), _ranking(what, kind, by)
    found = [agreement(given, target, by=by, level=level) for level in levels_of(target)]
    if not found:
        raise FileError(f"--reference {what.reference}: contains neither edges nor heads")
    out.facts([("reference", f"{target.name}: {target.n_edges:,} edges"), ("source", target.source)])
    out.table(f"{what.file} against {target.name}, ranked by {by} effect", COLUMNS, map(_row, found))
    for result in found:
        if result.mib_auroc == result.mib_auroc:
            out.say(f"AUROC of edges as in MIB, from ten greedy circuits: {fixed(result.mib_auroc)}")
    if heads := found[-1].heads:
        rows = [
            (name, " ".join(has) or "–", Text(" ".join(lacks), style="yellow")) for name, (has, lacks) in heads.items()
        ]
        out.table("Heads of the reference", ("class", "in the circuit", "missed"), rows)
    out.document({"file": str(what.file), "agreement": [result.to_dict() for result in found]})


def _ranking(what: AgreeOptions, kind: Any, by: Any) -> cf.Circuit | cf.Scores:
    if what.file.suffix.lower() != ".safetensors" and what.top is None:
        return cf.Circuit.open(what.file, kind)
    scores = cf.Scores.open(what.file, kind)
    if what.top is None:
        return scores
    return cf.Circuit(scores.graph, scores.top(what.top, by, prune=False).mask, estimates=scores.values)


def _row(result: Agreement) -> list[str]:
    counts = result.found
    sizes, rates = [DASH] * 2, [DASH] * 3
    if counts:
        sizes = [whole(counts.true_positives + counts.false_positives), whole(counts.true_positives)]
        rates = [fixed(value) for value in (counts.precision, counts.recall, counts.f1)]
    ranking = [fixed(value) for value in (result.auroc, result.average_precision)]
    return [f"{result.level}s", whole(result.n_items), whole(result.n_true), *sizes, *rates, *ranking]
