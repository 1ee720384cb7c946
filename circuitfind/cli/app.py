"""The command line: `circuitfind VERB [MODEL] [--task NAME | --data FILE] [--out DIR]`.

1. A verb is a function in a file of the same name. Its parameters are groups of options (`cli/options.py`) and one
   `Output`; the last line of its docstring is an example.
2. The fields of the groups become the signature that typer reads (`_parameters`), and the groups are built from what
   typer parsed. Typer reads numbers and words of a list as text, so that wrong ones are reported like any other bad
   input, also in JSON.
3. Exit codes: 0 done; 1 a check failed or nothing was found; 2 bad input; 130 Ctrl-C, 143 SIGTERM (finished work is
   kept in both cases); 141 done, but the output's reader was closed. Bad input ends with one line, which names an
   option as it was typed; `--debug` also shows the traceback.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

from circuitfind import __version__, processes
from circuitfind.checkpoint import until_saved
from circuitfind.cli.acdc import acdc
from circuitfind.cli.agree import agree
from circuitfind.cli.approximation import approximation
from circuitfind.cli.attention import attention
from circuitfind.cli.attribute import attribute
from circuitfind.cli.compare import compare
from circuitfind.cli.doctor import doctor
from circuitfind.cli.evaluate import evaluate
from circuitfind.cli.export import export
from circuitfind.cli.find import find
from circuitfind.cli.launch import launch
from circuitfind.cli.learn import learn
from circuitfind.cli.mib import mib
from circuitfind.cli.models import models
from circuitfind.cli.options import as_text, keyword_of, option, spelled_of, value_of
from circuitfind.cli.output import BAD_INPUT, CLOSED_PIPE, FAILED, Lasting, Output
from circuitfind.cli.patch import patch
from circuitfind.cli.show import show
from circuitfind.cli.tasks import tasks
from circuitfind.cli.testbed import testbed
from circuitfind.cli.verify import verify
from circuitfind.errors import CircuitfindError, ProcessError

Verb = Callable[..., int | None]
VERBS: tuple[Verb, ...] = (
    *(find, attribute, patch, approximation, attention, verify, evaluate, acdc, learn, compare),
    *(export, mib, show, agree, testbed, tasks, models, doctor),
)
EXAMPLE = "Example: "
REPLACED = {  # former options of find
    "--by": "--search absolute or signed",
    "--one-sided": "--criterion at-least",
    "--prune-tolerance": "--tolerance",
}
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@dataclass(frozen=True)
class OutputOptions:
    as_json: bool = option(
        "Print a JSON document on standard output, and everything else on standard error.", False, names=("--json",)
    )
    verbose: bool = option("Print more about the model, memory and pairs before the run.", False)
    debug: bool = option("Show the traceback of an error.", False, variable="CIRCUITFIND_DEBUG")


def _register(app: typer.Typer, verb: Verb) -> None:
    """Add a function to the app as a verb of the same name."""
    hints = get_type_hints(verb).items()
    groups = {name: kind for name, kind in hints if isinstance(kind, type) and is_dataclass(kind)}

    def run(ctx: typer.Context, **values: Any) -> None:
        if (several := _several(ctx)) > 1 and "RANK" not in os.environ:  # each process runs this command line
            raise typer.Exit(launch(several, ctx.obj))
        out = Output(values["as_json"], _command(ctx), values["verbose"])

        def call() -> int | None:
            processes.join()
            built = {name: _built(kind, values) for name, kind in groups.items()}
            out.typed = dict(_typed(ctx, built.values()))
            return verb(out=out, **built)

        raise typer.Exit(_guarded(call, out, values["debug"]))

    parameters = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    parameters += [parameter for kind in (*groups.values(), OutputOptions) for parameter in _parameters(kind)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__, _, example = (inspect.getdoc(verb) or "").rpartition(EXAMPLE)
    app.command(verb.__name__, epilog=EXAMPLE + example)(run)


def _parameters(kind: type) -> Iterator[inspect.Parameter]:
    """The fields of a group as parameters of a function."""
    hints = get_type_hints(kind)
    for one in fields(kind):
        annotation, default = as_text(one, hints[one.name], getattr(kind, "PANEL", None))
        yield inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _built(kind: type, values: dict[str, Any]) -> Any:
    """Build a group of options from what typer parsed."""
    hints = get_type_hints(kind)
    return kind(**{one.name: value_of(one, hints[one.name], values[one.name]) for one in fields(kind)})


def _typed(ctx: typer.Context, groups: Iterable[Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    """For each option that was typed: the library's keyword, its value as errors show it, and its spelling."""
    for group in groups:
        for one in fields(group):
            if (source := ctx.get_parameter_source(one.name)) is not None and source.name == "COMMANDLINE":
                value, given = getattr(group, one.name), ctx.params[one.name]
                yield keyword_of(one), (repr(value), spelled_of(one) if given is True else f"{spelled_of(one)} {given}")


def _guarded(call: Callable[[], int | None], out: Output, debug: bool) -> int:
    """Run a verb and return the exit code; every error becomes one line."""
    try:
        with out.hearing_warnings(), out.at_end, until_saved() as out.complete:
            code = call() or 0
        code *= processes.first()  # the first process reports for all
        processes.leave()
        return code
    except KeyboardInterrupt as stop:
        if (lost := processes.lost()) is not None:
            return out.lost(lost)
        out.stopped(_code_of(stop))
        return _code_of(stop)
    except ProcessError as error:
        return out.lost(error)
    except Exception as error:
        if debug:
            out.err.print(traceback.format_exc(), soft_wrap=True)
        if isinstance(error, CircuitfindError):
            out.fail(f"{error}{out.kept}", BAD_INPUT)
            processes.end(str(error))
            return BAD_INPUT
        said = str(error).strip().partition("\n")[0]
        text = f"unexpected {type(error).__name__}{': ' if said else ''}{said}"
        text = text if debug else f"{text} (this is a bug; --debug shows where)"
        out.fail(f"{text}{out.kept}", FAILED)
        processes.end(text)
        return FAILED


class _Signal(KeyboardInterrupt):
    """A signal that asks the process to end, handled like Ctrl-C."""


def _code_of(stop: KeyboardInterrupt) -> int:
    return 128 + (stop.args[0] if isinstance(stop, _Signal) else signal.SIGINT)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise a `_Signal`; a signal sent twice at once (as by `timeout`) raises only one."""
    last = -math.inf

    def stop(number: int, _: object) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > 1:
            raise _Signal(number)

    main_thread = threading.current_thread() is threading.main_thread()
    ours = [
        one for one in SIGNALS if main_thread and signal.getsignal(one) is signal.SIG_DFL
    ]  # not ignored, as under `nohup`
    for one in ours:
        signal.signal(one, stop)
    try:
        yield
    finally:
        for one in ours:
            signal.signal(one, signal.SIG_DFL)


def _several(ctx: typer.Context) -> int:
    return int(ctx.find_root().params.get("processes", 1))


def _command(ctx: typer.Context) -> list[str]:
    """The command line, rebuilt from what was parsed, with options in long form."""
    several = _several(ctx)
    words = ["circuitfind", *(["--processes", str(several)] if several > 1 else []), str(ctx.info_name)]
    for parameter in ctx.command.params:
        name = str(parameter.name)
        source, value = ctx.get_parameter_source(name), ctx.params.get(name)
        if parameter.param_type_name == "argument":
            words += [str(value)] if value is not None else []
        elif source is not None and source.name == "COMMANDLINE" and name not in ("as_json", "verbose", "debug"):
            flag = getattr(parameter, "is_flag", False)
            words += [parameter.secondary_opts[0] if flag and not value else parameter.opts[0]]
            words += [] if flag else [str(value)]
    return words


# -------------------------------------------------------------------- the app
app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: circuitfind find tiny --task ioi",
)
for each in VERBS:
    _register(app, each)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"circuitfind {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def circuitfind(
    ctx: typer.Context,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="Number of processes that share the work (before the verb).")
    ] = 1,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find the heads, MLPs and connections of a language model that do a task, and measure how well.

    Without MODEL and --task, verbs use the embedded model "tiny" and the task "ioi".
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a prompt may contain characters that the terminal cannot show
    silent = os.environ.get("RANK", "0") != "0"  # only the first of several processes prints
    out, err = (Lasting(None if silent else stream) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err), _stoppable():
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        out.flush()
        if out.failed:
            print(f"error: the output cannot be written: {out.failed}", file=err)
        err.flush()
    if out.failed or err.failed:
        return code or FAILED
    return code or (CLOSED_PIPE if out.unread or err.unread else 0)


@functools.cache
def _parser() -> Any:
    """The parser of command lines. Cached, because typer rebuilds it at each call of `app`."""
    return typer.main.get_command(app)


def _run(words: list[str]) -> int:
    try:
        return _parser()(args=words, prog_name="circuitfind", standalone_mode=False, obj=words) or 0
    except KeyboardInterrupt as stop:
        return _code_of(stop)
    except Exception as error:
        # the class of usage errors depends on the version of typer; this method does not
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "circuitfind"
        now = REPLACED.get(getattr(error, "option_name", "")) if where.endswith(" find") else None
        said = error.format_message().partition(" (Possible")[0] + f": give {now}" if now else error.format_message()
        print(f"error: {said} (see {where} --help)", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
