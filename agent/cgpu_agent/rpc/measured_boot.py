"""The MeasuredBoot service: convert, call the domain, convert."""

from __future__ import annotations

from typing import Any

from cgpu_agent.api.v1 import common_pb2, measured_boot_pb2, measured_boot_pb2_grpc
from cgpu_agent.backends.base import AkAlgorithm, Signed
from cgpu_agent.domain.boot import MeasuredBoot
from cgpu_agent.domain.core import Core
from cgpu_agent.errors import Misuse, Unavailable
from cgpu_agent.rpc.interceptor import current_caller

pb = measured_boot_pb2

_EK_KINDS: dict[int, AkAlgorithm] = {pb.EK_KIND_RSA: "rsa", pb.EK_KIND_ECC: "ecc"}


def _signed(signed: Signed) -> common_pb2.Signed:
    return common_pb2.Signed(attest=signed.attest, signature=signed.signature)


def _bank(values: dict[int, bytes]) -> common_pb2.PcrBank:
    return common_pb2.PcrBank(bank="sha256", values=values)


class MeasuredBootService(measured_boot_pb2_grpc.MeasuredBootServicer):
    """See protos/cgpu_agent/api/v1/measured_boot.proto."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def _boot(self) -> MeasuredBoot:
        await self._core.started()
        return self._core.boot

    async def GetIdentity(self, request: pb.GetIdentityRequest, context: Any) -> pb.GetIdentityResponse:
        boot = await self._boot()
        rsa, ecc = await boot.ek_publics()
        keys = boot.keys
        return pb.GetIdentityResponse(
            platform_ak=keys.platform_ak,
            platform_ak_certificate=keys.platform_ak_certificate or b"",
            agent_ak=keys.agent_ak.public,
            agent_ak_certify=_signed(keys.agent_ak_certify),
            ek_certificates=keys.ek_certificates,
            ek_rsa=rsa,
            ek_ecc=ecc,
            manufacturer=keys.tpm.manufacturer,
            reset_count=keys.clock.reset_count,
            restart_count=keys.clock.restart_count,
        )

    async def GetPlatform(self, request: pb.GetPlatformRequest, context: Any) -> pb.GetPlatformResponse:
        keys = (await self._boot()).keys
        if self._core.platform is None:
            raise Unavailable("NO_PLATFORM", "this agent does not look at the platform")
        found = await self._core.platform.report()
        return pb.GetPlatformResponse(
            kind=found.kind,
            report=found.report or b"",
            certificates=found.certificates,
            td_quote=found.td_quote or b"",
            platform_ak=keys.platform_ak,
            platform_ak_certificate=keys.platform_ak_certificate or b"",
            missing=dict(found.missing),
        )

    async def GetQuote(self, request: pb.GetQuoteRequest, context: Any) -> pb.GetQuoteResponse:
        boot, caller = await self._boot(), current_caller()
        found = await boot.quote(caller, request.nonce, _pcrs(request.pcrs))
        return pb.GetQuoteResponse(
            quote=_signed(found.quote), caller_claims=caller.claims_bytes(), pcrs=_bank(found.pcrs)
        )

    async def GetRawQuote(self, request: pb.GetRawQuoteRequest, context: Any) -> pb.GetRawQuoteResponse:
        boot = await self._boot()
        found = await boot.raw_quote(current_caller(), request.nonce, _pcrs(request.pcrs))
        return pb.GetRawQuoteResponse(quote=_signed(found.quote), pcrs=_bank(found.pcrs))

    async def ReadPcrs(self, request: pb.ReadPcrsRequest, context: Any) -> pb.ReadPcrsResponse:
        boot = await self._boot()
        return pb.ReadPcrsResponse(pcrs=_bank(await boot.read_pcrs(current_caller(), _pcrs(request.pcrs))))

    async def GetEventLog(self, request: pb.GetEventLogRequest, context: Any) -> pb.GetEventLogResponse:
        boot = await self._boot()
        if request.kind == pb.EVENT_LOG_KIND_BOOT:
            log = boot.logs.boot()
        elif request.kind == pb.EVENT_LOG_KIND_SYSTEMD:
            log = await boot.systemd_log(current_caller())
        elif request.kind == pb.EVENT_LOG_KIND_AGENT:
            log = boot.log.data
        else:
            raise Misuse("BAD_LOG_KIND", "name the log: boot, systemd or agent")
        if log is None:
            raise Unavailable("LOG_ABSENT", "this machine has no such log")
        return pb.GetEventLogResponse(log=log)

    async def MeasureEvent(self, request: pb.MeasureEventRequest, context: Any) -> pb.MeasureEventResponse:
        boot = await self._boot()
        sequence, digest = await boot.measure_event(current_caller(), request.content)
        return pb.MeasureEventResponse(sequence=sequence, digest=digest, pcr=boot.log.register)

    async def ActivateCredential(
        self,
        request: pb.ActivateCredentialRequest,
        context: Any,
    ) -> pb.ActivateCredentialResponse:
        ek = _EK_KINDS.get(request.ek)
        if ek is None:
            raise Misuse("BAD_CREDENTIAL", "name the EK: RSA or ECC")
        boot = await self._boot()
        secret = await boot.activate_credential(current_caller(), ek, request.credential_blob, request.secret)
        return pb.ActivateCredentialResponse(certinfo=secret)


def _pcrs(values: Any) -> tuple[int, ...]:
    if len(values) > 24:
        raise Misuse("BAD_PCR", "at most 24 PCR indices")
    return tuple(values)
