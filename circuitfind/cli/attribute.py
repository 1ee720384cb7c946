"""`circuitfind attribute`: scores of every edge or node, to a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from circuitfind.cli import inputs, shown, sweep_tables
from circuitfind.cli.options import (
    SCORING,
    CheckedModelOptions,
    Level,
    OutOptions,
    PlacesOptions,
    RankOptions,
    RunOptions,
    ScoringOptions,
    TaskOptions,
    What,
)
from circuitfind.cli.output import Output
from circuitfind.cli.verbs import verb
from circuitfind.cli.words import count, fixed

if TYPE_CHECKING:
    from circuitfind import NodeScores, Scores, Sweep
    from circuitfind.record import Record


@dataclass(frozen=True)
class LevelOptions:
    """What is scored and shown."""

    level: Annotated[Level, typer.Option(help="Score edges or nodes.", rich_help_panel=SCORING)] = Level.edge
    what: Annotated[
        What | None,
        typer.Option(
            help='With --level node: the places that "circuitfind patch" measures, instead of the nodes.',
            rich_help_panel=SCORING,
        ),
    ] = None
    normalise: Annotated[
        bool,
        typer.Option("--normalise", help="hisp: divided by the norm of each layer's scores.", rich_help_panel=SCORING),
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
    level: LevelOptions,
    places: PlacesOptions,
    place: OutOptions,
    out: Output,
) -> None:
    """Score every edge, node, or place of a sweep on a behaviour.

    Writes scores.safetensors (edges), node-scores.safetensors, or estimates-WHAT.safetensors. Positive = supports the
    behaviour, except for baselines and direct contributions (direct, atp-star, hisp, ifr, activation,
    weights, random), whose scores are no effects.
    """
    scored = {"level": level.level.value, "normalise": level.normalise or None}
    what = level.what and level.what.value
    inputs.check_scoring(scoring, run, what=what, by_position=places.by_position, **scored)
    folder, ways = inputs.folder(place.out), inputs.ways_of(places)
    loaded = inputs.load_model(model, out, model.check)
    import circuitfind as cf

    bound = inputs.load_task(task, loaded)
    if what is not None:
        inputs.check_places(loaded, bound, what, run.ablation, scoring.direction, **ways)
    memory = inputs.memory_line(loaded, len(bound), bound.batch.clean.ids.shape[1], run.batch_size)
    lines = inputs.task_lines(loaded, bound, count(len(bound), "pair"), run.batch_size, out)
    out.facts([("model", inputs.model_line(loaded)), ("memory", memory), *lines])
    scores = inputs.scored(loaded, bound, task.seed, scoring, run, folder, out, what=what, **ways, **scored)
    path = scores.save(folder / _file_name(scores))
    out.say()
    if isinstance(scores, cf.Sweep):
        sweep_tables.strongest(scores, rank.by.value, level.show, out)
        sweep_tables.heat(scores, out)
    elif isinstance(scores, cf.Scores):
        _edges(scores, rank, level.show, out)
    else:
        _nodes(scores, rank, level.show, out)
    out.say(shown.drawable(path))
    made = {"method": scores.record.method, "level": level.level.value, "direction": scores.record.direction}
    found = {**made, "ablation": scores.record.ablation, "sign": scores.record.sign, "files": [str(path)]}
    out.document({**inputs.described(loaded, bound, out), **found, "scores": scores.to_dict() if out.as_json else {}})


def _file_name(scores: Scores | NodeScores | Sweep) -> str:
    from circuitfind import Scores, Sweep

    if isinstance(scores, Sweep):
        return f"estimates-{scores.what}.safetensors"
    return "scores.safetensors" if isinstance(scores, Scores) else "node-scores.safetensors"


def _edges(scores: Scores, rank: RankOptions, rows: int, out: Output) -> None:
    best = scores.ranked(rank.by.value)[:rows]
    values = [float(scores.values[u, r]) for u, r in best]
    digits = shown.digits_for(values)
    names = [scores.graph.edge_name(u, r) for u, r in best]
    cell = _cell(scores.record)
    table = [(name, cell(value, digits)) for name, value in zip(names, values, strict=True)]
    _table("edge", len(scores), scores.record, [], table, out)


def _nodes(scores: NodeScores, rank: RankOptions, rows: int, out: Output) -> None:
    values, names = scores.values, scores.graph.writer_names
    more = [("strongest position", "right"), ("there", "right")] if values.ndim == 2 else []
    cell = _cell(scores.record)
    table = []
    digits = shown.digits_for(values.ravel().tolist())
    for name in scores.top(rows, rank.by.value):
        row = values[names.index(name)]
        cells: list[str | Text] = [name, cell(float(row.sum()), digits)]
        if values.ndim == 2:
            place = int(abs(row).argmax())
            cells += [scores.positions[place] if scores.positions else str(place), cell(float(row[place]), digits)]
        table.append(cells)
    _table("node", len(names), scores.record, more, table, out)
    if scores.positions and table:
        shown.positions(out)


def _cell(record: Record) -> Callable[[float, int], str | Text]:
    """How a score is written: effects with their sign."""
    return shown.effect if record.is_effect else fixed


def _table(
    what: str,
    total: int,
    record: Record,
    more: list[tuple[str, str]],
    rows: Iterable[Iterable[str | Text]],
    out: Output,
) -> None:
    """Scores under what they are: exact effects, estimates, or neither."""
    by = f"{record.method} ({record.metric})" if record.is_effect else record.method
    heading = "score" if not record.is_effect else "exact" if record.method == "exact" else "estimate"
    out.table(f"Strongest of {count(total, what)} by {by}", [(what, "left"), (heading, "right"), *more], rows)
    if not record.is_effect:
        out.say(record.sign, style="dim")
