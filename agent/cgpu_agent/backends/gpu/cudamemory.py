"""A GPU's memory for one owner: a CUDA context of his own, and a thread that makes, wipes and ends what is in it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final

from cgpu_agent.backends.gpu.cuda import Context
from cgpu_agent.backends.gpu.cudachannel import CudaChannel, Room, Rooms
from cgpu_agent.backends.gpu.nvmlfaults import timed_out
from cgpu_agent.backends.worker import Faults, Job, Worker
from cgpu_agent.errors import AgentError, DeviceFault, Exhausted, Unavailable

MAX_CHANNELS: Final = 16
"""Channels of one owner at a time; each has 8 MiB of pinned memory."""
MAX_ALLOCATIONS: Final = 4096
_MAX_SIZE: Final = 1 << 48


class CudaMemory:
    """A ``DeviceMemory``, made by ``establish``.

    What timed out goes on in its thread; what came of it too late is undone there, or by ``end``.
    """

    def __init__(self) -> None:
        self._rooms: Final = Rooms(MAX_ALLOCATIONS)
        self._channels: list[CudaChannel] = []
        self._context: Context | None = None
        self._worker: Final = Worker("gpu-memory", _perform, self._retire, _FAULTS, queue_limit=64)

    @classmethod
    async def establish(cls, gpu: str, *, timeout: float) -> CudaMemory:
        """Memory of this GPU for a new owner. Raises as ``TransferGpus.establish_transfers``."""
        memory = cls()
        try:
            await memory._worker.run(lambda _: memory._open(gpu), timeout=timeout)
        except BaseException:
            memory._dismiss()
            raise
        return memory

    @property
    def chain(self) -> bytes | None:
        return None

    async def allocate(self, size: int, *, timeout: float) -> int:
        handle: int = await self._worker.run(
            lambda deadline: self._allocate(size, deadline), timeout=timeout, idempotent=False
        )
        return handle

    async def free(self, handle: int, *, timeout: float) -> None:
        await self._worker.run(lambda deadline: self._free(handle, deadline), timeout=timeout)

    async def channel(self, *, timeout: float) -> CudaChannel:
        channel: CudaChannel = await self._worker.run(self._channel, timeout=timeout)
        return channel

    async def end(self, *, timeout: float) -> None:
        """As ``DeviceMemory.end``. A fault says that not all of it could be wiped; it was given back all the same."""
        try:
            await self._worker.run(self._end, timeout=timeout)
        finally:
            self._dismiss()

    def _dismiss(self) -> None:
        """Have the thread end when it can, and what is left then with it."""
        asyncio.get_running_loop().run_in_executor(None, self._worker.close)

    def _open(self, gpu: str) -> None:
        self._context = Context(gpu)

    def _within(self) -> Context:
        if self._context is None:
            raise _closed()
        return self._context

    def _allocate(self, size: int, deadline: float) -> int:
        context = self._within()
        self._rooms.require_place()
        if not 0 < size < _MAX_SIZE:
            raise Exhausted("DEVICE_MEMORY", "no GPU has room for this allocation")
        with context.current():
            address = context.allocate(size)
            context.zero(address, size)
            if time.monotonic() >= deadline:
                context.free(address)
                raise timed_out()
        return self._rooms.add(Room(address, size))

    def _free(self, handle: int, deadline: float) -> None:
        room = self._rooms.doom(handle, max(0.0, deadline - time.monotonic()))
        context = self._within()
        with context.current():
            context.zero(room.address, room.size)
            context.free(room.address)
        self._rooms.forget(handle)

    def _channel(self, deadline: float) -> CudaChannel:
        self._channels = [channel for channel in self._channels if not channel.closed]
        if len(self._channels) >= MAX_CHANNELS:
            raise Exhausted("TRANSFER_CHANNELS", f"there are {MAX_CHANNELS} transfer channels already")
        channel = CudaChannel(self._within(), self._rooms)
        if time.monotonic() >= deadline:
            channel.close()
            raise timed_out()
        self._channels.append(channel)
        return channel

    def _end(self, deadline: float) -> None:
        for channel in self._channels:
            channel.close()  # before the context goes: a call of theirs must not find it gone
        try:
            for handle in self._rooms.all():
                self._free(handle, deadline)
        finally:
            context, self._context = self._context, None
            if context is not None:
                context.destroy()

    def _retire(self) -> None:
        with contextlib.suppress(AgentError):  # whoever wanted to know has asked ``end``
            self._end(time.monotonic())


def _perform(job: Job) -> None:
    try:
        job.settle(job.work(job.deadline), None)
    except BaseException as error:  # noqa: BLE001 - the thread outlives whatever goes wrong in a job
        job.settle(None, error)


def _closed() -> DeviceFault:
    return DeviceFault("GPU_CLOSED", "this memory of the GPU was given back")


def _queue_full() -> Unavailable:
    return Unavailable("GPU_QUEUE_FULL", "too many calls wait for this GPU's memory", retry_after=1.0)


_FAULTS: Final = Faults(timed_out, _closed, _queue_full)
