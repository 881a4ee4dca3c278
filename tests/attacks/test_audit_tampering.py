"""Attack 20 again, exhaustively: every record of a real log of releases, over two rotations, altered in every way."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest

from cgpu_agent.backends.keys.credential import CredentialKeys
from cgpu_agent.cli.main import main
from cgpu_agent.domain import audit as audit_module
from cgpu_agent.domain.audit import AuditLog
from cgpu_agent.domain.caller import Caller
from cgpu_agent.domain.policy import Decision, Key
from cgpu_agent.domain.rate import Rate
from cgpu_agent.domain.release import KeySpec, Release
from cgpu_agent.errors import Unavailable
from cgpu_agent.rpc.auditor import Auditor
from cgpu_agent.wire.audit import AuditHead, AuditRecord, digest_of, parse_record
from cgpu_agent.wire.manifest import AuditAnchor
from cgpu_agent.wire.strictjson import dumps
from fixtures.bundles import made
from fixtures.gpusessions import MovableClock
from fixtures.machine import BOOT_ID, WORKLOAD

ALLOWED = Decision(True, ("inference-gets-its-model-key",), "")
RELEASES = 17
RECORDS = 3 * RELEASES
Lines = list[bytes]


@dataclass
class Log:
    """The lines of all files, oldest first; ``sizes`` says how many of them each file has."""

    folder: Path
    sizes: tuple[int, ...]
    lines: Lines
    capsys: pytest.CaptureFixture[str]

    def bundle(self, last: int) -> str:
        """Evidence from just after record ``last``."""
        path = self.folder / f"bundle-{last}.json"
        path.write_bytes(
            made(manifest_with={"audit": AuditAnchor(head(self.lines, last), head(self.lines, last - 1))})
        )
        return str(path)

    def verdict(self, lines: Sequence[bytes], *since: str) -> str:
        """What ``cgpuctl audit verify`` says of these lines in as many files: ``pass``, or the reason."""
        names, left = [], list(lines)
        for number, size in enumerate((*self.sizes[:-1], len(left))):
            names.append(self.folder / f"{number}.jsonl")
            names[-1].write_bytes(b"".join(left[:size]))
            left = left[size:]
        main(["audit", "verify", *map(str, names), *(word for each in since for word in ("--since", each)), "--json"])
        document = json.loads(self.capsys.readouterr().out)
        return str(document.get("reason", {}).get("slug", document["result"]))


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Log:
    """The log of an agent that released keys, each with its three records."""
    monkeypatch.setattr(audit_module, "MAX_FILE", 7_000)
    state, credentials = tmp_path / "state", tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "llama.key").write_bytes(b"secret")
    clock = MovableClock()
    audit = AuditLog(state, BOOT_ID, clock)
    release = Release(
        {"llama": KeySpec(Key("llama", "credential", "models"), "llama.key", 300)},
        {"credential": CredentialKeys(credentials)},
        lambda *_: ALLOWED,
        lambda: 1,
        audit,
        None,  # type: ignore[arg-type]
        Rate(clock, 1000, "KEY_LIMIT", ""),
        clock,
    )

    auditor = Auditor(audit)

    async def one(caller: Caller) -> None:
        outcomes = []

        async def begin(decision: Decision) -> None:
            outcomes.append(await auditor.begins(caller, "/cgpu.agent.v1.Keys/Get", decision))

        await release.get(caller, "llama", None, begin)
        (ended,) = outcomes
        assert ended is not None
        ended("OK")
        await auditor.settle()

    async def work() -> None:
        for number in range(RELEASES):
            await one(dataclasses.replace(WORKLOAD, pid=4000 + number))

    asyncio.run(work())
    files = [*sorted(state.glob("audit.[0-9]*.jsonl")), state / "audit.jsonl"]
    parts = [path.read_bytes().splitlines(keepends=True) for path in files]
    found = Log(tmp_path, tuple(map(len, parts)), [line for part in parts for line in part], capsys)
    assert len(parts) == 3
    assert len(found.lines) == RECORDS
    return found


def head(lines: Lines, number: int) -> AuditHead:
    return AuditHead(number, digest_of(lines[number]))


def rewritten(lines: Lines, number: int, record: AuditRecord) -> Lines:
    """``record`` in that place, and all that follow it chained to it anew."""
    forged = [*lines[:number], record.line()]
    for line in lines[number + 1 :]:
        forged.append(dataclasses.replace(parse_record(line), previous=digest_of(forged[-1])).line())
    return forged


def edits(line: bytes) -> Iterator[bytes]:
    """The record with each of its values changed to another of the same type."""

    def changed(value: Any) -> Iterator[Any]:
        if isinstance(value, dict):
            for name, child in value.items():
                for other in changed(child):
                    yield {**value, name: other}
        elif isinstance(value, list):
            yield [*value, "another"]
        elif isinstance(value, int):
            yield value + 1
        else:
            yield f"{value[:-1]}{'1' if value.endswith('0') else '0'}" if value else "another"

    for document in changed(json.loads(line)):
        yield dumps(document) + b"\n"


def test_the_log_as_it_is_is_whole(log: Log) -> None:
    assert log.verdict(log.lines, *(log.bundle(last) for last in (1, 20, RECORDS - 1))) == "pass"
    assert {parse_record(line).event for line in log.lines} == {"call", "key", "call-ended"}


def test_every_edit_of_a_record_is_found(log: Log) -> None:
    newest, tried = log.bundle(RECORDS - 1), 0
    for number, line in enumerate(log.lines):
        found = list(edits(line))
        if parse_record(line).event != "key":  # of a release every value, of the others one after the other
            found = [found[number % len(found)]]
        for edited in found:
            tried += 1
            assert edited != line
            assert log.verdict([*log.lines[:number], edited, *log.lines[number + 1 :]], newest) != "pass"
    assert tried > 20 * RELEASES


def test_every_dropped_doubled_or_moved_record_is_found(log: Log) -> None:
    lines, newest, oldest = log.lines, log.bundle(RECORDS - 1), log.bundle(1)
    for number in range(RECORDS):
        assert log.verdict([*lines[:number], *lines[number + 1 :]], newest, oldest) != "pass"
        assert log.verdict([*lines[: number + 1], *lines[number:]], newest) == "AUDIT_BROKEN"
    releases = [number for number, line in enumerate(lines) if parse_record(line).event == "key"]
    for one, other in (*pairwise(range(RECORDS)), *combinations(releases, 2)):
        swapped = list(lines)
        swapped[one], swapped[other] = lines[other], lines[one]
        assert log.verdict(swapped, newest) == "AUDIT_BROKEN"


def test_every_cut_tail_is_found_by_later_evidence_alone(log: Log) -> None:
    newest = log.bundle(RECORDS - 1)
    for length in range(1, RECORDS):
        assert log.verdict(log.lines[:length]) == "pass"  # in itself it is flawless
        assert log.verdict(log.lines[:length], newest) == "AUDIT_SHORT"
        assert log.verdict([*log.lines[:length], log.lines[length][:-1]]) == "AUDIT_TORN"


def test_a_history_chained_anew_is_found_by_evidence_from_after_the_change(log: Log) -> None:
    middle = log.bundle(RECORDS // 2)
    for number, line in enumerate(log.lines):
        record = parse_record(line)
        forged = rewritten(log.lines, number, dataclasses.replace(record, data={**record.data, "forged": 1}))
        assert log.verdict(forged) == "pass"
        assert log.verdict(forged, middle) == ("AUDIT_FORKED" if number <= RECORDS // 2 else "pass")
        assert log.verdict(forged, log.bundle(RECORDS - 1)) == "AUDIT_FORKED"


def test_a_log_without_its_beginning_says_where_it_begins(log: Log) -> None:
    for number in range(RECORDS):
        path = log.folder / "part.jsonl"
        path.write_bytes(b"".join(log.lines[number:]))
        assert main(["audit", "verify", str(path)]) == 0
        said = log.capsys.readouterr().out
        assert f"{RECORDS - number} records" in said
        assert ("from record" in said) == (number > 0)
        assert number == 0 or f"from record {number} on" in said


def test_the_agent_does_not_go_on_from_a_file_that_does_not_follow_the_one_before(log: Log) -> None:
    state = log.folder / "state"
    path = state / "audit.jsonl"
    first = sum(log.sizes[:-1])
    for lines in (log.lines[first + 1 :], rewritten(log.lines, first - 1, parse_record(log.lines[0]))[first:]):
        path.write_bytes(b"".join(lines))
        with pytest.raises(Unavailable) as caught:
            AuditLog(state, BOOT_ID, MovableClock())
        assert caught.value.slug == "AUDIT_BROKEN"
    path.write_bytes(b"".join(log.lines[first:]))
    assert AuditLog(state, BOOT_ID, MovableClock()).head == head(log.lines, RECORDS - 1)
    for kept in state.glob("audit.[0-9]*.jsonl"):  # an operator archived them
        kept.unlink()
    assert AuditLog(state, BOOT_ID, MovableClock()).head == head(log.lines, RECORDS - 1)
