"""`circuitfind patch`: activation-patching sweeps and path patching, to a file, with the strongest places or paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from circuitfind.cli import inputs, shown, sweep_tables
from circuitfind.cli.options import (
    PATHS,
    SCORING,
    CheckedModelOptions,
    OutOptions,
    PlacesOptions,
    RankOptions,
    RunOptions,
    TaskOptions,
    What,
)
from circuitfind.cli.output import Output
from circuitfind.cli.verbs import verb
from circuitfind.cli.words import count
from circuitfind.errors import ScoreError

if TYPE_CHECKING:
    from circuitfind import Model
    from circuitfind.tasks.task import BoundTask

CHECKPOINT = "patch.part.safetensors"


@dataclass(frozen=True)
class SweepOptions:
    """What is patched, and how."""

    what: Annotated[What, typer.Option(help="Which places, one at a time.", rich_help_panel=SCORING)] = What.heads
    direction: Annotated[
        str, typer.Option(help="noising or denoising (clean values into corrupted runs).", rich_help_panel=SCORING)
    ] = "noising"
    show: Annotated[int, typer.Option(min=0, help="How many of the strongest to print.")] = 15


@dataclass(frozen=True)
class PathOptions:
    """Path patching instead of a sweep."""

    path: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help='Patch paths instead of places: the senders, such as a1.h5 or input, one at a time, or "all".',
            rich_help_panel=PATHS,
        ),
    ] = None
    to: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help="The receivers, patched together: such as 'a2.h6<v>', a2.h6 (its q, k and v), m3. Default: logits.",
            rich_help_panel=PATHS,
        ),
    ] = None
    separate: Annotated[bool, typer.Option("--separate", help="Each receiver on its own.", rich_help_panel=PATHS)] = (
        False
    )


def register(app: typer.Typer) -> None:
    """Adds the verb to the app."""
    verb(app, "circuitfind patch tiny --task ioi --what heads --direction denoising")(patch)


def patch(
    model: CheckedModelOptions,
    task: TaskOptions,
    sweep: SweepOptions,
    places: PlacesOptions,
    paths: PathOptions,
    run: RunOptions,
    rank: RankOptions,
    place: OutOptions,
    out: Output,
) -> None:
    """Patch every head, layer, position, ... one at a time, and measure the behaviour.

    Writes patch-WHAT.safetensors, or paths.json with --path. Positive = supports the behaviour, in both directions.
    """
    if paths.path is None and (paths.to is not None or paths.separate):
        raise ScoreError("--to and --separate belong to path patching: name the senders with --path, or --path all")
    folder, ways = inputs.folder(place.out), inputs.ways_of(places)
    loaded = inputs.load_model(model, out, model.check)
    import circuitfind as cf

    bound = inputs.load_task(task, loaded)
    if paths.path is None:
        inputs.check_places(loaded, bound, sweep.what.value, run.ablation, sweep.direction, **ways)
    lines = inputs.task_lines(loaded, bound, count(len(bound), "pair"), run.batch_size, out)
    out.facts([("model", inputs.model_line(loaded)), *lines])
    if paths.path is not None:
        _paths(loaded, bound, task.seed, sweep, paths, run, rank, folder, out)
        return
    checkpoint = inputs.checkpoint_of(loaded, folder / CHECKPOINT, "measured", out)
    with out.progress():
        found = cf.patch(
            loaded,
            bound,
            sweep.what.value,
            **ways,
            ablation=run.ablation or "corrupted",
            direction=sweep.direction,
            batch_size=run.batch_size,
            seed=task.seed,
            checkpoint=checkpoint,
        )
    path = found.save(folder / f"patch-{sweep.what.value}.safetensors")
    out.say()
    sweep_tables.strongest(found, rank.by.value, sweep.show, out)
    sweep_tables.heat(found, out)
    out.say(shown.drawable(path))
    rows = [row._asdict() for row in found.top(sweep.show, rank.by.value)]
    made = {"files": [str(path)], "strongest": rows}
    out.document({**inputs.described(loaded, bound, out), **made, "sweep": found.to_dict() if out.as_json else {}})


def _paths(
    model: Model,
    bound: BoundTask,
    seed: int,
    sweep: SweepOptions,
    paths: PathOptions,
    run: RunOptions,
    rank: RankOptions,
    folder: Path,
    out: Output,
) -> None:
    """Patches paths, and shows the strongest."""
    import circuitfind as cf

    with out.progress():
        found = cf.path_patch(
            model,
            bound,
            None if paths.path == "all" else str(paths.path).split(","),
            (paths.to or "logits").split(","),
            separate=paths.separate,
            ablation=run.ablation or "corrupted",
            direction=sweep.direction,
            batch_size=run.batch_size,
            seed=seed,
        )
    described = inputs.described(model, bound, out)
    path = found.save(folder / "paths.json", **described)
    out.say()
    shown.paths(found, sweep.show, rank.by.value, out)
    out.say(shown.drawable(path))
    out.document({**described, **found.to_dict(), "files": [str(path)]})
