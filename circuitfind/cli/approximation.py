"""`circuitfind approximation`: estimates beside exact effects, for every place of a sweep, and where they part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from circuitfind.cli import inputs, shown
from circuitfind.cli.options import SCORING, CheckedModelOptions, OutOptions, PlacesOptions, RunOptions, TaskOptions
from circuitfind.cli.output import Output
from circuitfind.cli.verbs import verb
from circuitfind.cli.words import count


@dataclass(frozen=True)
class EstimateOptions:
    """What is estimated and measured."""

    what: Annotated[
        str,
        typer.Option(
            metavar="KIND,KIND,...",
            help="Kinds of place: resid, resid-mid, attn, mlp, heads, q, k, v, pattern, neurons.",
            rich_help_panel=SCORING,
        ),
    ] = "resid,attn,mlp,heads"
    method: Annotated[
        str,
        typer.Option(
            help="Of the estimate: atp, relp, eap-ig-inputs, clean-corrupted, or atp-qk for q and k.",
            rich_help_panel=SCORING,
        ),
    ] = "atp"
    steps: Annotated[int | None, typer.Option(help="Of integrated gradients. Default: 5.", rich_help_panel=SCORING)] = (
        None
    )
    direction: Annotated[str, typer.Option(help="noising or denoising.", rich_help_panel=SCORING)] = "noising"


def register(app: typer.Typer) -> None:
    """Adds the verb to the app."""
    verb(app, "circuitfind approximation tiny --task greater_than --n 16")(approximation)


def approximation(
    model: CheckedModelOptions,
    task: TaskOptions,
    estimate: EstimateOptions,
    places: PlacesOptions,
    run: RunOptions,
    place: OutOptions,
    out: Output,
) -> None:
    """Hold estimates against exact patching, place by place, and say where they fail.

    Writes approximation.json. Change: how large what is replaced is beside what it is part of.
    """
    folder, ways = inputs.folder(place.out), inputs.ways_of(places)
    loaded = inputs.load_model(model, out, model.check)
    import circuitfind as cf

    bound = inputs.load_task(task, loaded)
    lines = inputs.task_lines(loaded, bound, count(len(bound), "pair"), run.batch_size, out)
    out.facts([("model", inputs.model_line(loaded)), *lines])
    with out.progress():
        found = cf.approximation(
            loaded,
            bound,
            estimate.what.split(","),
            method=estimate.method,
            steps=estimate.steps,
            **ways,
            ablation=run.ablation,
            direction=estimate.direction,
            batch_size=run.batch_size,
            seed=task.seed,
        )
    described = inputs.described(loaded, bound, out)
    path = found.save(folder / "approximation.json", **described)
    out.say()
    shown.approximation(found, out)
    out.say(f"\n{shown.drawable(path)}")
    out.document({**described, **found.to_dict(), "files": [str(path)]})
