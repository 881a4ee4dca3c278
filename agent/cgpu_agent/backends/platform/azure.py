"""Azure's Confidential VMs: the paravisor keeps a report in the vTPM, and makes a new one for what is written beside.

There is one place for these 64 bytes, no lock on it and no signal when the report is made; whoever may use the TPM
may write them, too. So write, then look until the report names them, and begin anew where others wrote meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from cgpu_agent.backends.base import PlatformKind, PlatformReport, Tpm, TpmCommands
from cgpu_agent.backends.platform.store import PlatformStore
from cgpu_agent.backends.tpm.transport import timed_out
from cgpu_agent.errors import DeviceFault, HostileInput, Misuse
from cgpu_agent.wire.hcl import REPORT_INDEX, USER_DATA_INDEX, HclReport, ReportType, parse_claims, parse_hcl
from cgpu_agent.wire.snp import parse_snp_report
from cgpu_agent.wire.tdx import parse_td_quote, parse_tdreport

T = TypeVar("T")

TdQuoter = Callable[[bytes], Awaitable[bytes | None]]
"""TDREPORT to TD quote; ``None`` where nobody makes one now."""

KINDS: Final[dict[ReportType, PlatformKind]] = {ReportType.SNP: "azure-cvm-snp", ReportType.TDX: "azure-cvm-tdx"}

_READS: Final = 5
"""A report that is replaced while it is read comes out torn."""
_WRITES: Final = 4
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 0.5
_PATIENCE: Final = 10.0
"""Seconds for a new report, at most; public clients wait three."""
_RESIGNATION: Final = 60.0
"""Seconds without another attempt after one that failed: all evidence waits for them."""
_REFUSED_WRITE: Final = frozenset({"TPM_AUTH", "TPM_BUSY", "TPM_ERROR", "TPM_NV_FULL"})


@dataclass(frozen=True, slots=True)
class _Reading:
    """A report, and what stood beside it afterwards."""

    raw: bytes
    report: HclReport
    user_data: bytes | None
    written: bytes | None


class AzureCvm:
    """``Platform`` of a Confidential VM.

    Args:
        tpm: asked for a moment at a time: nothing waits while it holds the TPM.
        kind: of the report that is there.
        store: collateral that was fetched before.
        quoter: makes TD quotes. Without one a TD report is never renewed, since a quote from the store would then be
            about another report.
    """

    def __init__(self, tpm: Tpm, kind: PlatformKind, store: PlatformStore, quoter: TdQuoter | None = None) -> None:
        self.kind: PlatformKind = kind
        self._tpm: Final = tpm
        self._store: Final = store
        self._quoter: Final = quoter
        self._turn: Final = asyncio.Lock()
        self._resigned: tuple[float, str] | None = None

    async def report(self, user_data: bytes | None, *, timeout: float) -> PlatformReport:
        if user_data is not None and len(user_data) != 64:
            raise Misuse("BAD_USER_DATA", "a platform report binds 64 bytes")
        deadline = time.monotonic() + timeout
        missing: list[tuple[str, str]] = []
        stale = None
        if user_data is None:
            reading = await self._read(deadline)
        elif self.kind == "azure-cvm-tdx" and self._quoter is None:
            reading, stale = await self._read(deadline), "a new TD report would need a new TD quote"
        else:
            reading, stale = await self._renewed_in_turn(user_data, deadline)
        if stale is not None:
            missing.append(("platform-freshness", stale))
        certificates: tuple[bytes, ...] = ()
        quote = None
        try:
            if reading.report.kind is ReportType.TDX:
                quote = await self._td_quote(reading.report.hardware, deadline)
            else:
                certificates = await asyncio.to_thread(self._certificates)
        except HostileInput as error:
            part = "td-quote" if reading.report.kind is ReportType.TDX else "platform-certificates"
            missing.append((part, error.message))
        fresh = user_data is not None and stale is None
        return PlatformReport(self.kind, reading.raw, certificates, quote, fresh, tuple(missing))

    def _certificates(self) -> tuple[bytes, ...]:
        found = self._store.certificates()
        if not found:
            raise HostileInput("NO_CERTIFICATES", "AMD's certificates were not fetched")
        return found

    async def _td_quote(self, tdreport: bytes, deadline: float) -> bytes:
        """The quote over this very report. Raises ``HostileInput``."""
        quote = None
        if self._quoter is None:
            quote = await asyncio.to_thread(self._store.td_quote)
        else:
            with contextlib.suppress(asyncio.TimeoutError):
                quote = await asyncio.wait_for(self._quoter(tdreport), deadline - time.monotonic())
        if quote is None:
            raise HostileInput("NO_TD_QUOTE", "there is no TD quote")
        if parse_td_quote(quote).body.report_data != parse_tdreport(tdreport).report_data:
            raise HostileInput("QUOTE_MISMATCH", "the TD quote is about another report: fetch it again")
        return quote

    async def _renewed_in_turn(self, user_data: bytes, deadline: float) -> tuple[_Reading, str | None]:
        """``_renewed``, one at a time, and after a failure not at all for a while."""
        try:
            await asyncio.wait_for(self._turn.acquire(), deadline - time.monotonic())
        except asyncio.TimeoutError:
            raise timed_out() from None
        try:
            now = time.monotonic()
            if self._resigned is not None and now < self._resigned[0]:
                return await self._read(deadline), self._resigned[1]
            reading, stale = await self._renewed(user_data, min(deadline, now + _PATIENCE))
            self._resigned = None if stale is None else (time.monotonic() + _RESIGNATION, stale)
            return reading, stale
        finally:
            self._turn.release()

    async def _renewed(self, user_data: bytes, deadline: float) -> tuple[_Reading, str | None]:
        """A report for these bytes, or the one that is there and why it is not for them."""
        writes, pause = 0, _FIRST_PAUSE
        while True:
            began = time.monotonic()
            reading = await self._read(deadline)
            took = time.monotonic() - began
            if reading.user_data is not None and hmac.compare_digest(reading.user_data, user_data):
                return reading, None
            if reading.written != user_data:
                if writes == _WRITES:
                    return reading, "other users of the TPM kept asking for reports of their own"
                writes += 1
                try:
                    await self._run(lambda tpm: tpm.nv_write(USER_DATA_INDEX, user_data), deadline)
                except DeviceFault as fault:
                    if fault.slug not in _REFUSED_WRITE:
                        raise
                    return reading, fault.message
            if time.monotonic() + pause + took >= deadline:
                return reading, "no new report was made in time"
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _read(self, deadline: float) -> _Reading:
        """A whole report. Raises ``HostileInput`` where there is none however often one looks."""
        for attempt in range(_READS):
            try:
                return await self._run(_look, deadline)
            except HostileInput:
                if attempt == _READS - 1:
                    raise
            await asyncio.sleep(_FIRST_PAUSE)
        raise AssertionError  # pragma: no cover - the last attempt returned or raised

    async def _run(self, job: Callable[[TpmCommands], T], deadline: float) -> T:
        return await self._tpm.run(job, timeout=max(0.0, deadline - time.monotonic()))


def _look(tpm: TpmCommands) -> _Reading:
    raw = tpm.nv_read(REPORT_INDEX)
    if raw is None:
        raise HostileInput("NO_REPORT", "the report that was in the TPM is gone")
    report = parse_hcl(raw)
    bound = parse_tdreport if report.kind is ReportType.TDX else parse_snp_report
    # Not a judgement, but how a torn report shows: who replaces it does so while we read.
    expected = hashlib.sha256(report.claims).digest() + bytes(32)
    if bound(report.hardware).report_data != expected:
        raise HostileInput("REPORT_DATA_MISMATCH", "the report in the TPM does not bind its own claims")
    return _Reading(raw, report, parse_claims(report.claims).user_data, tpm.nv_read(USER_DATA_INDEX))
