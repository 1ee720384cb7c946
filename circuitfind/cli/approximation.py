"""`circuitfind approximation`: estimates beside exact effects, for every place of a sweep, and where they part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from circuitfind.cli import inputs, options, tables
from circuitfind.cli.options import Option, given, listed
from circuitfind.cli.output import Output, count


@dataclass(frozen=True)
class EstimateOptions:
    """What is estimated and measured."""

    PANEL: ClassVar[str] = options.SCORING

    what: Annotated[
        str | None,
        Option(f"Kinds of place: {', '.join(options.KINDS)}. Default: resid,attn,mlp,heads.", metavar="KIND,KIND,..."),
    ] = None
    method: Annotated[
        str | None,
        Option(f"Of the estimate: {listed(options.ESTIMATES)} (for q and k), {options.OWN_METHOD}. Default: atp."),
    ] = None
    steps: Annotated[int | None, Option("Of integrated gradients. Default: 5.")] = None
    direction: Annotated[str | None, Option(f"{listed(options.DIRECTIONS)}. Default: {options.DIRECTIONS[0]}.")] = None


def approximation(
    model: options.CheckedModelOptions,
    task: options.TaskOptions,
    estimate: EstimateOptions,
    places: options.PlacesOptions,
    run: options.RunOptions,
    place: options.OutOptions,
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
