"""Several processes that share the work of one call. The only module that uses `torch.distributed`.

1. Every process (a rank) runs the same program on the same pairs, and holds the whole model. `join` makes them a group.
2. The loop over batches (`engine/batches.py`) gives each rank a batch of its own. `gathered` then sends all results to
   every rank, in the order of the pairs. So all ranks continue with the same numbers, sum them in the same order, and
   take the same branches.
3. If there are fewer pairs than ranks, several ranks run the same batch and divide its candidates (`Division`).
4. An error on one rank is raised on all. Inside a rank's own part (`alone`), work is not divided further.
5. Rank 0 prints and writes files; the others are silent.
6. Ranks that hold parts of one model (divided by heads) run the same passes (`in_step`) and divide no work. But they
   must agree on what may differ between processes (the time, the content of a file, free memory); otherwise one rank
   would wait forever for a pass that another does not run.

A result equals that of a single process up to float rounding, and to the bit if the batches are the same: the same runs
are then made in each batch, and the batches' results are added in the same order.
"""

from __future__ import annotations

import functools
import io
import math
import os
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from circuitfind.errors import CircuitfindError, CircuitfindWarning, ProcessError, warn

if TYPE_CHECKING:
    from torch import Tensor

R = TypeVar("R")
START = 4  # the cost of running both sides of a batch, in candidates
ABOUT = 1.05  # a division may cost this much times the cheapest one, if its batches are larger
MEETING = timedelta(minutes=10)  # to wait for all processes to join
SIGN_OF_LIFE = 5.0  # seconds to wait for the other ranks, when one seems lost
TIMEOUT = timedelta(days=7)  # long, because one rank may write a report, or run a user's function, while others wait


class Group(NamedTuple):
    """This process's `rank` among `size`. `exchange`: sends its bytes to all ranks of the group (with `in_step`: of
    those that run in step with it), and returns theirs, in the order of ranks."""

    rank: int = 0
    size: int = 1
    exchange: Callable[[bytes], list[bytes]] = lambda own: [own]
    in_step: bool = False


_joined = Group()
_store: list[Any] = []  # the key-value store of the group that `join` made, for `lost` and `end`; else empty
_here: ContextVar[Group | None] = ContextVar("circuitfind_group", default=None)


def group() -> Group:
    """Return the group that divides the work here."""
    return _here.get() or _joined


def size() -> int:
    """Return how many processes divide the work here."""
    return group().size


def first() -> bool:
    """Whether this process is the one that prints and writes files: rank 0."""
    return group().rank == 0


@contextmanager
def within(other: Group) -> Iterator[None]:
    """Inside this context (in this thread), another group divides the work."""
    token = _here.set(other)
    try:
        yield
    finally:
        _here.reset(token)


@contextmanager
def alone() -> Iterator[None]:
    """Inside this context, this process does not divide its work; if it is in step with others, it stays so."""
    here = group()
    with within(here if here.in_step else Group(here.rank)):
        yield


@contextmanager
def in_step(others: Any) -> Iterator[None]:
    """Inside this context, all ranks of a torch process group run the same, and no work is divided."""
    with within(Group(group().rank, 1, functools.partial(_exchange, others=others), in_step=True)):
        yield


# -------------------------------------------------------------------- joining
def join() -> bool:
    """Make one group of the processes that `torchrun` started, which then share the work of each call.

    Every process must make the same calls, on the same model and pairs, with the same seeds. If the script has already
    initialised `torch.distributed`, that group is used. Otherwise the backend is nccl if each process has a GPU of its
    own, else gloo.

    Returns:
        Whether there are several processes. Outside `torchrun` nothing happens, and this is False.

    Raises:
        ProcessError: the processes cannot find each other.
    """
    global _joined
    started = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if not started and "torch.distributed" not in sys.modules:  # do not import torch just to show help or open a file
        return False
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if not dist.is_available() or not (started or dist.is_initialized()):
        return False
    _store.clear()
    if not dist.is_initialized():
        devices = torch.cuda.device_count()
        own = devices >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if devices:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % devices)
        try:
            store, rank, ranks = next(rendezvous("env://", timeout=MEETING))
            dist.init_process_group("nccl" if own else "gloo", None, TIMEOUT, ranks, rank, store)
            _store.append(store)
        except (RuntimeError, ValueError) as error:
            raise ProcessError(f"the processes do not find each other: {str(error).splitlines()[0]}") from None
    _joined = Group(dist.get_rank(), dist.get_world_size(), _exchange)
    if _joined.rank:
        warnings.simplefilter("ignore", CircuitfindWarning)
    return _joined.size > 1


def leave() -> None:
    """End the group that `join` made, if there is one."""
    global _joined
    if _joined.size > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
    _joined = Group()
    _store.clear()


def _exchange(own: bytes, others: Any = None) -> list[bytes]:
    import torch.distributed as dist

    parts: list[Any] = [None] * dist.get_world_size(others)
    try:
        dist.all_gather_object(parts, own, group=others)
    except RuntimeError as error:
        said = str(error).strip().splitlines()[-1]
        raise lost() or ProcessError(f"the processes cannot exchange their results: {said}", first()) from None
    return parts


def lost() -> ProcessError | None:
    """Return an error that names the ranks that no longer respond; None if all respond.

    A rank that calls this shows that it is alive, and waits up to `SIGN_OF_LIFE` for the others to do the same.
    """
    if not _store:
        return None
    store, here, end = _store[0], _joined, time.monotonic() + SIGN_OF_LIFE
    gone, words = set(range(here.size)), dict.fromkeys(range(here.size), "was lost")
    try:
        store.set(f"here {here.rank}", "")
        while gone - {rank for rank, said in words.items() if said != "was lost"} and time.monotonic() < end:
            time.sleep(0.05)
            gone = {rank for rank in gone if not store.check([f"here {rank}"])}
            words |= {rank: store.get(f"ended {rank}").decode() for rank in gone if store.check([f"ended {rank}"])}
    except RuntimeError:  # rank 0, which hosts the store, is gone
        gone = {0}
    text = "; ".join(f"rank {rank} of {here.size} {words[rank]}" for rank in sorted(gone))
    return ProcessError(text, here.rank == min(set(range(here.size)) - gone)) if gone else None


def end(said: str) -> None:
    """Leave the error message of a rank that ends, for `lost`, unless rank 0 ends, too, and prints its own."""
    if not _store:
        return
    with suppress(RuntimeError):
        if first():
            _store[0].set("spoken", "")
            return
        with suppress(RuntimeError):
            _store[0].wait(["spoken"], timedelta(seconds=SIGN_OF_LIFE))
            return
        _store[0].set(f"ended {_joined.rank}", f"ended: {said}")


# -------------------------------------------------------------------- exchanging
def gathered(function: Callable[[], R], label: str = "") -> list[R]:
    """Call a function on every rank that divides the work, and return all results on every rank, in the order of ranks.

    An error is raised on all ranks (of several, the lowest rank's). Warnings of all ranks are shown by rank 0. The
    function's name and the label are compared, to detect ranks that are in different calls.

    Raises:
        ProcessError: a rank is lost, or is in another call.
    """
    return [function()] if size() == 1 else of_each(function, label)


def of_each(function: Callable[[], R], label: str = "") -> list[R]:
    """Do what `gathered` does, also for ranks in step: for values that may differ between them."""
    here = group()
    if here.size == 1 and not here.in_step:
        return [function()]
    found: R | Exception
    with warnings.catch_warnings(record=True) if here.rank else nullcontext() as heard:
        if heard is not None:
            warnings.simplefilter("always", CircuitfindWarning)
        try:
            with within(Group(here.rank)):
                found = function()
        except Exception as error:
            found = error
    said = [str(one.message) for one in heard or () if issubclass(one.category, CircuitfindWarning)]
    call = f"{function.__module__}.{function.__qualname__} {label}"
    every = [pickle.loads(part) for part in here.exchange(pickle.dumps((call, said, _packed(found))))]
    if len({other for other, *_ in every}) > 1:
        remedy = "every one must make all of them, in one order, on the same model and pairs"
        raise ProcessError(f"the processes do not make the same calls: {remedy}", here.rank == 0)
    for text in dict.fromkeys(text for _, texts, _ in every for text in texts) if first() else ():
        warn(text)
    parts: list[Any] = [pickle.loads(part) for *_, part in every]
    for rank, part in enumerate(parts):
        if isinstance(part, Exception):
            raise found if rank == here.rank and isinstance(found, Exception) else part
    return parts


def of_first(function: Callable[[], R]) -> R:
    """Call a function on rank 0 only, and return its result on every rank. Inside `alone`, call it on this rank."""
    if group().size == 1 and not group().in_step:
        return function()
    return cast(R, of_each(functools.wraps(function)(lambda: function() if first() else None))[0])


def same(value: R) -> R:
    """Return rank 0's value on every rank, for values that may differ between processes, such as the time."""
    return of_first(lambda: value)


class _Pickler(pickle.Pickler):
    """Pickles tensors as bytes; the receiver puts them on its own device of the same type."""

    def reducer_override(self, one: Any) -> Any:
        import torch

        if not isinstance(one, torch.Tensor):
            return NotImplemented
        flat = one.detach().cpu().contiguous().flatten()
        return _tensor, (flat.view(torch.uint8).numpy(), flat.dtype, tuple(one.shape), one.device.type)


def _tensor(raw: Any, dtype: Any, shape: tuple[int, ...], device: str) -> Tensor:
    import torch

    return torch.from_numpy(raw).view(dtype).view(shape).to(device)


def _packed(value: object) -> bytes:
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, protocol=5).dump(value)
        if isinstance(value, Exception):
            pickle.loads(buffer.getvalue())  # raises for exceptions that cannot be unpickled
    except Exception as error:
        if not isinstance(value, Exception):
            raise
        kind = CircuitfindError if isinstance(value, CircuitfindError) else RuntimeError
        return pickle.dumps(kind(str(value) or repr(error)))
    return buffer.getvalue()


# -------------------------------------------------------------------- dividing
class Division(NamedTuple):
    """How ranks divide pairs and candidates: into `blocks` of ranks, each of which runs batches of its own.

    block: this rank's block. place: this rank's number among the `members` of its block.
    most: the number of members of the largest block.
    """

    blocks: int = 1
    block: int = 0
    place: int = 0
    members: int = 1
    most: int = 1

    def own(self, works: Iterable[int]) -> list[int]:
        """Return the indices of this rank's groups, given the work of every group.

        Groups are assigned in order, each to the member with the least work so far.
        """
        loads, mine = [0] * self.members, []
        for number, work in enumerate(works):
            to = loads.index(min(loads))
            loads[to] += work
            if to == self.place:
                mine.append(number)
        return mine

    def part(self, candidates: int) -> slice:
        """Return this rank's slice of candidates, for candidates that each build on those before."""
        return slice(*(candidates * (self.place + end) // self.members for end in (0, 1)))

    def batches(self, start: int, stop: int, most: int) -> list[slice]:
        """Return the next batches of pairs from `start` on, one for each block, of at most `most` pairs each."""
        step = min(most, math.ceil((stop - start) / self.blocks))
        ends = range(start, min(stop, start + self.blocks * step), step)
        return [slice(at, min(at + step, stop)) for at in ends]


def division(pairs: int, candidates: int = 1) -> Division:
    """Return the division that (nearly) minimises the work of the busiest rank; of those, the one with the fewest
    blocks, whose batches are largest."""
    here = group()
    if here.size == 1:
        return Division()
    counts = range(1, max(1, min(here.size, pairs)) + 1)
    work = [math.ceil(pairs / n) * (START + math.ceil(candidates / (here.size // n))) for n in counts]
    blocks = next(n for n, most in zip(counts, work, strict=True) if most <= ABOUT * min(work))
    of = [rank * blocks // here.size for rank in range(here.size)]
    members = of.count(of[here.rank])
    return Division(blocks, of[here.rank], here.rank - of.index(of[here.rank]), members, -(-here.size // blocks))
