"""`circuitfind compare`: compare methods on one model and task, or repeat a saved comparison."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import circuitfind as cf
from circuitfind.cli import inputs, options, tables
from circuitfind.cli.cells import count
from circuitfind.cli.options import given, option
from circuitfind.cli.output import FAILED, Output
from circuitfind.errors import FileError

KEPT = "compare.part"  # scores of finished methods
SAME = 1e-5  # tolerance of a repetition on another machine; on the same machine numbers are equal


@dataclass(frozen=True)
class CompareOptions:
    PANEL = options.JUDGING
    methods: str | None = option("Names of methods, separated by commas. Default: all.", metavar="A,B,...")
    reference: str | None = option(
        "Published circuit of this model to compare with: ioi, greater-than, docstring, or a file.", metavar="NAME|FILE"
    )
    holdout: float | None = option("Fraction of pairs held out to judge circuits. Default: 0.5.")
    again: Path | None = option(
        "Repeat the comparison saved in this compare.json and check every number against it.", metavar="FILE"
    )


GROUPS = {"model": options.Model, "task": options.Task, "run": options.Run, "what": CompareOptions}


def compare(
    model: options.Model, task: options.Task, run: options.Run, what: CompareOptions, place: options.Out, out: Output
) -> int | None:
    """Compare methods: faithfulness at every size, CPR, CMD, agreement, overlap, passes, time and memory.

    Rankings are made on one part of the pairs, and judged on the other. Writes compare.json, compare.csv, compare.md,
    compare.html (with plotly installed). A stopped run keeps each method's scores, and the same command goes on.

    Example: circuitfind compare tiny --methods eap,acdc,random
    """
    if what.again is not None:
        return _again(what.again, out)
    folder = inputs.folder(place.out, out)
    found = _compared({"model": model, "task": task, "run": run, "what": what}, folder / KEPT, out)
    files = found.write(folder)
    _clear(folder / KEPT, found)
    tables.comparison(found, out, whole=True)
    out.finish(found.to_dict(), files)
    return None


def _clear(kept: Path, found: cf.Comparison) -> None:
    """Remove the kept scores of a complete comparison, but not those that another run left."""
    from circuitfind.comparison.run import kept_at

    for entry in found.ranked:
        kept_at(kept, entry.method).unlink(missing_ok=True)
    with suppress(OSError):
        kept.rmdir()


def _compared(groups: dict[str, Any], scores: Path | None, out: Output) -> cf.Comparison:
    """Run the comparison that the options ask for."""
    model, task, run, what = (groups[name] for name in GROUPS)
    loaded, bound = inputs.load(model, task, out)
    names = None if what.methods is None else inputs.names_in(what.methods)
    about = f"{bound.name}, {bound.metric.name}: {count(len(bound), 'pair')}"
    memory = inputs.task_memory(loaded, bound, run, inputs.kept_by({}, "edge")._replace(circuits=True))
    out.facts([("model", inputs.model_line(loaded)), ("memory", memory), ("task", about)])
    out.say()
    if loaded.remote:  # a server keeps nothing
        scores = None
    elif scores is not None:
        kept = f"the scores of the methods that were done are kept in {scores}"
        out.if_stopped, out.state = f"{kept}; go on with: {out.command_line()}", scores
    asked = inputs.run_keywords(task, run) | given(what, without=("methods", "again"))
    with out.progress():
        found = cf.compare(loaded, bound, names, folder=scores, **asked)
    said = {name: _plain(asdict(group)) for name, group in groups.items()}
    return found.with_arguments(command=out.command, **said)


def _again(path: Path, out: Output) -> int | None:
    """Repeat a comparison from its record, with all rankings made again."""
    from circuitfind.comparison.result import difference

    before = cf.Comparison.open(path)
    try:
        groups = {name: _rebuilt(kind, before.arguments[name]) for name, kind in GROUPS.items()}
    except (KeyError, TypeError):
        raise FileError(
            f"{path}: it does not hold the command that made it (only 'circuitfind compare' saves that)"
        ) from None
    found = _compared(groups, None, out)
    apart, where = difference(before, found)
    total = len(dict(before.numbers()))
    if apart == 0:
        out.say(f"Reproduced: all {total:,} numbers of {path} are equal to the bit.")
    elif apart <= SAME:
        out.say(f"Reproduced: {total:,} numbers of {path}, the largest difference is {apart:.1e} ({where}).")
    else:
        out.say(f"Not reproduced: the largest difference is {apart:.3g} ({where}).", style="bold red")
    out.document({"numbers": total, "largest_difference": apart, "where": where, "reproduced": apart <= SAME})
    return None if apart <= SAME else FAILED


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _rebuilt(kind: Any, values: dict[str, Any]) -> Any:
    paths = {f.name for f in fields(kind) if "Path" in str(f.type)}
    return kind(**{name: Path(v) if name in paths and v is not None else v for name, v in values.items()})
