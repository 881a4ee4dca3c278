"""The Admin service, for the operator's socket."""

from __future__ import annotations

from typing import Any, Protocol

from cgpu_agent.api.v1 import admin_pb2, admin_pb2_grpc

pb = admin_pb2


class Operated(Protocol):
    """The daemon, which knows all its parts."""

    def status(self) -> pb.GetStatusResponse:
        """What the agent is doing."""

    def metrics(self) -> str:
        """Its numbers, in Prometheus' text format."""

    def log_level(self) -> tuple[str, str]:
        """The level of the journal, and that of the configuration."""

    def set_log_level(self, level: str) -> None:
        """Raises ``Misuse`` (``BAD_LOG_LEVEL``)."""


class AdminService(admin_pb2_grpc.AdminServicer):
    """See protos/cgpu_agent/api/v1/admin.proto."""

    def __init__(self, daemon: Operated) -> None:
        self._daemon = daemon

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        return self._daemon.status()

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Any) -> pb.GetMetricsResponse:
        return pb.GetMetricsResponse(text=self._daemon.metrics())

    async def GetLogLevel(self, request: pb.GetLogLevelRequest, context: Any) -> pb.GetLogLevelResponse:
        level, configured = self._daemon.log_level()
        return pb.GetLogLevelResponse(level=level, configured=configured)

    async def SetLogLevel(self, request: pb.SetLogLevelRequest, context: Any) -> pb.SetLogLevelResponse:
        self._daemon.set_log_level(request.level)
        return pb.SetLogLevelResponse()
