"""What all verbs share: options in groups, one place for errors, one way to end.

1. A verb is a function whose parameters are groups of options (dataclasses of `typing.Annotated` fields, see
   `cli/options.py`) and one `Output`. `verb` spreads the groups' fields into the signature that typer reads, and builds
   the groups again from what typer parsed (`cli/values.py`): an option is declared once and means the same everywhere.
2. Bad input ends with one line and exit code 2, Ctrl-C with one line and 130, a failed check with 1. `--debug` shows
   the traceback instead.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

from circuitfind.cli.output import Output
from circuitfind.cli.values import as_text, value_of
from circuitfind.errors import CircuitfindError

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
Verb = Callable[..., int | None]


@dataclass(frozen=True)
class SpeechOptions:
    """How a verb speaks."""

    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on standard output, everything else on standard error.")
    ] = False
    debug: Annotated[
        bool, typer.Option("--debug", envvar="CIRCUITFIND_DEBUG", help="Show the traceback of an error.")
    ] = False


def verb(app: typer.Typer, example: str) -> Callable[[Verb], Verb]:
    """Makes a function a verb of the app, under its own name; `example` ends its help."""

    def register(function: Verb) -> Verb:
        groups = {
            name: kind
            for name, kind in get_type_hints(function).items()
            if is_dataclass(kind) and isinstance(kind, type)
        }
        spread = [*groups.values(), SpeechOptions]

        def run(ctx: typer.Context, **values: Any) -> None:
            out = Output(values["as_json"], _command(ctx))

            def call() -> int | None:
                return function(out=out, **{name: _built(kind, values) for name, kind in groups.items()})

            raise typer.Exit(_guarded(call, out, values["debug"]))

        parameters = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
        parameters += [parameter for kind in spread for parameter in _parameters(kind)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = function.__doc__
        app.command(function.__name__, epilog=f"Example: {example}")(run)
        return function

    return register


def _parameters(kind: type) -> Iterator[inspect.Parameter]:
    """A group's fields as parameters of a function."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        given = inspect.Parameter.empty if field.default is MISSING else field.default
        annotation, default = as_text(hints[field.name], given)
        yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _built(kind: type, values: dict[str, Any]) -> Any:
    """A group of options from what typer read."""
    hints = get_type_hints(kind, include_extras=True)
    return kind(**{field.name: value_of(field.name, hints[field.name], values[field.name]) for field in fields(kind)})


def _guarded(call: Callable[[], int | None], out: Output, debug: bool) -> int:
    """Runs a verb and returns the exit code; whatever goes wrong becomes one line."""
    try:
        with out.hearing_warnings():
            return call() or 0
    except KeyboardInterrupt:
        out.fail(out.if_stopped, INTERRUPTED, label="stopped")
        return INTERRUPTED
    except CircuitfindError as error:
        if debug:
            out.err.print(traceback.format_exc(), soft_wrap=True)
        out.fail(str(error), BAD_INPUT)
        return BAD_INPUT
    except Exception as error:
        if debug:
            out.err.print(traceback.format_exc(), soft_wrap=True)
        said = str(error).strip().partition("\n")[0]
        text = f"unexpected {type(error).__name__}{': ' if said else ''}{said}"
        out.fail(text if debug else f"{text} (this is a bug; --debug shows where)", FAILED)
        return FAILED


def _command(ctx: typer.Context) -> list[str]:
    """The command line as it was given, rebuilt from what was parsed: arguments by name, options in long form."""
    words = ["circuitfind", str(ctx.info_name)]
    for parameter in ctx.command.params:
        name = str(parameter.name)
        source, value = ctx.get_parameter_source(name), ctx.params.get(name)
        if parameter.param_type_name == "argument":
            words += [str(value)] if value is not None else []
        elif source is not None and source.name == "COMMANDLINE" and name not in ("as_json", "debug"):
            words += _option(parameter, value)
    return words


def _option(parameter: Any, value: Any) -> list[str]:
    if getattr(parameter, "is_flag", False):
        return [parameter.opts[0] if value else parameter.secondary_opts[0]]
    return [parameter.opts[0], str(value)]
