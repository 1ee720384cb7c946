"""Output of a verb: text and tables, a JSON document, progress and warnings."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from circuitfind.cli.cells import (
    EFFECTS,
    FORMS,
    HEADINGS,
    PLAIN,
    Cell,
    Right,
    digits_for,
    effect,
    fixed,
    interval,
    some,
)
from circuitfind.errors import CircuitfindWarning, ProcessError

BAD_INPUT, FAILED, CLOSED_PIPE = 2, 1, 141  # exit codes; that of a signal is 128 plus its number
PACKAGE = Path(__file__).resolve().parents[1]
PATIENCE = 3.0  # seconds without output, after which a line is printed
NOTHING, PAGE = "nothing was written", "report.html"
INDENT, BETWEEN_COLUMNS = 2, 3  # of tables


class Lasting:
    """A stream that may stop accepting output: its reader is closed (`| head -1`), the disk is full, or it is closed
    (`>&-`). The work continues, and later output is lost.

    Attributes:
        unread: the reader was closed.
        failed: another reason why writing failed, or "".
    """

    def __init__(self, stream: Any) -> None:
        self.stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115 (to the end)
        self.unread, self.failed = False, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, call: Callable[..., object], *text: str) -> None:
        try:
            call(*text)
        except BrokenPipeError:
            self.unread = True
        except OSError as error:
            self.failed = error.strerror or str(error)
        if self.unread or self.failed:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def linked(path: Path, name: str) -> Text:
    """A file's name as a link, for terminals that support links."""
    return Text(name, style=f"link {path.resolve().as_uri()}")


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, Right) or getattr(cell, "justify", "") == "right"


def _width(cell: Cell) -> int:
    return (cell if isinstance(cell, Text) else Text(cell)).cell_len


def _blocks(widths: Sequence[int], may_part: bool, room: int) -> Iterator[list[int]]:
    """Divide columns into blocks that fit the width, each with the first column."""
    block, used = [0], widths[0]
    for at in range(1, len(widths)):
        if may_part and len(block) > 1 and used + BETWEEN_COLUMNS + widths[at] > room:
            yield block
            block, used = [0], widths[0]
        block.append(at)
        used += BETWEEN_COLUMNS + widths[at]
    yield block


class Output:
    """The output streams of a verb.

    Attributes:
        text: console for text: standard output, or standard error if JSON goes to standard output.
        err: standard error.
        command: the command line that started the verb, word by word.
        verbose: whether to print more about model, memory and pairs.
        if_stopped: message after Ctrl-C, if the file `state` exists.
        typed: for each of the library's keywords, the value as errors show it, and the option as it was typed.
        at_end: callbacks for the end of the verb.
        complete: checkpoints of runs that are complete but not saved yet.
    """

    def __init__(self, as_json: bool, command: list[str], verbose: bool = False) -> None:
        self.as_json, self.command, self.verbose = as_json, command, verbose
        self.err = Console(stderr=True, highlight=False, markup=False)
        self.text = self.err if as_json else Console(highlight=False, markup=False)
        self.if_stopped, self.state = NOTHING, Path()
        self.typed: dict[str, tuple[str, str]] = {}
        self.at_end = contextlib.ExitStack()
        self.complete: Sequence[object] = ()
        self._warned: set[str] = set()

    def command_line(self, *more: str) -> str:
        """The command as one would type it, with more words at its end."""
        return shlex.join([*self.command, *more])

    # ---------------------------------------------------------------- text
    def say(self, text: str = "", style: str = "") -> None:
        """Print text, wrapped at words."""
        self.text.print(text, style=style)

    def finish(self, content: dict[str, Any], files: Sequence[Path], drawable: bool = False) -> None:
        """Print the names of the files that were written, and the JSON document.

        Names are links in terminals that support them. The report has its own line. `drawable`: add the command that
        shows figures of the first file.
        """
        pages = [path for path in files if path.name == PAGE]
        rest = [path for path in files if path not in pages]
        folders = {path.parent for path in rest}
        together = len(rest) > 1 and len(folders) == 1
        names = Text(", ").join(linked(path, path.name if together else str(path)) for path in rest)
        figures = f" (figures: circuitfind show {shlex.quote(str(files[0]))})" if drawable else ""
        self.text.print(Text(f"Written to {rest[0].parent}: " if together else "Written: ") + names + figures)
        for page in pages:
            self.text.print(Text("Report: ") + linked(page, str(page)))
        self.document({**content, "files": [str(path) for path in files]})

    def facts(self, rows: Iterable[tuple[str, str]]) -> None:
        """Print labels and texts in two columns, without empty texts."""
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, said in rows:
            if said:
                grid.add_row(Text(label), Text(said))
        self.text.print(grid)

    def table(self, title: str, headings: Iterable[str], rows: Iterable[Iterable[Cell]]) -> None:
        """Print a table, with columns of numbers aligned to the right.

        Numbers are never broken over lines. A table that is too wide continues below, with its first column repeated.
        """
        self.text.print(Text(title, style="bold"))
        heads, cells = list(headings), [list(row) for row in rows]
        right = [any(_is_number(row[at]) for row in cells) for at in range(len(heads))]
        widths = [max(map(_width, (heading, *(row[at] for row in cells)))) for at, heading in enumerate(heads)]
        for columns in _blocks(widths, all(right[1:]), self.text.width - INDENT):
            table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
            for at in columns:
                side: Any = "right" if right[at] else "left"
                table.add_column(heads[at], justify=side, overflow="fold", no_wrap=right[at])
            for row in cells:
                table.add_row(*(cell if isinstance(cell := row[at], Text) else Text(cell) for at in columns))
            self.text.print(Padding(table, (0, 0, 1, INDENT), expand=False))

    def rows(self, title: str, rows: Sequence[Any], names: str, most: int, signed: bool = True, **called: str) -> None:
        """Print a table of the first rows (named tuples) of a result.

        Args:
            most: number of rows.
            names: fields to show, separated by spaces; `field=heading` for another heading.
            signed: show the sign of effects, opposing ones in red.
            called: headings by field, as in `names`.
        """
        shown, called = rows[:most], HEADINGS | dict(word.split("=") for word in names.split() if "=" in word) | called
        columns = [word.partition("=")[0] for word in names.split()]
        digits = digits_for(getattr(row, name) or 0 for row in shown for name in columns if name in EFFECTS | PLAIN)

        def cell(row: Any, name: str) -> Cell:
            if name == "interval":
                return interval(row.interval if hasattr(row, name) else (row.low, row.high), digits)
            value = getattr(row, name)
            if name in EFFECTS | PLAIN:
                value = math.nan if value is None else value
                return effect(value, digits) if signed and name in EFFECTS else fixed(value, digits)
            return FORMS.get(name, fixed if isinstance(value, float) else str)(value)

        headings = [called.get(name, name) for name in columns]
        cells = [[cell(row, name) for name in columns] for row in shown]
        self.table(f"{title}{some(most, len(rows))}", headings, cells)

    def few(self, pairs: int) -> None:
        """Warn once if intervals are based on few different pairs."""
        from circuitfind.statistics import of_few

        text = of_few(pairs)
        if text and text not in self._warned:
            self._warned.add(text)
            self.say(text, "yellow")

    # ---------------------------------------------------------------- JSON
    def document(self, content: dict[str, Any]) -> None:
        """Print the JSON document if --json was given; NaN becomes null."""
        if self.as_json:
            from circuitfind.export.files import plain

            print(json.dumps(plain(content), ensure_ascii=False, allow_nan=False, indent=1))

    @property
    def kept(self) -> str:
        """Ending of an error message: where the work of a complete run is kept."""
        return f"; {self.if_stopped}" if self.complete and self.state.exists() else ""

    def stopped(self, code: int) -> None:
        """Report that a signal stopped the run, what is kept, and how to continue."""
        self.fail(self.if_stopped if self.state.exists() else NOTHING, code, label="stopped")

    def lost(self, error: ProcessError) -> int:
        """Report that other processes were lost, and what is kept; only the first remaining process prints."""
        if error.first:
            self.err = Console(file=sys.__stderr__, highlight=False, markup=False)
            kept = any(self.state.parent.glob(f"{self.state.name}*")) if self.state.name else False
            self.fail(f"{error}; {self.if_stopped if kept else NOTHING}", FAILED)
        return FAILED

    def fail(self, text: str, code: int, label: str = "error") -> None:
        """Print one line on standard error and, with --json, a document with the same text."""
        for name, (value, typed) in self.typed.items():  # name options as they were typed
            asked = rf"(?<![\w.]){name}={re.escape(value)}(?!\.?\w)|^{name}=(\[.*?\]|'.*?'|[^\s:,]+)"
            text = re.sub(asked, typed.replace("\\", r"\\"), text)
        self.err.print(Text.assemble((f"{label}: ", "bold red"), text), soft_wrap=True)
        self.document({label: text, "exit_code": code})

    # ---------------------------------------------------------------- warnings and progress
    def warn(self, text: str) -> None:
        """Print a warning in yellow on standard error; repeated warnings are printed once."""
        if text not in self._warned:
            self._warned.add(text)
            self.err.print(Text.assemble(("warning: ", "yellow"), (text, "yellow")), soft_wrap=True)

    @contextlib.contextmanager
    def hearing_warnings(self) -> Iterator[None]:
        """Print Python warnings of this package as lines; hide those of other libraries."""

        def show(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
            inside = issubclass(category, UserWarning) and PACKAGE in Path(filename).resolve().parents
            if inside or issubclass(category, CircuitfindWarning):
                self.warn(str(message).partition("\n")[0])

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show  # type: ignore[assignment]
            yield

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """Show progress bars with elapsed and remaining time, if standard error is a terminal."""
        if not self.err.is_terminal:
            yield
            return
        from circuitfind.progress import show_progress

        with show_progress():
            yield

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show a spinner while waiting; if standard error is no terminal, print a line if it takes long."""
        if self.err.is_terminal:
            with self.err.status(text):
                yield
            return
        late = threading.Timer(PATIENCE, self.err.print, (f"{text} ...",))
        late.daemon = True
        late.start()
        try:
            yield
        finally:
            late.cancel()
