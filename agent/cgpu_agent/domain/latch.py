"""The latch: an NV index without which the TPM opens no sealed key; closed by every start, reset and revocation.

Closing it does not reach a policy session that looked at it before. What ends such a session is an extend of any PCR,
so each closing is also a record of the agent log.
"""

from __future__ import annotations

from collections.abc import Sequence

from cgpu_agent.backends.base import TpmCommands
from cgpu_agent.domain.agentlog import AgentLog
from cgpu_agent.domain.sealedkeys import SealedKeys
from cgpu_agent.errors import Unavailable
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.approval import Approval

CLOSED_RECORD = strictjson.dumps({"event": "latch-closed"})


class Latch:
    """The latch of one key store. Every method must run inside one TPM job.

    ``DeviceFault`` and ``Unavailable`` of ``SealedKeys`` and ``AgentLog`` pass through.

    Args:
        keys: whose latch it is.
        log: the agent log, open before ``settle``.
    """

    def __init__(self, keys: SealedKeys, log: AgentLog) -> None:
        self._keys = keys
        self._log = log
        self._owes_record = True  # a start that closed it and crashed did not extend

    def close(self, tpm: TpmCommands, approvals: Sequence[Approval]) -> None:
        """Close it: the first TPM command of a start, and of a revocation. ``settle`` or ``recorded`` must follow."""
        self._owes_record = True
        self._keys.close_latch(tpm, approvals)

    def settle(self, tpm: TpmCommands) -> None:
        """Put the closing on record, which ends every session that saw the latch open."""
        if self._owes_record:
            self._log.measure(tpm, "agent", CLOSED_RECORD)
            self._owes_record = False

    def recorded(self) -> None:
        """Any record of the agent log came after the closing: it ended those sessions just as well."""
        self._owes_record = False

    def revoke(self, tpm: TpmCommands, approvals: Sequence[Approval]) -> None:
        """Close it and put that on record."""
        self.close(tpm, approvals)
        self.settle(tpm)

    def open(self, tpm: TpmCommands, approvals: Sequence[Approval]) -> None:
        """Open it. Raises ``Unavailable``: ``KEY_LATCH_CLOSED`` while a closing is not on record yet."""
        if self._owes_record:
            raise Unavailable("KEY_LATCH_CLOSED", "the latch's last closing is not on record yet")
        self._keys.open_latch(tpm, approvals)

    def is_open(self, tpm: TpmCommands) -> bool:
        """Whether the TPM would open keys."""
        return self._keys.latch_is_open(tpm)
