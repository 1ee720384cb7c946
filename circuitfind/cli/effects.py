"""`circuitfind attribute`, `patch`, `approximation`, `attention`: what parts of the model do, to files.

Positive = supports the task.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Any

import circuitfind as cf
from circuitfind.cli import inputs, options, tables
from circuitfind.cli.options import given, listed, option
from circuitfind.cli.output import Output
from circuitfind.errors import FileError, ScoreError

FILES = {"Scores": "scores", "NodeScores": "node-scores"}
CHECKPOINT = "patch.part.safetensors"
SHOW = "How many of the strongest to print."
NAMES = "NAME,NAME,..."


# -------------------------------------------------------------------- attribute
@dataclass(frozen=True)
class LevelOptions:
    PANEL = options.SCORING
    level: str = option("Score edges or nodes.", options.LEVELS[0], words=options.LEVELS)
    what: str | None = option(
        'With --level node: the places that "circuitfind patch" measures, instead of the nodes.',
        metavar="|".join(options.KINDS),
    )
    normalise: bool = option("hisp: divided by the norm of each layer's scores.", False)
    show: int = option(SHOW, 15, least=0)


def attribute(
    model: options.Model,
    task: options.Task,
    scoring: options.Scoring,
    run: options.Run,
    rank: options.Rank,
    level: LevelOptions,
    places: options.Places,
    place: options.Out,
    out: Output,
) -> None:
    """Score every edge, node, or place of a sweep on a task.

    Writes scores.safetensors (edges), node-scores.safetensors, or estimates-WHAT.safetensors. Positive = supports the
    task, except for rankings that are not effects (atp-star, hisp, ifr, activation, weights, random): higher = ranked
    first.

    Example: circuitfind attribute tiny --task ioi --method eap
    """
    where = {"level": level.level, "what": level.what, **inputs.where_of(places, level.what)}
    asked = inputs.run_keywords(task, run, scoring) | ({"normalise": True} if level.normalise else {})
    inputs.check_scoring(asked, **where)
    folder = inputs.folder(place.out)
    loaded, bound = inputs.load(model, task, out)
    if level.what is not None:
        inputs.check_places(loaded, bound, asked, where)
    inputs.introduce(loaded, bound, run, out, scoring=True)
    scores = inputs.scored(loaded, bound, asked, folder, out, **where)
    name = FILES.get(type(scores).__name__, f"estimates-{level.what}")
    path = scores.save(folder / f"{name}.safetensors")
    out.say()
    tables.show(scores, out, level.show, rank.by)
    made = {name: getattr(scores.record, name) for name in ("method", "direction", "ablation", "sign")}
    content = {**made, "level": level.level, "scores": scores.to_dict() if out.as_json else {}}
    out.finish({**inputs.described(loaded, bound, out), **content}, [path], drawable=True)


# -------------------------------------------------------------------- patch
@dataclass(frozen=True)
class SweepOptions:
    PANEL = options.SCORING
    what: str = option("Which places, one at a time.", "heads", metavar="|".join(options.KINDS))
    direction: str | None = option(
        f"{listed(options.DIRECTIONS)} (clean values into corrupted runs). Default: {options.DIRECTIONS[0]}."
    )
    show: int = option(SHOW, 15, least=0)


@dataclass(frozen=True)
class PathOptions:
    PANEL = "Path patching"
    path: str | None = option(
        'Patch paths instead of places: the senders, such as a1.h5 or input, one at a time, or "all".', metavar=NAMES
    )
    to: str | None = option(
        "The receivers, patched together: such as 'a2.h6<v>', a2.h6 (its q, k and v), m3. Default: logits.",
        metavar=NAMES,
    )
    separate: bool = option("Each receiver on its own.", False)


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
    """Patch every head, layer, position, ... one at a time, and measure the metric.

    Writes patch-WHAT.safetensors, or paths.json with --path. Positive = supports the task, in both directions.

    Example: circuitfind patch tiny --task ioi --what heads --direction denoising
    """
    if paths.path is None and (paths.to is not None or paths.separate):
        raise ScoreError("--to and --separate belong to path patching: name the senders with --path, or --path all")
    folder, where = inputs.folder(place.out), {"what": sweep.what, **inputs.where_of(places, sweep.what)}
    asked = inputs.run_keywords(task, run) | {"direction": sweep.direction}
    loaded, bound = inputs.load(model, task, out)
    if paths.path is None:
        inputs.check_places(loaded, bound, asked, where)
    inputs.introduce(loaded, bound, run, out)
    content: dict[str, Any] = inputs.described(loaded, bound, out)
    found: Any
    if paths.path is None:
        checkpoint = inputs.checkpoint(loaded, folder / CHECKPOINT, "measured", out)
        with out.progress():
            found = cf.patch(loaded, bound, **where, **asked, checkpoint=checkpoint)
        path = found.save(folder / f"patch-{sweep.what}.safetensors")
        strongest = [row._asdict() for row in found.top(sweep.show, rank.by)]
        content |= {"strongest": strongest, "sweep": found.to_dict() if out.as_json else {}}
    else:
        senders = None if paths.path == "all" else inputs.names_in(paths.path)
        asked |= {"separate": paths.separate} | ({} if paths.to is None else {"receivers": inputs.names_in(paths.to)})
        with out.progress():
            found = cf.path_patch(loaded, bound, senders, **asked)
        path = found.save(folder / "paths.json", **content)
        content |= found.to_dict()
    out.say()
    tables.show(found, out, sweep.show, rank.by)
    out.finish(content, [path], drawable=True)


# -------------------------------------------------------------------- approximation
@dataclass(frozen=True)
class EstimateOptions:
    PANEL = options.SCORING
    what: str | None = option(
        f"Kinds of place: {', '.join(options.KINDS)}. Default: resid,attn,mlp,heads.", metavar="KIND,KIND,..."
    )
    method: str | None = option(
        f"Of the estimate: {listed(options.ESTIMATES)} (for q and k), {options.OWN_METHOD}. Default: atp."
    )
    steps: int | None = option("Of integrated gradients. Default: 5.")
    direction: str | None = option(f"{listed(options.DIRECTIONS)}. Default: {options.DIRECTIONS[0]}.")


def approximation(
    model: options.Model,
    task: options.Task,
    estimate: EstimateOptions,
    places: options.Places,
    run: options.Run,
    place: options.Out,
    out: Output,
) -> None:
    """Compare estimates with exact patching, place by place, and say where they fail.

    Writes approximation.json. Change: how large what is replaced is beside what it is part of.

    Example: circuitfind approximation tiny --task greater_than --n 16
    """
    where, folder = inputs.where_of(places), inputs.folder(place.out)
    asked: dict[str, Any] = {**where, **inputs.run_keywords(task, run), **given(estimate, what="")}
    if estimate.what is not None:
        asked["what"] = inputs.names_in(estimate.what)
    loaded, bound = inputs.load(model, task, out)
    inputs.introduce(loaded, bound, run, out)
    with out.progress():
        found = cf.approximation(loaded, bound, **asked)
    described = inputs.described(loaded, bound, out)
    path = found.save(folder / "approximation.json", **described)
    out.say()
    tables.approximation(found, out)
    out.say()
    out.finish({**described, **found.to_dict()}, [path], drawable=True)


# -------------------------------------------------------------------- attention
@dataclass(frozen=True)
class HeadOptions:
    head: str = option("Such as a0.h1.", MISSING, metavar=NAMES)
    example: int = option("Which of the pairs, counted from 0.", 0, least=0)
    corrupted: bool = option("The corrupted prompt, not the clean one.", False)


def attention(model: options.Model, task: options.Task, which: HeadOptions, place: options.Out, out: Output) -> None:
    """Show what heads attend to on one prompt of a task.

    Writes attention-HEAD.json with the whole pattern of each head (queries down, keys across), and a page that shows
    them: attention-HEAD.html, or of several heads attention.html.

    Example: circuitfind attention tiny --task ioi --head a0.h1,a3.h2
    """
    folder = inputs.folder(place.out)
    loaded, bound = inputs.load(model, task, out)
    heads = inputs.names_in(which.head)
    found = cf.attention(loaded, bound, heads, example=which.example, corrupted=which.corrupted)
    described = {**inputs.described(loaded, bound, out), "example": which.example}
    files = [one.save(folder / f"attention-{one.head}.json", **described) for one in found]
    page = files[0].with_suffix(".html") if len(files) == 1 else folder / "attention.html"
    try:
        files.append(cf.save_page(cf.plot(found), page, f"Attention on {bound.name}"))
    except FileError as error:
        out.warn(str(error))
    for one in found:
        tables.attention(one, out)
    out.finish({**described, "patterns": [one.to_dict() for one in found]}, files)
