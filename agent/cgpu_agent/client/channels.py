"""A channel to a GPU's memory, blocking and for asyncio; both run the plans of ``transfer``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, BinaryIO, TypeVar

from cgpu_agent.api.v1 import transfer_buffers_pb2
from cgpu_agent.client import calls
from cgpu_agent.client.calls import Call, Copy, Progress
from cgpu_agent.client.transfer import ChannelPlans, Memory, OnProgress, Plan
from cgpu_agent.wire.sealed import SEGMENT_SIZES

R = TypeVar("R")


class Channel:
    """A channel of this process; see ``Agent.channel``. All of it ends with its block.

    Handles are numbers, good in this channel only. ``progress`` is called now and then with a ``Progress``.
    """

    def __init__(
        self, plans: ChannelPlans, run: Callable[[Call[Any]], Any], stream: Callable[[Call[Any]], Iterator[Any]]
    ) -> None:
        self._plans = plans
        self._run = run
        self._stream = stream

    @property
    def id(self) -> bytes:
        """Names the channel to the agent; gives nobody else a right to it."""
        return self._plans.id

    def allocate(self, size: int) -> int:
        """Device memory, all zeros: its handle."""
        return self._do(self._plans.allocate(size))

    def free(self, handle: int) -> None:
        """Give an allocation back; it is wiped."""
        self._run(calls.free(self.id, handle))

    def buffer(self, size: int) -> Memory:
        """Memory that the agent shares with you: arrays that lie in its ``view`` are transferred without a copy."""
        return self._do(self._plans.buffer(size))

    def put(
        self, source: Any, *, handle: int | None = None, offset: int = 0, progress: OnProgress | None = None
    ) -> int:
        """Copy a buffer (bytes, an array, ...) to the device. Returns when the device has it.

        Args:
            handle: where to; without one, a new allocation of its size.
        """
        return self._do(self._plans.put(source, handle, offset, progress))

    def get(self, handle: int, out: Any, *, offset: int = 0, progress: OnProgress | None = None) -> None:
        """Fill ``out``, a buffer that can be written to, from an allocation."""
        self._do(self._plans.get(handle, out, offset, progress))

    def load_sealed(
        self,
        file: BinaryIO,
        *,
        key: str,
        object_id: str,
        version: int,
        segment_size: int = SEGMENT_SIZES["1MiB"],
        progress: OnProgress | None = None,
    ) -> int:
        """A sealed object, opened by the agent into a new allocation; you have neither its key nor its plaintext.

        It cannot be got back from there. Arguments as ``Agent.open_sealed``; policy must permit ``key.load``.
        """
        return self._do(self._plans.load(file, key, object_id, version, segment_size, progress))

    def submit(self, copies: Sequence[Copy]) -> int:
        """Queue copies, 1 to 1024; returns at once: the ticket."""
        return self._do(self._plans.submit(copies))

    def synchronize(self, ticket: int, *, progress: OnProgress | None = None) -> Progress:
        """Wait until a transfer has ended. Raises why it failed."""
        return self._do(self._plans.wait(ticket, progress))

    def watch(self, ticket: int = 0) -> Iterator[list[Progress]]:
        """How a transfer goes, or all that wait or run now, until none is left."""
        return self._stream(calls.watch_transfers(self.id, ticket))

    def stats(self) -> transfer_buffers_pb2.ChannelStats:
        """The channel's numbers."""
        found: list[transfer_buffers_pb2.ChannelStats] = self._run(calls.get_transfer_stats(self.id))
        return found[0]

    def _do(self, plan: Plan[R]) -> R:
        try:
            step = next(plan)
            while True:
                try:
                    found = self._run(step) if isinstance(step, Call) else step()
                except BaseException as error:  # noqa: BLE001 - the plan tidies up, and raises it
                    step = plan.throw(error)
                else:
                    step = plan.send(found)
        except StopIteration as end:
            result: R = end.value
            return result


class AsyncChannel:
    """A channel of this process; see ``AsyncAgent.channel``. Methods, arguments, errors are those of ``Channel``."""

    def __init__(
        self,
        plans: ChannelPlans,
        run: Callable[[Call[Any]], Coroutine[Any, Any, Any]],
        stream: Callable[[Call[Any]], AsyncIterator[Any]],
    ) -> None:
        self._plans = plans
        self._run = run
        self._stream = stream

    @property
    def id(self) -> bytes:
        """Names the channel to the agent; gives nobody else a right to it."""
        return self._plans.id

    async def allocate(self, size: int) -> int:
        """Device memory, all zeros: its handle."""
        return await self._do(self._plans.allocate(size))

    async def free(self, handle: int) -> None:
        """Give an allocation back; it is wiped."""
        await self._run(calls.free(self.id, handle))

    async def buffer(self, size: int) -> Memory:
        """Memory that the agent shares with you: arrays that lie in its ``view`` are transferred without a copy."""
        return await self._do(self._plans.buffer(size))

    async def put(
        self, source: Any, *, handle: int | None = None, offset: int = 0, progress: OnProgress | None = None
    ) -> int:
        """Copy a buffer to the device."""
        return await self._do(self._plans.put(source, handle, offset, progress))

    async def get(self, handle: int, out: Any, *, offset: int = 0, progress: OnProgress | None = None) -> None:
        """Fill ``out`` from an allocation."""
        await self._do(self._plans.get(handle, out, offset, progress))

    async def load_sealed(
        self,
        file: BinaryIO,
        *,
        key: str,
        object_id: str,
        version: int,
        segment_size: int = SEGMENT_SIZES["1MiB"],
        progress: OnProgress | None = None,
    ) -> int:
        """A sealed object, opened by the agent into a new allocation."""
        return await self._do(self._plans.load(file, key, object_id, version, segment_size, progress))

    async def submit(self, copies: Sequence[Copy]) -> int:
        """Queue copies; the ticket."""
        return await self._do(self._plans.submit(copies))

    async def synchronize(self, ticket: int, *, progress: OnProgress | None = None) -> Progress:
        """Wait until a transfer has ended."""
        return await self._do(self._plans.wait(ticket, progress))

    def watch(self, ticket: int = 0) -> AsyncIterator[list[Progress]]:
        """How a transfer goes, or all that wait or run now, until none is left."""
        return self._stream(calls.watch_transfers(self.id, ticket))

    async def stats(self) -> transfer_buffers_pb2.ChannelStats:
        """The channel's numbers."""
        found: list[transfer_buffers_pb2.ChannelStats] = await self._run(calls.get_transfer_stats(self.id))
        return found[0]

    async def _do(self, plan: Plan[R]) -> R:
        try:
            step = next(plan)
            while True:
                try:
                    found = await (self._run(step) if isinstance(step, Call) else asyncio.to_thread(step))
                except BaseException as error:  # noqa: BLE001 - the plan tidies up, and raises it
                    step = plan.throw(error)
                else:
                    step = plan.send(found)
        except StopIteration as end:
            result: R = end.value
            return result
