"""`circuitfind attribute`: scores of every edge or node, to a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from circuitfind.cli import inputs, shown
from circuitfind.cli.options import (
    SCORING,
    CheckedModelOptions,
    Level,
    OutOptions,
    RankOptions,
    RunOptions,
    ScoringOptions,
    TaskOptions,
)
from circuitfind.cli.output import Output
from circuitfind.cli.verbs import verb
from circuitfind.cli.words import count

if TYPE_CHECKING:
    from circuitfind import NodeScores, Scores


@dataclass(frozen=True)
class LevelOptions:
    """What is scored and shown."""

    level: Annotated[Level, typer.Option(help="Score edges or nodes.", rich_help_panel=SCORING)] = Level.edge
    by_position: Annotated[
        bool,
        typer.Option("--by-position", help="Nodes by token position; equal lengths only.", rich_help_panel=SCORING),
    ] = False
    show: Annotated[int, typer.Option(min=0, help="How many of the strongest to print.")] = 15


def register(app: typer.Typer) -> None:
    """Adds the verb to the app."""
    verb(app, "circuitfind attribute tiny --task ioi --method eap")(attribute)


def attribute(
    model: CheckedModelOptions,
    task: TaskOptions,
    scoring: ScoringOptions,
    run: RunOptions,
    rank: RankOptions,
    what: LevelOptions,
    place: OutOptions,
    out: Output,
) -> None:
    """Score every edge or node on a behaviour.

    Writes scores.safetensors (edges) or node-scores.safetensors. Positive = supports the behaviour.
    """
    folder = inputs.folder(place.out)
    loaded = inputs.load_model(model, out, model.check)
    import circuitfind as cf

    bound = inputs.load_task(task, loaded)
    with out.progress():
        summary = cf.summarise(loaded, bound, warn=False, batch_size=run.batch_size)
    memory = inputs.memory_line(loaded, len(bound), bound.batch.clean.ids.shape[1], run.batch_size)
    lines = inputs.task_lines(summary, count(len(bound), "pair"), out)
    out.facts([("model", inputs.model_line(loaded)), ("memory", memory), *lines])
    level = {"level": what.level.value, "by_position": what.by_position}
    scores = inputs.scored(loaded, bound, task.seed, scoring, run, folder, out, **level)
    name = "scores.safetensors" if isinstance(scores, cf.Scores) else "node-scores.safetensors"
    path = scores.save(folder / name)
    out.say()
    if isinstance(scores, cf.Scores):
        _edges(scores, rank, what.show, out)
    else:
        _nodes(scores, rank, what.show, out)
    out.say(f"Written: {path}")
    made = {"method": scores.record.method, "level": what.level.value, "direction": scores.record.direction}
    found = {**made, "ablation": scores.record.ablation, "files": [str(path)]}
    out.document({**inputs.described(loaded, bound, out), **found, "scores": scores.to_dict() if out.as_json else {}})


def _edges(scores: Scores, rank: RankOptions, rows: int, out: Output) -> None:
    best = scores.ranked(rank.by.value)[:rows]
    values = [float(scores.values[u, r]) for u, r in best]
    digits = shown.digits_for(values)
    names = [scores.graph.edge_name(u, r) for u, r in best]
    table = [(name, shown.effect(value, digits)) for name, value in zip(names, values, strict=True)]
    title = f"Strongest of {len(scores):,} edges by {scores.record.method} ({scores.record.metric})"
    out.table(title, (("edge", "left"), ("exact" if scores.record.method == "exact" else "estimate", "right")), table)


def _nodes(scores: NodeScores, rank: RankOptions, rows: int, out: Output) -> None:
    values, names = scores.values, scores.graph.writer_names
    columns = [("node", "left"), ("estimate", "right")]
    columns += [("strongest position", "right"), ("there", "right")] if values.ndim == 2 else []
    table = []
    digits = shown.digits_for(values.ravel().tolist())
    for name in scores.top(rows, rank.by.value):
        row = values[names.index(name)]
        cells: list[str | Text] = [name, shown.effect(float(row.sum()), digits)]
        if values.ndim == 2:
            place = int(abs(row).argmax())
            cells += [str(place), shown.effect(float(row[place]), digits)]
        table.append(cells)
    title = f"Strongest of {len(names):,} nodes by {scores.record.method} ({scores.record.metric})"
    out.table(title, columns, table)
