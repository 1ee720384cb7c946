"""`circuitfind compare`: methods beside each other on one model and task, and the same again from its record."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from circuitfind.cli import inputs, tables
from circuitfind.cli.options import JUDGING, CheckedModelOptions, Option, OutOptions, RunOptions, TaskOptions, given
from circuitfind.cli.output import FAILED, Output, count
from circuitfind.errors import FileError

if TYPE_CHECKING:
    from circuitfind.comparison.result import Comparison

SAME = 1e-5  # numbers of a repetition on another machine; on the same one they are equal


@dataclass(frozen=True)
class CompareOptions:
    """What is compared."""

    PANEL: ClassVar[str] = JUDGING

    methods: Annotated[
        str | None, Option("Methods, by name, separated by commas. Default: all.", metavar="A,B,...")
    ] = None
    reference: Annotated[
        str | None,
        Option("A known circuit of this model: ioi, greater-than, docstring, or a file.", metavar="NAME|FILE"),
    ] = None
    holdout: Annotated[float | None, Option("Part of the pairs that circuits are judged on. Default: 0.5.")] = None
    again: Annotated[
        Path | None,
        Option("Make the comparison of this compare.json again, and compare every number with it.", metavar="FILE"),
    ] = None


GROUPS = {"model": CheckedModelOptions, "task": TaskOptions, "run": RunOptions, "what": CompareOptions}


def compare(
    model: CheckedModelOptions, task: TaskOptions, run: RunOptions, what: CompareOptions, place: OutOptions, out: Output
) -> int | None:
    """Compare methods: faithfulness at every size, CPR, CMD, agreement, overlap, passes, time and memory.

    Rankings are made on one part of the pairs, and judged on the other. Writes compare.json, compare.csv, compare.md,
    compare.html (with plotly installed) and each method's scores in scores/ (not with --remote): what a stopped run has
    finished is kept.

    Example: circuitfind compare tiny --methods eap,acdc,random
    """
    if what.again is not None:
        return _again(what.again, out)
    folder = inputs.folder(place.out)
    found = _compared({"model": model, "task": task, "run": run, "what": what}, folder / "scores", out)
    files = found.write(folder)
    tables.comparison(found, out)
    out.written(files)
    out.document({**found.to_dict(), "files": [str(path) for path in files]})
    return None


def _compared(options: dict[str, Any], scores: Path | None, out: Output) -> Comparison:
    """The comparison that groups of options ask for."""
    import circuitfind as cf

    model, task, run, what = (options[name] for name in GROUPS)
    loaded, bound = inputs.load(model, task, out, model.check)
    names = None if what.methods is None else [name.strip() for name in what.methods.split(",") if name.strip()]
    about = f"{bound.name}, {bound.metric.name}: {count(len(bound), 'pair')}"
    out.facts([("model", inputs.model_line(loaded)), ("task", about)])
    out.say()
    if loaded.remote:  # a server keeps nothing
        scores = None
    elif scores is not None:
        out.if_stopped = f"the scores of the methods that were done are in {scores}: the same command goes on"
    asked = inputs.run_keywords(task, run) | given(what, methods="", again="")
    with out.progress():
        found = cf.compare(loaded, bound, names, folder=scores, **asked)
    said = {name: _plain(asdict(group)) for name, group in options.items()}
    return found.with_arguments(command=out.command, **said)


def _again(path: Path, out: Output) -> int | None:
    """The same comparison from its own record: every ranking is made anew."""
    from circuitfind.comparison.result import Comparison, difference

    before = Comparison.open(path)
    try:
        options = {name: _rebuilt(kind, before.arguments[name]) for name, kind in GROUPS.items()}
    except (KeyError, TypeError):
        raise FileError(f"{path}: it does not say how it was made (only 'circuitfind compare' notes that)") from None
    found = _compared(options, None, out)
    apart, where = difference(before, found)
    total = len(dict(before.numbers()))
    if apart == 0:
        out.say(f"Reproduced: all {total:,} numbers of {path} are equal to the last bit.")
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
