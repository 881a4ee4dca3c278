"""Which calls are put on record, and what of them: those that let a caller speak as this VM, before and after."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from cgpu_agent.domain.audit import AuditLog
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.policy import OPEN, Decision
from cgpu_agent.errors import AgentError, Unavailable
from cgpu_agent.rpc.methods import ACTIONS, BY_KEY, OPERATOR, WITHIN_CHANNEL

log = structlog.get_logger()

WEIGHTY = (
    frozenset(method for method, action in ACTIONS.items() if action not in OPEN) | BY_KEY | OPERATOR
) - WITHIN_CHANNEL
"""Methods that are denied by default, or the operator's: whoever is let in is put on record first."""
LEASE = "lease"
"""Stands for a method where a lease was refused: the lease socket speaks no gRPC."""
_KNOWN = ACTIONS.keys() | BY_KEY | OPERATOR | {LEASE}


class Auditor:
    """The gate's ``Recorder``.

    Args:
        audit: the log; ``None`` where none can be kept: then weighty calls are refused.
    """

    def __init__(self, audit: AuditLog | None) -> None:
        self._audit = audit
        self._ending: set[asyncio.Task[None]] = set()

    def denied(self, caller: Caller | None, method: str, reason: str) -> None:
        if self._audit is not None:
            self._audit.denied(caller, method if method in _KNOWN else "", reason)

    async def begins(self, caller: Caller, method: str, decision: Decision) -> Callable[[str], None] | None:
        if method not in WEIGHTY:
            return None
        audit = self._audit
        if audit is None:
            raise Unavailable("AUDIT_UNAVAILABLE", "no audit log is kept, and this call needs its record")
        sequence = await audit.record(
            "call", {"caller": caller.claims(), "method": method, "policies": list(decision.policy_ids)}
        )

        def ended(code: str) -> None:
            task = asyncio.create_task(self._ended(audit, sequence, code))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

        return ended

    async def _ended(self, audit: AuditLog, sequence: int, code: str) -> None:
        try:
            await audit.record("call-ended", {"code": code, "of": sequence})
        except AgentError as error:
            log.error("the outcome of a call is not on record", of=sequence, code=code, reason=error.slug)

    async def settle(self) -> None:
        """Wait until the outcome of every call that has ended is on record."""
        while self._ending:
            await asyncio.wait(self._ending)
