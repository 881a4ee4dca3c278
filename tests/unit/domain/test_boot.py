"""Quotes that match their values, and extraData that only says what its caller may have signed."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable

import pytest

from cgpu_agent.backends.base import LoadedKey, Signed, TpmCommands
from cgpu_agent.domain.boot import AGENT, BootQuote, consistent_quote, selection_of
from cgpu_agent.domain.core import Core
from cgpu_agent.errors import AgentError, Exhausted, Misuse, Unavailable
from cgpu_agent.verifier.keys import load_attestation_key
from cgpu_agent.verifier.quote import verify_quote
from cgpu_agent.wire.extradata import caller_quote_extra_data
from cgpu_agent.wire.tpm import PcrSelection, parse_attest
from fixtures.gpusessions import MovableClock
from fixtures.machine import PLATFORM_AK, WORKLOAD, Machine

pytestmark = pytest.mark.swtpm

NONCE = bytes(range(32))
ALL = PcrSelection.of("sha256", range(24))


class Restless:
    """A TPM in which somebody else extends a PCR right after each of the first ``times`` quotes."""

    def __init__(self, tpm: TpmCommands, times: int) -> None:
        self._tpm = tpm
        self._left = times
        self.quotes = 0
        self.pcr_read = tpm.pcr_read

    def quote(self, key: int | LoadedKey, qualifying_data: bytes, selection: PcrSelection) -> Signed:
        restless = self._left > 0
        self._left -= restless
        self.quotes += 1
        if restless:  # before and after: neither the values read last nor those read next are the quoted ones
            self._tpm.pcr_extend(10, bytes(32))
        signed = self._tpm.quote(key, qualifying_data, selection)
        if restless:
            self._tpm.pcr_extend(10, bytes(32))
        return signed


def with_core(machine: Machine, scenario: Callable[[Core], object]) -> None:
    async def go() -> None:
        async with machine.serving() as core:
            await scenario(core)  # type: ignore[misc]

    asyncio.run(go())


def quote_while_others_extend(machine: Machine, times: int) -> tuple[BootQuote, int]:
    def job(tpm: TpmCommands) -> tuple[BootQuote, int]:
        tpm.create_platform_ak(PLATFORM_AK, "ecc")
        restless = Restless(tpm, times)
        found, _ = consistent_quote(restless, PLATFORM_AK, b"n", ALL, {})  # type: ignore[arg-type]
        return found, restless.quotes

    return machine.on_tpm(job)


@pytest.mark.parametrize("times", [0, 1, 7])
def test_quote_is_repeated_until_its_values_are_the_quoted_ones(machine: Machine, times: int) -> None:
    found, quotes = quote_while_others_extend(machine, times)
    assert quotes == times + 1
    key = load_attestation_key(machine.on_tpm(lambda tpm: tpm.persistent_public(PLATFORM_AK)) or b"")
    result = verify_quote(
        found.quote.attest,
        found.quote.signature,
        key,
        nonce=b"n",
        pcrs=found.pcrs,
        expected_pcrs=frozenset(found.pcrs),
    )
    assert result.refusal is None


def test_values_that_are_still_the_quoted_ones_are_not_read_again(machine: Machine) -> None:
    def job(tpm: TpmCommands) -> tuple[int, int, bool]:
        tpm.create_platform_ak(PLATFORM_AK, "ecc")
        reads = 0

        class Counting(Restless):
            def __init__(self) -> None:
                super().__init__(tpm, 0)
                self.pcr_read = self._read

            def _read(self, selection: PcrSelection) -> dict[int, bytes]:
                nonlocal reads
                reads += 1
                return tpm.pcr_read(selection)

        known: dict[int, bytes] = {}
        first, _ = consistent_quote(Counting(), PLATFORM_AK, b"1", ALL, known)  # type: ignore[arg-type]
        consistent_quote(Counting(), PLATFORM_AK, b"2", ALL, known)  # type: ignore[arg-type]
        quiet = reads
        tpm.pcr_extend(10, bytes(32))
        last, _ = consistent_quote(Counting(), PLATFORM_AK, b"3", ALL, known)  # type: ignore[arg-type]
        return quiet, reads, last.pcrs[10] != first.pcrs[10]

    assert machine.on_tpm(job) == (1, 2, True)


def test_pcrs_that_never_rest_are_a_reason_to_try_later(machine: Machine) -> None:
    with pytest.raises(Unavailable) as caught:
        quote_while_others_extend(machine, 8)
    assert caught.value.slug == "PCRS_CHANGING"
    assert caught.value.retry_after


def test_quote_names_its_caller_in_a_way_that_anybody_can_recompute(machine: Machine) -> None:
    async def scenario(core: Core) -> None:
        found = await core.boot.quote(WORKLOAD, NONCE, (0, 7))
        claims = WORKLOAD.claims_bytes()
        by_hand = hashlib.sha256(b"cgpu/quote/2\0" + len(claims).to_bytes(4, "big") + claims + NONCE).digest()
        assert parse_attest(found.quote.attest).extra_data == b"\xc6\x02" + by_hand
        key = load_attestation_key(core.boot.keys.platform_ak)
        expected = caller_quote_extra_data(claims, NONCE)
        result = verify_quote(
            found.quote.attest,
            found.quote.signature,
            key,
            nonce=expected,
            pcrs=found.pcrs,
            expected_pcrs=frozenset(found.pcrs),
        )
        assert result.refusal is None
        assert found.pcrs.keys() == {0, 7}

    with_core(machine, scenario)


def test_caller_claims_and_nonce_cannot_be_shifted_into_each_other() -> None:
    assert caller_quote_extra_data(b"claims", b"nonce...") != caller_quote_extra_data(b"claimsn", b"once...")


def test_raw_quote_signs_the_callers_bytes_as_they_are(machine: Machine) -> None:
    async def scenario(core: Core) -> None:
        for nonce in (b"x", bytes(48), b"\xc6" * 33, b"\xc6" * 35, b"\xc5" + bytes(33)):
            found = await core.boot.raw_quote(WORKLOAD, nonce, ())
            assert parse_attest(found.quote.attest).extra_data == nonce
            assert found.pcrs.keys() == set(range(16))

    with_core(machine, scenario)


@pytest.mark.parametrize(
    "nonce", [b"", bytes(49), *(bytes([0xC6, version]) + bytes(32) for version in (0, 1, 2, 3, 0xFF))]
)
def test_raw_quote_never_signs_a_form_of_the_agents_own(machine: Machine, nonce: bytes) -> None:
    async def scenario(core: Core) -> None:
        with pytest.raises(Misuse) as caught:
            await core.boot.raw_quote(WORKLOAD, nonce, ())
        assert caught.value.slug == "BAD_NONCE"

    with_core(machine, scenario)


@pytest.mark.parametrize(
    ("ask", "slug"),
    [
        (lambda boot: boot.quote(WORKLOAD, bytes(7), ()), "BAD_NONCE"),
        (lambda boot: boot.quote(WORKLOAD, bytes(65), ()), "BAD_NONCE"),
        (lambda boot: boot.quote(WORKLOAD, NONCE, (24,)), "BAD_PCR"),
        (lambda boot: boot.read_pcrs(WORKLOAD, (0xFFFFFFFF,)), "BAD_PCR"),
        (lambda boot: boot.measure_event(WORKLOAD, b""), "BAD_CONTENT"),
        (lambda boot: boot.measure_event(WORKLOAD, bytes(1025)), "BAD_CONTENT"),
        (lambda boot: boot.activate_credential(WORKLOAD, "rsa", b"", b"x"), "BAD_CREDENTIAL"),
        (lambda boot: boot.activate_credential(WORKLOAD, "rsa", b"x", bytes(513)), "BAD_CREDENTIAL"),
    ],
)
def test_request_outside_its_limits_never_reaches_the_tpm(
    machine: Machine, ask: Callable[[object], object], slug: str
) -> None:
    async def scenario(core: Core) -> None:
        machine.tpm.kill()
        with pytest.raises(Misuse) as caught:
            await ask(core.boot)  # type: ignore[misc]
        assert caught.value.slug == slug

    with_core(machine, scenario)


def test_event_of_a_caller_is_recorded_under_its_hashed_name(machine: Machine) -> None:
    async def scenario(core: Core) -> None:
        sequence, digest = await core.boot.measure_event(WORKLOAD, b"loaded model 7")
        record = core.boot.log.records[sequence]
        assert (record.author, record.digest) == ("caller", digest)
        assert WORKLOAD.digest().hex().encode() in record.content
        assert b"inference" not in record.content  # every bundle shows the log to every relying party

    with_core(machine, scenario)


def test_event_of_a_caller_never_hashes_to_a_record_of_the_agent(machine: Machine) -> None:
    async def scenario(core: Core) -> None:
        own = core.boot.log.records[0]
        sequence, digest = await core.boot.measure_event(WORKLOAD, own.content)
        assert digest != own.digest
        assert core.boot.log.records[sequence].author == "caller"

    with_core(machine, scenario)


def test_endorsement_keys_are_made_once_for_all_who_ask(machine: Machine) -> None:
    async def scenario(core: Core) -> None:
        answers = await asyncio.gather(*(core.boot.ek_publics() for _ in range(8)))
        assert len(set(answers)) == 1
        machine.tpm.kill()
        assert await core.boot.ek_publics() == answers[0]

    with_core(machine, scenario)


def test_fault_of_the_tpm_is_remembered_until_it_answers_again(machine: Machine) -> None:
    async def scenario(core: Core) -> None:
        assert core.boot.fault is None
        socket = machine.tpm.data_socket
        away = socket.with_name("away")
        socket.rename(away)
        with pytest.raises(AgentError):
            await core.boot.probe()
        assert core.boot.fault is not None
        assert core.boot.fault.slug == "TPM_IO"
        assert core.boot.refusal is None
        away.rename(socket)
        await core.boot.probe()
        assert core.boot.fault is None

    with_core(machine, scenario)


def test_selection_takes_pcr_indices_only() -> None:
    assert selection_of((3, 1, 1)).pcrs == (1, 3)
    with pytest.raises(Misuse) as caught:
        selection_of((-1,))
    assert caught.value.slug == "BAD_PCR"


def test_a_uid_has_its_share_of_the_tpms_time_and_takes_none_of_the_others(machine: Machine) -> None:
    clock = MovableClock()

    async def go() -> None:
        async with machine.agent(tpm_seconds_per_minute=30) as core:
            core.clock = clock
            await core.establish()
            with pytest.raises(ZeroDivisionError):  # a job that fails costs the same
                await core.boot.run(WORKLOAD.uid, lambda _: (clock.pass_by(40), 1 // 0))
            with pytest.raises(Exhausted) as refused:
                await core.boot.read_pcrs(WORKLOAD, (0,))
            assert refused.value.slug == "TPM_LIMIT"
            await core.boot.run(WORKLOAD.uid + 1, lambda _: None)
            await core.boot.probe()
            await core.boot.run(AGENT, lambda _: clock.pass_by(300))
            await core.boot.read_pcrs(WORKLOAD, (0,))

    asyncio.run(go())


def test_who_hangs_up_pays_for_what_the_tpm_does_all_the_same(machine: Machine) -> None:
    clock, at_work, go_on = MovableClock(), threading.Event(), threading.Event()

    def job(_: TpmCommands) -> None:
        at_work.set()
        go_on.wait(60)
        clock.pass_by(40)

    async def go() -> None:
        async with machine.agent(tpm_seconds_per_minute=30) as core:
            core.clock = clock
            await core.establish()
            call = asyncio.create_task(core.boot.run(WORKLOAD.uid, job))
            await asyncio.to_thread(at_work.wait, 60)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            go_on.set()
            await core.boot.probe()  # the job is over
            with pytest.raises(Exhausted):
                await core.boot.read_pcrs(WORKLOAD, (0,))

    asyncio.run(go())
