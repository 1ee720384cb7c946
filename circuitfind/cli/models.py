"""`circuitfind models`: the embedded model, and the supported families."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from circuitfind.cli.cells import Cell, number, percent
from circuitfind.cli.output import Output

LEGEND = (
    "clean, corrupted: mean metric; lowered: pairs whose corrupted prompt has the lower metric; flipped: below zero,"
    " where the corruption makes the other answer right"
)
HEADINGS = ("task, corruption", "accuracy", "clean", "corrupted", "lowered", "flipped")


def models(out: Output) -> None:
    """Describe the embedded model and list the supported model families.

    Example: circuitfind models
    """
    from circuitfind.models import tiny
    from circuitfind.models.families import FAMILIES

    figures = tiny.figures()
    made = figures["training"]
    pairs = {one["n"] for corruptions in figures["behaviours"].values() for one in corruptions.values()}
    out.facts(
        [
            ("tiny", f"GPT-2 class, {made['parameters']:,} parameters, in the package, works offline"),
            ("training", f"{made['steps']:,} steps, seed {made['seed']}, {made['seconds'] / 60:.0f} minutes"),
            ("measured", f"on {min(pairs):,} pairs each, held out from training ({made['held_out']})"),
        ]
    )
    out.say()
    rows: list[list[Cell]] = []
    for task, corruptions in figures["behaviours"].items():
        rows.append([Text(task, style="bold"), *[""] * 5])
        rows += [_figures(corruption, one) for corruption, one in corruptions.items()]
    out.table("How well it does the built-in tasks", HEADINGS, rows)
    out.say(LEGEND, style="dim")
    out.say()
    out.facts([("supported", f"{len(FAMILIES)} families: {', '.join(sorted(FAMILIES))}")])
    out.document({"embedded": {"tiny": figures}, "families": sorted(FAMILIES)})


def _figures(corruption: str, one: dict[str, Any]) -> list[Cell]:
    metrics = [number(one[name]) for name in ("metric_clean", "metric_corrupted")]
    flipped = percent(one["flipped"], 1) if one["flips"] else ""
    return [f"  {corruption}", percent(one["accuracy"], 1), *metrics, percent(one["lowered"], 1), flipped]
