"""Where a verb writes: text and tables for people, one JSON document for machines, progress and warnings beside it."""

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

BAD_INPUT, FAILED, CLOSED_PIPE = 2, 1, 141  # exit codes; a signal's is 128 and its number
PACKAGE = Path(__file__).resolve().parents[1]
PATIENCE = 3.0  # seconds that may pass without a word
NOTHING, PAGE = "nothing was written", "report.html"
INDENT, BETWEEN_COLUMNS = 2, 3  # of tables


class Lasting:
    """A stream whose reader may go away (`| head -1`), whose disk may be full, or that is closed (`>&-`): the work goes
    on, and what is written from then on is lost.

    Attributes:
        unread: the reader went away.
        failed: why else it could not be written to, or nothing.
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
    """A file's name, to click on where the terminal knows links."""
    return Text(name, style=f"link {path.resolve().as_uri()}")


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, Right) or getattr(cell, "justify", "") == "right"


def _width(cell: Cell) -> int:
    return (cell if isinstance(cell, Text) else Text(cell)).cell_len


def _blocks(widths: Sequence[int], may_part: bool, room: int) -> Iterator[list[int]]:
    """Columns of a table that stand beside each other: the first, and as many of the others as there is room for."""
    block, used = [0], widths[0]
    for at in range(1, len(widths)):
        if may_part and len(block) > 1 and used + BETWEEN_COLUMNS + widths[at] > room:
            yield block
            block, used = [0], widths[0]
        block.append(at)
        used += BETWEEN_COLUMNS + widths[at]
    yield block


class Output:
    """The streams that a verb writes to.

    Attributes:
        text: where people read: standard output, or standard error when JSON goes to standard output.
        err: standard error.
        command: the command line that started the verb, word by word.
        verbose: whether all that is known of a run's circumstances is to be said.
        if_stopped: what Ctrl-C is answered with, if the file `state` is there.
        typed: by the library's keyword, the value as its errors show it, and the option as it was typed.
        at_end: what is undone when the verb ends.
        complete: the checkpoints of runs that are complete, but whose results are not saved yet.
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
        """The command as one would type it, with further words at its end."""
        return shlex.join([*self.command, *more])

    # ---------------------------------------------------------------- for people
    def say(self, text: str = "", style: str = "") -> None:
        """A line (or lines, wrapped at words)."""
        self.text.print(text, style=style)

    def finish(self, content: dict[str, Any], files: Sequence[Path], drawable: bool = False) -> None:
        """Names the files that were written (and how to see the figures of the first), and writes the document.

        Several files of one folder go by their names, each a link where the terminal knows links; the page that is
        there to be read has a line of its own.
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
        """Labels and texts in two columns; empty texts are left out."""
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, said in rows:
            if said:
                grid.add_row(Text(label), Text(said))
        self.text.print(grid)

    def table(self, title: str, headings: Iterable[str], rows: Iterable[Iterable[Cell]]) -> None:
        """A table; a column of numbers is aligned to the right.

        Numbers are never broken over lines. Where they are too many for the window, the table goes on below, with its
        first column again.
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
        """A table of the first rows (named tuples) of a result.

        Args:
            names: of the fields that are columns, `field=heading` where the two differ; `called`: the same.
            signed: effects show their sign, opposing ones in red.
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
        """Says once where intervals rest on few different pairs."""
        from circuitfind.statistics import of_few

        text = of_few(pairs)
        if text and text not in self._warned:
            self._warned.add(text)
            self.say(text, "yellow")

    # ---------------------------------------------------------------- for machines
    def document(self, content: dict[str, Any]) -> None:
        """The JSON document, where JSON was asked for; NaN becomes null."""
        if self.as_json:
            from circuitfind.export.files import plain

            print(json.dumps(plain(content), ensure_ascii=False, allow_nan=False, indent=1))

    @property
    def kept(self) -> str:
        """The end of an error's line: what is left of a run that was complete."""
        return f"; {self.if_stopped}" if self.complete and self.state.exists() else ""

    def stopped(self, code: int) -> None:
        """What is left of a run that a signal ended, and how it goes on."""
        self.fail(self.if_stopped if self.state.exists() else NOTHING, code, label="stopped")

    def lost(self, error: ProcessError) -> int:
        """What is left where other processes were lost; of those that are there, the first says so."""
        if error.first:
            self.err = Console(file=sys.__stderr__, highlight=False, markup=False)
            kept = any(self.state.parent.glob(f"{self.state.name}*")) if self.state.name else False
            self.fail(f"{error}; {self.if_stopped if kept else NOTHING}", FAILED)
        return FAILED

    def fail(self, text: str, code: int, label: str = "error") -> None:
        """One line on standard error, and in JSON a document that says the same."""
        for name, (value, typed) in self.typed.items():  # an error begins with what it is about
            asked = rf"(?<![\w.]){name}={re.escape(value)}(?!\.?\w)|^{name}=(\[.*?\]|'.*?'|[^\s:,]+)"
            text = re.sub(asked, typed.replace("\\", r"\\"), text)
        self.err.print(Text.assemble((f"{label}: ", "bold red"), text), soft_wrap=True)
        self.document({label: text, "exit_code": code})

    # ---------------------------------------------------------------- beside the work
    def warn(self, text: str) -> None:
        """One yellow line on standard error, once however often it is said."""
        if text not in self._warned:
            self._warned.add(text)
            self.err.print(Text.assemble(("warning: ", "yellow"), (text, "yellow")), soft_wrap=True)

    @contextlib.contextmanager
    def hearing_warnings(self) -> Iterator[None]:
        """Python warnings raised in this package become lines; other libraries' are for their developers."""

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
        """Bars with elapsed and remaining time for everything inside; none where nobody watches."""
        if not self.err.is_terminal:
            yield
            return
        from circuitfind.progress import show_progress

        with show_progress():
            yield

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """A sign of life where no number of steps is known; where nobody watches, a line if it takes long."""
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
