"""Progress without printing: long loops report to whoever is listening, and to nobody by default.

The command line listens with a rich display; a script or notebook does the same with `with cf.show_progress():`.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Iterable, Iterator, Protocol, Sequence, TypeVar

T = TypeVar("T")


class Listener(Protocol):
    """What a display offers: a task with a total, advanced one step at a time."""

    def start(self, label: str, total: int) -> int: ...
    def advance(self, task: int) -> None: ...
    def finish(self, task: int) -> None: ...


_listener: ContextVar[Listener | None] = ContextVar("circuitfind_progress", default=None)


def track(items: Sequence[T] | Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yields the items, reporting each one as it is done."""
    listener = _listener.get()
    if listener is None:
        yield from items
        return
    task = listener.start(label, len(items) if total is None else total)  # type: ignore[arg-type]
    try:
        for item in items:
            yield item
            listener.advance(task)
    finally:
        listener.finish(task)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Sends the progress of everything inside to a listener."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def show_progress() -> Iterator[None]:
    """Shows progress bars with elapsed and remaining time (rich, on stderr) for everything inside."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    text, bar, count = TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn()
    remaining = TextColumn("left")
    columns = (text, bar, count, TimeElapsedColumn(), TimeRemainingColumn(), remaining)
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        with listening(_Rich(display)):
            yield


class _Rich:
    def __init__(self, display: object) -> None:
        self.display = display

    def start(self, label: str, total: int) -> int:
        return self.display.add_task(label, total=total)  # type: ignore[attr-defined]

    def advance(self, task: int) -> None:
        self.display.advance(task)  # type: ignore[attr-defined]

    def finish(self, task: int) -> None:
        self.display.remove_task(task)  # type: ignore[attr-defined]
