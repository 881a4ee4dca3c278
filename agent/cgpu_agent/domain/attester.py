"""What a key broker may have this VM show, in the name of one caller and for one key."""

from __future__ import annotations

from typing import Protocol

from cgpu_agent.backends.base import GpuEvidence, GpuInfo, PlatformReport, Signed
from cgpu_agent.domain.boot import MeasuredBoot
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.evidence import Evidence, Request
from cgpu_agent.domain.gpus import GpuSessions
from cgpu_agent.domain.platform import PlatformBelow
from cgpu_agent.errors import Unavailable
from cgpu_agent.wire.statement import KeyRelease


class Machine(Protocol):
    """The parts of ``Core`` that show something. Each raises ``Unavailable`` as ``Core`` does."""

    @property
    def boot(self) -> MeasuredBoot: ...
    @property
    def evidence(self) -> Evidence: ...

    platform: PlatformBelow | None
    gpus: GpuSessions | None


class CoreAttester:
    """``Attester`` of one release."""

    def __init__(self, machine: Machine, caller: Caller, release: KeyRelease) -> None:
        self._machine = machine
        self._caller = caller
        self._release = release

    async def bundle(self, nonce: bytes, audience: str) -> bytes:
        request = Request(nonce, audience, gpus=self._has_gpus())
        return await self._machine.evidence.get(self._caller, request, self._release)

    async def raw_quote(self, data: bytes, pcrs: tuple[int, ...]) -> tuple[Signed, dict[int, bytes]]:
        found = await self._machine.boot.raw_quote(self._caller, data, pcrs)
        return found.quote, found.pcrs

    async def platform_ak(self) -> bytes:
        return self._machine.boot.keys.platform_ak

    async def platform(self, user_data: bytes | None) -> PlatformReport:
        if self._machine.platform is None:
            raise Unavailable("NO_PLATFORM", "this agent does not look at the platform")
        return await self._machine.platform.report(user_data)

    async def gpu_reports(self, nonce: bytes) -> tuple[tuple[GpuInfo, GpuEvidence], ...]:
        gpus = self._machine.gpus
        if gpus is None or not self._has_gpus():
            return ()
        found = await gpus.collect(nonce)
        gpus.require_still(found)
        return tuple(zip(found.devices, found.answers, strict=True))

    def _has_gpus(self) -> bool:
        gpus = self._machine.gpus
        return gpus is not None and gpus.view().state != "none"
