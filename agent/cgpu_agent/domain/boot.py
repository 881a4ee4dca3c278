"""Measured-boot evidence of one instant: a quote, the PCR values it covers and the logs that explain them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

from cgpu_agent.backends.base import AkAlgorithm, LoadedKey, MeasurementLogs, Signed, Tpm, TpmCommands
from cgpu_agent.domain.agentlog import AgentLog, CallerRecords
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.keys import Keys, tpm_was_reset
from cgpu_agent.domain.rate import Rate
from cgpu_agent.domain.turns import Turns
from cgpu_agent.errors import DeviceFault, Misuse, Unavailable
from cgpu_agent.wire import strictjson
from cgpu_agent.wire.cel import Author, Record
from cgpu_agent.wire.extradata import caller_quote_extra_data, is_reserved_extra_data
from cgpu_agent.wire.tpm import Attest, ClockInfo, PcrSelection, Quoted, parse_attest, parse_signature, pcr_digest

T = TypeVar("T")

AGENT = "agent"
"""Owner of the agent's own TPM jobs, among them those that serve many callers at once."""

_QUOTE_ATTEMPTS = 8
_OUT_OF_REACH = frozenset({"TPM_IO", "TPM_TIMEOUT"})


@dataclass(frozen=True, slots=True)
class BootQuote:
    """A quote and the PCR values it covers."""

    quote: Signed
    pcrs: dict[int, bytes]


def consistent_quote(
    tpm: TpmCommands,
    key: int | LoadedKey,
    qualifying_data: bytes,
    selection: PcrSelection,
    known: dict[int, bytes],
) -> tuple[BootQuote, Attest]:
    """Quote and read until the values are the quoted ones: PCRs of IMA and others change at any time.

    Args:
        known: values read before, brought up to date here. Where they are still the quoted ones, as the quote's own
            digest says, nothing need be read: half of a quote's time on a slow TPM.

    Raises:
        Unavailable: ``PCRS_CHANGING`` after eight attempts.
    """
    for _ in range(_QUOTE_ATTEMPTS):
        signed = tpm.quote(key, qualifying_data, selection)
        attest = parse_attest(signed.attest)
        if not isinstance(attest.attested, Quoted):
            raise DeviceFault("TPM_ERROR", "the TPM answered a quote with another structure")
        hash_name = parse_signature(signed.signature).hash  # a pcrDigest is made with the signing scheme's hash
        if not known.keys() >= set(selection.pcrs):
            known.update(tpm.pcr_read(selection))
        for fresh in (False, True):
            if fresh:
                known.update(tpm.pcr_read(selection))
            values = {index: known[index] for index in selection.pcrs}
            if pcr_digest(values, selection.pcrs, hash_name) == attest.attested.pcr_digest:
                return BootQuote(signed, values), attest
    raise Unavailable("PCRS_CHANGING", "PCRs kept changing while they were quoted", retry_after=1.0)


def selection_of(pcrs: tuple[int, ...]) -> PcrSelection:
    """A SHA-256 selection. Raises ``Misuse`` (``BAD_PCR``)."""
    try:
        return PcrSelection.of("sha256", pcrs)
    except ValueError:
        raise Misuse("BAD_PCR", "a PCR index must be within 0-23") from None


class MeasuredBoot:
    """The vTPM's side of evidence. Built once the keys of this boot are established.

    Args:
        timeout: seconds for one request's TPM job, waiting included.
        seconds: of the TPM's time, for each uid.
    """

    def __init__(
        self, tpm: Tpm, keys: Keys, log: AgentLog, logs: MeasurementLogs, *, timeout: float, seconds: Rate
    ) -> None:
        self._tpm = tpm
        self._timeout = timeout
        self._seconds = seconds
        self.keys = keys
        self.log = log
        self.logs = logs
        self._caller_records = CallerRecords(log)
        self._eks: tuple[bytes, bytes] | None = None
        self._turns = Turns()
        self.known_pcrs: dict[int, bytes] = {}
        """Values read last; only touched on the TPM's thread."""
        self._making_eks = asyncio.Lock()
        self.refusal: Unavailable | None = None
        """Set for good once measured state cannot be trusted any more; every call raises its like until reboot."""
        self.fault: DeviceFault | None = None
        """Why the last job got nothing from the TPM; ``None`` once one got something."""

    @property
    def waiting(self) -> int:
        """Jobs that wait for their turn at the TPM."""
        return self._turns.waiting

    async def run(self, owner: Hashable, job: Callable[[TpmCommands], T], *, idempotent: bool = True) -> T:
        """Run a TPM job, unless evidence is refused; remember a refusal that only a reboot mends.

        Args:
            owner: on whose behalf, a uid or ``AGENT``: owners take turns, and a uid has a share of the TPM's time.

        Raises ``Exhausted`` (``TPM_LIMIT``), and what the job raises.
        """
        if self.refusal is not None:
            # A new one: an exception that is raised again and again keeps every traceback.
            raise Unavailable(self.refusal.slug, self.refusal.message)
        try:
            async with self._turns.turn(owner):
                result = await self._charged(owner, job, idempotent)
        except DeviceFault as error:
            if error.slug == "TPM_RESET":
                self.refusal = tpm_was_reset()
                raise tpm_was_reset() from error
            if error.slug in _OUT_OF_REACH:
                self.fault = error
            raise
        except Unavailable as error:
            if error.slug in ("TPM_RESET_DETECTED", "AGENT_LOG_DIVERGED"):
                self.refusal = Unavailable(error.slug, error.message)
            raise
        self.fault = None
        return result

    async def _charged(self, owner: Hashable, job: Callable[[TpmCommands], T], idempotent: bool) -> T:
        """Run a job, at the cost of a uid's share of the TPM: its time there, not what it waits."""
        if not isinstance(owner, int):
            return await self._tpm.run(job, timeout=self._timeout, idempotent=idempotent)
        self._seconds.require(owner, 0.0)
        loop = asyncio.get_running_loop()

        def timed(tpm: TpmCommands) -> T:
            begun = self._seconds.clock.monotonic()
            try:
                return job(tpm)
            finally:  # from here, not from the waiting side: who hangs up has the TPM at work all the same
                spent = self._seconds.clock.monotonic() - begun
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(self._seconds.spend, owner, spent)

        return await self._tpm.run(timed, timeout=self._timeout, idempotent=idempotent)

    def check_counters(self, now: ClockInfo) -> None:
        """Raises ``TPM_RESET_DETECTED`` when the TPM was reset or restarted since the keys were established."""
        then = self.keys.clock
        if (now.reset_count, now.restart_count) != (then.reset_count, then.restart_count):
            raise tpm_was_reset()

    async def probe(self) -> None:
        """Ask the TPM for its counters, so that a reset, a failure and its end are noticed though nobody calls."""
        await self.run(AGENT, lambda tpm: self.check_counters(tpm.clock()))

    async def ek_publics(self) -> tuple[bytes, bytes]:
        """TPMT_PUBLIC of the RSA and the ECC EK; made once, since recreating an RSA EK is slow."""
        async with self._making_eks:
            if self._eks is None:
                self._eks = await self.run(AGENT, lambda tpm: (tpm.ek_public("rsa"), tpm.ek_public("ecc")))
            return self._eks

    async def activate_credential(self, caller: Caller, ek: AkAlgorithm, id_object: bytes, secret: bytes) -> bytes:
        """TPM2_ActivateCredential for the platform AK. Raises ``Misuse`` (``BAD_CREDENTIAL``)."""
        if not 1 <= len(id_object) <= 256 or not 1 <= len(secret) <= 512:
            raise Misuse("BAD_CREDENTIAL", "credential_blob needs 1 to 256 bytes, secret 1 to 512")
        handle = self.keys.platform_ak_handle
        return await self.run(caller.uid, lambda tpm: tpm.activate_credential(handle, ek, id_object, secret))

    async def quote(self, caller: Caller, nonce: bytes, pcrs: tuple[int, ...]) -> BootQuote:
        """A plain quote that names its caller (see ``wire.extradata.caller_quote_extra_data``)."""
        if not 8 <= len(nonce) <= 64:
            raise Misuse("BAD_NONCE", "the nonce must have 8 to 64 bytes")
        return await self._plain_quote(caller, caller_quote_extra_data(caller.claims_bytes(), nonce), pcrs)

    async def raw_quote(self, caller: Caller, nonce: bytes, pcrs: tuple[int, ...]) -> BootQuote:
        """A quote over the caller's bytes as they are; never one of the agent's own forms."""
        if not 1 <= len(nonce) <= 48:
            raise Misuse("BAD_NONCE", "the nonce must have 1 to 48 bytes")
        if is_reserved_extra_data(nonce):
            raise Misuse("BAD_NONCE", "34 bytes beginning with C6 are the agent's own form and are never signed raw")
        return await self._plain_quote(caller, nonce, pcrs)

    async def _plain_quote(self, caller: Caller, extra_data: bytes, pcrs: tuple[int, ...]) -> BootQuote:
        selection = selection_of(pcrs or tuple(range(16)))
        handle = self.keys.platform_ak_handle

        def job(tpm: TpmCommands) -> BootQuote:
            found, attest = consistent_quote(tpm, handle, extra_data, selection, self.known_pcrs)
            self.check_counters(attest.clock_info)
            return found

        return await self.run(caller.uid, job)

    async def read_pcrs(self, caller: Caller, pcrs: tuple[int, ...]) -> dict[int, bytes]:
        selection = selection_of(pcrs or tuple(range(24)))
        return await self.run(caller.uid, lambda tpm: tpm.pcr_read(selection))

    async def systemd_log(self, caller: Caller) -> bytes | None:
        """systemd's log as it is now; read on the TPM's thread, where waiting for its lock holds nobody up."""

        def job(_tpm: TpmCommands) -> bytes | None:
            with self.logs.systemd() as log:
                return log

        return await self.run(caller.uid, job)

    async def measure_event(self, caller: Caller, content: bytes) -> tuple[int, bytes]:
        """Measure a caller's event under its (hashed) identity; returns sequence number and digest."""
        if not 1 <= len(content) <= 1024:
            raise Misuse("BAD_CONTENT", "the content must have 1 to 1024 bytes")
        self._caller_records.take(caller.uid)
        body = strictjson.dumps({"caller": caller.digest().hex(), "data": strictjson.b64(content)})
        record = await self._measure(caller.uid, "caller", body)
        return record.sequence, record.digest

    async def measure_agent(self, event: dict[str, str]) -> None:
        """Measure an event of the agent's own."""
        await self._measure(AGENT, "agent", strictjson.dumps(event))

    async def _measure(self, owner: Hashable, author: Author, content: bytes) -> Record:
        def job(tpm: TpmCommands) -> Record:
            # First: after a reset the register explains nothing, and "diverged" would blame somebody else.
            self.check_counters(tpm.clock())
            return self.log.measure(tpm, author, content)

        return await self.run(owner, job, idempotent=False)
