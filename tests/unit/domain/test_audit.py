"""The audit log: nothing lost, nothing rewritten unnoticed, nobody fills the disk with refusals."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from cgpu_agent.domain import audit as audit_module
from cgpu_agent.domain.audit import DENIAL_SECONDS, AuditLog
from cgpu_agent.domain.caller import Caller
from cgpu_agent.errors import HostileInput, Unavailable
from cgpu_agent.wire.audit import EMPTY, MAX_RECORD, AuditHead, follow

BOOT = "00000000-0000-0000-0000-000000000001"
CALLER = Caller(1000, 1000, (), 7, None, None, "/", None, "pidfd")


class ManualClock:
    """Time that a test moves."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def opened(folder: Path, clock: ManualClock) -> AuditLog:
    return AuditLog(folder, BOOT, clock)


def records(folder: Path) -> tuple[list[str], AuditHead]:
    found, head = follow((folder / "audit.jsonl").read_bytes(), EMPTY)
    return [record.event for record in found], head


def test_records_follow_each_other_over_restarts(folder: Path, clock: ManualClock) -> None:
    for number in range(3):
        asyncio.run(opened(folder, clock).record("agent-start", {"n": number}))
    events, head = records(folder)
    assert events == ["agent-start"] * 3
    assert head.sequence == 2
    assert opened(folder, clock).head == head


def test_a_record_cut_short_by_a_crash_is_dropped_and_the_chain_goes_on(folder: Path, clock: ManualClock) -> None:
    asyncio.run(opened(folder, clock).record("call", {}))
    with (folder / "audit.jsonl").open("ab") as file:
        file.write(b'{"boot_id":"half a rec')
    asyncio.run(opened(folder, clock).record("call", {}))
    assert records(folder)[1].sequence == 1


@pytest.mark.parametrize("change", ["edit", "drop", "swap"])
def test_refuses_a_rewritten_history(folder: Path, clock: ManualClock, change: str) -> None:
    log = opened(folder, clock)
    for number in range(3):
        asyncio.run(log.record("call", {"n": number}))
    path = folder / "audit.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        {
            "edit": first + second.replace(b'"n":1', b'"n":9') + third,
            "drop": first + third,
            "swap": second + first + third,
        }[change]
    )
    with pytest.raises(Unavailable) as caught:
        opened(folder, clock)
    assert caught.value.slug == "AUDIT_BROKEN"


def test_a_rewritten_tail_no_longer_leads_to_a_head_seen_before(folder: Path, clock: ManualClock) -> None:
    log = opened(folder, clock)
    asyncio.run(log.record("call", {"n": 0}))
    asyncio.run(log.record("call", {"n": 1}))
    seen = log.head
    path = folder / "audit.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    fork = opened(folder, clock)
    asyncio.run(fork.record("call", {"n": 2}))
    assert fork.head.sequence == seen.sequence
    assert fork.head.digest != seen.digest


def test_full_files_are_kept_and_the_chain_goes_on(
    folder: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "MAX_FILE", 400)
    log = opened(folder, clock)
    for _ in range(10):
        asyncio.run(log.record("call", {}))
    files = sorted(folder.glob("audit.[0-9]*.jsonl"))
    assert len(files) >= 2
    _, head = follow(b"".join(file.read_bytes() for file in [*files, folder / "audit.jsonl"]), EMPTY)
    assert head == log.head
    (folder / "audit.jsonl").unlink()
    assert opened(folder, clock).head.sequence < log.head.sequence


def test_the_name_of_every_new_file_is_on_disk_before_its_first_record_counts(
    folder: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, synced, fsync = opened(folder, clock), list[str](), os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(audit_module, "MAX_FILE", 400)
    while not list(folder.glob("audit.[0-9]*.jsonl")):
        asyncio.run(log.record("call", {}))
    assert synced[:2] == synced[-2:] == ["audit.jsonl", "state"]
    assert synced.count("state") == 2


def test_what_needs_its_record_does_not_happen_without_it(
    folder: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = opened(folder, clock)
    asyncio.run(log.record("call", {"n": 0}))

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(Unavailable) as caught:
            asyncio.run(log.record("call", {"n": 1}))
    assert caught.value.slug == "AUDIT_UNAVAILABLE"
    asyncio.run(log.record("call", {"n": 2}))
    assert records(folder)[1] == log.head == AuditHead(1, log.head.digest)


def test_a_caller_who_is_gone_while_its_record_is_written_breaks_no_chain(
    folder: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, fsync = opened(folder, clock), os.fsync
    writing, go_on = threading.Event(), threading.Event()

    def slow(descriptor: int) -> None:
        writing.set()
        assert go_on.wait(60)
        fsync(descriptor)

    async def scenario() -> list[int]:
        gone = asyncio.create_task(log.record("call", {"n": 0}))
        await asyncio.to_thread(writing.wait, 60)
        gone.cancel()
        await asyncio.wait([gone])
        assert gone.cancelled()
        others = [asyncio.create_task(log.record("call", {"n": number})) for number in (1, 2)]
        await asyncio.sleep(0.1)  # time enough for a second writer to start beside the first
        go_on.set()
        return await asyncio.gather(*others)

    monkeypatch.setattr(os, "fsync", slow)
    assert asyncio.run(scenario()) == [1, 2]
    assert records(folder)[1] == log.head == opened(folder, clock).head


def test_refusals_become_one_record_per_caller_method_and_minute(folder: Path, clock: ManualClock) -> None:
    log = opened(folder, clock)
    for _ in range(5000):
        log.denied(CALLER, "/x/GetRawQuote", "NOT_ALLOWED")
    log.denied(None, "/x/GetRawQuote", "CALLER_UNKNOWN")
    asyncio.run(log.flush_denials())
    assert not (folder / "audit.jsonl").exists()
    clock.now += DENIAL_SECONDS
    asyncio.run(log.flush_denials())
    found, _ = follow((folder / "audit.jsonl").read_bytes(), EMPTY)
    assert [(r.data["uid"], r.data["count"]) for r in found] == [(1000, 5000), (-1, 1)]


def test_refusals_that_cannot_be_written_are_counted_on(
    folder: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = opened(folder, clock)
    log.denied(CALLER, "/x/GetRawQuote", "NOT_ALLOWED")
    (folder / "audit.jsonl").mkdir()  # nothing can be appended to that
    with pytest.raises(Unavailable):
        asyncio.run(log.flush_denials(now=True))
    (folder / "audit.jsonl").rmdir()
    log.denied(CALLER, "/x/GetRawQuote", "NOT_ALLOWED")
    assert asyncio.run(log.flush_denials(now=True))
    found, _ = follow((folder / "audit.jsonl").read_bytes(), EMPTY)
    assert [record.data["count"] for record in found] == [2]


def test_a_record_that_nobody_could_read_is_not_written(folder: Path, clock: ManualClock) -> None:
    log = opened(folder, clock)
    for length, fits in ((MAX_RECORD, False), (MAX_RECORD - 300, True), (2 * MAX_RECORD, False)):
        if fits:
            asyncio.run(log.record("call", {"policies": "x" * length}))
            continue
        with pytest.raises(Unavailable) as caught:
            asyncio.run(log.record("call", {"policies": "x" * length}))
        assert caught.value.slug == "AUDIT_UNAVAILABLE"
    assert opened(folder, clock).head == log.head == records(folder)[1]
    assert log.head.sequence == 0


def test_made_up_names_cannot_grow_the_counts_without_bound(folder: Path, clock: ManualClock) -> None:
    log = opened(folder, clock)
    for number in range(3000):
        log.denied(CALLER, f"/x/{number}", "NOT_ALLOWED")
    asyncio.run(log.flush_denials(now=True))
    found, _ = follow((folder / "audit.jsonl").read_bytes(), EMPTY)
    assert len(found) <= 1025
    assert sum(record.data["count"] for record in found) == 3000


def test_a_torn_log_is_no_log_to_a_verifier(folder: Path, clock: ManualClock) -> None:
    asyncio.run(opened(folder, clock).record("call", {}))
    with pytest.raises(HostileInput) as caught:
        follow((folder / "audit.jsonl").read_bytes()[:-1], EMPTY)
    assert caught.value.slug == "AUDIT_TORN"


def test_a_torn_record_that_cannot_be_cut_off_now_is_cut_off_before_the_next(
    folder: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = opened(folder, clock)
    asyncio.run(log.record("call", {"n": 0}))
    with monkeypatch.context() as disk:
        write = os.write
        disk.setattr(os, "write", lambda fd, data: write(fd, data[:9]))
        disk.setattr(os, "truncate", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        for _ in range(2):
            with pytest.raises(Unavailable):
                asyncio.run(log.record("call", {"n": 1}))
    assert not (folder / "audit.jsonl").read_bytes().endswith(b"\n")
    asyncio.run(log.record("call", {"n": 2}))
    assert records(folder)[1].sequence == 1
