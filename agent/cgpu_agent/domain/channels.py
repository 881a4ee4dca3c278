"""All callers' channels to GPUs: who may have one, how many, how much, and when they end.

A channel is its process's alone, and rests on the GPU's trust of the moment it was opened in: whatever casts doubt
ends all channels before anything else happens. Nothing of them is kept anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

from cgpu_agent.backends.base import Clock
from cgpu_agent.backends.devicememory import DeviceChannel, TransferGpus
from cgpu_agent.backends.workmemory import WorkMemory
from cgpu_agent.domain.audit import AuditLog
from cgpu_agent.domain.channel import ASK_SECONDS, GpuChannel
from cgpu_agent.domain.cores import Cores
from cgpu_agent.domain.gpus import GpuSessions
from cgpu_agent.domain.gpustate import IDENTITY, Reason, Verdict
from cgpu_agent.domain.leases import Leases, Process
from cgpu_agent.domain.policy import GpuName
from cgpu_agent.domain.quota import Budget
from cgpu_agent.domain.rate import Rate
from cgpu_agent.domain.transfers import Copy, Progress, Tally, Transfer, require_readable, told
from cgpu_agent.errors import AgentError, Denied, DeviceFault, Exhausted, Misuse, Unavailable
from cgpu_agent.transfer.engine import Engine

logger = logging.getLogger(__name__)

MAX_COPIES: Final = 1024
OPENS_PER_MINUTE: Final = 120
"""Of one uid."""
WATCH_SECONDS: Final = 0.2
"""Between two messages of a watch, while something moves."""
WAIT_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class ChannelLimits:
    """Channels in all; and of one uid: channels, transfers that wait or run, bytes of device memory."""

    channels: int
    channels_per_uid: int
    transfers_per_uid: int
    device_memory_per_uid: int


@dataclass(frozen=True, slots=True)
class Range:
    """A copy as a caller asks for it; see ``Copy`` in the protos."""

    to_device: bool
    lease: bytes
    start: int
    handle: int
    offset: int
    size: int


class Channels:
    """The channels of this agent. One event loop's.

    Args:
        devices: whose memory can be had.
        sessions: which of them are trusted.
        epoch: changes whenever what was decided before is void.
        audit: the log; ``None`` where none can be kept: then no channel is opened.
        generation: see ``GpuChannel``.
    """

    def __init__(
        self,
        devices: TransferGpus,
        sessions: GpuSessions,
        leases: Leases,
        epoch: Callable[[], object],
        audit: AuditLog | None,
        clock: Clock,
        limits: ChannelLimits,
        generation: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._devices = devices
        self._sessions = sessions
        self._leases = leases
        self._epoch = epoch
        self._audit = audit
        self._clock = clock
        self._generation = generation
        self._engine: Engine[DeviceChannel] = Engine(limits.channels)
        self._cores = Cores()
        # Threads of its own: whatever a GPU does not let go of must hold up nothing else.
        self._closers = ThreadPoolExecutor(limits.channels, "channel-end")
        self._table: dict[bytes, GpuChannel] = {}
        self._records: dict[bytes, int] = {}
        self._tallies: dict[bytes, Tally] = {}
        self._moved_before = (0, 0)
        self._sample = (clock.monotonic(), 0)
        self._speed = 0.0
        self._ending: dict[bytes, asyncio.Task[None]] = {}
        each = limits.channels_per_uid
        many = "too many channels were opened; wait a little"
        self._rate = Rate(clock, OPENS_PER_MINUTE, "TRANSFER_CHANNELS", many)  # each is four records, on disk
        self._open = Budget(
            each, "TRANSFER_CHANNELS", f"you have {each} channels; close one (limits.channels_per_uid)"
        )
        self._queued = Budget(limits.transfers_per_uid, "TRANSFER_QUEUE", "too many of your transfers wait")
        self._memory = Budget(
            limits.device_memory_per_uid, "DEVICE_MEMORY", "you have as much device memory as one uid may"
        )
        sessions.state.on_doubt = self.doubted

    def __len__(self) -> int:
        return len(self._table)

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes to and from GPUs, of channels that are over, too."""
        to_device, from_device = self._moved_before
        tallies = self._tallies.values()
        return (
            to_device + sum(each.to_device for each in tallies),
            from_device + sum(each.from_device for each in tallies),
        )

    @property
    def speed(self) -> float:
        """Bytes a second, both ways, between the last two times that somebody asked, a second apart or more."""
        now, moved = self._clock.monotonic(), sum(self.moved)
        since, before = self._sample
        if now - since >= 1.0:
            self._speed, self._sample = (moved - before) / (now - since), (now, moved)
        return self._speed

    @property
    def memory_each(self) -> int:
        """Bytes of device memory that one uid may have."""
        return self._memory.per_uid

    @property
    def gpus(self) -> list[GpuName]:
        """Those that are trusted now."""
        sessions = self._sessions.state.sessions
        return [GpuName(each.info.uuid, each.verdict.identity) for each in sessions if each.verdict is not None]

    # Opening

    async def open(self, process: Process, uuid: str) -> GpuChannel:
        """A channel of this process to a GPU that is trusted now; on record.

        Raises:
            Misuse: ``UNKNOWN_GPU``.
            Denied: ``LEASE_IDENTITY``, ``CALLER_GONE``.
            Exhausted: ``TRANSFER_CHANNELS``.
            Unavailable: ``GPU_NOT_TRUSTED``, ``TRUST_CHANGED``, ``AUDIT_UNAVAILABLE``, ``GPU_UNSUPPORTED``.
            DeviceFault: from the GPU; ``GPU_IDENTITY_CHANGED``: another one answers than was attested.
        """
        audit = self._audit
        if audit is None:
            raise Unavailable("AUDIT_UNAVAILABLE", "no audit log is kept, and a channel needs its record")
        if process.pidfd is None or process.caller.identity_strength != "pidfd":
            raise Denied("LEASE_IDENTITY", "this kernel has no SO_PEERPIDFD, without which a channel is nobody's")
        verdict, epoch = self._sessions.trusted(uuid), self._epoch()
        uid, gpu = process.caller.uid, GpuName(uuid, verdict.identity)
        self._rate.take(uid)
        async with contextlib.AsyncExitStack() as stack:
            self._take_place(process)
            stack.callback(self._open.give, uid, 1)
            owner = process.kept()
            stack.callback(owner.close)
            channel = await self._established(owner, gpu, verdict)
            stack.push_async_callback(self._discard, channel)
            sequence = await audit.record(
                "channel",
                {"caller": owner.caller.claims(), "gpu": uuid, "simulated": verdict.simulated, "ueid": gpu.ueid},
            )
            self._records[channel.id] = sequence
            self._require(epoch)
            channel.require_open()
            owner.still_the_same()
            stack.pop_all()
        self._table[channel.id] = channel
        self._tallies[channel.id] = channel.tally
        if owner.pidfd is not None:
            asyncio.get_running_loop().add_reader(owner.pidfd, self._owner_gone, channel)
        return channel

    def _take_place(self, process: Process) -> None:
        """Count one more; those of this process that are over, and that it did not close, make room."""
        uid = process.caller.uid
        try:
            self._open.take(uid, 1)
        except Exhausted:
            for channel in self.all_of(process):
                if channel.ended is not None:
                    self._drop(channel)
            self._open.take(uid, 1)

    async def _established(self, owner: Process, gpu: GpuName, verdict: Verdict) -> GpuChannel:
        memory = await self._devices.establish_transfers(gpu.uuid, timeout=ASK_SECONDS)
        try:
            chain = memory.chain
            if chain is not None and hashlib.sha256(chain).digest() != verdict.chain:
                await self._sessions.distrust(IDENTITY)
                raise DeviceFault(
                    IDENTITY.slug, "another GPU answers than the one that was attested", retry_after=2.0
                )
            link = await memory.channel(timeout=ASK_SECONDS)
            make = partial(GpuChannel, owner, gpu, memory, link, self._engine, self._cores, self._closers)
            try:
                return make(self._clock, self._generation, self._faulted)
            except BaseException:
                link.close()
                raise
        except BaseException:
            with contextlib.suppress(AgentError):
                await memory.end(timeout=ASK_SECONDS)
            raise

    async def _discard(self, channel: GpuChannel) -> None:
        """A channel that nobody got."""
        self._end(channel, Unavailable("TRUST_CHANGED", "the channel was not opened"), "TRUST_CHANGED")
        await self._settled(channel)

    def _require(self, epoch: object) -> None:
        if self._epoch() != epoch:
            raise Unavailable("TRUST_CHANGED", "what the channel rests on has changed meanwhile", retry_after=1.0)

    # Using

    def of(self, process: Process, name: bytes) -> GpuChannel:
        """The channel of this name, if it is this process's. Raises ``Denied`` (``NO_CHANNEL``), also for others'."""
        channel = self._table.get(name)
        if channel is None or not channel.owner.is_same_process(process):
            raise Denied("NO_CHANNEL", "this process has no such channel")
        return channel

    def all_of(self, process: Process) -> list[GpuChannel]:
        """All channels of this process."""
        return [channel for channel in self._table.values() if channel.owner.is_same_process(process)]

    async def allocate(self, process: Process, name: bytes, size: int) -> int:
        """A handle of ``size`` bytes. Raises ``Misuse`` (``BAD_SIZE``), ``Exhausted`` (``DEVICE_MEMORY``)."""
        channel = self.of(process, name)
        channel.require_open()
        if size < 1:
            raise Misuse("BAD_SIZE", "an allocation has 1 byte at least")
        uid = channel.owner.caller.uid
        self._memory.take(uid, size)
        try:
            return (await channel.allocate(size)).handle
        except BaseException:
            self._memory.give(uid, size)
            raise

    async def free(self, process: Process, name: bytes, handle: int) -> None:
        """Raises ``Misuse`` (``NO_ALLOCATION``)."""
        channel = self.of(process, name)
        channel.require_open()
        room = channel.room(handle)
        try:
            await channel.free(room)
        finally:
            self._memory.give(channel.owner.caller.uid, room.size)

    def submit(self, process: Process, name: bytes, ranges: Sequence[Range]) -> Transfer:
        """Queue copies.

        Raises:
            Misuse: ``BAD_COPY``: none, too many, or an empty one; ``NO_ALLOCATION``, ``DEVICE_RANGE``,
                ``LEASE_RANGE``, ``LEASE_KIND``.
            Denied: ``NO_LEASE``, ``DEVICE_SEALED``.
            Exhausted: ``TRANSFER_QUEUE``.
            Unavailable: why the channel has ended.
        """
        channel = self.of(process, name)
        channel.require_open()
        if not 1 <= len(ranges) <= MAX_COPIES:
            raise Misuse("BAD_COPY", f"a transfer is 1 to {MAX_COPIES} copies")
        leases = {name: self._leases.work(name, process) for name in {each.lease for each in ranges}}
        copies = [_copy(channel, leases[each.lease], each) for each in ranges]
        uid = channel.owner.caller.uid
        self._queued.take(uid, 1)
        try:
            return channel.submit(copies, partial(self._queued.give, uid, 1))
        except BaseException:
            self._queued.give(uid, 1)
            raise

    async def synchronize(self, process: Process, name: bytes, ticket: int, seconds: float) -> Progress:
        """Wait until a transfer is over, or for so long. Raises why it failed; ``Misuse`` (``NO_TRANSFER``)."""
        transfer = self.of(process, name).find(ticket)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(transfer.ended.wait(), min(seconds, WAIT_SECONDS))
        if transfer.error is not None:
            raise told(transfer.error)
        return transfer.progress()

    async def watch(self, process: Process, name: bytes, ticket: int) -> AsyncGenerator[tuple[Progress, ...], None]:
        """How a transfer goes, or with 0 all that wait or run now, until none is left."""
        channel = self.of(process, name)
        transfers = (channel.find(ticket),) if ticket else channel.pending
        seen: tuple[Progress, ...] = ()
        while transfers:
            changed = channel.changed
            last = all(each.ended.is_set() for each in transfers)
            found = tuple(each.progress() for each in transfers)
            if found != seen:
                seen = found
                yield found
            if last:
                return
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), WATCH_SECONDS)

    # Ending

    async def close(self, process: Process, name: bytes) -> None:
        """End a channel, and wait until nothing of it is left. Raises ``Denied`` (``NO_CHANNEL``)."""
        channel = self.of(process, name)
        self._drop(channel)
        self._end(channel, Unavailable("TRANSFER_STOPPED", "this transfer channel was closed"), "CLOSED")
        await self._settled(channel)

    def doubted(self, reason: Reason) -> None:
        """No GPU is trusted any more: end every channel, now."""
        for channel in list(self._table.values()):
            error = Unavailable("TRANSFER_STOPPED", f"the GPU is trusted no more: {reason.slug}", retry_after=2.0)
            self._end(channel, error, reason.slug)

    async def stop(self) -> None:
        """End all of them, with the agent."""
        for channel in list(self._table.values()):
            self._end(
                channel, Unavailable("TRANSFER_STOPPED", "the agent is stopping", retry_after=1.0), "AGENT_STOPPED"
            )
        if self._ending:
            await asyncio.wait(self._ending.values(), timeout=_STOP_SECONDS)
        for channel in list(self._table.values()):
            self._drop(channel)
        self._closers.shutdown(wait=False)

    def _owner_gone(self, channel: GpuChannel) -> None:
        self._drop(channel)
        self._end(channel, Denied("CALLER_GONE", "the calling process is gone"), "CALLER_GONE")

    def _faulted(self, channel: GpuChannel, error: AgentError) -> None:
        self._end(channel, error, error.slug)

    def _drop(self, channel: GpuChannel) -> None:
        """To its owner, too, it does not exist any more."""
        del self._table[channel.id]
        if channel.owner.pidfd is not None:
            asyncio.get_running_loop().remove_reader(channel.owner.pidfd)
        self._open.give(channel.owner.caller.uid, 1)
        channel.owner.close()

    async def _settled(self, channel: GpuChannel) -> None:
        """Wait until nothing is left of a channel that was ended."""
        ending = self._ending.get(channel.id)
        if ending is not None:
            await asyncio.shield(ending)

    def _end(self, channel: GpuChannel, error: AgentError, why: str) -> None:
        try:
            first = channel.stop(error)
        except Exception:  # a doubt must close the GPUs, whatever a driver does
            logger.exception("a channel was not stopped at once")
            first = True
        if first:
            task = self._ending[channel.id] = asyncio.get_running_loop().create_task(self._finish(channel, why))
            task.add_done_callback(lambda _: self._ending.pop(channel.id, None))

    async def _finish(self, channel: GpuChannel, why: str) -> None:
        try:
            await channel.close()
        except Exception:
            logger.exception("a channel did not end in order")
        self._memory.give(channel.owner.caller.uid, sum(room.size for room in channel.allocations.values()))
        channel.allocations.clear()
        self._tallies.pop(channel.id, None)
        to_device, from_device = self._moved_before
        self._moved_before = to_device + channel.tally.to_device, from_device + channel.tally.from_device
        sequence = self._records.pop(channel.id, None)
        if self._audit is None or sequence is None:
            return
        tally = channel.tally
        with contextlib.suppress(AgentError):  # the log's trouble is shown elsewhere
            await self._audit.record(
                "channel-ended",
                {
                    "errors": tally.errors,
                    "from_device": tally.from_device,
                    "of": sequence,
                    "reason": why,
                    "to_device": tally.to_device,
                    "transfers": tally.transfers,
                },
            )


def _copy(channel: GpuChannel, memory: WorkMemory, asked: Range) -> Copy:
    """See ``Channels.submit``."""
    room = channel.room(asked.handle)
    if asked.size < 1:
        raise Misuse("BAD_COPY", "there is nothing to copy")
    if asked.offset + asked.size > room.size:
        raise Misuse("DEVICE_RANGE", "the range is not within the allocation")
    if asked.start + asked.size > memory.size:
        raise Misuse("LEASE_RANGE", "the range is not within the memory on lease")
    if not asked.to_device:
        require_readable(room)
    return Copy(asked.to_device, memory, asked.start, room, asked.offset, asked.size)
