"""`circuitfind patch`: activation-patching sweeps and path patching, to a file, with the strongest places or paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from circuitfind.cli import inputs, options, tables
from circuitfind.cli.options import Option, listed
from circuitfind.cli.output import Output, count
from circuitfind.errors import ScoreError

CHECKPOINT = "patch.part.safetensors"
PATHS = "Path patching"


@dataclass(frozen=True)
class SweepOptions:
    """What is patched, and how."""

    PANEL: ClassVar[str] = options.SCORING

    what: Annotated[str, Option("Which places, one at a time.", metavar="|".join(options.KINDS))] = "heads"
    direction: Annotated[
        str | None,
        Option(f"{listed(options.DIRECTIONS)} (clean values into corrupted runs). Default: {options.DIRECTIONS[0]}."),
    ] = None
    show: Annotated[int, Option("How many of the strongest to print.", least=0)] = 15


@dataclass(frozen=True)
class PathOptions:
    """Path patching instead of a sweep."""

    PANEL: ClassVar[str] = PATHS

    path: Annotated[
        str | None,
        Option(
            'Patch paths instead of places: the senders, such as a1.h5 or input, one at a time, or "all".',
            metavar="NAME,NAME,...",
        ),
    ] = None
    to: Annotated[
        str | None,
        Option(
            "The receivers, patched together: such as 'a2.h6<v>', a2.h6 (its q, k and v), m3. Default: logits.",
            metavar="NAME,NAME,...",
        ),
    ] = None
    separate: Annotated[bool, Option("Each receiver on its own.")] = False


def patch(
    model: options.CheckedModelOptions,
    task: options.TaskOptions,
    sweep: SweepOptions,
    places: options.PlacesOptions,
    paths: PathOptions,
    run: options.RunOptions,
    rank: options.RankOptions,
    place: options.OutOptions,
    out: Output,
) -> None:
    """Patch every head, layer, position, ... one at a time, and measure the metric.

    Writes patch-WHAT.safetensors, or paths.json with --path. Positive = supports the task, in both directions.

    Example: circuitfind patch tiny --task ioi --what heads --direction denoising
    """
    if paths.path is None and (paths.to is not None or paths.separate):
        raise ScoreError("--to and --separate belong to path patching: name the senders with --path, or --path all")
    folder, where = inputs.folder(place.out), {"what": sweep.what, **inputs.where_of(places, sweep.what)}
    asked = inputs.run_keywords(task, run) | {"direction": sweep.direction}
    loaded, bound = inputs.load(model, task, out, model.check)
    import circuitfind as cf

    if paths.path is None:
        inputs.check_places(loaded, bound, asked, where)
    about = inputs.task_lines(loaded, bound, count(len(bound), "pair"), run.batch_size, out)
    out.facts([("model", inputs.model_line(loaded)), *about])
    described = inputs.described(loaded, bound, out)
    found: Any
    if paths.path is None:
        checkpoint = inputs.checkpoint(loaded, folder / CHECKPOINT, "measured", out)
        with out.progress():
            found = cf.patch(loaded, bound, **where, **asked, checkpoint=checkpoint)
        path = found.save(folder / f"patch-{sweep.what}.safetensors")
    else:
        senders = None if paths.path == "all" else paths.path.split(",")
        asked |= {"separate": paths.separate} | ({} if paths.to is None else {"receivers": paths.to.split(",")})
        with out.progress():
            found = cf.path_patch(loaded, bound, senders, **asked)
        path = found.save(folder / "paths.json", **described)
    out.say()
    tables.show(found, out, sweep.show, rank.by)
    out.written([path], drawable=True)
    if paths.path is not None:
        out.document({**described, **found.to_dict(), "files": [str(path)]})
        return
    rows = [row._asdict() for row in found.top(sweep.show, rank.by)]
    whole = found.to_dict() if out.as_json else {}
    out.document({**described, "files": [str(path)], "strongest": rows, "sweep": whole})
