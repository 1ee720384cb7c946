"""Where a verb speaks: text and tables for people, one JSON document for machines, progress and warnings beside it."""

from __future__ import annotations

import contextlib
import json
import shlex
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

PACKAGE = Path(__file__).resolve().parents[1]
PATIENCE = 3.0  # seconds that may pass without a word


class Output:
    """A verb's voice.

    Attributes:
        text: where people read: standard output, or standard error when JSON goes to standard output.
        err: standard error.
        command: the command line that started the verb, word by word.
        if_stopped: what Ctrl-C is answered with.
    """

    def __init__(self, as_json: bool, command: list[str]) -> None:
        self.as_json, self.command = as_json, command
        self.err = Console(stderr=True, highlight=False, markup=False)
        self.text = self.err if as_json else Console(highlight=False, markup=False)
        self.if_stopped = "nothing was written"
        self._warned: set[str] = set()

    def command_line(self, *more: str) -> str:
        """The command as one would type it, with further words at its end."""
        return shlex.join([*self.command, *more])

    # ---------------------------------------------------------------- for people
    def say(self, text: str = "", style: str = "") -> None:
        """A line (or lines, wrapped at words)."""
        self.text.print(text, style=style)

    def facts(self, rows: Iterable[tuple[str, str]]) -> None:
        """Labels and what they say, in two columns; what says nothing is left out."""
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, said in rows:
            if said:
                grid.add_row(Text(label), Text(said))
        self.text.print(grid)

    def table(self, title: str, columns: Iterable[tuple[str, str]], rows: Iterable[Iterable[str | Text]]) -> None:
        """A table; each column is its heading and "left" or "right"."""
        self.text.print(Text(title, style="bold"))
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
        for heading, side in columns:
            table.add_column(heading, justify="right" if side == "right" else "left", overflow="fold")
        for row in rows:
            table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
        self.text.print(Padding(table, (0, 0, 1, 2), expand=False))

    # ---------------------------------------------------------------- for machines
    def document(self, content: dict[str, Any]) -> None:
        """The JSON document, where JSON was asked for; NaN becomes null."""
        if self.as_json:
            from circuitfind.export.files import plain

            print(json.dumps(plain(content), ensure_ascii=False, allow_nan=False, indent=1))

    def fail(self, text: str, code: int, label: str = "error") -> None:
        """One line on standard error, and in JSON a document that says the same."""
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
            if issubclass(category, UserWarning) and PACKAGE in Path(filename).resolve().parents:
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
