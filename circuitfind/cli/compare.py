"""`circuitfind compare`: methods beside each other on one model and behaviour, and the same again from its record."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuitfind.cli import inputs
from circuitfind.cli.options import JUDGING, CheckedModelOptions, OutOptions, RunOptions, TaskOptions
from circuitfind.cli.output import Output
from circuitfind.cli.verbs import FAILED, verb
from circuitfind.cli.words import count
from circuitfind.errors import FileError

if TYPE_CHECKING:
    from circuitfind.comparison.result import Comparison

SAME = 1e-5  # numbers of a repetition on another machine; on the same one they are equal


@dataclass(frozen=True)
class CompareOptions:
    """What is compared."""

    methods: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...", help="Methods, by name, separated by commas. Default: all.", rich_help_panel=JUDGING
        ),
    ] = None
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="A known circuit of this model: ioi, greater-than, docstring, or a file.",
            rich_help_panel=JUDGING,
        ),
    ] = None
    holdout: Annotated[
        float, typer.Option(help="Part of the pairs that circuits are judged on.", rich_help_panel=JUDGING)
    ] = 0.5
    again: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Make the comparison of this compare.json again, and compare every number with it.",
            rich_help_panel=JUDGING,
        ),
    ] = None


def register(app: typer.Typer) -> None:
    """Adds the verb to the app."""
    verb(app, "circuitfind compare tiny --methods eap,acdc,random")(compare)


def compare(
    model: CheckedModelOptions,
    task: TaskOptions,
    run: RunOptions,
    what: CompareOptions,
    place: OutOptions,
    out: Output,
) -> int | None:
    """Compare methods: faithfulness at every size, CPR, CMD, agreement, overlap, passes, time and memory.

    Rankings are made on one part of the pairs, and judged on the other. Writes compare.json, compare.csv, compare.md,
    compare.html (with plotly installed) and each method's scores in scores/ (not with --remote): what a stopped run has
    finished is kept.
    """
    if what.again is not None:
        return _again(what.again, place, out)
    folder = inputs.folder(place.out)
    options = {"model": model, "task": task, "run": run, "what": what}
    found = _compared(options, folder / "scores", out)
    files = [found.save(folder / f"compare.{ending}") for ending in ("json", "csv", "md")]
    try:
        from circuitfind.comparison.page import write_page

        files.append(write_page(found, folder / "compare.html"))
    except FileError as error:
        out.warn(str(error))
    _show(found, out)
    out.say(f"Written: {', '.join(map(str, files))}")
    out.document({**found.to_dict(), "files": [str(path) for path in files]})
    return None


def _compared(options: dict[str, Any], scores: Path | None, out: Output) -> Comparison:
    """The comparison that groups of options ask for."""
    import circuitfind as cf

    model, task, run, what = (options[name] for name in ("model", "task", "run", "what"))
    loaded = inputs.load_model(model, out, model.check)
    bound = inputs.load_task(task, loaded)
    names = None if what.methods is None else [name.strip() for name in what.methods.split(",") if name.strip()]
    out.facts(
        [
            ("model", inputs.model_line(loaded)),
            ("behaviour", f"{bound.name}, {bound.metric.name}: {count(len(bound), 'pair')}"),
        ]
    )
    out.say()
    if loaded.remote:  # a server keeps nothing
        scores = None
    elif scores is not None:
        out.if_stopped = f"the scores of the methods that were done are in {scores}: the same command goes on"
    with out.progress():
        found = cf.compare(
            loaded,
            bound,
            names,
            reference=what.reference,
            holdout=what.holdout,
            ablation=run.ablation or "corrupted",
            batch_size=run.batch_size,
            seed=task.seed,
            folder=scores,
        )
    said = {name: _plain(asdict(group)) for name, group in options.items()}
    return found.with_arguments(command=out.command, **said)


def _again(path: Path, place: OutOptions, out: Output) -> int | None:
    """The same comparison from its own record: every ranking is made anew."""
    from circuitfind.comparison.result import Comparison, difference

    before = Comparison.open(path)
    kinds = {"model": CheckedModelOptions, "task": TaskOptions, "run": RunOptions, "what": CompareOptions}
    try:
        options = {name: _rebuilt(kind, before.arguments[name]) for name, kind in kinds.items()}
    except (KeyError, TypeError):
        raise FileError(f"{path}: it does not say how it was made (only 'circuitfind compare' notes that)") from None
    found = _compared(options, None, out)
    apart, where = difference(before, found)
    count_of = len(dict(before.numbers()))
    if apart == 0:
        out.say(f"Reproduced: all {count_of:,} numbers of {path} are equal to the last bit.")
    elif apart <= SAME:
        out.say(f"Reproduced: {count_of:,} numbers of {path}, the largest difference is {apart:.1e} ({where}).")
    else:
        out.say(f"Not reproduced: the largest difference is {apart:.3g} ({where}).", style="bold red")
    out.document({"numbers": count_of, "largest_difference": apart, "where": where, "reproduced": apart <= SAME})
    return None if apart <= SAME else FAILED


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _rebuilt(kind: Any, values: dict[str, Any]) -> Any:
    paths = {f.name for f in fields(kind) if "Path" in str(f.type)}
    return kind(**{name: Path(v) if name in paths and v is not None else v for name, v in values.items()})


def _show(found: Comparison, out: Output) -> None:
    from circuitfind.comparison import result as tables

    found_in = (tables.faithfulness(found), tables.closest(found), tables.overlap(found))
    for table in (tables.summary(found, intervals=False), *found_in):
        if table.rows and table.title.startswith("Overlap") and table.width > out.text.width:
            out.say(f"{table.title}: wider than this window, see compare.md")
        elif table.rows:
            sides = [(heading, "right" if at else "left") for at, heading in enumerate(table.headings)]
            out.table(table.title, sides, table.rows)
    for entry in found.entries:
        if entry.refused:
            out.warn(f"{entry.method} is not in the tables: {entry.refused}")
