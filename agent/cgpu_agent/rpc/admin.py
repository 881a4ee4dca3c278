"""The Admin service, for the operator's socket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cgpu_agent.api.v1 import admin_pb2, admin_pb2_grpc

pb = admin_pb2


class AdminService(admin_pb2_grpc.AdminServicer):
    """See protos/cgpu_agent/api/v1/admin.proto.

    Args:
        status: composes the answer; the daemon knows all its parts.
    """

    def __init__(self, status: Callable[[], pb.GetStatusResponse]) -> None:
        self._status = status

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        return self._status()
