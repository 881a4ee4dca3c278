"""Copies to and from a GPU's memory through pinned buffers; from there on the driver encrypts, for a GPU in CC mode.

Bytes are copied into a buffer of ours and from there by the driver: what a caller shares with us is touched once, and
by nobody who keeps it longer than the call. While one buffer is on its way the other is filled, or emptied.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from cgpu_agent.backends.devicememory import MAX_PACKED_COPY, Buffer
from cgpu_agent.backends.gpu.cuda import Context
from cgpu_agent.backends.gpu.cudafaults import OUT_OF_MEMORY, CudaFault
from cgpu_agent.errors import AgentError, DeviceFault, Exhausted, Misuse, Unavailable
from cgpu_agent.transfer.channel import view_of
from cgpu_agent.transfer.memory import address_of, copy

SLOT: Final = 4 << 20
"""Bytes of a buffer. In confidential-computing mode each copy costs a fixed third of a millisecond or so."""
STALL: Final = 10.0
"""Seconds that the GPU may take for one buffer."""

_SLOTS: Final = 2
_SETTLE: Final = 1.0  # seconds that copies under way get to end when nobody wants them any more
_FIRST_PAUSE, _LAST_PAUSE = 20e-6, 1e-3  # seconds between two looks at the GPU


@dataclass(slots=True)
class Room:
    """An allocation. ``doomed``: it is being freed, and no copy begins any more."""

    address: int
    size: int
    users: int = 0
    doomed: bool = False


class Rooms:
    """What one owner has in device memory, and who is using it. Any thread may call.

    Args:
        limit: allocations at a time.
    """

    def __init__(self, limit: int) -> None:
        self._limit: Final = limit
        self._turn: Final = threading.Condition()
        self._rooms: Final[dict[int, Room]] = {}
        self._last = 0

    def require_place(self) -> None:
        """Raises ``Exhausted`` (``DEVICE_MEMORY``) when there are as many as there may be."""
        if len(self._rooms) >= self._limit or self._last >= (1 << 32) - 1:
            raise Exhausted("DEVICE_MEMORY", "there are too many allocations in this GPU's memory")

    def add(self, room: Room) -> int:
        """Its handle: one that nothing had before."""
        with self._turn:
            self._last += 1
            self._rooms[self._last] = room
            return self._last

    @contextlib.contextmanager
    def using(self, places: Sequence[tuple[int, int, int]]) -> Iterator[list[Room]]:
        """Hold the allocations of ``(handle, offset, size)``: they are not freed meanwhile.

        Raises ``Misuse``: ``NO_ALLOCATION``, ``DEVICE_RANGE``.
        """
        with self._turn:
            held = [self._find(*place) for place in places]
            for room in held:
                room.users += 1
        try:
            yield held
        finally:
            with self._turn:
                for room in held:
                    room.users -= 1
                self._turn.notify_all()

    def doom(self, handle: int, seconds: float) -> Room:
        """Let no copy begin, and wait for those that are using it. Again after ``GPU_TIMEOUT``, if need be.

        Raises ``Misuse`` (``NO_ALLOCATION``), ``DeviceFault`` (``GPU_TIMEOUT``).
        """
        with self._turn:
            room = self._rooms.get(handle)
            if room is None:
                raise _no_allocation()
            room.doomed = True
            if not self._turn.wait_for(lambda: not room.users, seconds):
                raise DeviceFault("GPU_TIMEOUT", "a copy that uses this allocation did not end in time")
            return room

    def forget(self, handle: int) -> None:
        """It is no more."""
        with self._turn:
            del self._rooms[handle]

    def all(self) -> list[int]:
        """The handles of what there is."""
        with self._turn:
            return list(self._rooms)

    def _find(self, handle: int, offset: int, size: int) -> Room:
        room = self._rooms.get(handle)
        if room is None or room.doomed:
            raise _no_allocation()
        if not 0 <= offset <= room.size - size:
            raise Misuse("DEVICE_RANGE", "the range is not within the allocation")
        return room


class _Run(NamedTuple):
    """Bytes of a buffer that go to one place: ``start`` in the buffer, ``offset`` in the allocation."""

    room: Room
    offset: int
    start: int
    size: int


@dataclass(slots=True)
class _Slot:
    """One of a channel's buffers, and the mark behind its last copy. ``pending``: that may not have been made yet."""

    address: int
    event: Any
    pending: bool = False


class CudaChannel:
    """A ``DeviceChannel`` with a stream of its own: copies are made in the order in which they are asked for.

    What the driver has begun cannot be called back. ``stop`` and every fault leave the copies of two buffers a second
    to end; if they do not, the context is given up, with all that is in it.

    Args:
        context: of the owner of ``rooms``.
        rooms: where copies may go.

    Raises ``Exhausted`` (``TRANSFER_CHANNELS``) where there is no memory for its buffers, and as ``Context``.
    """

    def __init__(self, context: Context, rooms: Rooms) -> None:
        self._context: Final = context
        self._rooms: Final = rooms
        self._turn: Final = threading.Lock()
        self._stopped: Final = threading.Event()
        self._death: AgentError | None = None
        with context.current(), contextlib.ExitStack() as made:
            try:
                self._pinned: Final = context.pin(_SLOTS * SLOT)
                made.callback(context.unpin, self._pinned)
                self._stream: Final = context.stream()
                made.callback(context.close_stream, self._stream)
                self._slots: Final[list[_Slot]] = []
                for number in range(_SLOTS):
                    slot = _Slot(self._pinned + number * SLOT, context.event())
                    made.callback(context.close_event, slot.event)
                    self._slots.append(slot)
            except CudaFault as fault:
                if fault.code == OUT_OF_MEMORY:
                    raise Exhausted("TRANSFER_CHANNELS", "there is no memory for another transfer channel") from fault
                raise
            self._made: Final = made.pop_all()
        self._stage: int | None = None
        self.closed = False

    @property
    def dead(self) -> AgentError | None:
        return self._death

    @property
    def locked(self) -> bool:
        return True  # pinned memory is never swapped out

    def write(self, handle: int, offset: int, source: Buffer) -> None:
        view = view_of(source)
        with self._busy([(handle, offset, len(view))]) as (room,):
            self._push((room, offset + at, view[at : at + SLOT]) for at in range(0, len(view), SLOT))

    def write_many(self, copies: Sequence[tuple[int, int, Buffer]]) -> None:
        views = [view_of(source) for _, _, source in copies]
        if any(len(view) > MAX_PACKED_COPY for view in views):
            raise Misuse("BAD_COPY", f"a packed copy has at most {MAX_PACKED_COPY} bytes")
        places = [(handle, offset, len(view)) for (handle, offset, _), view in zip(copies, views, strict=True)]
        with self._busy(places) as rooms:
            self._push(zip(rooms, (offset for _, offset, _ in places), views, strict=True))

    def read_into(self, handle: int, offset: int, out: bytearray | memoryview) -> None:
        view = view_of(out)
        with self._busy([(handle, offset, len(view))]) as (room,):
            under_way: deque[tuple[_Slot, memoryview]] = deque()
            for at, slot in zip(range(0, len(view), SLOT), itertools.cycle(self._slots)):
                if slot.pending:
                    self._pull(*under_way.popleft())
                piece = view[at : at + SLOT]
                self._require_wanted(room)
                slot.pending = True
                self._context.to_host(slot.address, room.address + offset + at, len(piece), self._stream)
                self._context.mark(slot.event, self._stream)
                under_way.append((slot, piece))
            for each in under_way:
                self._pull(*each)

    def stop(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        self.stop()
        with self._turn:
            if self.closed:
                return
            self.closed = True
            self._die(_stopped())
            ctypes.memset(self._pinned, 0, _SLOTS * SLOT)
            # What cannot be given back now goes with the context.
            with contextlib.suppress(AgentError), self._context.current():
                self._made.close()

    def _push(self, pieces: Iterable[tuple[Room, int, memoryview]]) -> None:
        """Write ``(allocation, offset, bytes)``, at most ``SLOT`` each, as many to a buffer as fit."""
        slots = itertools.cycle(self._slots)
        slot, used, runs = next(slots), SLOT, list[_Run]()
        for room, offset, piece in pieces:
            if used + len(piece) > SLOT:
                self._send(slot, runs)
                slot, used, runs = next(slots), 0, []
                self._wait(slot)
            self._require_wanted(room)
            _fill(slot.address + used, piece)
            last = runs[-1] if runs else None
            if last is not None and last.room is room and last.offset + last.size == offset:
                runs[-1] = last._replace(size=last.size + len(piece))
            else:
                runs.append(_Run(room, offset, used, len(piece)))
            used += len(piece)
        self._send(slot, runs)

    def _send(self, slot: _Slot, runs: Sequence[_Run]) -> None:
        """Queue the copies of a buffer's bytes to their places. To many places they go by way of a buffer on the
        device: what crosses the bus costs the same however small it is, and copies on the device next to nothing."""
        if not runs:
            return
        slot.pending = True
        stage = self._staging() if len(runs) > 1 else None
        if stage is None:
            for room, offset, start, size in runs:
                self._context.to_device(room.address + offset, slot.address + start, size, self._stream)
        else:
            stage += slot.address - self._pinned
            self._context.to_device(stage, slot.address, runs[-1].start + runs[-1].size, self._stream)
            for room, offset, start, size in runs:
                self._context.within_device(room.address + offset, stage + start, size, self._stream)
        self._context.mark(slot.event, self._stream)

    def _staging(self) -> int | None:
        """Device memory as large as all buffers, made when it is first needed; ``None`` while there is no room."""
        if self._stage is None:
            with contextlib.suppress(Exhausted):
                self._stage = self._context.allocate(_SLOTS * SLOT)
                self._made.callback(self._context.free, self._stage)
                self._made.callback(self._context.zero, self._stage, _SLOTS * SLOT)
        return self._stage

    def _pull(self, slot: _Slot, piece: memoryview) -> None:
        self._wait(slot)
        copy(address_of(piece), slot.address, len(piece))

    def _wait(self, slot: _Slot) -> None:
        """Until the copies from or to a buffer were made."""
        if slot.pending:
            self._await(lambda: self._context.reached(slot.event), STALL, self._stopped.wait)
            slot.pending = False

    def _require_wanted(self, room: Room) -> None:
        self._require_running()
        if room.doomed:
            raise _no_allocation()

    def _require_running(self) -> None:
        if self._stopped.is_set():
            raise _stopped()

    @contextlib.contextmanager
    def _busy(self, places: Sequence[tuple[int, int, int]]) -> Iterator[list[Room]]:
        """This call's turn, and what it copies to or from. Whatever but ``Misuse`` is raised in it ends the channel.

        Allocations are held until no copy uses them any more, or the context is given up.
        """
        with self._turn:
            if self._death is not None:
                raise Unavailable("TRANSFER_DEAD", f"this transfer channel has ended: {self._death.slug}")
            try:
                self._require_running()
                with self._rooms.using(places) as rooms, self._context.current():
                    try:
                        yield rooms
                        self._await(self._idle, STALL, self._stopped.wait)
                    except BaseException:
                        self._settle()
                        raise
                    finally:
                        for slot in self._slots:
                            slot.pending = False
            except Misuse:
                raise
            except AgentError as error:
                self._die(error)
                raise
            except BaseException:
                self._die(Unavailable("TRANSFER_DEAD", "a call on this transfer channel was cut short"))
                raise

    def _settle(self) -> None:
        """Wait a little for copies that nobody wants any more, or let nothing they touch be used again."""
        try:
            self._await(self._idle, _SETTLE, time.sleep)
        except AgentError:
            self._context.condemn(DeviceFault("GPU_TIMEOUT", "a copy to or from this GPU's memory did not end"))

    def _idle(self) -> bool:
        return self._context.idle(self._stream)

    def _await(self, done: Callable[[], bool], seconds: float, pause: Callable[[float], object]) -> None:
        """Raises ``DeviceFault``: ``TRANSFER_STALLED``; ``Unavailable``: ``TRANSFER_STOPPED``."""
        until = time.monotonic() + seconds
        nap = _FIRST_PAUSE
        while not done():
            if time.monotonic() >= until:
                raise DeviceFault(
                    "TRANSFER_STALLED", f"the GPU took longer than {seconds:g} s for a part of a transfer"
                )
            if pause(nap):
                raise _stopped()
            nap = min(2 * nap, _LAST_PAUSE)

    def _die(self, error: AgentError) -> None:
        # Afresh: with its traceback an error would keep the caller's buffers.
        kind = DeviceFault if isinstance(error, DeviceFault) else Unavailable
        self._death = self._death or kind(error.slug, error.message)


def _fill(address: int, piece: memoryview) -> None:
    if piece.readonly:
        memoryview((ctypes.c_char * len(piece)).from_address(address)).cast("B")[:] = piece
    else:
        copy(address, address_of(piece), len(piece))


def _stopped() -> Unavailable:
    return Unavailable("TRANSFER_STOPPED", "this transfer channel was closed")


def _no_allocation() -> Misuse:
    return Misuse("NO_ALLOCATION", "there is no such allocation in device memory")
