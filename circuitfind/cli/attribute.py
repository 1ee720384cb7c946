"""`circuitfind attribute`: scores of every edge or node, to a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from circuitfind.cli import inputs, options, tables
from circuitfind.cli.options import Option
from circuitfind.cli.output import Output, count

FILES = {"Scores": "scores", "NodeScores": "node-scores"}


@dataclass(frozen=True)
class LevelOptions:
    """What is scored and shown."""

    PANEL: ClassVar[str] = options.SCORING

    level: Annotated[str, Option("Score edges or nodes.", words=options.LEVELS)] = options.LEVELS[0]
    what: Annotated[
        str | None,
        Option(
            'With --level node: the places that "circuitfind patch" measures, instead of the nodes.',
            metavar="|".join(options.KINDS),
        ),
    ] = None
    normalise: Annotated[bool, Option("hisp: divided by the norm of each layer's scores.")] = False
    show: Annotated[int, Option("How many of the strongest to print.", least=0)] = 15


def attribute(
    model: options.CheckedModelOptions,
    task: options.TaskOptions,
    scoring: options.ScoringOptions,
    run: options.RunOptions,
    rank: options.RankOptions,
    level: LevelOptions,
    places: options.PlacesOptions,
    place: options.OutOptions,
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
    loaded, bound = inputs.load(model, task, out, model.check)
    if level.what is not None:
        inputs.check_places(loaded, bound, asked, where)
    memory = inputs.memory_line(loaded, len(bound), bound.batch.clean.ids.shape[1], run.batch_size)
    about = inputs.task_lines(loaded, bound, count(len(bound), "pair"), run.batch_size, out)
    out.facts([("model", inputs.model_line(loaded)), ("memory", memory), *about])
    scores = inputs.scored(loaded, bound, asked, folder, out, **where)
    name = FILES.get(type(scores).__name__, f"estimates-{level.what}")
    path = scores.save(folder / f"{name}.safetensors")
    out.say()
    tables.show(scores, out, level.show, rank.by)
    out.written([path], drawable=True)
    record = scores.record
    made = {"method": record.method, "level": level.level, "direction": record.direction}
    found = {**made, "ablation": record.ablation, "sign": record.sign, "files": [str(path)]}
    out.document({**inputs.described(loaded, bound, out), **found, "scores": scores.to_dict() if out.as_json else {}})
