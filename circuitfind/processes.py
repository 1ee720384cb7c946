"""Several processes that do one call together: the only module that knows `torch.distributed`.

1. Every process (a rank) runs the same program on the same pairs, and holds the whole model. `join` makes them a group.
2. A loop over batches (`engine/batches.py`) gives each rank a batch of its own, and `gathered` then gives every rank
   the results of all, in the order of pairs. So all ranks go on with the same numbers and take the same path; what is
   added up is added up in the same order on each.
3. Where there are too few pairs to go round, ranks share a batch and divide its candidates (`Division`).
4. An error of one rank is raised on all of them. Inside a rank's own part (`alone`) nothing is divided further.
5. Rank 0 speaks and writes; the others are silent.
6. Processes that divide a model's heads run the same passes (`in_step`). They divide nothing further, but agree on what
   may differ between them: the time, what a file holds, free memory. Else one would wait for a pass that another never
   makes.

A result equals that of one process to float rounding. It is the same to the bit where the batches are the same: what is
patched or run in a batch then is, too, and each batch's part is added in the same order.
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
START = 4  # what running both sides of a batch costs, in candidates
ABOUT = 1.05  # of the least; larger batches are worth as much
MEETING = timedelta(minutes=10)
SIGN_OF_LIFE = 5.0  # seconds
TIMEOUT = timedelta(days=7)  # one rank may write a report, or run a function of the user's, while the others wait


class Group(NamedTuple):
    """This process among `size`; `exchange` gives every rank the bytes of each, or each that runs `in_step` with it."""

    rank: int = 0
    size: int = 1
    exchange: Callable[[bytes], list[bytes]] = lambda own: [own]
    in_step: bool = False


_joined = Group()
_store: list[Any] = []  # of the group that was made here: what ranks can ask of each other at any time
_here: ContextVar[Group | None] = ContextVar("circuitfind_group", default=None)


def group() -> Group:
    """The group that divides what is run here."""
    return _here.get() or _joined


def size() -> int:
    """How many processes divide what is run here."""
    return group().size


def first() -> bool:
    """Whether this process speaks and writes."""
    return group().rank == 0


@contextmanager
def within(other: Group) -> Iterator[None]:
    """Inside, in this thread, another group divides the work."""
    token = _here.set(other)
    try:
        yield
    finally:
        _here.reset(token)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process does all that is asked of it itself; one that is in step with others stays so."""
    here = group()
    with within(here if here.in_step else Group(here.rank)):
        yield


@contextmanager
def in_step(others: Any) -> Iterator[None]:
    """Inside, this process runs what all of a torch process group run, and nothing is divided."""
    with within(Group(group().rank, 1, functools.partial(_exchange, others=others), in_step=True)):
        yield


# -------------------------------------------------------------------- joining
def join() -> bool:
    """Makes one group of the processes that `torchrun` started: from here on they divide each call's work.

    Every process must make the same calls, on the same model and pairs, with the same seeds. The group that the script
    has initialised already is taken; else one of nccl where each process has an accelerator of its own, else of gloo.

    Returns:
        Whether there are several; False, and nothing changes, outside `torchrun`.

    Raises:
        ProcessError: the processes do not find each other.
    """
    global _joined
    started = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if not started and "torch.distributed" not in sys.modules:  # help and files do not wait for torch
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
    """Ends the group that `join` made, if there is one."""
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
    """The error that names the ranks that give no sign of life any more; None where all are there.

    A rank that calls this gives one, and waits a while for those of the others.
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
    except RuntimeError:  # who kept it is gone
        gone = {0}
    text = "; ".join(f"rank {rank} of {here.size} {words[rank]}" for rank in sorted(gone))
    return ProcessError(text, here.rank == min(set(range(here.size)) - gone)) if gone else None


def end(said: str) -> None:
    """Leaves the last words of a rank that ends with an error, unless the first one ends, too, and speaks for all."""
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
    """What a function makes on each rank of those that divide the work, in the order of ranks, on every rank.

    The first error is raised on all, and rank 0 warns of what others warn of. The function's name and the label tell
    whether all are in the same call.

    Raises:
        ProcessError: a rank is lost, or is in another call.
    """
    return [function()] if size() == 1 else of_each(function, label)


def of_each(function: Callable[[], R], label: str = "") -> list[R]:
    """`gathered`, of ranks in step, too: for what differs between them though they run the same."""
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
    """What a function makes on rank 0, which alone calls it, on every rank; in a rank's own part, what it makes."""
    if group().size == 1 and not group().in_step:
        return function()
    return cast(R, of_each(functools.wraps(function)(lambda: function() if first() else None))[0])


def same(value: R) -> R:
    """Rank 0's value, on every rank: of what differs between processes, such as the time."""
    return of_first(lambda: value)


class _Pickler(pickle.Pickler):
    """Tensors as their bytes; they are put on the receiver's own device of the same kind."""

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
            pickle.loads(buffer.getvalue())  # some cannot be made again from what they hold
    except Exception as error:
        if not isinstance(value, Exception):
            raise
        kind = CircuitfindError if isinstance(value, CircuitfindError) else RuntimeError
        return pickle.dumps(kind(str(value) or repr(error)))
    return buffer.getvalue()


# -------------------------------------------------------------------- dividing
class Division(NamedTuple):
    """How ranks divide pairs and candidates: into `blocks` of ranks, each of which runs a batch of its own.

    block: this rank's. place, members: which of so many ranks it is there.
    most: the members of the largest block.
    """

    blocks: int = 1
    block: int = 0
    place: int = 0
    members: int = 1
    most: int = 1

    def own(self, works: Iterable[int]) -> list[int]:
        """Of groups that take so much work each, the numbers of this rank's: each goes to the one with least so far."""
        loads, mine = [0] * self.members, []
        for number, work in enumerate(works):
            to = loads.index(min(loads))
            loads[to] += work
            if to == self.place:
                mine.append(number)
        return mine

    def part(self, candidates: int) -> slice:
        """Of candidates of which each builds on those before it, this rank's."""
        return slice(*(candidates * (self.place + end) // self.members for end in (0, 1)))

    def batches(self, start: int, stop: int, most: int) -> list[slice]:
        """The next batches of pairs from `start` on, one a block, of `most` pairs each at most."""
        step = min(most, math.ceil((stop - start) / self.blocks))
        ends = range(start, min(stop, start + self.blocks * step), step)
        return [slice(at, min(at + step, stop)) for at in ends]


def division(pairs: int, candidates: int = 1) -> Division:
    """The division that leaves the busiest rank about least to do; of those, the one with the largest batches."""
    here = group()
    if here.size == 1:
        return Division()
    counts = range(1, max(1, min(here.size, pairs)) + 1)
    work = [math.ceil(pairs / n) * (START + math.ceil(candidates / (here.size // n))) for n in counts]
    blocks = next(n for n, most in zip(counts, work, strict=True) if most <= ABOUT * min(work))
    of = [rank * blocks // here.size for rank in range(here.size)]
    members = of.count(of[here.rank])
    return Division(blocks, of[here.rank], here.rank - of.index(of[here.rank]), members, -(-here.size // blocks))
