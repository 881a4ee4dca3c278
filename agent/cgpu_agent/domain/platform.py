"""The platform below the vTPM: found out once, and not asked by many at a time for what is the same to all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from cgpu_agent.backends.base import Platform, PlatformReport
from cgpu_agent.errors import AgentError
from cgpu_agent.verifier.platform import batch_user_data
from cgpu_agent.wire.platformwords import PlatformWords, parse_platform
from cgpu_agent.wire.strictjson import Fields


class PlatformBelow:
    """One event loop's.

    Args:
        detect: finds out what it is; asked again as long as it raises.
        timeout: seconds for one report.
    """

    def __init__(self, detect: Callable[[], Awaitable[Platform]], *, timeout: float) -> None:
        self._detect = detect
        self._timeout = timeout
        self._platform: Platform | None = None
        self._detecting = asyncio.Lock()
        self._any: asyncio.Task[PlatformReport] | None = None

    async def report(self, user_data: bytes | None = None) -> PlatformReport:
        """The report, made for ``user_data`` (64 bytes) where that can be; see ``Platform.report``.

        Without user data all who ask meanwhile share one answer: however many ask, the TPM is asked once at a time.

        Raises:
            DeviceFault, HostileInput: as ``Platform.report``, or the platform could not be found out.
        """
        if user_data is not None:
            return await self._ask(user_data)
        if self._any is None or self._any.done():
            self._any = asyncio.create_task(self._ask(None))
            self._any.add_done_callback(
                lambda task: task.cancelled() or task.exception()
            )  # all who asked may be gone
        return await asyncio.shield(self._any)

    async def words(self, root: bytes) -> tuple[PlatformWords | None, tuple[tuple[str, str], ...]]:
        """The report for a batch of evidence with this Merkle root, and what is missing of it and why. Never raises.

        A platform that fails is said as missing: the boot is evidence without it, and its reader decides.
        """
        try:
            found = await self.report(batch_user_data(root))
            if found.report is None:
                return None, found.missing
            words = PlatformWords(found.report, None, found.td_quote, found.certificates)
            parse_platform(Fields(words.to_json(), "platform"))
        except AgentError as error:
            return None, (("platform-report", error.message),)
        return words, found.missing

    async def _ask(self, user_data: bytes | None) -> PlatformReport:
        async with self._detecting:
            if self._platform is None:
                self._platform = await self._detect()
        return await self._platform.report(user_data, timeout=self._timeout)
