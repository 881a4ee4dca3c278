"""The Gpus service: convert, call the domain, convert."""

# gRPC names a service's methods and their parameters.
from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

from cgpu_agent.api.v1 import gpus_pb2, gpus_pb2_grpc
from cgpu_agent.backends.base import Clock
from cgpu_agent.domain.core import Core
from cgpu_agent.domain.gpus import NO_GPUS, GpuSessions, GpuView
from cgpu_agent.domain.gpustate import Session
from cgpu_agent.errors import Misuse, Unavailable
from cgpu_agent.rpc.interceptor import current_caller
from cgpu_agent.wire.gpunonce import gpu_report_nonce

pb = gpus_pb2

_MAX_UUID: Final = 128
_PHASES: Final = {
    "discovered": pb.GPU_PHASE_DISCOVERED,
    "attesting": pb.GPU_PHASE_ATTESTING,
    "trusted": pb.GPU_PHASE_TRUSTED,
    "stale": pb.GPU_PHASE_STALE,
    "rejected": pb.GPU_PHASE_REJECTED,
    "lost": pb.GPU_PHASE_LOST,
}
_STATES: Final = {
    "none": pb.GPU_SET_STATE_NONE,
    "ready": pb.GPU_SET_STATE_READY,
    "not-ready": pb.GPU_SET_STATE_NOT_READY,
}


def gpu_set(view: GpuView | None, clock: Clock) -> pb.GpuSet:
    """The GPUs as the API tells them; ``None`` where nothing looks at GPUs."""
    if view is None:
        return pb.GpuSet(state=pb.GPU_SET_STATE_NONE, reason=NO_GPUS.slug, message=NO_GPUS.message, backend="none")
    reason = view.reason
    return pb.GpuSet(
        state=_STATES[view.state],
        reason="" if reason is None else reason.slug,
        message="" if reason is None else reason.message,
        backend=view.backend,
        trust_epoch=view.epoch,
        attesting=view.attesting,
        gpus=[_gpu(session, clock.monotonic()) for session in view.sessions],
    )


def _gpu(session: Session, now: float) -> pb.Gpu:
    info, reason, verdict = session.info, session.reason, session.verdict
    told = pb.Gpu(
        uuid=info.uuid,
        bdf=info.bdf,
        model=info.model,
        architecture=info.architecture,
        driver=info.driver,
        vbios=info.vbios,
        phase=_PHASES[session.phase],
        reason="" if reason is None else reason.slug,
        message="" if reason is None else reason.message,
        cc=info.cc,
        cc_environment=info.cc_environment or "",
        dev_tools=info.dev_tools,
        multi_gpu=info.multi_gpu,
    )
    if verdict is not None:
        told.ueid = verdict.identity
        told.valid_seconds = max(0.0, verdict.until - now)
        told.simulated = verdict.simulated
    return told


class GpusService(gpus_pb2_grpc.GpusServicer):
    """See protos/cgpu_agent/api/v1/gpus.proto."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def _told(self) -> pb.GpuSet:
        gpus = self._core.gpus
        return gpu_set(None if gpus is None else gpus.view(), self._core.clock)

    def _sessions(self) -> GpuSessions:
        if self._core.gpus is None:
            raise Unavailable(NO_GPUS.slug, NO_GPUS.message)
        return self._core.gpus

    async def List(self, request: pb.ListGpusRequest, context: Any) -> pb.ListGpusResponse:
        return pb.ListGpusResponse(gpus=self._told())

    async def GetReport(self, request: pb.GetGpuReportRequest, context: Any) -> pb.GetGpuReportResponse:
        if not 8 <= len(request.nonce) <= 64:
            raise Misuse("BAD_NONCE", "the nonce must have 8 to 64 bytes")
        sessions, caller, uuid = self._sessions(), current_caller(), _uuid(request.uuid)
        await self._core.started()
        name, claims = self._core.boot.keys.agent_ak_name, caller.claims_bytes()
        found = await sessions.report(caller.uid, uuid, gpu_report_nonce(name, claims, request.nonce))
        return pb.GetGpuReportResponse(report=found.report, chain=found.chain, caller_claims=claims, ak_name=name)

    async def GetRawReport(self, request: pb.GetRawGpuReportRequest, context: Any) -> pb.GetRawGpuReportResponse:
        found = await self._sessions().report(current_caller().uid, _uuid(request.uuid), request.nonce)
        return pb.GetRawGpuReportResponse(report=found.report, chain=found.chain)

    async def Attest(self, request: pb.AttestGpusRequest, context: Any) -> pb.AttestGpusResponse:
        await self._sessions().attest()
        return pb.AttestGpusResponse(gpus=self._told())

    async def Watch(self, request: pb.WatchGpusRequest, context: Any) -> AsyncIterator[pb.WatchGpusResponse]:
        if self._core.gpus is None:
            yield pb.WatchGpusResponse(gpus=self._told())
            return
        async with contextlib.aclosing(self._core.gpus.watch()) as views:
            async for view in views:
                yield pb.WatchGpusResponse(gpus=gpu_set(view, self._core.clock))


def _uuid(text: str) -> str:
    if not 1 <= len(text) <= _MAX_UUID:
        raise Misuse("UNKNOWN_GPU", "name a GPU by its uuid")
    return text
