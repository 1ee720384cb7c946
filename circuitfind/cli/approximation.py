"""`circuitfind approximation`: estimates beside exact effects, for every place of a sweep, and where they part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from circuitfind.cli import inputs, tables
from circuitfind.cli.options import (
    DIRECTIONS,
    ESTIMATES,
    KINDS,
    OWN_METHOD,
    SCORING,
    CheckedModelOptions,
    Option,
    OutOptions,
    PlacesOptions,
    RunOptions,
    TaskOptions,
    given,
    listed,
)
from circuitfind.cli.output import Output, count


@dataclass(frozen=True)
class EstimateOptions:
    """What is estimated and measured."""

    what: Annotated[
        str | None,
        Option(f"Kinds of place: {', '.join(KINDS)}. Default: resid,attn,mlp,heads.", SCORING, metavar="KIND,KIND,..."),
    ] = None
    method: Annotated[
        str | None,
        Option(
            f"Of the estimate: {', '.join(ESTIMATES)} (for q and k), {OWN_METHOD}. Default: {ESTIMATES[0]}.", SCORING
        ),
    ] = None
    steps: Annotated[int | None, Option("Of integrated gradients. Default: 5.", SCORING)] = None
    direction: Annotated[str | None, Option(f"{listed(DIRECTIONS)}. Default: {DIRECTIONS[0]}.", SCORING)] = None


def approximation(
    model: CheckedModelOptions,
    task: TaskOptions,
    estimate: EstimateOptions,
    places: PlacesOptions,
    run: RunOptions,
    place: OutOptions,
    out: Output,
) -> None:
    """Compare estimates with exact patching, place by place, and say where they fail.

    Writes approximation.json. Change: how large what is replaced is beside what it is part of.

    Example: circuitfind approximation tiny --task greater_than --n 16
    """
    where, folder = inputs.where_of(places), inputs.folder(place.out)
    asked: dict[str, Any] = {**where, **inputs.run_keywords(task, run), **given(estimate, what="")}
    if estimate.what is not None:
        asked["what"] = estimate.what.split(",")
    loaded, bound = inputs.load(model, task, out, model.check)
    import circuitfind as cf

    about = inputs.task_lines(loaded, bound, count(len(bound), "pair"), run.batch_size, out)
    out.facts([("model", inputs.model_line(loaded)), *about])
    with out.progress():
        found = cf.approximation(loaded, bound, **asked)
    described = inputs.described(loaded, bound, out)
    path = found.save(folder / "approximation.json", **described)
    out.say()
    tables.approximation(found, out)
    out.say()
    out.written([path], drawable=True)
    out.document({**described, **found.to_dict(), "files": [str(path)]})
