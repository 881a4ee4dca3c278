"""GPU verdicts in the agent register: one record when all devices were trusted, one when that ended; not without end.

A workload can provoke errors of its GPU at will, and each would cost two records in a log that rides in every bundle.
So their number is bounded; the last record says that the log tells no more of GPUs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from cgpu_agent.domain.boot import MeasuredBoot
from cgpu_agent.domain.gpustate import Reason, Verdict
from cgpu_agent.wire import strictjson

MAX_RECORDS: Final = 64
"""Per boot."""
_OURS = b'"event":"gpu-'


class Recorder(Protocol):
    """Keeps a durable record; raises ``AgentError`` when it cannot."""

    async def attested(self, verdicts: Mapping[str, Verdict]) -> None: ...
    async def dropped(self, reason: Reason) -> None: ...


class GpuRecords:
    """Measures into the agent register.

    Args:
        boot: raises ``Unavailable`` (``NOT_READY``) until the keys are established.
    """

    def __init__(self, boot: Callable[[], MeasuredBoot]) -> None:
        self._boot = boot

    async def attested(self, verdicts: Mapping[str, Verdict]) -> None:
        """Record that these devices, and no others, were trusted."""
        identities = sorted(verdict.identity for verdict in verdicts.values())
        await self._measure(
            {
                "devices": hashlib.sha256(strictjson.dumps(identities)).hexdigest(),
                "event": "gpu-attested",
                "gpus": str(len(identities)),
                "simulated": "true" if any(verdict.simulated for verdict in verdicts.values()) else "false",
            }
        )

    async def dropped(self, reason: Reason) -> None:
        """Record that the devices are not trusted any more."""
        await self._measure({"event": "gpu-dropped", "reason": reason.slug})

    @property
    def full(self) -> bool:
        """Whether no more is recorded in this boot."""
        return self._count(self._boot()) >= MAX_RECORDS

    @staticmethod
    def _count(boot: MeasuredBoot) -> int:
        return sum(record.author == "agent" and _OURS in record.content for record in boot.log.records)

    async def _measure(self, event: dict[str, str]) -> None:
        boot = self._boot()
        count = self._count(boot)
        if count >= MAX_RECORDS:
            return
        await boot.measure_agent({"event": "gpu-records-end"} if count == MAX_RECORDS - 1 else event)
