"""A VM whose platform makes no report: all there is, is the vTPM and who certified its AK."""

from __future__ import annotations

from cgpu_agent.backends.base import PlatformKind, PlatformReport


class Plain:
    """``Platform`` without a report.

    Args:
        kind: ``azure-trusted-launch`` or ``plain``.
        reason: why there is none, for readers of the evidence.
    """

    def __init__(self, kind: PlatformKind, reason: str) -> None:
        self.kind: PlatformKind = kind
        self._answer = PlatformReport(kind, missing=(("platform-report", reason),))

    async def report(self, user_data: bytes | None, *, timeout: float) -> PlatformReport:  # noqa: ARG002
        return self._answer
