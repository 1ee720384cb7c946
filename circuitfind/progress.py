"""Progress without printing: long loops report to a listener, if there is one.

The command line listens with a rich display; scripts and notebooks can do so with `with cf.show_progress():`. A call of
several stages reports as one task (`stages`), whose total is the estimated work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from html import escape
from importlib import import_module
from typing import Any, Protocol, TypeVar, cast

from circuitfind import processes

T = TypeVar("T")


class Listener(Protocol):
    """The methods of a display, named as in `rich.progress.Progress`: a task has a total, and advances by steps."""

    def add_task(self, description: str, *, total: float) -> int: ...
    def advance(self, task: int, steps: float) -> None: ...
    def remove_task(self, task: int) -> None: ...


_listener: ContextVar[Listener | None] = ContextVar("circuitfind_progress", default=None)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Report a loop of `total` steps inside this context. Yields a function to call with the number of steps done."""
    listener = _listener.get()
    if listener is None or not processes.first():
        yield lambda steps: None
        return
    task = listener.add_task(label, total=total)
    try:
        yield lambda steps: listener.advance(task, steps)
    finally:
        listener.remove_task(task)


def track(items: Sequence[T], label: str) -> Iterator[T]:
    """Yield the items, and report each of them once it is done."""
    with progress(label, len(items)) as advance:
        for item in items:
            yield item
            advance(1)


class _Stage:
    """A listener that turns the progress of a stage's outermost loops into progress of the whole call."""

    def __init__(self, advance: Callable[[float], None], work: float) -> None:
        self.advance_whole, self.left, self.work = advance, work, work
        self.totals: list[float] = []

    def add_task(self, description: str, *, total: float) -> int:
        self.totals.append(total)
        return len(self.totals)

    def advance(self, task: int, steps: float) -> None:
        if task == 1 and self.totals[0]:
            done = min(self.left, self.work * steps / self.totals[0])
            self.left -= done
            self.advance_whole(done)

    def remove_task(self, task: int) -> None:
        self.totals.pop()


@contextmanager
def stages(label: str, work: float) -> Iterator[Callable[[float], AbstractContextManager[None]]]:
    """Report a whole call as one task inside this context. Yields a function from the work of a stage to the stage's
    context. In a stage only the outermost loops count; work that they did not report counts when the stage ends.

    `work`: the sum over all stages, in any unit.
    """
    listener = _listener.get()
    if listener is None:
        yield lambda part: nullcontext()
        return
    task = listener.add_task(label, total=work)

    @contextmanager
    def stage(part: float) -> Iterator[None]:
        inner = _Stage(lambda done: listener.advance(task, done), part)
        with listening(inner):
            yield
        listener.advance(task, inner.left)

    try:
        yield stage
    finally:
        listener.remove_task(task)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside this context, send all progress to a listener."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def show_progress() -> Iterator[None]:
    """Inside this context, show progress bars with elapsed and remaining time: rich's on stderr, or in a notebook plain
    HTML, which needs no widgets. Covers this thread only (others: `contextvars.copy_context().run(function)`)."""
    import rich.progress as bars
    from rich.console import Console

    if Console().is_jupyter:
        with listening(_Notebook()):
            yield
        return
    text, count, left = bars.TextColumn("{task.description}"), bars.MofNCompleteColumn(), bars.TextColumn("left")
    times = bars.TimeElapsedColumn(), bars.TimeRemainingColumn()
    columns = (text, bars.BarColumn(bar_width=28), count, *times, left)
    with (
        bars.Progress(*columns, console=Console(stderr=True), transient=True) as display,
        listening(cast(Listener, display)),
    ):
        yield


class _Notebook:
    """Bars in a notebook cell's output, by display updates, which every notebook supports. Finished bars disappear."""

    EVERY = 0.2  # seconds between updates

    def __init__(self) -> None:
        self.display: Any = import_module("IPython.display")
        self.bars: dict[int, dict[str, Any]] = {}
        self.count = 0

    def add_task(self, description: str, *, total: float) -> int:
        self.count += 1
        bar = {"label": description, "total": total, "done": 0.0, "began": time.monotonic(), "shown": 0.0}
        bar["handle"] = self.display.display(self.display.HTML(self._html(bar)), display_id=True)
        self.bars[self.count] = bar
        return self.count

    def advance(self, task: int, steps: float) -> None:
        bar = self.bars[task]
        bar["done"] += steps
        if time.monotonic() - bar["shown"] > self.EVERY:
            bar["shown"] = time.monotonic()
            bar["handle"].update(self.display.HTML(self._html(bar)))

    def remove_task(self, task: int) -> None:
        self.bars.pop(task)["handle"].update(self.display.HTML(""))

    @staticmethod
    def _html(bar: Mapping[str, Any]) -> str:
        done, total, spent = bar["done"], bar["total"], time.monotonic() - bar["began"]
        left = f", {spent / done * (total - done):.0f} s left" if done else ""
        said = f"{done:.0f} of {total:.0f}, {spent:.0f} s{left}"
        return f'<progress value="{done:g}" max="{total:g}"></progress> {escape(bar["label"])}: {said}'
