"""`circuitfind attribute`: scores of edges, nodes or places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import circuitfind as cf
from circuitfind.cli import inputs, options, tables
from circuitfind.cli.options import given, option
from circuitfind.cli.output import Output
from circuitfind.errors import FileError, ScoreError

FILES = {"Scores": "scores", "NodeScores": "node-scores", "PlacedScores": "placed-scores"}


@dataclass(frozen=True)
class LevelOptions:
    PANEL = options.SCORING
    level: str = option("Score edges or nodes.", options.LEVELS[0], words=options.LEVELS)
    what: str | None = option(
        'With --level node: the places that "circuitfind patch" measures, instead of the nodes.',
        metavar="|".join(options.KINDS),
    )
    ungrouped: bool = option("Score keys and values for each query head, as files of EAP-IG and MIB do.", False)
    normalise: bool = option("For hisp: divide by the norm of each layer's scores.", False)
    show: int = option(options.SHOW, 15, least=0, names=("--top", "--show"))


@dataclass(frozen=True)
class CheckOptions:
    PANEL = options.JUDGING
    max_checks: int | None = option(
        "Number of strongest estimates to measure exactly as well. Default: 10.", least=0, keyword="top"
    )


def attribute(
    model: options.Model,
    task: options.Task,
    scoring: options.Scoring,
    run: options.Run,
    rank: options.Rank,
    level: LevelOptions,
    places: options.Places,
    checks: CheckOptions,
    place: options.Out,
    out: Output,
) -> None:
    """Score every edge, node, or place of a sweep on a task.

    Writes scores.safetensors (edges), node-scores.safetensors, or estimates-WHAT.safetensors, and checks.json: the
    exact effects of the strongest estimates. Edges --by-position or --by-span: placed-scores.safetensors, and
    placed-scores.svg, the strongest of them with a column for each place. Positive = supports the task, except for
    rankings that are not effects (atp-star, hisp, ifr, activation, weights, random): higher = ranked first.

    Example: circuitfind attribute tiny --task ioi --method eap
    """
    where = {"level": level.level, "what": level.what, **inputs.where_of(places, level.what)}
    where |= {"ungrouped": True} if level.ungrouped else {}
    asked = inputs.run_keywords(task, run, scoring) | ({"normalise": True} if level.normalise else {})
    inputs.check_scoring(asked, **where)
    if level.level == "edge" and (places.by_position or places.by_span) and checks.max_checks:
        raise ScoreError("--max-checks measures edges over all tokens: it does not apply to edges by position or span")
    folder = inputs.folder(place.out, out)
    loaded, bound = inputs.load(model, task, out)
    if level.what is not None:
        inputs.check_places(loaded, bound, asked, where)
    kind = level.what or level.level
    method = inputs.method_line(asked, kind)
    divided = inputs.places_line(bound, where, *([] if level.what is None else [level.what]))
    inputs.introduce(loaded, bound, run, out, kept=inputs.kept_by(asked, kind), method=method, places=divided)
    scores = inputs.scored(loaded, bound, asked, folder, out, **where)
    checked = inputs.checked(loaded, bound, scores, {**given(checks), "by": rank.by}, run, out)
    name = FILES.get(type(scores).__name__, f"estimates-{level.what}")
    out.say()
    tables.show(scores, out, level.show, rank.by, checked)
    described, files = inputs.described(loaded, bound, out), [scores.save(folder / f"{name}.safetensors")]
    made = {name: getattr(scores.record, name) for name in ("method", "direction", "ablation", "sign")}
    content = {**made, "level": level.level, "scores": scores.to_dict() if out.as_json else {}}
    if checked is not None:
        files.append(checked.save(folder / "checks.json", **described))
        content["checks"] = checked.to_dict()
    if isinstance(scores, cf.PlacedScores):
        by: Any = rank.by
        try:
            files.append(scores.render(folder / f"{name}.svg", by=by))
        except FileError as error:  # no Graphviz
            out.warn(str(error))
    out.finish({**described, **content}, files, drawable=not isinstance(scores, cf.PlacedScores))
