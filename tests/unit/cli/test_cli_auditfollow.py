"""``cgpuctl audit follow`` on a log that an agent's own code writes meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cgpu_agent.cli import auditfollow
from cgpu_agent.cli.auditfollow import GrowingLog
from cgpu_agent.domain import audit as audit_module
from cgpu_agent.domain.audit import AuditLog
from cgpu_agent.errors import HostileInput
from cgpu_agent.wire.audit import EMPTY, AuditHead, AuditRecord, digest_of
from fixtures.ctl import REFUSED, USAGE, Ctl
from fixtures.gpusessions import MovableClock

BOOT = "00000000-0000-0000-0000-000000000001"
INTERRUPTED = 130


class Agent:
    """Who writes the log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "state"
        self.path = self.folder / "audit.jsonl"
        self.restart()

    def restart(self) -> None:
        self.log = AuditLog(self.folder, BOOT, MovableClock())

    def writes(self, *numbers: int) -> None:
        for number in numbers:
            asyncio.run(self.log.record("call", {"n": number}))


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    return Agent(tmp_path)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are full after two records."""
    monkeypatch.setattr(audit_module, "MAX_FILE", 400)


class Follower:
    """The command, in a process of its own."""

    def __init__(self, path: Path, *options: str) -> None:
        command = [sys.executable, "-m", "cgpu_agent.cli.main", "audit", "follow", str(path), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def numbers(self, count: int) -> list[int]:
        return [json.loads(self.line())["data"]["n"] for _ in range(count)]

    def ended(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@contextmanager
def following(path: Path, *options: str) -> Iterator[Follower]:
    follower = Follower(path, *options)
    try:
        yield follower
    finally:
        follower.process.kill()
        follower.process.communicate()


def test_the_last_ten_then_each_as_it_comes_until_interrupted(agent: Agent) -> None:
    agent.writes(*range(12))
    with following(agent.path, "--json") as follower:
        assert follower.numbers(10) == list(range(2, 12))
        for number in (12, 13):
            agent.writes(number)
            assert follower.numbers(1) == [number]
        follower.process.send_signal(signal.SIGINT)
        assert follower.ended() == (INTERRUPTED, "", "")


def test_people_get_a_line_that_a_terminal_may_be_sent(agent: Agent) -> None:
    asyncio.run(agent.log.record("call", {"caller": {"uid": 7, "unit": "\x1b[2J"}}))
    with following(agent.path) as follower:
        line = follower.line()
        assert "uid=7" in line
        assert "\x1b" not in line
        follower.process.send_signal(signal.SIGINT)
        assert follower.ended() == (INTERRUPTED, "", "")


def test_a_reader_that_has_seen_enough_ends_it(agent: Agent) -> None:
    agent.writes(0)
    with following(agent.path, "--json") as follower:
        assert follower.numbers(1) == [0]
        assert follower.process.stdout is not None
        follower.process.stdout.close()
        agent.writes(1)
        assert follower.process.wait(60) == 0


def test_it_goes_on_in_the_next_file(agent: Agent, small: None) -> None:
    agent.writes(0)
    with following(agent.path, "--json") as follower:
        for number in range(9):
            assert follower.numbers(1) == [number]
            agent.writes(number + 1)
        assert len(list(agent.folder.glob("audit.0*.jsonl"))) >= 3


def test_files_that_were_filled_while_it_slept_are_read_too(agent: Agent, small: None) -> None:
    agent.writes(0)
    with following(agent.path, "--json") as follower:
        assert follower.numbers(1) == [0]
        follower.process.send_signal(signal.SIGSTOP)
        agent.writes(*range(1, 10))
        follower.process.send_signal(signal.SIGCONT)
        assert follower.numbers(9) == list(range(1, 10))


def test_a_record_cut_short_by_a_crash_is_awaited_and_forgotten(agent: Agent) -> None:
    agent.writes(0)
    log = GrowingLog(agent.path)
    assert [each.data["n"] for each in log.grown()] == [0]
    with agent.path.open("ab") as file:
        file.write(b'{"boot_id":"half a record, and longer than the one that will stand in its place' * 4)
    assert list(log.grown()) == []
    agent.restart()
    agent.writes(1)
    assert [each.data["n"] for each in log.grown()] == [1]
    log.close()


def forged(agent: Agent) -> None:
    with agent.path.open("ab") as file:
        file.write(AuditRecord(1, bytes(32), 0, BOOT, "call", {"n": 9}).line())


def dropped(agent: Agent) -> None:
    head = AuditHead(1, digest_of(AuditRecord(1, agent.log.head.digest, 0, BOOT, "call", {"n": 1}).line()))
    with agent.path.open("ab") as file:
        file.write(AuditRecord(2, head.digest, 0, BOOT, "call", {"n": 2}).line())


def emptied(agent: Agent) -> None:
    os.truncate(agent.path, 0)


def removed(agent: Agent) -> None:
    agent.path.unlink()


def begun_anew(agent: Agent) -> None:
    agent.path.rename(agent.folder / "elsewhere")
    agent.restart()
    agent.writes(0)


def moved_when_torn(agent: Agent) -> None:
    with agent.path.open("ab") as file:
        file.write(b'{"boot_id":')
    agent.path.rename(agent.folder / "audit.0000000000000000.jsonl")
    line = AuditRecord(1, agent.log.head.digest, 0, BOOT, "call", {"n": 1}).line()
    agent.path.write_bytes(line)


def endless(agent: Agent) -> None:
    with agent.path.open("ab") as file:
        file.write(b'{"boot_id":"' + b"a" * 10_000)


def blocked(agent: Agent) -> None:
    """An empty file where the next full one would be, which never grows."""
    (agent.folder / "audit.0000000000000001.jsonl").touch()
    agent.path.rename(agent.folder / "elsewhere")
    agent.path.write_bytes(AuditRecord(5, bytes(32), 0, BOOT, "call", {}).line())


@pytest.mark.parametrize(
    ("damage", "slug"),
    [
        (forged, "AUDIT_BROKEN"),
        (dropped, "AUDIT_BROKEN"),
        (emptied, "AUDIT_BROKEN"),
        (removed, "AUDIT_BROKEN"),
        (begun_anew, "AUDIT_BROKEN"),
        (moved_when_torn, "AUDIT_TORN"),
        (endless, "AUDIT_TORN"),
        (blocked, "AUDIT_BROKEN"),
    ],
)
def test_a_break_ends_it_loudly(agent: Agent, damage: Any, slug: str) -> None:
    agent.writes(0)
    with following(agent.path, "--json") as follower:
        assert follower.numbers(1) == [0]
        damage(agent)
        code, out, err = follower.ended()
    assert code == REFUSED
    assert json.loads(out)["reason"]["slug"] == slug
    assert f"[{slug}]" in err


def test_a_log_that_is_broken_already_is_not_followed(agent: Agent, tmp_path: Path, capsys: Any) -> None:
    agent.writes(0, 1, 2)
    first, _, third = agent.path.read_bytes().splitlines(keepends=True)
    agent.path.write_bytes(first + third)
    refused = Ctl(tmp_path, capsys)("audit", "follow", str(agent.path))
    assert (refused.code, "[AUDIT_BROKEN]" in refused.err) == (REFUSED, True)


@pytest.mark.parametrize("verb", ["show", "follow"])
def test_a_time_that_no_calendar_knows_is_refused(tmp_path: Path, capsys: Any, verb: str) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(AuditRecord(0, bytes(32), 253_402_300_800, BOOT, "call", {}).line())
    assert Ctl(tmp_path, capsys)("audit", verb, str(path)).code == REFUSED
    path.write_bytes(AuditRecord(0, bytes(32), 253_402_300_799, BOOT, "call", {}).line())
    assert "9999-12-31 23:59:59Z" in Ctl(tmp_path, capsys)("audit", "show", str(path)).out


def test_where_there_is_no_log(tmp_path: Path, capsys: Any) -> None:
    refused = Ctl(tmp_path, capsys)("audit", "follow", str(tmp_path / "audit.jsonl"))
    assert (refused.code, "[NO_FILE]" in refused.err) == (USAGE, True)


def test_a_large_log_takes_no_more_memory_than_a_small_one(tmp_path: Path) -> None:
    path, head = tmp_path / "audit.jsonl", EMPTY
    with path.open("wb") as file:
        for number in range(2000):
            record = AuditRecord(number, head.digest, 0, BOOT, "call", {"n": number, "text": "a" * 7000})
            file.write(record.line())
            head = AuditHead(number, digest_of(record.line()))
    log = GrowingLog(path)
    tracemalloc.start()
    try:
        assert sum(1 for _ in log.grown()) == 2000
        assert tracemalloc.get_traced_memory()[1] < 8 * auditfollow._CHUNK < path.stat().st_size / 4
    finally:
        tracemalloc.stop()
        log.close()


def test_what_was_read_may_not_shrink(agent: Agent) -> None:
    agent.writes(0, 1)
    log = GrowingLog(agent.path)
    assert len(list(log.grown())) == 2
    os.truncate(agent.path, len(agent.path.read_bytes().splitlines(keepends=True)[0]))
    with pytest.raises(HostileInput) as caught:
        list(log.grown())
    assert caught.value.slug == "AUDIT_BROKEN"
    log.close()
