"""What a channel's methods do, step by step. Sync and async clients differ only in waiting.

A plan yields calls to be made and functions to be run, and is sent what came of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, BinaryIO, Final, TypeVar

from cgpu_agent.client import calls
from cgpu_agent.client.calls import Call, Copy, Progress
from cgpu_agent.client.lease import LeasedMemory, plain_size
from cgpu_agent.errors import AgentError, Misuse

R = TypeVar("R")

Plan = Generator["Call[Any] | Callable[[], Any]", Any, R]
OnProgress = Callable[[Progress], None]
HALF: Final = 16 << 20
"""Bytes that are copied while the same number is on its way."""
_LOOK: Final = 250
_LONGEST: Final = 10_000.0


class Memory:
    """Memory on lease for transfers, until ``close`` or the channel's end.

    Attributes:
        view: write to it and read from it; what lies in here, ``put`` and ``get`` do not copy.
    """

    def __init__(self, lease: LeasedMemory) -> None:
        self._lease = lease
        self.id = lease.id
        self.view = lease.view
        self._place: tuple[int, int] | None = (_address(self.view), self.view.nbytes)

    def offset_of(self, part: memoryview) -> int | None:
        """Where a part of this memory begins; ``None`` for any other memory."""
        if self._place is None:  # what is at its address now is something else
            return None
        address, size = self._place
        start = _address(part) - address
        return start if 0 <= start <= start + part.nbytes <= size else None

    def close(self) -> None:
        """End the lease: the agent wipes the memory. Idempotent."""
        self._place = None
        self._lease.close()


class ChannelPlans:
    """Plans for one channel.

    Args:
        channel: its id.
        lease: leases memory: size -> memory, or the place of a sealed object.
        timeout: seconds each call may take.
    """

    def __init__(self, channel: bytes, lease: Callable[[int, BinaryIO | None], LeasedMemory], timeout: float) -> None:
        self.id = channel
        self._lease = lease
        self._patience = int(min(_LONGEST, timeout * 500))
        self._memories: list[Memory] = []
        self._staging: list[Memory] = []

    def buffer(self, size: int) -> Plan[Memory]:
        """Lease memory."""
        leased: LeasedMemory = yield partial(self._lease, size, None)
        memory = Memory(leased)
        self._memories.append(memory)
        return memory

    def allocate(self, size: int) -> Plan[int]:
        handle: int = yield calls.allocate(self.id, size)
        return handle

    def put(self, source: Any, handle: int | None, offset: int, progress: OnProgress | None) -> Plan[int]:
        """Copy to the device; without a handle, to a new allocation."""
        data = _bytes(source)
        target = (yield from self.allocate(data.nbytes)) if handle is None else handle
        try:
            yield from self._moved(True, data, target, offset, progress)
        except BaseException:
            if handle is None:
                with contextlib.suppress(AgentError):
                    yield calls.free(self.id, target)
            raise
        return target

    def get(self, handle: int, out: Any, offset: int, progress: OnProgress | None) -> Plan[None]:
        """Copy from the device."""
        data = _bytes(out)
        if data.readonly:
            raise Misuse("BAD_BUFFER", "what is got needs a buffer that can be written to")
        yield from self._moved(False, data, handle, offset, progress)

    def load(
        self,
        file: BinaryIO,
        key: str,
        object_id: str,
        version: int,
        segment_size: int,
        progress: OnProgress | None,
    ) -> Plan[int]:
        """Have a sealed object opened into a new allocation."""
        handle = yield from self.allocate(max(1, plain_size(file, segment_size)))
        try:
            lease: LeasedMemory = yield partial(self._lease, 1, file)
            with contextlib.closing(lease):
                ticket: int = yield calls.load_sealed(
                    self.id, key, lease.id, object_id, version, segment_size, handle
                )
            yield from self.wait(ticket, progress)
        except BaseException:
            with contextlib.suppress(AgentError):
                yield calls.free(self.id, handle)
            raise
        return handle

    def submit(self, copies: Sequence[Copy]) -> Plan[int]:
        ticket: int = yield calls.submit(self.id, copies)
        return ticket

    def wait(self, ticket: int, progress: OnProgress | None) -> Plan[Progress]:
        """Until it has ended; raises why it failed."""
        while True:
            call = calls.synchronize(self.id, ticket, self._patience if progress is None else _LOOK)
            found: Progress = yield call
            if progress is not None:
                progress(found)
            if found.ended:
                return found

    def close(self) -> None:
        """End the leases."""
        for memory in (*self._memories, *self._staging):
            memory.close()

    def _moved(
        self, to_device: bool, data: memoryview, handle: int, offset: int, progress: OnProgress | None
    ) -> Plan[None]:
        for memory in self._memories:
            start = memory.offset_of(data)
            if start is not None:
                copy = Copy(to_device, memory.id, start, handle, offset, data.nbytes)
                ticket = yield from self.submit([copy])
                yield from self.wait(ticket, progress)
                return
        yield from self._staged(to_device, data, handle, offset, progress)

    def _staged(
        self, to_device: bool, data: memoryview, handle: int, offset: int, progress: OnProgress | None
    ) -> Plan[None]:
        """By way of memory on lease, half of it in the agent's hands while the other is copied."""
        try:
            yield from self._by_halves(to_device, data, handle, offset, progress)
        except BaseException:
            # The agent may be at the other half still: nothing else may ever lie there.
            for stage in self._staging:
                stage.close()
            self._staging.clear()
            raise

    def _by_halves(
        self, to_device: bool, data: memoryview, handle: int, offset: int, progress: OnProgress | None
    ) -> Plan[None]:
        began = time.monotonic()
        under_way: list[tuple[int, Memory, memoryview, int]] = []
        for number, start in enumerate(range(0, data.nbytes, HALF)):
            part = data[start : start + HALF]
            if len(under_way) == 2:
                yield from self._over(under_way.pop(0), to_device, data.nbytes, began, progress)
            stage = yield from self._stage(number % 2, min(HALF, data.nbytes))
            if to_device:
                yield partial(_copy, stage.view, part)
            copy = Copy(to_device, stage.id, 0, handle, offset + start, part.nbytes)
            under_way.append(((yield from self.submit([copy])), stage, part, start + part.nbytes))
        for each in under_way:
            yield from self._over(each, to_device, data.nbytes, began, progress)

    def _over(
        self,
        moved: tuple[int, Memory, memoryview, int],
        to_device: bool,
        total: int,
        began: float,
        progress: OnProgress | None,
    ) -> Plan[None]:
        ticket, stage, part, done = moved
        yield from self.wait(ticket, None)
        if not to_device:
            yield partial(_copy, part, stage.view)
        if progress is not None:
            rate = done / max(time.monotonic() - began, 1e-9)
            progress(Progress(ticket, done, total, rate, (total - done) / rate, done == total))

    def _stage(self, number: int, size: int) -> Plan[Memory]:
        """Kept memory on lease: new memory each time would cost more than the transfer."""
        if number == len(self._staging):
            leased: LeasedMemory = yield partial(self._lease, size, None)
            self._staging.append(Memory(leased))
        stage = self._staging[number]
        if stage.view.nbytes < size:
            stage.close()
            larger: LeasedMemory = yield partial(self._lease, size, None)
            stage = self._staging[number] = Memory(larger)
        return stage


def _bytes(buffer: Any) -> memoryview:
    """The buffer as bytes, without copying. Raises ``Misuse`` (``BAD_BUFFER``)."""
    try:
        view = memoryview(buffer)
        if not view.c_contiguous or not view.nbytes:
            raise Misuse("BAD_BUFFER", "a transfer takes a buffer that is contiguous, and not empty")
        return view.cast("B")
    except (TypeError, ValueError) as error:  # no buffer, or of a format that is none of memory's own
        raise Misuse("BAD_BUFFER", "this is no buffer of plain memory") from error


def _copy(target: memoryview, source: memoryview) -> None:
    """As much as the shorter has, without holding up other threads."""
    size = min(target.nbytes, source.nbytes)
    ctypes.memmove(_address(target), _address(source), size)


class _Buffer(ctypes.Structure):
    """``Py_buffer``, of which the first word is wanted."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("rest", ctypes.c_byte * 128),
    )


def _address(view: memoryview) -> int:
    """Where a buffer begins, one that cannot be written to as well. It must be kept as long as that is used."""
    found = _Buffer()
    api = ctypes.pythonapi
    api.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(found), 0)
    try:
        return int(found.buf or 0)
    finally:
        api.PyBuffer_Release(ctypes.byref(found))
