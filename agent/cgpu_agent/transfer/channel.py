"""A channel as the agent uses it: writes to and reads from device memory, one after the other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Final

from cgpu_agent.errors import AgentError, HostileInput, Misuse, Unavailable
from cgpu_agent.transfer.duplex import Duplex
from cgpu_agent.transfer.memory import address_of, copy
from cgpu_agent.wire.transfer import (
    DEPTH,
    MAX_PACKED,
    PACKED_SIZE,
    SLOT_SIZE,
    Kind,
    Refusal,
    SlotHeader,
    pack_into,
)

Buffer = bytes | bytearray | memoryview


class Channel:
    """Moves bytes between private memory and one GPU's. Calls from several threads take turns.

    Whatever goes wrong on the way kills the channel, and no other: the call that notices says why, later ones
    ``TRANSFER_DEAD``. A device's refusal of a range is no such thing.

    Args:
        duplex: the agent's end; taken over.
    """

    def __init__(self, duplex: Duplex) -> None:
        self._duplex: Final = duplex
        self._turn: Final = threading.Lock()
        self._transfer = 0
        self._death: AgentError | None = None

    @property
    def dead(self) -> AgentError | None:
        """Why it died, if it has."""
        return self._death

    @property
    def locked(self) -> bool:
        """Whether plaintext in staging stays off swap."""
        return self._duplex.locked

    def write(self, handle: int, offset: int, source: Buffer) -> None:
        """Copy ``source`` to ``offset`` of an allocation. Returns when the device has said, sealed, that it has it.

        Raises:
            Misuse: ``BAD_COPY`` (nothing to copy), ``DEVICE_RANGE``, ``NO_ALLOCATION``.
            DeviceFault: ``TRANSFER_STALLED``, ``TRANSFER_PEER_GONE``.
            HostileInput: as ``Opener.receive``; ``BAD_REPLY``.
            Unavailable: ``TRANSFER_STOPPED``, ``TRANSFER_DEAD``.
        """
        view = view_of(source)
        _require_place(handle, offset, len(view))
        send = self._duplex.sealer.send
        with self._busy():
            transfer = self._next(1)
            for start in range(0, len(view), SLOT_SIZE):
                piece, left = view[start : start + SLOT_SIZE], len(view) - start
                send(Kind.WRITE, transfer, piece, handle=handle, offset=offset + start, left=left)
            refusal = self._acknowledged(transfer)
        _raise(refusal)

    def write_many(self, copies: Sequence[tuple[int, int, Buffer]]) -> None:
        """Small copies ``(handle, offset, source)``, many to a slot; each at most ``SLOT_SIZE - PACKED_SIZE`` bytes.

        Those of one slot are all made or, if the device refuses one, none. Raises as ``write``.
        """
        views = [(handle, offset, view_of(source)) for handle, offset, source in copies]
        for handle, offset, view in views:
            _require_place(handle, offset, len(view))
        slots = list(_slots(views))
        sealer = self._duplex.sealer
        refusal: Refusal | None = None
        with self._busy():
            waiting: list[int] = []
            for slot in slots:
                if len(waiting) == DEPTH:  # the device must never have to wait for us to take its answers
                    refusal = self._acknowledged(waiting.pop(0)) or refusal
                size = pack_into(sealer.body, slot)
                waiting.append(self._next(len(slot)))
                sealer.send(Kind.PACKED, waiting[-1], sealer.body[:size], left=size, detail=len(slot))
            for transfer in waiting:
                refusal = self._acknowledged(transfer) or refusal
        _raise(refusal)

    def read_into(self, handle: int, offset: int, out: bytearray | memoryview) -> None:
        """Fill ``out``, which must be private to the VM, from ``offset`` of an allocation.

        Nothing is written there before its tag was verified; after an exception a beginning of it may be filled.
        Raises as ``write``.
        """
        view = view_of(out)
        _require_place(handle, offset, len(view))
        target = address_of(view)
        opener = self._duplex.opener
        with self._busy():
            transfer, size = self._next(1), len(view)
            self._duplex.sealer.send(Kind.READ, transfer, handle=handle, offset=offset, left=size)
            found = opener.receive()
            refusal = None
            if found.kind != Kind.DATA:
                refusal = _refusal(found, transfer)
            elif found[6:] != (transfer, found.counter, offset, size, min(size, SLOT_SIZE), handle):
                raise _bad_reply()
            else:
                copy(target, opener.address, found.length)
                for start in range(SLOT_SIZE, size, SLOT_SIZE):
                    left, length = size - start, min(size - start, SLOT_SIZE)
                    opener.expect(Kind.DATA, transfer, length, handle=handle, offset=offset + start, left=left)
                    copy(target + start, opener.address, length)
        _raise(refusal)

    def stop(self) -> None:
        """Have whoever is using it get ``TRANSFER_STOPPED`` soon. Does not wait; ``close`` is still due."""
        self._duplex.end.stop()

    def close(self) -> None:
        """End the channel; whoever is using it gets ``TRANSFER_STOPPED``. Idempotent."""
        self.stop()
        with self._turn:
            self._die(Unavailable("TRANSFER_STOPPED", "this transfer channel was closed"))

    def _next(self, count: int) -> int:
        self._transfer += count
        return self._transfer

    def _acknowledged(self, transfer: int) -> Refusal | None:
        """Wait for the device's answer to a write."""
        found = self._duplex.opener.receive()
        if found.kind == Kind.DONE and found.transfer == transfer:
            return None
        return _refusal(found, transfer)

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        """This call's turn. Whatever is raised within it ends the channel: where it stood is lost."""
        with self._turn:
            if self._death is not None:
                raise Unavailable("TRANSFER_DEAD", f"this transfer channel has ended: {self._death.slug}")
            try:
                yield
            except AgentError as error:
                self._die(error)
                raise
            except BaseException:
                self._die(Unavailable("TRANSFER_DEAD", "a call on this transfer channel was cut short"))
                raise

    def _die(self, error: AgentError) -> None:
        if self._death is None:
            # A twin: the error itself holds the frames that it came through, and those the caller's memory.
            self._death = type(error)(error.slug, error.message, retry_after=error.retry_after)
            self._duplex.kill()


def _slots(copies: Sequence[tuple[int, int, memoryview]]) -> Iterator[list[tuple[int, int, memoryview]]]:
    """Cut a sequence of copies into slots. Raises ``Misuse`` (``BAD_COPY``)."""
    chosen: list[tuple[int, int, memoryview]] = []
    size = 0
    for each in copies:
        cost = PACKED_SIZE + len(each[2])
        if cost > SLOT_SIZE:
            raise Misuse("BAD_COPY", "a packed copy must fit into one slot")
        if size + cost > SLOT_SIZE or len(chosen) == MAX_PACKED:
            yield chosen
            chosen, size = [], 0
        chosen.append(each)
        size += cost
    if chosen:
        yield chosen


def view_of(source: Buffer) -> memoryview:
    """All bytes of a buffer. Raises ``Misuse`` (``BAD_COPY``) where there are none."""
    view = memoryview(source).cast("B")
    if not view:
        raise Misuse("BAD_COPY", "there is nothing to copy")
    return view


def _require_place(handle: int, offset: int, size: int) -> None:
    """Raises ``Misuse`` for numbers that no header can hold."""
    if not 0 <= handle < 1 << 32:
        _raise(Refusal.NO_ALLOCATION)
    if offset < 0 or offset + size >= 1 << 64:
        _raise(Refusal.BAD_RANGE)


def _refusal(found: SlotHeader, transfer: int) -> Refusal:
    if found.kind != Kind.REFUSED or found.transfer != transfer:
        raise _bad_reply()
    return Refusal(found.detail)


def _bad_reply() -> HostileInput:
    return HostileInput("BAD_REPLY", "the device answered something that was not asked")


def _raise(refusal: Refusal | None) -> None:
    if refusal is Refusal.NO_ALLOCATION:
        raise Misuse("NO_ALLOCATION", "there is no such allocation in device memory")
    if refusal is Refusal.BAD_RANGE:
        raise Misuse("DEVICE_RANGE", "the range is not within the allocation")
