"""The Evidence service: convert, call the domain, convert."""

from __future__ import annotations

from typing import Any

from cgpu_agent.api.v1 import evidence_pb2, evidence_pb2_grpc
from cgpu_agent.domain.core import Core
from cgpu_agent.domain.evidence import Request
from cgpu_agent.rpc.interceptor import current_caller


class EvidenceService(evidence_pb2_grpc.EvidenceServicer):
    """See protos/cgpu_agent/api/v1/evidence.proto."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def GetEvidence(
        self,
        request: evidence_pb2.GetEvidenceRequest,
        context: Any,
    ) -> evidence_pb2.GetEvidenceResponse:
        binding = request.WhichOneof("binding")
        asked = Request(
            nonce=request.nonce,
            audience=request.audience,
            gpus=request.gpus,
            user_data=request.user_data if binding == "user_data" else None,
            public_key=request.public_key if binding == "public_key" else None,
        )
        await self._core.started()
        return evidence_pb2.GetEvidenceResponse(bundle=await self._core.evidence.get(current_caller(), asked))
