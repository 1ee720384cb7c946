"""`circuitfind attribute`: scores of edges, nodes or places."""

from __future__ import annotations

from dataclasses import dataclass

from circuitfind.cli import inputs, options, tables
from circuitfind.cli.options import option
from circuitfind.cli.output import Output

FILES = {"Scores": "scores", "NodeScores": "node-scores"}


@dataclass(frozen=True)
class LevelOptions:
    PANEL = options.SCORING
    level: str = option("Score edges or nodes.", options.LEVELS[0], words=options.LEVELS)
    what: str | None = option(
        'With --level node: the places that "circuitfind patch" measures, instead of the nodes.',
        metavar="|".join(options.KINDS),
    )
    normalise: bool = option("hisp: divided by the norm of each layer's scores.", False)
    show: int = option(options.SHOW, 15, least=0)


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
    folder = inputs.folder(place.out, out)
    loaded, bound = inputs.load(model, task, out)
    if level.what is not None:
        inputs.check_places(loaded, bound, asked, where)
    inputs.introduce(loaded, bound, run, out, scoring=True)
    scores = inputs.scored(loaded, bound, asked, folder, out, **where)
    name = FILES.get(type(scores).__name__, f"estimates-{level.what}")
    out.say()
    tables.show(scores, out, level.show, rank.by)
    path = scores.save(folder / f"{name}.safetensors")
    made = {name: getattr(scores.record, name) for name in ("method", "direction", "ablation", "sign")}
    content = {**made, "level": level.level, "scores": scores.to_dict() if out.as_json else {}}
    out.finish({**inputs.described(loaded, bound, out), **content}, [path], drawable=True)
