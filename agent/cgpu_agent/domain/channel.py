"""One caller's channel to one GPU's memory: what is allocated, what is queued, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import traceback
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import CancelledError, Executor, Future
from functools import partial
from typing import Final, TypeVar

from cgpu_agent.backends.base import Clock
from cgpu_agent.backends.devicememory import DeviceChannel, DeviceMemory
from cgpu_agent.domain.cores import Cores
from cgpu_agent.domain.leases import Process
from cgpu_agent.domain.policy import GpuName
from cgpu_agent.domain.transfers import Allocation, Copy, Tally, Transfer, make, told
from cgpu_agent.errors import AgentError, Exhausted, Misuse, Unavailable
from cgpu_agent.transfer.engine import MAX_WAITING, Engine

logger = logging.getLogger(__name__)

T = TypeVar("T")

ASK_SECONDS: Final = 10.0
"""For what is asked of a GPU beside copies."""
_QUEUED: Final = MAX_WAITING - 8
"""Fewer than the engine takes, so that there is room for the pieces of objects."""
_REMEMBERED: Final = 1024
ID_SIZE: Final = 16


class GpuChannel:
    """A channel. One event loop's; ``make`` alone runs in the engine's thread.

    Args:
        owner: whose it is; kept, and closed with ``forget``.
        memory, link: taken over.
        cores: shared by all channels.
        closers: where it is waited for what blocks.
        generation: the virtual machine's; a copy of the machine has the same keys, and must not use them.
        on_fault: told when the channel cannot go on by itself any more, and why.

    Attributes:
        id: 128 random bits. It names the channel and gives no right to it.
        ended: why it is over, if it is.
        changed: set, and replaced, whenever a transfer ended.
    """

    def __init__(
        self,
        owner: Process,
        gpu: GpuName,
        memory: DeviceMemory,
        link: DeviceChannel,
        engine: Engine[DeviceChannel],
        cores: Cores,
        closers: Executor,
        clock: Clock,
        generation: Callable[[], int | None],
        on_fault: Callable[[GpuChannel, AgentError], None],
    ) -> None:
        self.id: Final = secrets.token_bytes(ID_SIZE)
        self.owner: Final = owner
        self.gpu: Final = gpu
        self.tally: Final = Tally()
        self.allocations: Final[dict[int, Allocation]] = {}
        self.ended: AgentError | None = None
        self.changed = asyncio.Event()
        self._memory: Final = memory
        self._link: Final = link
        self._engine: Final = engine
        self._turn: Final = partial(cores.turn, owner.caller.uid, self.require_open)
        self._closers: Final = closers
        self._clock: Final = clock
        self._generation: Final = generation
        self._born: Final = generation()
        self._on_fault: Final = on_fault
        self._loop: Final = asyncio.get_running_loop()
        self._transfers: Final[dict[int, Transfer]] = {}
        self._pending: Final[set[int]] = set()
        self._last = 0
        engine.add(link)

    @property
    def locked(self) -> bool:
        """Whether plaintext in staging stays off swap."""
        return self._link.locked

    @property
    def pending(self) -> tuple[Transfer, ...]:
        """Transfers that wait or run."""
        return tuple(self._transfers[ticket] for ticket in sorted(self._pending))

    def require_open(self) -> None:
        """Raises why it is over. Any thread may ask."""
        if self.ended is not None:
            raise told(self.ended)
        if self._generation() != self._born:
            raise Unavailable("TRANSFER_STOPPED", "this VM was restored from a snapshot, or copied")

    # Device memory

    async def allocate(self, size: int) -> Allocation:
        """Raises ``Exhausted`` (``DEVICE_MEMORY``) and as ``DeviceMemory``."""
        handle = await self._asked(self._memory.allocate(size, timeout=ASK_SECONDS))
        self.allocations[handle] = Allocation(handle, size)
        return self.allocations[handle]

    async def free(self, room: Allocation) -> None:
        """Raises as ``DeviceMemory``."""
        del self.allocations[room.handle]  # before: nothing more is to be queued for it
        await self._asked(self._memory.free(room.handle, timeout=ASK_SECONDS))

    def room(self, handle: int) -> Allocation:
        """An allocation. Raises ``Misuse`` (``NO_ALLOCATION``)."""
        if handle not in self.allocations:
            raise Misuse("NO_ALLOCATION", "there is no such allocation in device memory")
        return self.allocations[handle]

    async def _asked(self, work: Awaitable[T]) -> T:
        """Without an answer nobody knows what the GPU has: that ends the channel."""
        try:
            found = await work
        except (Exhausted, Misuse):
            raise
        except BaseException as error:
            lost = Unavailable("TRANSFER_STOPPED", "a call on this transfer channel was cut short")
            self._on_fault(self, told(error) if isinstance(error, AgentError) else lost)
            raise
        self.require_open()
        return found

    # Transfers

    def begin(self, total: int) -> Transfer:
        """A new ticket. Raises ``Exhausted`` (``TRANSFER_QUEUE``), and as ``require_open``."""
        self.require_open()
        if len(self._pending) >= _QUEUED:
            raise Exhausted("TRANSFER_QUEUE", f"{_QUEUED} transfers are waiting in this channel", retry_after=0.1)
        self._last += 1
        transfer = self._transfers[self._last] = Transfer(self._last, total, self._clock.monotonic)
        self._pending.add(self._last)
        for ticket in list(self._transfers)[:-_REMEMBERED]:
            if ticket not in self._pending:
                del self._transfers[ticket]
        return transfer

    def end(self, transfer: Transfer, error: AgentError | None) -> None:
        """A ticket is over."""
        if transfer.ticket not in self._pending:
            return
        self._pending.discard(transfer.ticket)
        transfer.end(told(self.ended) if error is not None and self.ended is not None else error)
        self.tally.transfers += error is None
        self.tally.errors += error is not None
        self.tell()
        fault = self._fault()
        if fault is not None:
            self._on_fault(self, fault)

    def find(self, ticket: int) -> Transfer:
        """Raises ``Misuse`` (``NO_TRANSFER``)."""
        if ticket not in self._transfers:
            raise Misuse("NO_TRANSFER", "this channel has no such transfer, or has forgotten it")
        return self._transfers[ticket]

    def submit(self, copies: Sequence[Copy], on_end: Callable[[], None]) -> Transfer:
        """Queue copies. ``on_end`` is called on the event loop when they are over.

        Raises as ``begin``; ``Unavailable`` (``TRANSFER_STOPPED``).
        """
        transfer = self.begin(sum(each.size for each in copies))
        try:
            future = self._engine.submit(self._link, partial(self._make, transfer, copies))
        except AgentError as error:
            self.end(transfer, told(error))
            raise

        def ended(future: Future[AgentError | None]) -> None:
            try:
                error = future.result()
            except CancelledError:
                error = Unavailable("TRANSFER_STOPPED", "this transfer channel was closed")
            with contextlib.suppress(RuntimeError):  # the loop is closed, and everything with it
                self._loop.call_soon_threadsafe(over, error)

        def over(error: AgentError | None) -> None:
            self.end(transfer, error)
            on_end()

        future.add_done_callback(ended)
        return transfer

    async def write(self, room: Allocation, offset: int, data: memoryview) -> None:
        """Write memory of the agent's own, when its turn comes. Raises as ``DeviceChannel.write``, ``told``."""

        def work(link: DeviceChannel) -> None:
            began = self._clock.monotonic()
            with self._turn():
                self.require_open()
                link.write(room.handle, offset, data)
            self.tally.busy += self._clock.monotonic() - began
            self.tally.to_device += len(data)

        try:
            await asyncio.wrap_future(self._engine.submit(self._link, work))
        except AgentError as error:
            raise told(error) from None
        except asyncio.CancelledError:
            if self.ended is not None:  # it was taken out of the queue
                raise told(self.ended) from None
            raise

    def _make(self, transfer: Transfer, copies: Sequence[Copy], link: DeviceChannel) -> AgentError | None:
        """In the engine's thread; returns why it failed."""
        transfer.begin()
        began = self._clock.monotonic()

        def made(each: Copy) -> None:
            transfer.done += each.size
            if each.to_device:
                self.tally.to_device += each.size
            else:
                self.tally.from_device += each.size

        try:
            make(copies, link, self._turn, self.require_open, made)
        except AgentError as error:
            traceback.clear_frames(error.__traceback__)  # a channel keeps what it died of, and that the buffers
            return told(error)
        except Exception:
            logger.exception("a transfer failed")
            return AgentError("INTERNAL", "the transfer failed within the agent")
        finally:
            self.tally.busy += self._clock.monotonic() - began
        return None

    def _fault(self) -> AgentError | None:
        """Why the channel cannot go on, though nobody ended it."""
        if self.ended is not None:
            return None
        if self._link.dead is not None:
            return told(self._link.dead)
        try:
            self.require_open()
        except AgentError as error:
            return error
        return None

    # Its end

    def give_up(self, error: AgentError) -> None:
        """End it: what it holds is not what it should be."""
        self._on_fault(self, self._fault() or error)

    def tell(self) -> None:
        """Wake whoever watches."""
        self.changed.set()
        self.changed = asyncio.Event()

    def stop(self, error: AgentError) -> bool:
        """Nothing more goes over the channel; ``close`` is due. False if that was so before."""
        if self.ended is not None:
            return False
        self.ended = error
        self._link.stop()
        self.tell()
        return True

    async def close(self) -> None:
        """Wait until nothing uses it, then have the GPU wipe and take back what was allocated. After ``stop``."""
        try:
            await self._loop.run_in_executor(self._closers, self._engine.remove, self._link)
        finally:
            with contextlib.suppress(AgentError):  # the session is over either way
                await self._memory.end(timeout=ASK_SECONDS)
