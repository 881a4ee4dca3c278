"""Which log explains which PCR, when several logs tell of one."""

from __future__ import annotations

import hashlib

from cgpu_agent.verifier.logs import RegisterStory, explain_registers
from cgpu_agent.wire import eventlog
from cgpu_agent.wire.cel import Record, SystemdRecord
from fixtures.bundles import BOOT_LOG, RECORDED_PCRS, extended

LOG = eventlog.parse(BOOT_LOG, kind="tpm")
AGENT = (Record(0, 13, "agent", b"{}"), Record(1, 13, "caller", b"{}"))
WORD = hashlib.sha256(b"sysinit").digest()
PHASE = SystemdRecord(11, {"sha256": WORD}, "phase", "sysinit")


def story(pcrs: dict[int, bytes], *systemd: SystemdRecord, log: eventlog.EventLog | None = LOG) -> RegisterStory:
    return explain_registers({**RECORDED_PCRS, **pcrs}, log, systemd, AGENT)


def after(pcr: int, *digests: bytes) -> dict[int, bytes]:
    return {pcr: extended(digests, RECORDED_PCRS[pcr])}


REGISTER = after(13, AGENT[0].digest, AGENT[1].digest)


def test_each_log_goes_on_where_the_one_before_it_ended() -> None:
    both = SystemdRecord(14, {"sha256": WORD}, "", "")
    found = story({**REGISTER, **after(11, WORD), **after(14, WORD)}, PHASE).results
    assert found[13].note == "equal after the records of the agent"
    assert found[11].note == "equal after the records of systemd"
    assert {found[index].status for index in (0, 7, 11, 13)} == {"explained"}
    assert story({**REGISTER, **after(14, WORD)}, both).results[14].status == "mismatch"


def test_two_later_logs_extend_one_pcr_in_turn() -> None:
    first = SystemdRecord(13, {"sha256": WORD}, "", "")
    found = story(after(13, WORD, *(record.digest for record in AGENT)), first).results[13]
    assert (found.status, found.note) == ("explained", "equal after the records of systemd and the agent")


def test_records_that_lead_elsewhere_leave_a_pcr_unexplained() -> None:
    found = story({}, PHASE).results
    assert {found[11].status, found[13].status} == {"unexplained"}
    assert found[13].note == "not what the records of the agent lead to"
    assert found[13].expected == REGISTER[13]


def test_a_later_log_takes_no_contradiction_back() -> None:
    """PCR 7 is the firmware's: a record that would account for its value makes it no better."""
    forged = SystemdRecord(7, {"sha256": WORD}, "", "")
    result = story({**REGISTER, **after(7, WORD)}, forged)
    assert result.results[7].status == "mismatch"
    assert [wrong.index for wrong in result.wrong()] == [7]


def test_a_record_without_a_digest_of_the_bank_explains_nothing() -> None:
    blind = SystemdRecord(11, {"sha1": bytes(20)}, "", "")
    assert story({**REGISTER, **after(11, WORD)}, blind, PHASE).results[11].status == "unexplained"
    assert story({**REGISTER, **after(11, WORD)}, PHASE, blind).results[11].status == "unexplained"


def test_records_of_a_pcr_that_was_not_quoted_are_passed_over() -> None:
    quoted = {index: value for index, value in {**RECORDED_PCRS, **REGISTER}.items() if index != 11}
    found = explain_registers(quoted, LOG, [PHASE], AGENT)
    assert 11 not in found.results
    assert found.wrong() == []


def test_a_pcr_that_the_firmware_extended_must_be_quoted() -> None:
    quoted = {index: value for index, value in {**RECORDED_PCRS, **REGISTER}.items() if index != 14}
    assert [(r.index, r.status) for r in explain_registers(quoted, LOG, [], AGENT).wrong()] == [(14, "uncompared")]


def test_without_a_firmware_log_only_later_logs_explain_anything() -> None:
    result = story({**REGISTER, **after(11, WORD)}, PHASE, log=None)
    explained = [index for index, found in result.results.items() if found.status == "explained"]
    assert explained == [11, 13]
    assert result.results[7].note == "there is no firmware log"
    assert result.wrong() == []
