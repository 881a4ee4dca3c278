"""One transfer: copies between memory on lease and a GPU's, made piece by piece, and how far they are."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Final, Literal

from cgpu_agent.backends.devicememory import MAX_PACKED_COPY, DeviceChannel
from cgpu_agent.backends.workmemory import WorkMemory
from cgpu_agent.errors import AgentError, Denied, DeviceFault, HostileInput

PIECE: Final = 16 << 20
"""Bytes between two looks at whether the channel, and the lease, are still there."""
_BATCH_COPIES: Final = 1024
_BATCH: Final = 4 << 20

State = Literal["waiting", "running", "done", "failed"]


@dataclass(slots=True)
class Allocation:
    """Device memory. ``secret``: an object was, or is being, opened into it: its owner may not read it."""

    handle: int
    size: int
    secret: bool = False


@dataclass(frozen=True, slots=True)
class Copy:
    """``size`` bytes between ``start`` of memory on lease and ``offset`` of an allocation."""

    to_device: bool
    memory: WorkMemory
    start: int
    room: Allocation
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a transfer is: bytes; bytes a second and seconds to go, 0.0 = not known."""

    ticket: int
    state: State
    done: int
    total: int
    rate: float
    eta: float
    error: AgentError | None


class Transfer:
    """A ticket. Its numbers are moved on by the channel's thread; everything else is the event loop's.

    Args:
        now: the clock.

    Attributes:
        ended: set once it has.
        error: why it failed, if it did.
    """

    def __init__(self, ticket: int, total: int, now: Callable[[], float]) -> None:
        self.ticket: Final = ticket
        self.total: Final = total
        self.ended: Final = asyncio.Event()
        self.error: AgentError | None = None
        self.done = 0
        self._now: Final = now
        self._began: float | None = None
        self._until: float | None = None

    def begin(self) -> None:
        """It is its turn."""
        self._began = self._now()

    def end(self, error: AgentError | None) -> None:
        """It is over. Idempotent."""
        if not self.ended.is_set():
            self._until = self._now()
            self.error = error
            self.ended.set()

    def progress(self) -> Progress:
        state: State = "waiting" if self._began is None else "running"
        if self.ended.is_set():
            state = "done" if self.error is None else "failed"
        done = self.done
        seconds = 0.0 if self._began is None else (self._until or self._now()) - self._began
        rate = done / seconds if seconds > 0 else 0.0
        eta = (self.total - done) / rate if rate and state == "running" else 0.0
        return Progress(self.ticket, state, done, self.total, rate, eta, self.error)


@dataclass(slots=True)
class Tally:
    """What a channel has done: bytes each way, transfers that ended well and otherwise, seconds at work."""

    to_device: int = 0
    from_device: int = 0
    transfers: int = 0
    errors: int = 0
    busy: float = 0.0


def make(
    copies: Sequence[Copy],
    link: DeviceChannel,
    turn: Callable[[], AbstractContextManager[None]],
    require: Callable[[], None],
    made: Callable[[Copy], None],
) -> None:
    """Make the copies, in their order. Blocks.

    Args:
        turn: held for each piece.
        require: raises ``AgentError`` when it may not go on; asked before each piece.
        made: told of each piece.

    Raises as ``DeviceChannel.write``; ``Unavailable`` (``LEASE_GONE``), ``Denied`` (``DEVICE_SEALED``).
    """
    for step in _steps(copies):
        with contextlib.ExitStack() as stack:
            stack.enter_context(turn())
            require()
            views = [stack.enter_context(each.memory.use(each.start, each.size)) for each in step]
            first = step[0]
            if len(step) > 1:
                link.write_many(
                    [(each.room.handle, each.offset, view) for each, view in zip(step, views, strict=True)]
                )
            elif first.to_device:
                link.write(first.room.handle, first.offset, views[0])
            else:
                require_readable(first.room)
                link.read_into(first.room.handle, first.offset, views[0])
        for each in step:
            made(each)


def require_readable(room: Allocation) -> None:
    """Raises ``Denied`` (``DEVICE_SEALED``)."""
    if room.secret:
        raise Denied("DEVICE_SEALED", "a sealed object was opened into this allocation; it is not read back")


def _steps(copies: Sequence[Copy]) -> Iterator[list[Copy]]:
    """Small copies to the device together, long ones in pieces."""
    batch: list[Copy] = []
    held = 0
    for each in copies:
        small = each.to_device and each.size <= MAX_PACKED_COPY
        if batch and (not small or len(batch) == _BATCH_COPIES or held >= _BATCH):
            yield batch
            batch, held = [], 0
        if small:
            batch.append(each)
            held += each.size
            continue
        for done in range(0, each.size, PIECE):
            size = min(PIECE, each.size - done)
            yield [replace(each, start=each.start + done, offset=each.offset + done, size=size)]
    if batch:
        yield batch


def told(error: AgentError) -> AgentError:
    """The error as the caller gets it, afresh: without traceback, and so without the buffers that one keeps."""
    # What is hostile here came from the device or the way to it; and what else a device's faults know stays here.
    kind = DeviceFault if isinstance(error, (HostileInput, DeviceFault)) else type(error)
    return kind(error.slug, error.message, retry_after=error.retry_after)
