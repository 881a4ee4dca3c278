"""Asks the GPUs and has their answers judged: which devices there are, and a verdict on each of them, or none."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Mapping
from typing import Final

from cgpu_agent.backends.base import Clock, GpuEvidence, GpuInfo, Gpus
from cgpu_agent.domain.gpujudge import Judge, signed_moments
from cgpu_agent.domain.gpurules import GpuRules, mode_fault
from cgpu_agent.domain.gpustate import Attempt, Reason, Verdict
from cgpu_agent.domain.timefloor import TimeFloor
from cgpu_agent.domain.turns import Turns
from cgpu_agent.errors import AgentError, DeviceFault, Unavailable
from cgpu_agent.verifier.gpuset import SetResult
from cgpu_agent.verifier.verdict import Step

ASK_SECONDS: Final = 5.0
"""For anything but a report."""
NONCE_SIZE: Final = 32
_WAITING_REPORTS: Final = 4
_AGENT = "agent"


class Refused(Exception):
    """An attempt failed; says why, for all and by device."""

    def __init__(self, whole: Reason, devices: Mapping[str, Reason] | None = None) -> None:
        super().__init__(whole.slug)
        self.whole = whole
        self.devices = devices or {}


class GpuExaminer:
    """The sessions' side of the devices.

    Args:
        nonce: makes 32 fresh bytes.

    Attributes:
        present: whether kernel or driver saw a device at the last look; true before the first one, since a machine
            without GPUs is one that was looked at.
    """

    def __init__(
        self,
        gpus: Gpus,
        clock: Clock,
        floor: TimeFloor,
        rules: GpuRules,
        nonce: Callable[[], bytes] = lambda: secrets.token_bytes(NONCE_SIZE),
    ) -> None:
        self._gpus = gpus
        self._clock = clock
        self._floor = floor
        self._rules = rules
        self._nonce = nonce
        self._turns: dict[str, Turns] = {}
        self.present = True

    async def inventory(self) -> tuple[GpuInfo, ...]:
        """All devices, where kernel and driver agree on them.

        Raises:
            DeviceFault: from the driver.
            Unavailable: ``GPU_INVENTORY``: one sees what the other does not, or one name is there twice.
        """
        kernel = await self._gpus.pci(timeout=ASK_SECONDS)
        self.present = self.present or bool(kernel)
        try:
            devices = await self._gpus.list(timeout=ASK_SECONDS)
        except DeviceFault:
            if kernel:
                raise
            devices = ()  # no device, so no driver
        self.present = bool(kernel) or bool(devices)
        addresses = [info.bdf for info in devices]
        if sorted(kernel) != sorted(addresses):
            odd = sorted(set(kernel) ^ set(addresses))
            raise Unavailable(
                "GPU_INVENTORY",
                f"kernel sees {len(kernel)} devices, driver {len(devices)}"
                + (f"; only one of them sees {', '.join(odd[:4])}" if odd else ""),
            )
        if len(set(addresses)) != len(devices) or len({info.uuid for info in devices}) != len(devices):
            raise Unavailable("GPU_INVENTORY", "two devices have one name")
        return devices

    async def examine(self, attempt: Attempt, judge: Judge) -> dict[str, Verdict]:
        """Ask every device, and have the answers judged.

        Raises ``Refused``, and ``Unavailable`` (``CLOCK_BEFORE_FLOOR``).
        """
        faults = {
            info.uuid: fault for info in attempt.devices if (fault := mode_fault(info, self._rules)) is not None
        }
        if faults:
            raise Refused(next(iter(faults.values())), faults)
        at, began, nonce = self._floor.now(), self._clock.monotonic(), self._nonce()
        devices = await self._answers(attempt, nonce)
        result = await asyncio.to_thread(judge, devices, nonce, at, self._rules.count or None)
        identities = self._identities(attempt, result, nonce)
        for moment in signed_moments(result):
            self._floor.rise(moment)
        self._floor.now()  # where they have shown that the clock is behind, this was judged at a wrong time
        until = began + self._rules.reattest_seconds
        chains = {info.uuid: hashlib.sha256(evidence.chain).digest() for info, evidence in devices}
        return {
            uuid: Verdict(identity, at.timestamp(), until, simulated, chains[uuid])
            for uuid, (identity, simulated) in identities.items()
        }

    async def _answers(self, attempt: Attempt, nonce: bytes) -> list[tuple[GpuInfo, GpuEvidence]]:
        """Every device's answer; ``Refused`` unless all of them answered."""
        names = [info.uuid for info in attempt.devices]
        self._turns = {uuid: turns for uuid, turns in self._turns.items() if uuid in names}
        answers = await asyncio.gather(*(self.ask(_AGENT, uuid, nonce) for uuid in names), return_exceptions=True)
        faults: dict[str, Reason] = {}
        found: list[tuple[GpuInfo, GpuEvidence]] = []
        for info, answer in zip(attempt.devices, answers, strict=True):
            if isinstance(answer, AgentError):
                faults[info.uuid] = Reason(answer.slug, answer.message)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found.append((info, answer))
        if faults:
            raise Refused(next(iter(faults.values())), faults)
        return found

    def _identities(self, attempt: Attempt, result: SetResult, nonce: bytes) -> dict[str, tuple[str, bool]]:
        """Identity and kind of root of every device, by uuid; ``Refused`` unless all passed."""
        faults: dict[str, Reason] = {}
        found: dict[str, tuple[str, bool]] = {}
        if len(result.devices) != len(attempt.devices):
            raise Refused(Reason("GPU_JUDGEMENT", "the judgement is not about the devices that were asked"))
        for info, device in zip(attempt.devices, result.devices, strict=True):
            facts = device.facts
            if not device.accepted or facts is None or facts.nonce != nonce:
                faults[info.uuid] = _reason(device.refusal)
            elif facts.simulated and not self._rules.allow_simulated:
                faults[info.uuid] = Reason("GPU_SIMULATED", "a root other than NVIDIA's vouches for this GPU")
            else:
                found[info.uuid] = (facts.identity.ueid, facts.simulated)
        if faults:
            raise Refused(next(iter(faults.values())), faults)
        if not result.accepted:
            raise Refused(_reason(result.refusal))
        return found

    async def ask(self, owner: object, uuid: str, nonce: bytes) -> GpuEvidence:
        """A device's report; owners take turns at each device. Raises ``Exhausted`` and what ``Gpus`` raises."""
        turns = self._turns.setdefault(uuid, Turns(width=1, waiting_each=_WAITING_REPORTS))
        async with turns.turn(owner):
            return await self._gpus.evidence(uuid, nonce, timeout=self._rules.report_seconds)


def _reason(step: Step | None) -> Reason:
    """The step of the verifier that refused."""
    if step is None:
        return Reason("GPU_NOT_VERIFIED", "there is no verdict")
    return Reason(step.slug or "GPU_NOT_VERIFIED", f"{step.id}: {step.detail}")
