"""The Keys service: convert, call the domain, convert."""

# gRPC names a service's methods and their parameters.
from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from cgpu_agent.api.v1 import keys_pb2, keys_pb2_grpc
from cgpu_agent.domain.core import Core
from cgpu_agent.errors import Denied
from cgpu_agent.rpc.interceptor import current_caller, current_process, put_on_record
from cgpu_agent.wire.sealed import SEGMENT_SIZES, ObjectName

pb = keys_pb2


class KeysService(keys_pb2_grpc.KeysServicer):
    """See protos/cgpu_agent/api/v1/keys.proto."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def List(self, request: pb.ListKeysRequest, context: Any) -> pb.ListKeysResponse:
        release, channels = self._core.release, self._core.channels
        gpus = [] if channels is None else channels.gpus
        offers = [] if release is None else release.offers(current_caller(), gpus)
        return pb.ListKeysResponse(
            keys=[
                pb.KeyInfo(
                    key=offer.key.id,
                    broker=offer.key.broker,
                    wrapped=offer.wrapped,
                    plain=offer.plain,
                    opens=offer.opens,
                    loads=offer.loads,
                )
                for offer in offers
            ]
        )

    async def Get(self, request: pb.GetKeyRequest, context: Any) -> pb.GetKeyResponse:
        if self._core.release is None:  # as for any key that the caller may not have
            raise Denied("NOT_ALLOWED", "not allowed: no policy allows this")
        await self._core.started()
        found = await self._core.release.get(current_caller(), request.key, request.recipient or None, put_on_record)
        secret = {"wrapped" if found.wrapped else "plain": found.secret}
        return pb.GetKeyResponse(context=found.context, **secret)

    async def OpenSealed(self, request: pb.OpenSealedRequest, context: Any) -> AsyncIterator[pb.OpenSealedResponse]:
        if self._core.opening is None:  # as for any key that the caller may not have
            raise Denied("NOT_ALLOWED", "not allowed: no policy allows this")
        name = ObjectName(request.key, request.object_id, request.object_version)
        await self._core.started()
        segment_size = request.segment_size or SEGMENT_SIZES["1MiB"]
        steps = self._core.opening.open(
            current_caller(), current_process(), request.lease, name, segment_size, put_on_record
        )
        async with contextlib.aclosing(steps):
            async for step in steps:
                yield pb.OpenSealedResponse(done=step.done, total=step.total, whole=step.whole)
