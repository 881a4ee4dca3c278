"""The TransferBuffers service: convert, call the domain, convert."""

# gRPC names a service's methods and their parameters.
from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

from cgpu_agent.api.v1 import transfer_buffers_pb2, transfer_buffers_pb2_grpc
from cgpu_agent.domain.channel import GpuChannel
from cgpu_agent.domain.channels import WAIT_SECONDS, Channels, Range
from cgpu_agent.domain.core import Core
from cgpu_agent.domain.gpus import NO_GPUS
from cgpu_agent.domain.transfers import Progress
from cgpu_agent.errors import Misuse, Unavailable
from cgpu_agent.rpc.interceptor import current_caller, current_process, put_on_record
from cgpu_agent.wire.sealed import SEGMENT_SIZES, ObjectName

pb = transfer_buffers_pb2

_STATES: Final = {
    "waiting": pb.TRANSFER_STATE_WAITING,
    "running": pb.TRANSFER_STATE_RUNNING,
    "done": pb.TRANSFER_STATE_DONE,
    "failed": pb.TRANSFER_STATE_FAILED,
}
_TO_DEVICE: Final = {pb.COPY_DIRECTION_TO_DEVICE: True, pb.COPY_DIRECTION_FROM_DEVICE: False}


class TransferBuffersService(transfer_buffers_pb2_grpc.TransferBuffersServicer):
    """See protos/cgpu_agent/api/v1/transfer_buffers.proto."""

    def __init__(self, core: Core) -> None:
        self._core = core

    @property
    def _channels(self) -> Channels:
        if self._core.channels is None:
            raise Unavailable(NO_GPUS.slug, "this agent has no GPUs whose memory it could fill")
        return self._core.channels

    async def OpenChannel(self, request: pb.OpenChannelRequest, context: Any) -> pb.OpenChannelResponse:
        channel = await self._channels.open(current_process(), request.gpu)
        return pb.OpenChannelResponse(channel=channel.id, memory=self._channels.memory_each)

    async def Allocate(self, request: pb.AllocateRequest, context: Any) -> pb.AllocateResponse:
        handle = await self._channels.allocate(current_process(), request.channel, request.size)
        return pb.AllocateResponse(handle=handle)

    async def Free(self, request: pb.FreeRequest, context: Any) -> pb.FreeResponse:
        await self._channels.free(current_process(), request.channel, request.handle)
        return pb.FreeResponse()

    async def Submit(self, request: pb.SubmitRequest, context: Any) -> pb.SubmitResponse:
        ranges = [_range(each) for each in request.copies]
        transfer = self._channels.submit(current_process(), request.channel, ranges)
        return pb.SubmitResponse(ticket=transfer.ticket)

    async def LoadSealed(self, request: pb.LoadSealedRequest, context: Any) -> pb.LoadSealedResponse:
        self._channels.of(current_process(), request.channel)
        if self._core.loading is None:
            raise Unavailable("KEY_ABSENT", "no keys are configured")
        name = ObjectName(request.key, request.object_id, request.object_version)
        await self._core.started()
        transfer = await self._core.loading.load(
            current_caller(),
            current_process(),
            request.channel,
            request.lease,
            name,
            request.segment_size or SEGMENT_SIZES["1MiB"],
            request.handle,
            put_on_record,
        )
        return pb.LoadSealedResponse(ticket=transfer.ticket, size=transfer.total)

    async def Watch(
        self, request: pb.WatchTransfersRequest, context: Any
    ) -> AsyncIterator[pb.WatchTransfersResponse]:
        views = self._channels.watch(current_process(), request.channel, request.ticket)
        async with contextlib.aclosing(views):
            async for view in views:
                yield pb.WatchTransfersResponse(transfers=[_progress(each) for each in view])

    async def Synchronize(self, request: pb.SynchronizeRequest, context: Any) -> pb.SynchronizeResponse:
        seconds = request.milliseconds / 1000 or WAIT_SECONDS
        found = await self._channels.synchronize(current_process(), request.channel, request.ticket, seconds)
        return pb.SynchronizeResponse(transfer=_progress(found))

    async def CloseChannel(self, request: pb.CloseChannelRequest, context: Any) -> pb.CloseChannelResponse:
        await self._channels.close(current_process(), request.channel)
        return pb.CloseChannelResponse()

    async def GetStats(self, request: pb.GetStatsRequest, context: Any) -> pb.GetStatsResponse:
        process, channels = current_process(), self._channels
        found = [channels.of(process, request.channel)] if request.channel else channels.all_of(process)
        return pb.GetStatsResponse(channels=[_stats(each) for each in found])


def _range(copy: pb.Copy) -> Range:
    if copy.direction not in _TO_DEVICE:
        raise Misuse("BAD_COPY", "say which way to copy")
    to_device = _TO_DEVICE[copy.direction]
    return Range(to_device, copy.lease, copy.lease_offset, copy.handle, copy.offset, copy.length)


def _progress(each: Progress) -> pb.TransferProgress:
    return pb.TransferProgress(
        ticket=each.ticket,
        state=_STATES[each.state],
        done=each.done,
        total=each.total,
        rate=each.rate,
        eta_seconds=each.eta,
        reason="" if each.error is None else each.error.slug,
        message="" if each.error is None else each.error.message,
    )


def _stats(channel: GpuChannel) -> pb.ChannelStats:
    tally, ended = channel.tally, channel.ended
    moved = tally.to_device + tally.from_device
    return pb.ChannelStats(
        channel=channel.id,
        gpu=channel.gpu.uuid,
        bytes_to_device=tally.to_device,
        bytes_from_device=tally.from_device,
        transfers=tally.transfers,
        errors=tally.errors,
        pending=len(channel.pending),
        busy_seconds=tally.busy,
        gigabytes_per_second=moved / tally.busy / 1e9 if tally.busy else 0.0,
        allocated=sum(room.size for room in channel.allocations.values()),
        allocations=len(channel.allocations),
        locked=channel.locked,
        reason="" if ended is None else ended.slug,
        message="" if ended is None else ended.message,
    )
