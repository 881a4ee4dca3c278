"""The sealed keys at work: their latch is open only while the machine is trusted; they open for releases alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeVar

from cgpu_agent.backends.base import Attester, BrokerKind, Clock, ReleasedKey, Tpm, TpmCommands
from cgpu_agent.domain.agentlog import AgentLog
from cgpu_agent.domain.latch import Latch
from cgpu_agent.domain.sealedkeys import SealedKeys
from cgpu_agent.errors import AgentError, DeviceFault, Misuse, Unavailable
from cgpu_agent.wire.approval import Approval

T = TypeVar("T")

_AGAIN: Final = 10.0
"""Seconds until a latch that would not open is tried again; one that would not close is tried at once."""


class Vault:
    """The ``KeyBroker`` of kind ``sealed``, and the operator's way to its keys. One event loop's.

    Args:
        tpm: the VM's.
        keys: where they are.
        approvals: the owner's, as installed.
        clock: for trying again.
        timeout: seconds for one job.
    """

    kind: BrokerKind = "sealed"
    sees_gpus = False

    def __init__(
        self, tpm: Tpm, keys: SealedKeys, approvals: Sequence[Approval], clock: Clock, *, timeout: float
    ) -> None:
        self._tpm: Final = tpm
        self._keys: Final = keys
        self._approvals = tuple(approvals)
        self._clock: Final = clock
        self._timeout: Final = timeout
        self._latch: Latch | None = None
        self._state: Literal["closed", "open", "unknown"] = "closed"
        self._not_before = 0.0
        self._unwanted = False
        self._one: Final = asyncio.Lock()
        self.problem: AgentError | None = None
        """Why the latch is not as it should be."""

    @property
    def approvals(self) -> int:
        return len(self._approvals)

    def begin(self, tpm: TpmCommands, log: AgentLog) -> None:
        """Close the latch: the first command of every start, inside its TPM job. ``recorded`` must follow."""
        self._latch = Latch(self._keys, log)
        self._state = "unknown"
        try:
            self._latch.close(tpm, self._approvals)
        except AgentError as error:
            self.problem = error
        else:
            self._state = "closed"

    def recorded(self) -> None:
        """The start is on record by now, which extended the agent register after the latch was closed."""
        if self._latch is not None:
            self._latch.recorded()

    def use(self, approvals: Sequence[Approval]) -> None:
        """Take other approvals from now on."""
        if tuple(approvals) != self._approvals:
            self._approvals = tuple(approvals)
            self._not_before = 0.0

    async def follow(self, trusted: Callable[[], bool]) -> None:
        """Have the latch as the machine is now. Call often: it costs nothing where nothing is to be done.

        What stands in the way is a ``problem`` to show. A latch that cannot be closed stays one until it is.
        """
        async with self._one:
            if self._latch is None:
                return
            self._unwanted = not trusted()
            if self._unwanted:
                if self._state != "closed":
                    await self._close(self._latch)
            elif self._state != "open" and self._clock.monotonic() >= self._not_before:
                await self._open(self._latch)
                if not trusted() and self._state != "closed":
                    await self._close(self._latch)

    async def _close(self, latch: Latch) -> None:
        self._state = "unknown"
        try:
            await self._run(lambda tpm: latch.revoke(tpm, self._approvals), idempotent=False)
        except AgentError as error:
            self.problem = error
        else:
            self._state, self.problem = "closed", None

    async def _open(self, latch: Latch) -> None:
        self._not_before = self._clock.monotonic() + _AGAIN
        before, self._state = self._state, "unknown"
        try:
            await self._run(lambda tpm: latch.open(tpm, self._approvals))
        except DeviceFault as error:  # the answer may be lost
            self.problem = error
        except AgentError as error:
            self._state = before
            self.problem = None if error.slug == "NO_KEYS" else error
        else:
            self._state, self.problem = "open", None

    async def release(self, path: str, attester: Attester, *, timeout: float) -> ReleasedKey:  # noqa: ARG002
        """As ``KeyBroker.release``: the newest generation of a key. It is shown nothing: the TPM itself decides.

        Also raises ``Unavailable`` as ``SealedKeys`` does: ``NO_KEYS``, ``KEYS_MISMATCH``, ``KEY_LOST``,
        ``KEY_NOT_APPROVED``, ``KEY_APPROVAL_OLD``, ``KEY_LATCH_CLOSED``, to be tried again where it is about to be
        opened; and ``DeviceFault``.
        """
        try:
            info, secret = await self._tpm.run(
                lambda tpm: self._keys.unseal(tpm, path, self._approvals), timeout=timeout
            )
        except Misuse as error:
            raise Unavailable("KEY_ABSENT", error.message) from None
        except Unavailable as error:
            if error.slug == "KEY_LATCH_CLOSED":  # whoever closed it: ``follow`` opens it where that is right
                self._state, self._not_before = "closed", 0.0
                if not self._unwanted:
                    raise Unavailable(error.slug, error.message, retry_after=1.0) from error
            raise
        return ReleasedKey(secret, info.generation)

    async def look(self, work: Callable[[SealedKeys, TpmCommands], T]) -> T:
        """Read something of the keys, for the operator. Raises as ``SealedKeys`` does."""
        return await self._run(lambda tpm: work(self._keys, tpm))

    async def change(
        self, work: Callable[[SealedKeys, TpmCommands, Sequence[Approval]], T], *, new_latch: bool = False
    ) -> T:
        """Change the keys, for the operator. Raises as ``SealedKeys`` does.

        Not tried again after a lost answer: only a fresh look at the files tells what became of it.
        ``new_latch``: the latch is made anew, and closed by that.
        """
        async with self._one:
            self._not_before = 0.0
            done = await self._run(lambda tpm: work(self._keys, tpm, self._approvals), idempotent=False)
            if new_latch:
                self._state = "closed"
            return done

    async def _run(self, job: Callable[[TpmCommands], T], *, idempotent: bool = True) -> T:
        return await self._tpm.run(job, timeout=self._timeout, idempotent=idempotent)

    def close(self) -> None:
        """It holds no key."""
