"""`circuitfind patch`: measure exact effects of places or paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import circuitfind as cf
from circuitfind.cli import inputs, options, tables
from circuitfind.cli.options import listed, option
from circuitfind.cli.output import Output
from circuitfind.errors import ScoreError

CHECKPOINT = "patch.part.safetensors"


@dataclass(frozen=True)
class SweepOptions:
    PANEL = options.SCORING
    what: str = option("Kind of place to patch, one place at a time.", "heads", metavar="|".join(options.KINDS))
    direction: str | None = option(
        f"Direction: {listed(options.DIRECTIONS)} (clean values into corrupted runs). Default: {options.DIRECTIONS[0]}."
    )
    show: int = option(options.SHOW, 15, least=0, names=("--top", "--show"))


@dataclass(frozen=True)
class PathOptions:
    PANEL = "Path patching"
    path: str | None = option(
        'Patch paths instead of places: the senders, such as a1.h5 or input, one at a time, or "all".',
        metavar=options.NAMES,
    )
    to: str | None = option(
        "Receivers, patched together, such as 'a2.h6<v>', a2.h6 (its q, k and v) or m3. Default: logits.",
        metavar=options.NAMES,
    )
    separate: bool = option("Patch each receiver separately.", False)


def patch(
    model: options.Model,
    task: options.Task,
    sweep: SweepOptions,
    places: options.Places,
    paths: PathOptions,
    run: options.Run,
    rank: options.Rank,
    place: options.Out,
    out: Output,
) -> None:
    """Patch every head, layer or position, one at a time, and measure the metric.

    Writes patch-WHAT.safetensors, or paths.json with --path. Positive = supports the task, in both directions.

    Example: circuitfind patch tiny --task ioi --what heads --direction denoising
    """
    if paths.path is None and (paths.to is not None or paths.separate):
        raise ScoreError("--to and --separate need path patching: name the senders with --path, or use --path all")
    folder, where = inputs.folder(place.out, out), {"what": sweep.what, **inputs.where_of(places, sweep.what)}
    asked = inputs.run_keywords(task, run) | {"direction": sweep.direction}
    loaded, bound = inputs.load(model, task, out)
    if paths.path is None:
        inputs.check_places(loaded, bound, asked, where)
    kept = inputs.kept_by({"method": "exact"}, sweep.what) if paths.path is None else None
    divided = inputs.places_line(bound, where, sweep.what) if paths.path is None else ""
    inputs.introduce(loaded, bound, run, out, kept=kept, places=divided)
    content: dict[str, Any] = inputs.described(loaded, bound, out)
    found: Any
    if paths.path is None:
        checkpoint = inputs.checkpoint(loaded, folder / CHECKPOINT, "measured", out)
        with out.progress():
            found = cf.patch(loaded, bound, **where, **asked, checkpoint=checkpoint)
        strongest = [row._asdict() for row in found.top(sweep.show, rank.by)]
        content |= {"strongest": strongest, "sweep": found.to_dict() if out.as_json else {}}
    else:
        senders = None if paths.path == "all" else inputs.names_in(paths.path)
        asked |= {"separate": paths.separate} | ({} if paths.to is None else {"receivers": inputs.names_in(paths.to)})
        with out.progress():
            found = cf.path_patch(loaded, bound, senders, **asked)
    out.say()
    tables.show(found, out, sweep.show, rank.by)
    if paths.path is None:
        path = found.save(folder / f"patch-{sweep.what}.safetensors")
    else:
        path = found.save(folder / "paths.json", **content)
        content |= found.to_dict()
    out.finish(content, [path], drawable=True)
