"""`circuitfind approximation`: compare estimates with exact patching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import circuitfind as cf
from circuitfind.cli import inputs, options, tables
from circuitfind.cli.options import given, listed, option
from circuitfind.cli.output import Output


@dataclass(frozen=True)
class EstimateOptions:
    PANEL = options.SCORING
    what: str | None = option(
        f"Kinds of place: {', '.join(options.KINDS)}. Default: resid,attn,mlp,heads.", metavar="KIND,KIND,..."
    )
    method: str | None = option(
        f"Method of the estimates: {listed(options.ESTIMATES)} (for q and k), {options.OWN_METHOD}. Default:"
        f" {options.OF_PLACES}."
    )
    steps: int | None = option("Steps of integrated gradients. Default: 5.")
    direction: str | None = option(f"Direction: {listed(options.DIRECTIONS)}. Default: {options.DIRECTIONS[0]}.")


def approximation(
    model: options.Model,
    task: options.Task,
    estimate: EstimateOptions,
    places: options.Places,
    run: options.Run,
    place: options.Out,
    out: Output,
) -> None:
    """Compare estimates with exact patching at every place, and report where they fail.

    Writes approximation.json. "Change" is the norm of the replaced difference, relative to the
    residual stream or vector that it is part of.

    Example: circuitfind approximation tiny --task greater_than --n 16
    """
    from circuitfind.evaluation.approximation import KINDS

    where, folder = inputs.where_of(places), inputs.folder(place.out, out)
    asked: dict[str, Any] = {**where, **inputs.run_keywords(task, run), **given(estimate, without=("what",))}
    if estimate.what is not None:
        asked["what"] = inputs.names_in(estimate.what)
    loaded, bound = inputs.load(model, task, out)
    kinds = asked.get("what", KINDS)
    method = inputs.method_line(asked, *asked.get("what", ("place",)))
    divided, kept = inputs.places_line(bound, where, *kinds), inputs.kept_by(asked, kinds[0])
    inputs.introduce(loaded, bound, run, out, kept=kept, method=method, places=divided)
    with out.progress():
        found = cf.approximation(loaded, bound, **asked)
    described = inputs.described(loaded, bound, out)
    out.say()
    tables.approximation(found, out)
    out.say()
    path = found.save(folder / "approximation.json", **described)
    out.finish({**described, **found.to_dict()}, [path], drawable=True)
