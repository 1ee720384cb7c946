"""Progress without printing: long loops report to whoever is listening, and to nobody by default.

The command line listens with a rich display; a script or notebook does the same with `with cf.show_progress():`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Listener(Protocol):
    """What a display offers: a task with a total, advanced by some steps at a time."""

    def start(self, label: str, total: int) -> int: ...
    def advance(self, task: int, steps: int) -> None: ...
    def finish(self, task: int) -> None: ...


_listener: ContextVar[Listener | None] = ContextVar("circuitfind_progress", default=None)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number of steps just done."""
    listener = _listener.get()
    if listener is None:
        yield lambda steps: None
        return
    task = listener.start(label, total)
    try:
        yield lambda steps: listener.advance(task, steps)
    finally:
        listener.finish(task)


def track(items: Sequence[T], label: str) -> Iterator[T]:
    """Yields the items, reporting each one as it is done."""
    with progress(label, len(items)) as advance:
        for item in items:
            yield item
            advance(1)


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
    """Shows progress bars with elapsed and remaining time (rich, on stderr) for everything inside, in this thread (in
    another one: `contextvars.copy_context().run(function)`)."""
    import rich.progress as bars
    from rich.console import Console

    text, count, left = bars.TextColumn("{task.description}"), bars.MofNCompleteColumn(), bars.TextColumn("left")
    times = bars.TimeElapsedColumn(), bars.TimeRemainingColumn()
    columns = (text, bars.BarColumn(bar_width=28), count, *times, left)
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as display, listening(_Rich(display)):
        yield


class _Rich:
    def __init__(self, display: Any) -> None:
        self.display = display

    def start(self, label: str, total: int) -> int:
        return int(self.display.add_task(label, total=total))

    def advance(self, task: int, steps: int) -> None:
        self.display.advance(task, steps)

    def finish(self, task: int) -> None:
        self.display.remove_task(task)
