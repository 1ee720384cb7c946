"""`circuitfind attribute`: scores of every edge or node, to a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from circuitfind.cli import inputs, tables
from circuitfind.cli.options import (
    KINDS,
    LEVELS,
    SCORING,
    CheckedModelOptions,
    Option,
    OutOptions,
    PlacesOptions,
    RankOptions,
    RunOptions,
    ScoringOptions,
    TaskOptions,
)
from circuitfind.cli.output import Output, count

FILES = {"Scores": "scores", "NodeScores": "node-scores"}


@dataclass(frozen=True)
class LevelOptions:
    """What is scored and shown."""

    level: Annotated[str, Option("Score edges or nodes.", SCORING, words=LEVELS)] = LEVELS[0]
    what: Annotated[
        str | None,
        Option(
            'With --level node: the places that "circuitfind patch" measures, instead of the nodes.',
            SCORING,
            metavar="|".join(KINDS),
        ),
    ] = None
    normalise: Annotated[
        bool, Option("hisp: divided by the norm of each layer's scores.", SCORING, ("--normalise",))
    ] = False
    show: Annotated[int, Option("How many of the strongest to print.", least=0)] = 15


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
